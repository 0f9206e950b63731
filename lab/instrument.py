"""The measuring process, started inside a namespace: pings, asks by ARP, listens; one loop, one thread.

Run by `lab.observe`, which gives it a JSON `Settings` as its argument and one-word commands on stdin; it answers
each with a line of JSON. It ends at end of file.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lab import clock, wire

# Not in Python's socket module (include/uapi: asm-generic/socket.h, linux/if_ether.h, icmp.h, icmpv6.h).
SO_ATTACH_FILTER, SO_TIMESTAMPNS = 26, 35
ETH_P_ALL = 3
SOL_RAW, ICMP_FILTER = 255, 1
ICMP6_FILTER = 1

# A classic BPF program: incoming ARP, RARP and neighbour advertisements, and nothing else.
LOAD_WORD, LOAD_HALF, LOAD_BYTE, IF_EQUAL, RETURN = 0x20, 0x28, 0x30, 0x15, 0x06
PACKET_TYPE, PACKET_OUTGOING = 0xFFFFF004, 4
NEIGHBOUR_FRAMES = (
    (LOAD_WORD, 0, 0, PACKET_TYPE),
    (IF_EQUAL, 7, 0, PACKET_OUTGOING),  # drop
    (LOAD_HALF, 0, 0, 12),
    (IF_EQUAL, 4, 0, wire.ETH_P_ARP),  # keep
    (IF_EQUAL, 3, 0, wire.ETH_P_RARP),  # keep
    (IF_EQUAL, 0, 3, wire.ETH_P_IPV6),  # else drop
    (LOAD_BYTE, 0, 0, 54),
    (IF_EQUAL, 0, 1, wire.NEIGHBOUR_ADVERTISEMENT),  # else drop; `wire.read` looks at the rest
    (RETURN, 0, 0, 0xFFFF),
    (RETURN, 0, 0, 0),
)

PING_SECONDS = {4: 0.005, 6: 0.020}
PROBE_SECONDS = 0.050


@dataclass(frozen=True)
class Settings:
    """What to do. Empty: do not do it. `ping` maps IP version ("4", "6") to an address."""

    listen: list[str]
    ping: dict[str, str] = field(default_factory=dict)
    probe_for: str = ""
    probe_mac: str = ""
    probe_from: list[str] = field(default_factory=list)


class Ticker:
    """Calls `action` at `start`, `start + period`, …; when late it catches up, so it never drifts."""

    def __init__(self, period: float, action: Callable[[], None]) -> None:
        self.period, self.action, self.next = period, action, clock.now()

    def run_due(self, now: float) -> None:
        while self.next <= now:
            self.next += self.period
            self.action()


class Pinger:
    """Echo requests to one address over a raw socket, so that the kernel's own neighbour cache is used."""

    def __init__(self, version: int, address: str) -> None:
        family, protocol = (
            (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
        )
        self.version, self.identifier = version, os.getpid() & 0xFFFF
        self.count = 0
        self.sent: list[float] = []
        self.replied: list[tuple[int, float]] = []
        self.socket = socket.socket(family, socket.SOCK_RAW, protocol)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        # Echo replies only: everything else is filtered in the kernel.
        if version == 4:
            self.socket.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", ~(1 << wire.ICMP_ECHO_REPLY) & 0xFFFFFFFF))
        else:
            blocked = [0xFFFFFFFF] * 8
            blocked[wire.ICMP6_ECHO_REPLY // 32] &= ~(1 << wire.ICMP6_ECHO_REPLY % 32)
            self.socket.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, struct.pack("=8I", *blocked))
        self.socket.connect((address, 0))

    def send(self) -> None:
        if self.count > 0xFFFF:
            raise SystemExit("the pinger has run out of sequence numbers")
        packet = (wire.echo if self.version == 4 else wire.echo6)(self.identifier, self.count)
        self.count += 1
        self.sent.append(clock.now())
        # No neighbour, or a full queue towards one: that is an echo lost, which is what is measured.
        with contextlib.suppress(OSError):
            self.socket.send(packet)

    def receive(self) -> None:
        while (got := receive(self.socket)) is not None:
            packet, at = got
            kind = wire.ICMP6_ECHO_REPLY
            if self.version == 4:
                packet, kind = packet[(packet[0] & 0xF) * 4 :], wire.ICMP_ECHO_REPLY
            reply = wire.echo_reply(packet, kind)
            if reply is not None and reply[0] == self.identifier:
                self.replied.append((reply[1], at))


class Listener:
    """Notes what ARP, RARP and neighbour advertisement frames come in at one port."""

    def __init__(self, port: str) -> None:
        self.port = port
        self.frames: list[tuple[Any, ...]] = []
        # All ethertypes, then filtered: a bridge takes its ports' frames away before a socket for one ethertype.
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in NEIGHBOUR_FRAMES))
        fprog = struct.pack("@HP", len(NEIGHBOUR_FRAMES), ctypes.addressof(program))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)
        self.socket.bind((port, ETH_P_ALL))

    def receive(self) -> None:
        while (got := receive(self.socket)) is not None:
            frame, at = got
            seen = wire.read(frame)
            if seen is not None:
                self.frames.append((at, self.port, *dataclasses.astuple(seen)))


