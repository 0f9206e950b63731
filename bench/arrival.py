"""From a guest's first frame to its announcement at the client: `python -m bench.arrival [--runs N] [--out DIR]`.

A node and a client in namespaces of their own. The guest's first frame, a RARP like QEMU's, is written into the tap;
the time is from there to the first gratuitous ARP, or unsolicited NA, that the client gets. Beside it, what a manager
gets that knows of the arrival at the same moment and runs kvm-ifup-post, with no agent. And a node that takes over all
guests of another one: many, each with both families, arrive within two seconds.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from bench import picture, results
from harness import agents, guests, hooks, manager, nodes, tools, wire
from harness.addresses import GUEST_IP4, GUEST_IP6, NODE_MAC
from harness.nodes import Node
from lab import clock, instrument
from lab.agent import scheduled
from lab.errors import LabError

MANY, WITHIN = 200, 2.0  # guests of a node that is evacuated, and the seconds in which they come
BUFFER, SO_RCVBUFFORCE = 1 << 24, 33  # bytes for all that the client hears meanwhile; asm-generic/socket.h
PATIENCE = 60.0  # seconds for all of them; this only turns a hang into a failure
PAUSE = 1.2  # seconds after which nothing of an arrival goes on any more: announcements, the second look
FAMILIES = {"IPv4": GUEST_IP4, "IPv6": GUEST_IP6}


def announced(frame: bytes) -> bool:
    """Whether *frame* says that the guest is at the node."""
    arp, na = wire.arp(frame), wire.advertisement(frame)
    return bool(
        (arp and (arp.sender, arp.mac) == (GUEST_IP4, NODE_MAC))
        or (na and (na.target, na.mac, na.override) == (GUEST_IP6, NODE_MAC, True))
    )


def arrival(
    node: Node, number: int, address: str, begin: Callable[[wire.Tap, str], None], agent: agents.Agent | None
) -> float:
    """One incoming guest on a new tap: ms from *begin* to the client's knowing."""
    tap = f"tap{number}"
    guest = node.guest(tap)
    manager.write_nic(tap, mode="routed", ip=[address], incoming=True)
    hooks.check(hooks.hook("kvm-ifup-pre", tap), 0)
    if agent:
        agent.armed(tap)
    time.sleep(0.2)  # until nothing of it goes on any more
    client = node.listen()
    start = time.perf_counter()
    begin(guest, tap)
    client.until(announced)
    taken = (time.perf_counter() - start) * 1000
    time.sleep(PAUSE)
    tools.ip(f"link del {tap}")
    hooks.hook("kvm-ifdown", tap)
    guest.close()
    client.close()
    return taken


def first_frame(guest: wire.Tap, _tap: str) -> None:
    """The guest sends; the agent hears it."""
    guest.send(guests.rarp())


def by_manager(_guest: wire.Tap, tap: str) -> None:
    """The manager runs post."""
    hooks.start("kvm-ifup-post", tap)


def evacuation(node: Node, agent: agents.Agent) -> dict[str, list[float]]:
    """ms from each guest's first frame to its announcement at the client, by family, in the order in which they come.

    Both times are the kernel's: when the frame is written into the tap, and when the client's device has the other.
    """
    macs = [f"aa:00:00:00:01:{number:02x}" for number in range(MANY)]
    places = [(f"198.51.100.{number + 1}", f"2001:db8::1:{number + 1:x}") for number in range(MANY)]
    taps = [node.guest(f"tap{number}") for number in range(MANY)]
    for number, (mac, ips) in enumerate(zip(macs, places, strict=True)):
        name = f"tap{number}"
        manager.write_nic(name, f"web{number}", mode="routed", ip=list(ips), mac=mac, incoming=True)
        hooks.check(hooks.hook("kvm-ifup-pre", name), 0)
    for number in range(MANY):
        agent.armed(f"tap{number}")
    time.sleep(PAUSE)  # until all is prepared
    with node.client:
        client = wire.packet_socket("eth0")
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, instrument.SO_TIMESTAMPNS, 1)
    client.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    begin, sent = clock.now(), []
    for number, (tap, mac) in enumerate(zip(taps, macs, strict=True)):
        time.sleep(max(0.0, begin + number * WITHIN / MANY - clock.now()))
        sent.append(clock.now())
        tap.send(guests.rarp(mac))
    missing = {address for ips in places for address in ips}
    heard: dict[str, float] = {}
    while missing:
        if got := instrument.receive(client):
            frame, at = got
            heard |= {address: at for address in announces(frame) if address in missing}
            missing -= heard.keys()
        elif clock.now() > begin + PATIENCE:
            raise LabError(f"{len(missing)} addresses were never announced", "is this machine overloaded?")
        else:
            time.sleep(0.05)
    client.close()
    return {
        f"{family}, agent, {MANY} in {WITHIN:g} s": [
            (heard[ips[which]] - at) * 1000 for ips, at in zip(places, sent, strict=True)
        ]
        for which, family in enumerate(FAMILIES)
    }


def announces(frame: bytes) -> list[str]:
    """The addresses that *frame* says are at the node."""
    arp, na = wire.arp(frame), wire.advertisement(frame)
    told = [arp.sender] if arp and arp.sender == arp.target and arp.mac == NODE_MAC else []
    return [*told, na.target] if na and na.mac == NODE_MAC else told


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    options = results.parser("arrival", __doc__, runs=20).parse_args(argv)
    rows: dict[str, list[float]] = {}
    for family, address in FAMILIES.items():
        for label, begin in ((f"{family}, agent", first_frame), (f"{family}, kvm-ifup-post", by_manager)):
            with nodes.fresh_node() as node:
                node.uplink()
                heard = begin is first_frame
                runs = options.runs if heard else max(options.runs // 5, 3)
                with agents.running(within=scheduled()) if heard else contextlib.nullcontext() as agent:
                    rows[label] = [arrival(node, number, address, begin, agent) for number in range(runs)]
    with nodes.fresh_node() as node:
        node.uplink()
        with agents.running(within=scheduled()) as one:
            many = evacuation(node, one)
    rows |= many
    print(picture.table("ms", rows, "IPv4, kvm-ifup-post"))
    for label, values in many.items():
        late = statistics.quantiles(values, n=100)[-1]
        print(
            f"{label}: 99th percentile {late:.2f} ms, median of the last ten {statistics.median(values[-10:]):.2f} ms"
        )
    results.write(options.json, rows)
    title = "From the guest's first frame (or the manager's call) to the announcement at the client"
    for path in picture.save("bench-arrival", title, "ms", rows, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
