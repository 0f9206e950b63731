"""The agent as the tests run it, and what it hears: a guest on a tap, announcements on the uplink."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import itertools
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import netns, wire
from tests.netns import GUEST_IP4, GUEST_IP6, GUEST_MAC, Node, hook

IPS = [GUEST_IP4, GUEST_IP6]
SOCKET = netns.RUN_DIR / "agent.sock"
STATE = netns.RUN_DIR / "state"
CONFIGURATION = Path("/etc/kvm-ifup")
FOREIGN_MAC = "02:00:00:00:00:0b"  # of another node
_numbers = itertools.count()


class Agent:
    """A running kvm-ifupd; *more* goes to Popen."""

    def __init__(self, *argv: str, environ: Mapping[str, str] | None = None, **more: Any) -> None:
        self.log = Path(f"/run/agent.{next(_numbers)}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                netns.command("kvm-ifupd", *argv),
                env={**netns.CLEAN, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **more,
            )

    def ready(self) -> Agent:
        """Once it is."""
        until(lambda: "ready" in self.said() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        return self

    def said(self) -> str:
        """All that it has said."""
        return self.log.read_text()

    def heard(self, *words: str) -> None:
        """Wait until it says *words*, in one line."""
        until(lambda: any(all(word in line for word in words) for line in self.said().splitlines()))

    def armings(self, tap: str = "tap0") -> int:
        """How often it has said that it is armed."""
        return self.said().count(f"{tap}): armed")

    def armed(self, tap: str = "tap0", times: int = 1) -> None:
        """Wait until it has said so."""
        until(lambda: self.armings(tap) >= times)

    def holds(self, path: Path) -> bool:
        """Whether it has *path* open, such as a lock that it waits for."""
        found = []
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(descriptor.readlink())
        return path in found

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it, and wait until it has."""
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(number)
        return self.process.wait(netns.PATIENCE)


def until(true: Callable[[], object], patience: float = 40.0) -> None:
    """Wait for something that takes a moment."""
    end = time.monotonic() + patience
    while not true():
        if time.monotonic() > end:
            logs = sorted(Path("/run").glob("agent.*.log"), key=lambda path: path.stat().st_mtime)
            said = "".join(f"{path}:\n{path.read_text()}" for path in logs)
            pytest.fail(f"what was waited for does not happen; the agents said: {said}")
        time.sleep(0.005)


@contextlib.contextmanager
def running(*argv: str, **more: Any) -> Iterator[Agent]:
    """An agent that ends with the block, if not before."""
    agent = Agent(*argv, **more)
    try:
        yield agent.ready()
    finally:
        agent.end()


@contextlib.contextmanager
def configured(**sections: dict[str, object]) -> Iterator[Path]:
    """An /etc/kvm-ifup that only this test sees, with these sections and nothing else."""
    with netns.private_etc():
        for path in sorted(CONFIGURATION.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        CONFIGURATION.mkdir(exist_ok=True)
        configure(**sections)
        yield CONFIGURATION


def configure(**sections: dict[str, object]) -> None:
    """Write the node's configuration anew."""
    lines = []
    for name, section in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    (CONFIGURATION / "config.toml").write_text("\n".join(lines) + "\n")


def through(program: str, *argv: str, environ: Mapping[str, str] | None = None) -> netns.Result:
    """Run a hook and see that the agent did it."""
    result = hook(program, *argv, "-v", environ=environ)
    assert result.code == 0, result.err
    assert "without the agent" not in result.err
    return result


def journal(tap: str = "tap0") -> dict[str, Any] | None:
    """The journal's file."""
    try:
        found: dict[str, Any] = json.loads((STATE / f"{tap}.json").read_text())
    except FileNotFoundError:
        return None
    return found


def phase(tap: str = "tap0") -> str | None:
    """The phase that the journal tells, None without one; "…" while a run is at work."""
    found = journal(tap)
    return str("…" if found["pending"] else found["phase"]) if found else None


def wired() -> tuple[set[str], set[str]]:
    """The addresses that the node answers for, and the routes to tap0: what only post may bring."""
    return netns.proxies(), netns.routes("tap0")


NOT_WIRED: tuple[set[str], set[str]] = (set(), set())
WIRED = (set(IPS), set(IPS))


# --- the guest ------------------------------------------------------------------------------------------


def rarp(mac: str = GUEST_MAC) -> bytes:
    """QEMU's announcement at the end of a migration."""
    sender = wire.mac_bytes(mac)
    body = struct.pack("!HHBBH6s4x6s4x", 1, 0x0800, 6, 4, 3, sender, sender)
    return wire.ethernet(wire.BROADCAST, mac, 0x8035, body.ljust(46, b"\0"))


def udp4(mac: str = GUEST_MAC) -> bytes:
    """An IPv4 datagram of a guest's."""
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, bytes([192, 0, 2, 8]), bytes([192, 0, 2, 1]))
    return wire.ethernet(netns.TAP_MAC, mac, wire.ETH_P_IP, header + struct.pack("!HHHH", 1024, 9, 8, 0))


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
    netns.write_nic(tap, **values)
    if agent:
        before = agent.armings(tap)
        through("kvm-ifup-pre", tap)
        agent.armed(tap, before + 1)
    else:
        netns.check(hook("kvm-ifup-pre", tap), 0)
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
    assert netns.routes(tap) == {address}
    netns.check(hook("kvm-ifdown", tap), 0)
    until(lambda: phase(tap) is None)
    netns.ip(f"link del {tap}")


@contextlib.contextmanager
def answering(guest: wire.Tap, mac: str = GUEST_MAC) -> Iterator[None]:
    """A guest that answers whoever asks for its MAC: a process of its own, and as soon as it can."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):  # nobody may do so in a user namespace; it is for a node that is busy
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        try:
            while True:
                frame = os.read(guest.descriptor, 65536)
                question = wire.arp(frame)
                if question and question.op == 1:
                    assert question.sender == "0.0.0.0"  # a probe changes no cache
                    guest.send(wire.arp_request(mac, question.target, question.target))
                elif frame[12:14] == b"\x86\xdd" and frame[54:55] == b"\x87":
                    source = ":".join(f"{frame[at]:02x}{frame[at + 1]:02x}" for at in range(62, 78, 2))
                    guest.send(advert(mac, source))
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- the wire -------------------------------------------------------------------------------------------


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
    """Those of *frames* that claim *address*."""
    return [
        frame
        for frame in frames
        if ((one := wire.arp(frame)) and one.sender == address)
        or ((na := wire.advertisement(frame)) and na.target == address)
    ]


def rounds_of(*addresses: str, rounds: int = 5) -> Callable[[bytes], bool]:
    """For `Wire.until`: so many announcements of each of *addresses* have come."""
    seen: list[bytes] = []

    def complete(frame: bytes) -> bool:
        seen.append(frame)
        return all(len(announcements(seen, address)) >= rounds for address in addresses)

    return complete


# --- locks ----------------------------------------------------------------------------------------------


def lock_file(tap: str) -> Path:
    """The file of a tap's lock."""
    return netns.RUN_DIR / "lock" / f"tap.{tap}"


@contextlib.contextmanager
def locked(tap: str) -> Iterator[None]:
    """Somebody works on *tap*."""
    lock_file(tap).parent.mkdir(parents=True, exist_ok=True)
    with lock_file(tap).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
