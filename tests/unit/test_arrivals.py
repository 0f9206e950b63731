"""A guest that is waited for: what is prepared and when again, its first frame, and a failure. Runs are stand-ins."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from kvmifup.agent import announcements, arrivals, late, preparing
from kvmifup.agent.announcements import Announcements
from kvmifup.agent.answers import Answers
from kvmifup.agent.arrivals import Arrivals
from kvmifup.agent.events import ANYTHING, Thing
from kvmifup.agent.loop import Loop, Settling
from kvmifup.agent.preparing import Preparations
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import State, TapRecord, Taps
from kvmifup.core.errors import KvmIfupError, LockTimeoutError, NotReadyError
from kvmifup.core.model import AgentConfig, Config, Message, Nic, Phase
from kvmifup.core.ops import Announce
from kvmifup.node import announce, frames, sockets
from kvmifup.node.messages import mac_bytes
from kvmifup.runs import clock
from kvmifup.runs.apply import Change
from kvmifup.runs.arriving import PreparedArrival
from kvmifup.runs.index import Stamp
from kvmifup.runs.journal import Journal
from kvmifup.runs.outcome import Outcome

from .samples import DUAL, HERE, MAC, ROUTED, into

FRAME = bytes.fromhex("ff" * 6 + MAC.replace(":", "") + "8035") + bytes(46)
NOTHING: frozenset[Thing] = frozenset({("device", 99)})
EVERYTHING = frozenset({ANYTHING})
OUTCOME = Outcome(ROUTED.label, ROUTED, "tap0", Phase.POST)


class Prepared(PreparedArrival):
    """A post that is prepared, and relies on eth0, whose index is 2."""

    def __init__(self, *, waits: bool = False) -> None:
        vars(self).update(devices=(("eth0", 2),), slow=waits)

    @property
    def waits(self) -> bool:
        """Whether it can take long."""
        return cast(bool, vars(self)["slow"])


class Finishing:
    """As `Arriving`: a guest that is wired, and whose journal does not say so yet."""

    def __init__(self, waiting: Waiting, outcome: Outcome) -> None:
        self.outcome = outcome
        self.journal = Journal(ROUTED, 7, Phase.POST, namespace=HERE)
        self._waiting = waiting

    def finish(self) -> Stamp:
        """As `Arriving`."""
        self._waiting.calls.append(("finish", threading.current_thread() is threading.main_thread()))
        if self._waiting.cannot_finish:
            raise self._waiting.cannot_finish
        return (2,)


@dataclass
class Waiting:
    """A tap that is armed, and stand-ins for the runs: what each of them is to return or raise, in turn."""

    loop: Loop
    runner: Runner
    said: list[str]
    preparations: list[PreparedArrival | KvmIfupError | None] = field(default_factory=list)
    arrivals: list[Outcome | KvmIfupError | None] = field(default_factory=list)
    posts: list[Outcome | KvmIfupError | None] = field(default_factory=list)
    calls: list[tuple[str, bool]] = field(default_factory=list)  # what was run, and whether in the loop's thread
    while_preparing: Callable[[], None] = lambda: None
    while_arriving: Callable[[], object] = lambda: None
    cannot_finish: KvmIfupError | None = None

    def __post_init__(self) -> None:
        self.ours, self.guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.looked_again_at: list[TapRecord] = []
        self.written_journals: list[tuple[Journal, Stamp]] = []
        self.tap = TapRecord(self.loop, Journal(ROUTED, 7, Phase.PRE, namespace=HERE), (1,))
        self.settling = Settling(self.loop, 0.01, lambda _: self.preparing.anew())
        announcer = Announcements(self.loop, self.runner)
        taps = cast(Taps, self)
        self.preparing = Preparations(self.loop, self.runner, taps, self.settling.stir)
        self.room = Arrivals(
            self.loop,
            self.runner,
            taps,
            announcer,
            self.preparing,
            listen=lambda _: None,
            came_back=lambda _: None,
            catch_up=lambda: None,
        )

    def __iter__(self) -> Iterator[TapRecord]:
        return iter([self.tap])

    def look_again_at(self, tap: TapRecord) -> None:
        """As `Taps`."""
        self.looked_again_at.append(tap)
        tap.become(State.OVER)

    def named(self, names: list[str]) -> list[TapRecord]:
        """As `Taps`."""
        return [self.tap] if self.tap.name in names else []

    def written(self, journal: Journal, stamp: Stamp) -> None:
        """As `Taps`."""
        self.written_journals.append((journal, stamp))

    def arrive(self, prepared: object, session: object) -> Any:
        """As `arriving.arrive`: it is announced, and then finished."""
        outcome = self.next("arrive", self.arrivals)
        self.while_arriving()
        return outcome and Finishing(self, outcome)

    def next(self, what: str, results: list[Any]) -> Any:
        """Do *what*."""
        self.calls.append((what, threading.current_thread() is threading.main_thread()))
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def prepare_arrival(self, _tap: str, _session: object) -> Any:
        """As `moves.prepare_arrival`."""
        self.while_preparing()
        return self.next("prepare", self.preparations)

    def arm(self) -> None:
        """Listen, and begin to wait."""
        self.tap.arm(self.ours)
        self.room.wait_for(self.tap)

    def hear(self, outcome: Outcome | KvmIfupError) -> None:
        """Prepare, and have the guest send a frame; *outcome* is of what is done then."""
        self.preparations.append(Prepared())
        self.arrivals.append(outcome)
        self.arm()
        self.run_until(State.READY)
        self.guest.send(FRAME)

    def until(self, true: Callable[[], object]) -> None:
        """Run the loop until something is so."""

        def look() -> None:
            if true() and not self.loop.working:
                self.loop.stop()
            else:
                self.loop.later(0.001, look)

        alarm = self.loop.later(30, lambda: pytest.fail(f"{self.tap.state}, {self.calls}, {self.said}"))
        self.loop.later(0, look)
        self.loop._running = True
        self.loop.run()
        alarm.cancel()

    def run_until(self, state: State) -> None:
        """Run the loop until the tap is in *state*."""
        self.until(lambda: self.tap.state is state)

    def pass_time(self, seconds: float) -> None:
        """Run the loop for so long."""
        self.loop.later(seconds, self.loop.stop)
        self.loop._running = True
        self.loop.run()


@pytest.fixture
def waiting(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    """A tap whose guest will be waited for, for an hour. All delays are short."""
    said: list[str] = []
    runner = Runner(tmp_path, into(said))
    runner.config = Config()
    monkeypatch.setattr(runner, "session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(runner, "attempt", lambda what, *_: attempted(what))
    one = Waiting(loop, runner, said)
    monkeypatch.setattr(runner, "tell_of", lambda *_: None)
    monkeypatch.setattr(arrivals, "arrive", one.arrive)
    for name, results in (("arrive_wholly", one.arrivals), ("run_post", one.posts)):
        monkeypatch.setattr(arrivals, name, lambda *_, name=name, results=results, **__: one.next(name, results))
    monkeypatch.setattr(preparing, "prepare_arrival", one.prepare_arrival)
    monkeypatch.setattr(preparing, "RECHECK", 0.01)
    monkeypatch.setattr(arrivals, "RECHECK", 0.01)
    one.tap.reached = clock.uptime()
    yield one
    if one.tap.state is not State.OVER:
        one.tap.become(State.OVER)
    one.guest.close()


def attempted(what: Callable[[Any], Any]) -> Any:
    """As `Runner.attempt`."""
    try:
        return what(None)
    except KvmIfupError as error:
        return error


# --- preparing ------------------------------------------------------------------------------------------


def test_what_is_prepared_is_ready_and_it_says_so(waiting: Waiting) -> None:
    waiting.preparations.append(Prepared())
    waiting.arm()
    assert waiting.tap.state is State.ARMING
    waiting.run_until(State.READY)
    assert waiting.said == [f"{ROUTED.label}: armed"]
    assert waiting.calls == [("prepare", False)]


@pytest.mark.parametrize("result", [NotReadyError("no uplink"), None])
def test_what_cannot_be_prepared_is_armed_all_the_same(waiting: Waiting, result: KvmIfupError | None) -> None:
    waiting.preparations.append(result)
    waiting.arm()
    waiting.run_until(State.ARMED)
    assert waiting.said[-1] == f"{ROUTED.label}: armed"
    assert len(waiting.said) == (2 if result else 1)
    assert ("no uplink" in waiting.said[0]) == bool(result)


def test_what_cannot_be_prepared_is_tried_whenever_it_is_quiet_until_it_can_be(waiting: Waiting) -> None:
    """And not any more: a node may have thousands of NICs, of which nobody looks through all then."""
    waiting.preparations += [NotReadyError("no uplink")] * 3 + [Prepared()]
    waiting.arm()
    waiting.run_until(State.ARMED)
    for times in (2, 3, 4):
        waiting.preparing.anew()
        waiting.until(lambda times=times: len(waiting.calls) == times)  # type: ignore[misc]
    waiting.run_until(State.READY)
    waiting.preparing.anew()
    waiting.pass_time(0.05)
    assert len(waiting.calls) == 4
    assert len(waiting.said) == 2


def test_who_works_on_the_tap_is_waited_for_and_armed_is_said_once(waiting: Waiting) -> None:
    waiting.preparations += [LockTimeoutError("held"), LockTimeoutError("held"), Prepared()]
    waiting.arm()
    waiting.run_until(State.READY)
    assert waiting.said == [f"{ROUTED.label}: armed"]
    assert len(waiting.calls) == 3


def test_what_has_become_wrong_is_prepared_anew_once_it_is_quiet(waiting: Waiting) -> None:
    waiting.preparations += [Prepared(), Prepared()]
    waiting.arm()
    waiting.run_until(State.READY)
    waiting.preparing.outdate(NOTHING)
    assert waiting.tap.prepared
    for _ in range(100):
        waiting.preparing.outdate(EVERYTHING)
        assert not waiting.tap.prepared
    waiting.run_until(State.READY)
    assert len(waiting.calls) == 2
    assert len(waiting.said) == 1


def test_what_has_become_wrong_while_it_was_prepared_is_prepared_anew(waiting: Waiting) -> None:
    def change_once() -> None:
        if len(waiting.calls) == 0:
            done = threading.Event()
            waiting.loop.soon(lambda: waiting.preparing.outdate(EVERYTHING))
            waiting.loop.soon(done.set)
            assert done.wait(30)

    waiting.while_preparing = change_once
    waiting.preparations += [Prepared(), Prepared()]
    waiting.arm()
    waiting.until(lambda: len(waiting.calls) == 2)
    waiting.run_until(State.READY)
    waiting.pass_time(0.05)
    assert len(waiting.calls) == 2


def test_an_agent_that_ends_prepares_nothing_more(waiting: Waiting) -> None:
    waiting.preparations.append(Prepared())
    waiting.arm()
    waiting.run_until(State.READY)
    waiting.preparing.stop()
    waiting.preparing.outdate(EVERYTHING)
    waiting.pass_time(0.05)
    assert waiting.tap.state is State.ARMED
    assert len(waiting.calls) == 1


def test_a_guest_that_does_not_come_in_time_is_not_waited_for(waiting: Waiting) -> None:
    waiting.runner.config = replace(waiting.runner.config, agent=AgentConfig(arrival_timeout=0.05))
    waiting.preparations.append(Prepared())
    waiting.arm()
    waiting.run_until(State.DISARMED)
    assert waiting.said[-1] == f"{ROUTED.label}: the guest has not arrived in 0.05 s: disarmed"
    waiting.preparing.outdate(EVERYTHING)
    waiting.pass_time(0.05)
    assert len(waiting.calls) == 1


# --- the first frame ------------------------------------------------------------------------------------


def test_the_first_frame_has_what_is_prepared_done_in_the_loop_itself(waiting: Waiting) -> None:
    waiting.hear(OUTCOME)
    waiting.until(lambda: len(waiting.calls) == 3)
    assert waiting.calls == [("prepare", False), ("arrive", True), ("finish", True)]
    assert [(journal.phase, stamp) for journal, stamp in waiting.written_journals] == [(Phase.POST, (2,))]
    assert waiting.tap.state is State.ARRIVING
    assert waiting.tap.listener is None
    assert "arrived, first frame RARP; wired" in waiting.said[-1]


def test_anothers_first_frame_comes_before_what_is_left_of_an_arrival(waiting: Waiting) -> None:
    ready, tell = os.pipe()
    waiting.while_arriving = lambda: os.write(tell, b"!")

    def other() -> None:
        os.read(ready, 1)
        waiting.calls.append(("other", waiting.room.under_way == 1))

    waiting.loop.watch(ready, other, first=True)
    waiting.hear(OUTCOME)
    waiting.until(lambda: len(waiting.calls) == 4)
    assert waiting.calls == [("prepare", False), ("arrive", True), ("other", True), ("finish", True)]
    assert waiting.room.under_way == 0
    waiting.loop.ignore(ready)
    for descriptor in (ready, tell):
        os.close(descriptor)


def test_who_is_asked_and_sends_without_end_keeps_nobody_from_their_turn(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(_listener: socket.socket) -> Iterator[tuple[bytes, float]]:
        while True:
            yield FRAME, 0.0

    waiting.tap.nic = replace(ROUTED, to_ask=True)
    waiting.preparations.append(None)
    monkeypatch.setattr(sockets, "received", endless)
    waiting.arm()
    waiting.guest.send(FRAME)  # never read
    waiting.pass_time(0.05)
    waiting.run_until(State.ARMED)
    assert waiting.tap.answers.first == ("RARP", 0.0)


@pytest.fixture
def asked(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> list[Nic]:
    """Whom the agent asks for its addresses, each time. The guest of `waiting` is one of them."""
    found: list[Nic] = []

    def ask(nic: Nic) -> bool:
        found.append(nic)
        return True

    for module in (arrivals, late):
        monkeypatch.setattr(module, "ask", ask)
        monkeypatch.setattr(module, "ASK_AGAIN", 3600.0)
    waiting.tap.nic = replace(ROUTED, to_ask=True)
    waiting.preparations.append(None)
    return found


@pytest.mark.parametrize("finds_one", [True, False])
def test_a_guest_that_finds_a_question_in_its_tap_is_asked_no_other(
    waiting: Waiting, asked: list[Nic], finds_one: bool
) -> None:
    waiting.tap.asked = finds_one
    waiting.arm()
    waiting.run_until(State.ARMED)
    waiting.guest.send(FRAME)
    waiting.until(lambda: waiting.tap.answers.first)
    assert asked == ([] if finds_one else [waiting.tap.nic])


def test_a_guest_that_does_not_answer_is_asked_again_and_again(
    waiting: Waiting, asked: list[Nic], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "ASK_AGAIN", 0.001)
    waiting.tap.asked = True
    waiting.arm()
    waiting.guest.send(FRAME)
    waiting.until(lambda: len(asked) == 3)


@pytest.mark.parametrize("pause", [0.001, 3600.0])
def test_who_has_answered_for_some_is_asked_for_the_rest_only_later(
    waiting: Waiting, asked: list[Nic], monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr(late, "ASK_AGAIN", pause)
    waiting.tap.nic = replace(DUAL, to_ask=True)
    waiting.tap.answers, waiting.tap.asked = Answers(waiting.tap.nic), True
    waiting.posts.append(OUTCOME)
    waiting.arm()
    waiting.run_until(State.ARMED)
    waiting.guest.send(frames.gratuitous_arp(mac_bytes(ROUTED.mac), "192.0.2.8"))
    waiting.until(lambda: "arrived" in waiting.said[-1])
    waiting.until((lambda: len(asked) == 3) if pause < 1 else lambda: True)
    assert asked == [waiting.tap.nic] * (3 if pause < 1 else 0)


@pytest.mark.parametrize("taken", [True, False, OSError("down")])
def test_whether_the_tap_has_taken_the_question_is_noted(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, taken: bool | OSError
) -> None:
    def ask(_nic: Nic) -> bool:
        if isinstance(taken, OSError):
            raise taken
        return taken

    monkeypatch.setattr(arrivals, "ask", ask)
    monkeypatch.setattr(sockets, "is_device", lambda *_: True)
    monkeypatch.setattr(sockets, "guest_listener", lambda *_: waiting.ours)
    waiting.tap.nic = replace(ROUTED, to_ask=True)
    arrivals.listen(waiting.runner, {}, 0.0, waiting.tap)
    waiting.loop.watch(waiting.ours, lambda: None, first=True)
    assert (waiting.tap.listener, waiting.tap.asked) == (waiting.ours, taken is True)


def test_an_agent_that_ends_at_once_completes_what_it_has_announced(waiting: Waiting) -> None:
    waiting.while_arriving = waiting.loop.stop
    waiting.hear(OUTCOME)
    waiting.loop._running = True
    waiting.loop.run()
    assert (waiting.calls[1:], waiting.room.under_way) == ([("arrive", True)], 1)
    waiting.room.close()
    assert waiting.calls[2:] == [("finish", True)]
    assert [journal.phase for journal, _ in waiting.written_journals] == [Phase.POST]
    waiting.pass_time(0.01)  # it is not done once more
    assert waiting.calls[3:] == []


def test_who_is_announced_and_cannot_be_noted_is_tried_again(waiting: Waiting) -> None:
    waiting.cannot_finish = NotReadyError("full")
    waiting.hear(OUTCOME)
    waiting.run_until(State.OVER)
    assert waiting.looked_again_at == [waiting.tap]
    assert waiting.written_journals == []
    assert "full" in waiting.said[-1]
    assert waiting.room.under_way == 0


def test_what_takes_long_is_done_in_a_thread_as_it_was_prepared(waiting: Waiting) -> None:
    waiting.preparations.append(Prepared(waits=True))
    waiting.arrivals.append(OUTCOME)
    waiting.arm()
    waiting.run_until(State.READY)
    waiting.guest.send(FRAME)
    waiting.until(lambda: len(waiting.calls) == 2)
    assert waiting.calls[1:] == [("arrive_wholly", False)]


def test_guests_that_come_one_after_the_other_are_a_crowd(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "CROWD", 60.0)
    waiting.hear(OUTCOME)
    waiting.until(lambda: len(waiting.calls) == 3)
    assert waiting.room.crowded
    monkeypatch.setattr(arrivals, "CROWD", 0.0)
    assert not waiting.room.crowded


def test_who_has_to_wait_for_a_lock_does_so_in_a_thread_as_it_was_prepared(waiting: Waiting) -> None:
    waiting.hear(LockTimeoutError("held"))
    waiting.arrivals.append(OUTCOME)
    waiting.until(lambda: not waiting.arrivals)
    assert waiting.calls[1:] == [("arrive", True), ("arrive_wholly", False)]
    waiting.until(lambda: "arrived" in waiting.said[-1])


@pytest.mark.parametrize("why", ["not prepared", "takes long", "has changed"])
def test_else_post_is_done_in_a_thread(waiting: Waiting, why: str) -> None:
    waiting.preparations.append(None if why == "not prepared" else Prepared(waits=why == "takes long"))
    waiting.arrivals.append(None)
    waiting.posts.append(OUTCOME)
    waiting.arm()
    waiting.run_until(State.ARMED if why == "not prepared" else State.READY)
    waiting.guest.send(FRAME)
    waiting.until(lambda: not waiting.posts)
    tried = {"not prepared": [], "takes long": [("arrive_wholly", False)], "has changed": [("arrive", True)]}[why]
    assert waiting.calls[1:] == [*tried, ("run_post", False)]
    assert waiting.tap.state is State.ARRIVING


def test_an_arrival_that_fails_is_said_and_the_next_frame_tries_again(waiting: Waiting) -> None:
    waiting.hear(NotReadyError("forwarding is off"))
    waiting.run_until(State.OVER)
    assert waiting.looked_again_at == [waiting.tap]
    assert "forwarding is off" in waiting.said[-1]


def test_a_tap_whose_journal_has_changed_meanwhile_is_left_alone(waiting: Waiting) -> None:
    waiting.hear(NotReadyError("forwarding is off"))
    waiting.run_until(State.ARRIVING)
    waiting.tap.become(State.OVER)
    waiting.pass_time(0.05)
    assert waiting.looked_again_at == []


# --- announcements --------------------------------------------------------------------------------------


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is sent, in quick rounds."""
    sent: list[object] = []
    monkeypatch.setattr(announcements, "SCHEDULE", (0.0, 0.001, 0.002, 0.003, 0.004))

    def send(messages: object) -> list[announce.NotSent]:
        sent.append(messages)
        return []

    monkeypatch.setattr(announce, "send", send)
    return sent


