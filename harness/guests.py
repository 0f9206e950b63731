"""Guests that are on their way, arrive, answer and leave; and what they and others announce."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from harness import hooks, manager, oracle, tools, wire
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, IPS, TAP_MAC
from harness.agents import Agent, phase, through, until
from harness.nodes import Node

_numbers = itertools.count()


def rarp(mac: str = GUEST_MAC) -> bytes:
    """QEMU's announcement at the end of a migration."""
    sender = wire.mac_bytes(mac)
    body = struct.pack("!HHBBH6s4x6s4x", 1, 0x0800, 6, 4, 3, sender, sender)
    return wire.ethernet(wire.BROADCAST, mac, 0x8035, body.ljust(46, b"\0"))


def udp4(mac: str = GUEST_MAC) -> bytes:
    """An IPv4 datagram of a guest's."""
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, bytes([192, 0, 2, 8]), bytes([192, 0, 2, 1]))
    return wire.ethernet(TAP_MAC, mac, wire.ETH_P_IP, header + struct.pack("!HHHH", 1024, 9, 8, 0))


def packet(source: str, hops: int = 64, mac: str = GUEST_MAC) -> bytes:
    """A packet that a guest sends from *source* through its node, or with fewer *hops* passes on."""
    if ":" in source:
        return wire.icmp6(TAP_MAC, mac, source, "2001:db8::1", struct.pack("!BBHHH", 128, 0, 0, 7, 1), hops)
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, hops, 17, 0, socket.inet_aton(source), bytes([192, 0, 2, 1])
    )
    checked = header[:10] + struct.pack("!H", 0xFFFF - wire.ones_sum(header)) + header[12:]
    return wire.ethernet(TAP_MAC, mac, wire.ETH_P_IP, checked + struct.pack("!HHHH", 1024, 9, 8, 0))


FRAMES = {
    "RARP": rarp(),
    "ARP": wire.arp_request(GUEST_MAC, GUEST_IP4, GUEST_IP4),
    "IPv4": udp4(),
    "IPv6": wire.solicitation(GUEST_MAC, GUEST_IP6, "fe80::1"),
}


def incoming(node: Node, agent: Agent | None = None, tap: str = "tap0", **nic: Any) -> wire.Tap:
    """A guest that is on its way here: pre is done, and if there is an agent, through it, and it is armed."""
    guest = node.guest(tap)
    values = {"mode": "routed", "ip": IPS, "incoming": True, "instance": f"{tap}.example.com", **nic}
    manager.write_nic(tap, **values)
    if agent:
        before = agent.armings(tap)
        through("kvm-ifup-pre", tap)
        agent.armed(tap, before + 1)
    else:
        hooks.check(hooks.hook("kvm-ifup-pre", tap), 0)
    return guest


def arrived(node: Node, agent: Agent, tap: str = "tap0", **nic: Any) -> wire.Tap:
    """A guest that has arrived here, and whose announcements are over."""
    guest = incoming(node, agent, tap, **nic)
    client = node.listen()
    guest.send(rarp(str(nic.get("mac", GUEST_MAC))))
    client.until(rounds_of(*[str(one) for one in nic.get("ip", IPS)]))
    until(lambda: phase(tap) == "post")
    return guest


def witness(node: Node, agent: Agent) -> None:
    """Let another guest arrive. What the agent had to do with what it heard before is done by then."""
    number = next(_numbers) % 100
    tap, address = f"tapw{number}", f"192.0.2.{100 + number}"
    guest = incoming(node, agent, tap, ip=[address], mac=f"aa:00:00:00:01:{number:02x}")
    guest.send(rarp(f"aa:00:00:00:01:{number:02x}"))
    until(lambda: phase(tap) == "post")
    assert oracle.routes(tap) == {address}
    hooks.check(hooks.hook("kvm-ifdown", tap), 0)
    until(lambda: phase(tap) is None)
    tools.ip(f"link del {tap}")


@contextlib.contextmanager
def answering(
    guest: wire.Tap,
    mac: str = GUEST_MAC,
    *,
    delay: float = 0.0,
    late: float = 0.0,
    deaf: float = 0.0,
    only: Collection[str] | None = None,
    times: int | None = None,
) -> Iterator[None]:
    """A guest that answers whoever asks for its MAC: a process of its own, and as soon as it can.

    Or only *delay* seconds later, and the machine takes nothing meanwhile; or *late* seconds later, though the machine
    takes everything at once; or not to what it is asked in the first *deaf* seconds, or only for *only* these
    addresses, or only so many *times*.
    """
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):  # nobody may do so in a user namespace; it is for a node that is busy
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        try:
            os.write(tell, b"!")
            begun: float | None = None
            waiting: list[tuple[float, bytes]] = []
            while times is None or times > 0:
                while waiting and not wire.readable(guest.descriptor, max(0.0, waiting[0][0] - time.monotonic())):
                    guest.send(waiting.pop(0)[1])
                frame = os.read(guest.descriptor, 65536)
                question = wire.arp(frame)
                if question and question.op == 1:
                    assert question.sender == "0.0.0.0"  # a probe changes no cache
                    address, answer = question.target, wire.arp_request(mac, question.target, question.target)
                elif frame[12:14] == b"\x86\xdd" and frame[54:55] == b"\x87":
                    address = str(ipaddress.IPv6Address(frame[62:78]))
                    answer = advert(mac, address)
                else:
                    continue
                begun = begun or time.monotonic()
                if time.monotonic() - begun >= deaf and (only is None or address in only):
                    if late:
                        waiting.append((time.monotonic() + late, answer))
                        continue
                    time.sleep(delay)
                    guest.send(answer)
                    times = times and times - 1
        finally:
            os._exit(0)
    os.close(tell)
    try:
        os.read(ready, 1)  # a busy machine may take longer to start it than the agent waits for an answer
        yield
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def garp(mac: str = FOREIGN_MAC, address: str = GUEST_IP4) -> bytes:
    """*address* is at *mac* now."""
    return wire.arp_request(mac, address, address)


def withdraw(client: wire.Wire) -> None:
    """Let another node announce the guest, until it is withdrawn here."""

    def told() -> bool:
        client.send(garp())
        return phase() == "pre"

    until(told)


def advert(mac: str = FOREIGN_MAC, address: str = GUEST_IP6, *, override: bool = True, to: str = "ff02::1") -> bytes:
    """The same for IPv6: an unsolicited neighbour advertisement."""
    target = ipaddress.IPv6Address(address).packed
    body = struct.pack("!BBHI16sBB6s", 136, 0, 0, 0x20000000 * override, target, 2, 1, wire.mac_bytes(mac))
    return wire.icmp6("33:33:00:00:00:01", mac, "fe80::b", to, body)


def announcements(frames: Sequence[bytes], address: str) -> list[bytes]:
    """Those of *frames* that announce *address*; a question to the gateway in the guest's name is none."""
    return [
        frame
        for frame in frames
        if ((one := wire.arp(frame)) and one.sender == one.target == address)
        or ((na := wire.advertisement(frame)) and na.target == address)
    ]


def rounds_of(*addresses: str, rounds: int = 5) -> Callable[[bytes], bool]:
    """For `Wire.until`: so many announcements of each of *addresses* have come."""
    seen: list[bytes] = []

    def complete(frame: bytes) -> bool:
        seen.append(frame)
        return all(len(announcements(seen, address)) >= rounds for address in addresses)

    return complete
