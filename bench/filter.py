"""What a filter costs a frame on a bridge, and a hook: `python -m bench.filter [--runs N] [--out DIR]`.

Each bridge is in a network namespace of its own; they are all there at once, and take turns. A guest sends UDP to a
neighbour behind the uplink, and what arrives there is counted. With one NIC on the bridge, and with 500; beside it, the
same tests as a base chain for each NIC, which is what other managers make.

The time is the processor's, in which the kernel brings a frame from the tap to the uplink: so what else the machine
does makes no difference.

Then what a hook takes with the agent, without a filter and with one, among 2 NICs that have one and among 500: the
processor's time of the agent, in which the work is done, with what it hears of it afterwards.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench import picture, results
from harness import agents, hooks, manager, nodes, tools
from harness.addresses import CLIENT_IP4, CLIENT_MAC
from harness.wire import ETH_P_IP, attach, ethernet
from lab.agent import scheduled

CROWD = 500
HOOK_CROWDS = (2, CROWD)
HOOKS = {"post": "kvm-ifup-post", "once more": "kvm-ifup-post", "kvm-ifdown": "kvm-ifdown"}
QUIET = 0.05  # seconds without work, after which the agent has done all
FRAMES = 10_000  # of one run
NONE, CHAINS = "no filter", "a base chain for each NIC"
KINDS = {NONE: "off", "mac": "mac", "address": "address", CHAINS: "off"}


def mac(number: int) -> str:
    """The MAC of a guest."""
    return f"aa:00:00:36:{number >> 8:02x}:{number & 255:02x}"


def address(number: int) -> str:
    """Its address."""
    return f"198.18.{number >> 8}.{number & 255}"


def chains(count: int) -> str:
    """A table in which each NIC has a base chain of its own, for nft."""
    lines = ["table bridge each {"]
    for number in range(count):
        tap = f'iifname "tap{number}"'
        lines += [
            f"chain in{number} {{ type filter hook prerouting priority -300; policy accept;",
            f"{tap} ether saddr != {mac(number)} drop",
            f"{tap} arp saddr ether != {mac(number)} drop",
            f"{tap} arp saddr ip != {address(number)} drop",
            f"{tap} ip saddr != {address(number)} drop",
            f"{tap} meta protocol != {{ arp, ip, 0x8035 }} drop",
            "}",
        ]
    return "\n".join([*lines, "}"])


def datagram(number: int) -> bytes:
    """A UDP datagram of a guest, as small as can be."""
    source, target = socket.inet_aton(address(number)), socket.inet_aton(CLIENT_IP4)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, source, target)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:]
    return ethernet(CLIENT_MAC, mac(number), ETH_P_IP, header + struct.pack("!HHHH", 9, 9, 8, 0) + bytes(18))


@dataclass
class Bridge:
    """One bridge with its guests; the last of them sends through *descriptor*."""

    node: nodes.Node
    descriptor: int
    frame: bytes

    def arrived(self) -> int:
        """The frames that have come out at the other end of the uplink."""
        with self.node.client:
            (found,) = tools.ask("-s link show dev eth0")
        return int(found["stats64"]["rx"]["packets"])

    def rate(self) -> float:
        """Thousands of frames per second of one core, of which not one may be lost."""
        before, descriptor, frame, send = self.arrived(), self.descriptor, self.frame, os.write
        started = time.thread_time()
        for _ in range(FRAMES):
            send(descriptor, frame)
        taken = time.thread_time() - started
        assert self.arrived() - before >= FRAMES
        return FRAMES / taken / 1000


@contextlib.contextmanager
def bridge(kind: str, count: int) -> Iterator[Bridge]:
    """A bridge with *count* guests, each with a filter of *kind*."""
    with nodes.fresh_node() as node:
        nodes.add_bridge()
        node.uplink(master="br0")
        tools.run("bridge", "fdb", "replace", CLIENT_MAC, "dev", "eth0", "master", "static")
        batch = "".join(f"tuntap add tap{number} mode tap\n" for number in range(count))
        subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
        last = count - 1
        guest = attach(f"tap{last}")
        node.taps.append(guest)
        for number in range(count):
            keys: dict[str, Any] = {"mode": "bridged", "link": "br0", "mac": mac(number), "ip": [address(number)]}
            manager.write_nic(f"tap{number}", "web", number, **keys, filter=KINDS[kind])
        hooks.check(hooks.call("kvm-ifup-post", "--instance", "web"), 0)
        if kind == CHAINS:
            subprocess.run(["nft", "-f", "-"], input=chains(count), text=True, check=True)
        yield Bridge(node, guest.descriptor, datagram(last))


def crowd(count: int) -> None:
    """NICs with a filter, all wired by one hook."""
    batch = "".join(f"tuntap add tap{number} mode tap\n" for number in range(count))
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
    for number in range(count):
        keys: dict[str, Any] = {"mode": "bridged", "link": "br0", "mac": mac(number), "ip": [address(number)]}
        manager.write_nic(f"tap{number}", "web", number, **keys, filter="address")
    hooks.check(hooks.hook("kvm-ifup-post", "--instance", "web"), 0)


def hook_costs(runs: int) -> dict[str, list[float]]:
    """Milliseconds of the agent's processor time for each hook of a new NIC, with a filter and without."""
    rows: dict[str, list[float]] = {}
    for count in HOOK_CROWDS:
        with nodes.fresh_node() as node, agents.running(within=scheduled()) as agent:
            nodes.add_bridge()
            node.uplink(master="br0")
            crowd(count)
            for number in range(CROWD, CROWD + 2 * runs):
                how = "address" if number % 2 else "off"
                tap = f"tap{number}"
                keys: dict[str, Any] = {"mac": mac(number), "ip": [address(number)], "filter": how}
                nodes.add_tap(tap)
                manager.write_nic(tap, f"web{number}", mode="bridged", link="br0", **keys)
                settled(agent)
                for what, program in HOOKS.items():
                    before = agent.taken()
                    agents.through(program, tap)
                    settled(agent)
                    rows.setdefault(f"{what}, {how}, among {count} NICs", []).append(agent.taken() - before)
                tools.ip(f"link del {tap}")
    return rows