MESSAGES = [("eth0", "192.0.2.8", "")]


@pytest.mark.parametrize(("true", "sent"), [([True] * 4, 4), ([True, True, False], 2), ([False], 0)])
def test_rounds_after_the_first_are_sent_as_long_as_they_are_true(
    loop: Loop, waiting: Waiting, rounds: list[object], true: list[bool], sent: int
) -> None:
    room = Announcements(loop, waiting.runner)
    room.begin(MESSAGES, lambda: true.pop(0))
    waiting.until(lambda: not true)
    waiting.pass_time(0.02)
    assert rounds == [MESSAGES] * sent
    assert room.under_way == 0


@pytest.mark.parametrize(("same", "read"), [([True] * 4, 0), ([True, False, False, True], 2)])
def test_the_journal_is_not_read_for_a_round_while_it_is_the_same(
    loop: Loop, waiting: Waiting, rounds: list[object], monkeypatch: pytest.MonkeyPatch, same: list[bool], read: int
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(waiting.tap, "is_same", lambda _store: same.pop(0))

    def has_here(tap: str, _addresses: object) -> bool:
        reads.append(tap)
        return True

    monkeypatch.setattr(waiting.runner.store, "has_here", has_here)
    announced = Change(Announce(tuple(MESSAGES), force=False), None, needed=True)
    room = Announcements(loop, waiting.runner)
    room.repeat(replace(OUTCOME, changes=(announced,)), time.monotonic(), waiting.tap)
    waiting.until(lambda: not same)
    waiting.pass_time(0.02)
    assert [list(cast(Any, one)) for one in rounds] == [MESSAGES] * 4
    assert reads == ["tap0"] * read


def test_when_the_uplink_has_gone_nothing_more_is_sent(
    loop: Loop, waiting: Waiting, rounds: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(messages: list[Message]) -> list[announce.NotSent]:
        rounds.append(messages)
        return [announce.NotSent(dev, address, errno.ENODEV) for dev, address, _ in messages]

    monkeypatch.setattr(announce, "send", send)
    room = Announcements(loop, waiting.runner)
    room.begin(MESSAGES, lambda: True)
    waiting.until(lambda: rounds)
    waiting.pass_time(0.02)
    assert len(rounds) == 1
    assert room.under_way == 0
