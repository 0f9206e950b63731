"""What the network saw: starts the measuring processes, and turns their records into frozen data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.tools import CLEAN
from lab import clock, instrument, wire
from lab.errors import LabError
from lab.nodes import Namespace, Network, end

# The prober is a host of its own on the client's port, so that the answers do not freshen the client's cache.
PROBER_MAC = "02:00:00:00:00:fe"
PROBER_ADDRESSES = [f"192.0.2.{n}" for n in range(128, 192)]
NODE_AT = {"to-a": "a", "to-b": "b"}


@dataclass(frozen=True)
class Ping:
    """One echo request. Times are CLOCK_MONOTONIC seconds; `replied` is None when no reply ever came."""

    sent: float
    replied: float | None


@dataclass(frozen=True)
class Frame:
    """An ARP, RARP or NA frame that came in at `port` at a time (CLOCK_MONOTONIC seconds)."""

    at: float
    port: str
    seen: wire.Seen


@dataclass(frozen=True)
class Probe:
    """One broadcast question "who has the guest's address", and when each node first answered it.

    A node is known by the switch port its answer came in at, so that it does not matter whether the node itself
    answers (routed) or the guest that runs on it (bridged).
    """

    sent: float
    answered: Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """All that was seen from the start of the observer to the call of `Observer.record`."""

    pings: tuple[Ping, ...]
    pings6: tuple[Ping, ...]
    probes: tuple[Probe, ...]
    at_client: tuple[Frame, ...]
    at_switch: tuple[Frame, ...]


Gap = tuple[float, float]

MISSED = 5  # so many replies in a row have to be missing before that is a silence
TOGETHER = 0.1  # seconds; replies that come for less than this do not end a silence, they split it


def silence(pings: tuple[Ping, ...], resumed: float, interval: float) -> tuple[Gap, ...]:
    """The times without a reply around the guest's arrival, each as its two ends, in CLOCK_MONOTONIC seconds.

    The longest one that reaches to the arrival or comes after it, and those that belong to it: a lucky reply in the
    middle of a silence splits it and does not end it. Pings go out every `interval` seconds. What ended before
    `resumed`, and does not belong to that, does not count: QEMU holds a guest up for some 50 ms when a migration
    begins, which is neither its downtime nor the network's doing. Raises LabError when there are no replies on both
    sides of `resumed`.
    """
    replies = sorted(p.replied for p in pings if p.replied is not None)
    gaps = list(itertools.pairwise(replies))
    after = [gap for gap in gaps if gap[1] > resumed]
    if not after or replies[0] > resumed:
        raise LabError("the client has no replies from before and after the migration", "is this machine overloaded?")
    longest = max(after, key=lambda gap: gap[1] - gap[0])
    silent = [gap for gap in gaps if gap == longest or gap[1] - gap[0] > MISSED * interval]
    first = last = silent.index(longest)
    while first > 0 and silent[first][0] - silent[first - 1][1] < TOGETHER:
        first -= 1
    while last + 1 < len(silent) and silent[last + 1][0] - silent[last][1] < TOGETHER:
        last += 1
    return tuple(silent[first : last + 1])


def length(gaps: tuple[Gap, ...]) -> float:
    """All of *gaps* together, in ms."""
    return sum(end - begin for begin, end in gaps) * 1000


def contested(probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
    """The probes that two nodes answered at the same moment.

    That is: both nodes answered this one probe, and when the second of them joined in, the first one had not
    finished answering (it answers this probe or a later one after that). The second half matters for a bridged
    guest: a broadcast sent while the guest moves is delivered to both taps and waits in the target's until the
    guest runs there; the guest then answers it again, from its new place. Nobody answers at the old place any more,
    so that is a move and not a conflict.
    """
    last = {node: max((p.answered.get(node, 0.0) for p in probes), default=0.0) for node in NODE_AT.values()}
    found = []
    for probe in probes:
        if len(probe.answered) == 2:
            first, second = sorted(last, key=lambda node: (last[node], node))
            # `first` fell silent first: a conflict when `second` had answered before that.
            if probe.answered[second] <= last[first]:
                found.append(probe)
    return tuple(found)


class Observer:
    """Controls the process at the client (pings, probes, listens) and the one at the switch (listens)."""

    def __init__(self, client: subprocess.Popen[str], switch: subprocess.Popen[str]) -> None:
        self._client, self._switch = client, switch
        self._sent: dict[str, list[float]] = {"4": [], "6": []}
        self._replied: dict[str, dict[int, float]] = {"4": {}, "6": {}}
        self._probes: list[tuple[float, str]] = []
        self._frames: dict[str, list[Frame]] = {"client": [], "switch": []}

    def probe(self, on: bool) -> None:
        """Starts or stops asking "who has the guest's address" every 50 ms."""
        _ask(self._client, "probe" if on else "quiet")

    def record(self) -> Record:
        """Everything so far; the observation goes on."""
        for name, process in (("client", self._client), ("switch", self._switch)):
            news = _ask(process, "news")
            for version in news["sent"]:
                self._sent[version] += news["sent"][version]
                for sequence, at in news["replied"][version]:
                    self._replied[version].setdefault(sequence, at)
            self._probes += [(at, asker) for at, asker in news["probes"]]
            self._frames[name] += _about_guest(news["frames"])
        at_client, at_switch = (tuple(sorted(f, key=lambda f: f.at)) for f in self._frames.values())
        return Record(
            pings=self._pings("4"),
            pings6=self._pings("6"),
            probes=_match(self._probes, at_switch),
            at_client=at_client,
            at_switch=at_switch,
        )

    def _pings(self, version: str) -> tuple[Ping, ...]:
        replied = self._replied[version]
        return tuple(Ping(at, replied.get(sequence)) for sequence, at in enumerate(self._sent[version]))

    def wait(
        self, what: str, until: Callable[[Record], bool], seconds: float, meanwhile: Callable[[], None] = lambda: None
    ) -> Record:
        """Observes until a record satisfies `until`, and returns it; calls `meanwhile` now and then, which may raise.

        LabError with `what` when `seconds` pass before.
        """
        deadline = clock.now() + seconds
        while not until(record := self.record()):
            meanwhile()
            if clock.now() > deadline:
                raise LabError(f"waited {seconds:.0f} s in vain until {what}", "is this machine overloaded?")
            time.sleep(0.2)
        return record

    def wait_for_replies(
        self, since: float, seconds: float, meanwhile: Callable[[], None] = lambda: None, settled: float = 1.0
    ) -> Record:
        """Observes until the guest has answered IPv4 and IPv6 steadily for `settled` seconds after `since`.

        Steadily: of what was sent in the last `settled` seconds (but for the last 0.5), nine in ten are answered.
        """

        def steady(pings: tuple[Ping, ...], now: float) -> bool:
            recent = [p.replied is not None for p in pings if now - settled <= p.sent < now - 0.5]
            return len(recent) > 0 and sum(recent) >= 0.9 * len(recent)

        def both(record: Record) -> bool:
            now = clock.now()
            return now - settled >= since and steady(record.pings, now) and steady(record.pings6, now)

        return self.wait("the guest answers the client steadily", both, seconds, meanwhile)


@contextlib.contextmanager
def observer(net: Network) -> Iterator[Observer]:
    """Observes until the block ends: pings the guest from the client and listens there and at the nodes' ports."""
    at_client = instrument.Settings(
        listen=["eth0"],
        ping={"4": GUEST_IP4, "6": GUEST_IP6},
        probe_for=GUEST_IP4,
        probe_mac=PROBER_MAC,
        probe_from=PROBER_ADDRESSES,
    )
    with (
        _process(net.switch, instrument.Settings(listen=list(NODE_AT))) as switch,
        _process(net.client, at_client) as client,
    ):
        yield Observer(client, switch)