def receive(source: socket.socket) -> tuple[bytes, float] | None:
    """The next packet and when the kernel got it; None when none is waiting."""
    while True:
        try:
            data, ancillary, _, _ = source.recvmsg(2048, 64)
        except BlockingIOError:
            return None
        except OSError:
            continue  # an ICMP error or "host unreachable" kept for us: reading it has cleared it
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = struct.unpack("=qq", value[:16])
                return data, clock.from_realtime(seconds + nanoseconds / 1e9)
        return data, clock.now()


class Instrument:
    """All of it around one `select`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.listeners = [Listener(port) for port in settings.listen]
        self.pingers = [Pinger(int(version), address) for version, address in settings.ping.items()]
        self.tickers = [Ticker(PING_SECONDS[pinger.version], pinger.send) for pinger in self.pingers]
        self.probe_count = 0
        self.probes: list[tuple[float, str]] = []
        self.prober = Ticker(PROBE_SECONDS, self._probe)

    def _probe(self) -> None:
        sender = self.settings.probe_from[self.probe_count % len(self.settings.probe_from)]
        self.probe_count += 1
        self.probes.append((clock.now(), sender))
        frame = wire.arp_request(self.settings.probe_mac, sender, self.settings.probe_for)
        self.listeners[0].socket.send(frame)

    def news(self) -> dict[str, Any]:
        """What has happened since the last call: short, so that telling it does not hold up the pings."""
        news = {
            "sent": {str(p.version): p.sent for p in self.pingers},
            "replied": {str(p.version): p.replied for p in self.pingers},
            "probes": self.probes,
            "frames": [frame for listener in self.listeners for frame in listener.frames],
        }
        self.probes = []
        for pinger in self.pingers:
            pinger.sent, pinger.replied = [], []
        for listener in self.listeners:
            listener.frames = []
        return news

    def run(self) -> None:
        sources: list[Pinger | Listener] = [*self.pingers, *self.listeners]
        stdin = sys.stdin.fileno()
        waiting_for = [stdin, *(source.socket for source in sources)]
        while True:
            now = clock.now()
            for ticker in self.tickers:
                ticker.run_due(now)
            wait = max(0.0, min((t.next for t in self.tickers), default=now + 1.0) - clock.now())
            ready, _, _ = select.select(waiting_for, [], [], wait)
            if not ready:
                continue
            for source in sources:
                source.receive()
            if stdin in ready:
                words = os.read(stdin, 4096).decode().split()
                if not words:
                    return
                for word in words:
                    self._obey(word)

    def _obey(self, word: str) -> None:
        if word in ("probe", "quiet") and self.prober in self.tickers:
            self.tickers.remove(self.prober)
        if word == "probe":
            self.prober.next = clock.now()
            self.tickers.append(self.prober)
        print(json.dumps(self.news() if word == "news" else {}), flush=True)


def main() -> None:
    """Runs until stdin ends."""
    # An interrupt at the terminal is for the lab, which then ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A measuring process that waits for a CPU measures the CPU. It needs a few percent of one.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    instrument = Instrument(Settings(**json.loads(sys.argv[1])))
    print("{}", flush=True)
    instrument.run()


if __name__ == "__main__":
    main()