def settled(agent: agents.Agent) -> None:
    """Wait until the agent has nothing left to do."""
    before = -1.0
    while (now := agent.taken()) != before:
        before = now
        time.sleep(QUIET)


def more(rows: dict[str, list[float]]) -> Iterator[str]:
    """What a filter adds to each hook, by the medians."""
    for count in HOOK_CROWDS:
        for what in HOOKS:
            on, off = (statistics.median(rows[f"{what}, {how}, among {count} NICs"]) for how in ("address", "off"))
            yield f"{what} among {count} NICs: {on - off:+.2f} ms with a filter"


def labels() -> dict[str, tuple[str, int]]:
    """What is compared: a kind, and how many NICs."""
    return {f"{kind}, {count} NIC{'s' if count > 1 else ''}": (kind, count) for kind in KINDS for count in (1, CROWD)}


def measure(runs: int) -> dict[str, list[float]]:
    """Every kind, with one NIC and with many, in turn."""
    with contextlib.ExitStack() as stack:
        bridges = {label: stack.enter_context(bridge(*which)) for label, which in labels().items()}
        rows: dict[str, list[float]] = {label: [] for label in bridges}
        for run in range(runs):
            for label in [*bridges][:: 1 if run % 2 else -1]:
                rows[label].append(bridges[label].rate())
    return rows


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    options = results.parser("filter", __doc__, runs=10).parse_args(argv)
    rows = measure(options.runs)
    costs = hook_costs(options.runs)
    results.write(options.json, {**{f"{label}, 1000/s": values for label, values in rows.items()}, **costs})
    print(picture.table("1000/s", rows, f"{NONE}, 1 NIC"))
    print(picture.table("ms", costs, next(iter(costs))))
    print("\n".join(more(costs)))
    title = "Frames per second through a bridge, by the filter of its guests"
    note = "small UDP datagrams, per second of one core, from the guest's tap to the uplink"
    for path in picture.save("bench-filter", title, "thousand/s", rows, options.out, note):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