@contextlib.contextmanager
def _process(inside: Namespace, settings: instrument.Settings) -> Iterator[subprocess.Popen[str]]:
    repository = Path(__file__).resolve().parents[1]
    argv = [sys.executable, "-m", "lab.instrument", json.dumps(dataclasses.asdict(settings))]
    env = {**CLEAN, "PYTHONPATH": str(repository)}
    started = inside.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    try:
        _answer(started)
        yield started
    finally:
        end(started)
        for pipe in (started.stdin, started.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _ask(process: subprocess.Popen[str], word: str) -> dict[str, Any]:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # _answer says so in words
        process.stdin.write(word + "\n")
        process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise LabError("a measuring process has ended by itself", "its own words are above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _about_guest(raw: list[list[Any]]) -> list[Frame]:
    frames = [Frame(at, port, wire.Seen(*seen)) for at, port, *seen in raw]
    return [f for f in frames if f.seen.address in (GUEST_IP4, GUEST_IP6) or f.seen.mac == GUEST_MAC]


def _match(raw: list[tuple[float, str]], at_switch: tuple[Frame, ...]) -> tuple[Probe, ...]:
    """Joins probes and answers: an answer goes back to the address from which it was asked.

    The addresses are used in turn, and each again only after 3.2 s; then an answer belongs to the latest question.
    """
    asked: dict[str, list[int]] = {}
    for number, (_, asker) in enumerate(raw):
        asked.setdefault(asker, []).append(number)
    answered: list[dict[str, float]] = [{} for _ in raw]
    for frame in at_switch:
        if frame.seen.kind == "arp-reply" and frame.seen.address == GUEST_IP4:
            before = [number for number in asked.get(frame.seen.asker, []) if raw[number][0] <= frame.at]
            if before:
                answered[before[-1]].setdefault(NODE_AT[frame.port], frame.at)
    return tuple(Probe(sent, found) for (sent, _), found in zip(raw, answered, strict=True))
