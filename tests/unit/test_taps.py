"""What the agent does for a tap: one state after another, as far as one version of its journal goes."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from kvmifup.agent import taps
from kvmifup.agent.events import ANYTHING, Thing
from kvmifup.agent.loop import Loop
from kvmifup.agent.preparing import relied_on
from kvmifup.agent.reliance import Reliance
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import LISTENING, NEXT, State, TapRecord, Taps, state_of
from kvmifup.core.errors import BugError
from kvmifup.core.model import Nic, Phase
from kvmifup.core.ops import LinkMtu, ProxyNeighbour
from kvmifup.runs.arriving import PreparedArrival
from kvmifup.runs.index import Stamp
from kvmifup.runs.journal import Entry, Journal
from kvmifup.runs.store import Store

from .samples import DUAL, HERE, ROUTED, into

MTU = Entry(LinkMtu("tap0", 9000), 1500)
PROXY = Entry(ProxyNeighbour("eth0", "192.0.2.8", want=True), False)
PRE = Journal(ROUTED, 7, Phase.PRE, (MTU,), since=1.0, namespace=HERE)
POST = replace(PRE, phase=Phase.POST, entries=(MTU, PROXY))
KILLED = replace(PRE, phase=Phase.DOWN, entries=(), pending=(MTU,))
PREPARED = cast(PreparedArrival, object())


def record(loop: Loop, state: State) -> tuple[TapRecord, socket.socket | None]:
    """A tap in *state*, and its listener if it has one."""
    tap = TapRecord(loop, {State.WIRED: POST, State.UNFINISHED: KILLED}.get(state, PRE), (1,))
    if state not in (State.WIRED, State.UNFINISHED, State.DISARMED, State.OVER):
        ours, theirs = socket.socketpair()
        theirs.close()
        tap.arm(ours)
        loop.watch(ours, lambda: None)
    listener = tap.listener
    if state is State.READY:
        tap.ready({None: PREPARED})
    elif state is not tap.state:
        tap.become(state)
    assert tap.state is state
    return tap, listener


def hears(loop: Loop, journal: Journal) -> tuple[TapRecord, socket.socket]:
    """An armed tap, and the guest's end of what it listens on."""
    tap = TapRecord(loop, journal, (1,))
    ours, guest = socket.socketpair()
    tap.arm(ours)
    return tap, guest


def test_what_the_guest_has_sent_before_the_journal_changed_is_still_heard(loop: Loop) -> None:
    before, guest = hears(loop, PRE)
    loop.watch(cast(socket.socket, before.listener), lambda: None)
    after, _ = hears(loop, replace(PRE, since=2.0))
    guest.send(b"RARP")
    after.take_over(before)
    before.become(State.OVER)
    assert after.listener is not None
    assert after.listener.recv(4) == b"RARP"


@pytest.mark.parametrize("nic", [replace(ROUTED, mac="aa:00:00:00:00:99"), ROUTED])
def test_another_guests_frames_are_not_taken_for_this_ones(loop: Loop, nic: Nic) -> None:
    before, guest = hears(loop, PRE)
    loop.watch(cast(socket.socket, before.listener), lambda: None)
    after, _ = hears(loop, replace(PRE, nic=nic, ifindex=7 if nic != ROUTED else 8))
    guest.send(b"RARP")
    own = after.listener
    after.take_over(before)
    assert after.listener is own


# --- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_only_what_the_table_has_can_follow(loop: Loop, before: State, after: State) -> None:
    tap, _ = record(loop, before)
    if after in NEXT[before]:
        tap.become(after)
        assert tap.state is after
    else:
        with pytest.raises(BugError, match=rf"{after.name}.*{before.name}"):
            tap.become(after)
        assert tap.state is before
    if tap.state is not State.OVER:
        tap.become(State.OVER)


def test_every_state_can_be_reached_and_only_over_is_the_end() -> None:
    assert NEXT.keys() == set(State)
    begin = {state_of(journal) for journal in (PRE, POST, KILLED)}
    assert begin | set().union(*NEXT.values()) == set(State)
    assert {state for state, following in NEXT.items() if not following} == {State.OVER}
    assert all(State.OVER in following for state, following in NEXT.items() if state is not State.OVER)


@pytest.mark.parametrize(
    ("journal", "state"),
    [
        (PRE, State.DISARMED),
        (POST, State.WIRED),
        (KILLED, State.UNFINISHED),
        (replace(POST, pending=(MTU,)), State.UNFINISHED),
        (replace(KILLED, pending=(), entries=(MTU,)), State.DISARMED),
    ],
)
def test_how_a_journal_begins(journal: Journal, state: State) -> None:
    assert state_of(journal) is state


def ended(listener: socket.socket) -> bool:
    """Whether it is closed, or will be: a thread does that."""
    end = time.monotonic() + 30
    while listener.fileno() != -1 and time.monotonic() < end:
        time.sleep(0.001)
    return listener.fileno() == -1


@pytest.mark.parametrize("before", [one for one in State if one in LISTENING])  # in the same order in each process
@pytest.mark.parametrize("after", [State.ARRIVING, State.DISARMED, State.OVER])
def test_who_does_not_listen_any_more_lets_go_of_all_that_it_took(loop: Loop, before: State, after: State) -> None:
    tap, listener = record(loop, before)
    fired: list[str] = []
    tap.timers.set("arrival", 0, partial(fired.append, "arrival"))
    tap.become(after)
    assert (tap.listener, dict(tap.prepared)) == (None, {})
    assert listener
    assert ended(listener)
    loop.later(0.01, loop.stop)
    loop.run()
    assert fired == []


def test_what_was_prepared_is_there_while_it_is_ready(loop: Loop) -> None:
    tap, _ = record(loop, State.READY)
    assert tap.prepared == {None: PREPARED}
    tap.become(State.ARMED)
    assert tap.prepared == {}
    assert tap.listener
    tap.ready({None: PREPARED})
    assert tap.prepared == {None: PREPARED}
    tap.become(State.ARMED)
    assert tap.prepared == {}
    tap.become(State.OVER)


def test_timers_do_not_get_more_with_every_change(loop: Loop) -> None:
    """As when a route comes and goes all the time."""
    tap, _ = record(loop, State.READY)
    for _ in range(1000):
        tap.become(State.ARMED)
        tap.timers.set("prepare", 0.2, lambda: None)
        tap.ready({None: PREPARED})
    assert len(tap.timers._timers) == 1
    tap.become(State.OVER)


def test_whose_journal_it_is(loop: Loop) -> None:
    tap = TapRecord(loop, POST, (1,))
    assert tap.is_of(PRE)
    assert not tap.is_of(replace(PRE, ifindex=8))
    assert not tap.is_of(replace(PRE, nic=replace(ROUTED, mac="aa:00:00:00:00:02")))
    assert set(tap.places) == {("eth0", "192.0.2.8")}
    assert TapRecord(loop, replace(POST, phase=Phase.PRE), (1,)).places == ()


# --- what relies on what --------------------------------------------------------------------------------


class Prepared:
    """What `relied_on` looks at."""

    devices = (("tap0", 7), ("eth0", 2), ("lost0", None))


@pytest.mark.parametrize(
    ("touched", "relies"),
    [
        (set(), False),
        ({("device", 2)}, True),
        ({("device", 7), ("name", "tap0"), ("name", "eth0"), ("port", 2), ("rule", "tap0")}, False),
        ({("device", 9)}, False),
        ({("route", "192.0.2.8/32")}, True),
        ({("route", "2001:db8::8/128")}, True),
        ({("route", "192.0.2.9/32"), ("route", "10.0.0.0/8")}, False),
        ({("route", "0.0.0.0/0")}, True),
        ({("route", "::/0")}, True),
        ({ANYTHING}, True),
    ],
)
def test_what_was_prepared_relies_on_its_devices_and_routes(touched: set[Thing], relies: bool) -> None:
    prepared: dict[str | None, PreparedArrival] = {None: cast(PreparedArrival, Prepared())}
    assert relied_on(prepared, DUAL).isdisjoint(touched) is not relies


# --- the journals ---------------------------------------------------------------------------------------


class Node:
    """A `Taps` over journals on disk, and what it calls."""

    def __init__(self, loop: Loop, run_dir: Path) -> None:
        self.loop = loop
        self.said: list[str] = []
        self.listened: list[str] = []
        self.found: list[tuple[str, State]] = []
        self.looks = 0
        self.changed: list[bool] = []
        self.runner = Runner(run_dir, into(self.said))
        self.over: list[str] = []
        over = [lambda tap: self.over.append(tap.name)]
        self.taps = Taps(loop, self.runner, self.listen, self.note, self.looked, over)

    def listen(self, tap: TapRecord) -> None:
        """As for a tap whose guest can be listened to."""
        assert threading.current_thread() is not threading.main_thread()
        self.listened.append(tap.name)
        ours, theirs = socket.socketpair()
        theirs.close()
        tap.arm(ours)

    def note(self, tap: TapRecord) -> None:
        """As the agent."""
        assert threading.current_thread() is threading.main_thread()
        self.found.append((tap.name, tap.state))
        if tap.listener:
            self.loop.watch(tap.listener, lambda: None)

    def looked(self, changed: bool) -> None:
        """After each look."""
        self.looks += 1
        self.changed.append(changed)
        self.loop.stop()

    def look(self, ask: Callable[[], None] | None = None) -> list[tuple[str, State]]:
        """Look, and return what was found."""
        self.found.clear()
        (ask or self.taps.look)()
        self.loop._running = True
        self.loop.run()
        return self.found.copy()

    def save(self, journal: Journal) -> None:
        """Write a journal."""
        self.runner.store.save(journal)

    def one(self) -> TapRecord:
        """The only record."""
        (tap,) = self.taps
        return tap


@pytest.fixture
def node(loop: Loop, tmp_path: Path) -> Iterator[Node]:
    """A node without journals."""
    made = Node(loop, tmp_path / "run")
    yield made
    for tap in made.taps:
        tap.become(State.OVER)


def named(tap: str, journal: Journal = PRE, **changes: Any) -> Journal:
    """The journal of another tap."""
    nic: Nic = replace(journal.nic, tap=tap)
    return replace(journal, nic=nic, **changes)


def test_every_journal_is_found_once(node: Node) -> None:
    for journal in (PRE, named("tap1", POST), named("tap2", KILLED)):
        node.save(journal)
    assert node.look() == [("tap0", State.ARMING), ("tap1", State.WIRED), ("tap2", State.UNFINISHED)]
    assert node.listened == ["tap0"]
    assert node.look() == []
    assert len(node.taps) == 3
    assert [tap.name for tap in node.taps.named(["tap2", "tap9", "tap0"])] == ["tap2", "tap0"]


def test_what_the_loop_itself_has_written_is_not_read(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.taps, "look_soon", lambda *_: None)
    node.save(PRE)
    node.look()
    before = node.one()
    node.save(POST)
    stamp = node.runner.store.stamp("tap0")
    assert stamp
    after = node.taps.written(POST, stamp)
    assert node.one() is after
    assert (before.state, after.state) == (State.OVER, State.WIRED)
    assert after.is_same(node.runner.store) is False, "there is no such device"
    monkeypatch.setattr(node.runner.store, "load", lambda tap: pytest.fail(f"{tap} was read"))
    assert node.look() == []
    assert node.changed == [True, True]
    assert node.look() == []
    assert node.changed == [True, True, False]
    assert node.one() is after


def test_what_is_written_during_a_look_is_not_replaced_by_what_that_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.taps, "look_soon", lambda *_: None)  # each look is the test's
    node.save(PRE)
    node.look()
    node.save(KILLED)  # what is pending while post is done
    node.taps._want(None)
    look = node.taps._begin()
    found = look()
    node.save(POST)
    stamp = node.runner.store.stamp("tap0")
    assert stamp
    after = node.taps.written(POST, stamp)
    node.taps._done(found)
    assert node.one() is after
    assert node.look() == []
    node.save(KILLED)
    assert node.look() == [("tap0", State.UNFINISHED)], "what changes after that is seen"


def test_only_those_are_looked_at_that_are_said_to_have_changed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for journal in (PRE, named("tap1", POST), named("tap2", POST)):
        node.save(journal)
    node.look()
    looked: list[str] = []
    stamp = Store.stamp

    def noting(store: Store, tap: str) -> Stamp | None:
        looked.append(tap)
        return stamp(store, tap)

    monkeypatch.setattr(Store, "stamp", noting)
    node.save(POST)
    node.save(named("tap1", POST, since=2.0))
    node.save(named("tap3", PRE))
    node.runner.store.delete("tap2")
    assert node.look(partial(node.taps.look, ["tap0"])) == [("tap0", State.WIRED)]
    assert set(looked) == {"tap0"}
    assert node.look(partial(node.taps.look, ["tap2", "tap3"])) == [("tap3", State.ARMING)]
    assert set(looked) == {"tap0", "tap2", "tap3"}
    assert node.over == ["tap0", "tap2"]
    assert node.look(partial(node.taps.look, [])) == []
    assert node.look() == [("tap1", State.WIRED)]
    assert node.over == ["tap0", "tap2", "tap1"]
    assert node.look() == []


@pytest.mark.parametrize("names", [["tap0"], ["tap1"], ["tap9"]])
def test_in_another_directory_all_are_looked_at(node: Node, names: list[str]) -> None:
    for journal in (PRE, named("tap1", POST)):
        node.save(journal)
    node.look()
    directory = node.runner.store.directory
    directory.rename(directory.with_name("old"))
    node.save(named("tap2", POST))
    found = node.look(partial(node.taps.look, names))
    assert ("tap2", State.WIRED) in found
    assert {tap.name for tap in node.taps} >= {"tap2"}


def test_what_could_not_be_read_is_looked_for_among_all(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "AGAIN", 0.01)
    node.save(named("tap2", POST))
    node.look()
    node.save(PRE)
    node.save(named("tap1", POST))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "stamp", raising(OSError(5, "broken")))
        assert node.look(partial(node.taps.look, ["tap0"])) == []
    assert node.look(lambda: None) == [("tap0", State.ARMING), ("tap1", State.WIRED)]


def raising(error: OSError) -> Callable[..., Any]:
    """What fails so."""

    def fail(*_: object) -> Any:
        raise error

    return fail


def test_a_journal_that_changes_ends_its_record_and_begins_another(node: Node) -> None:
    node.save(PRE)
    node.look()
    before = node.one()
    node.save(POST)
    assert node.look() == [("tap0", State.WIRED)]
    assert (before.state, before.listener) == (State.OVER, None)
    after = node.one()
    node.runner.store.delete("tap0")
    assert node.look() == []
    assert after.state is State.OVER
    assert len(node.taps) == 0


def test_how_often_in_a_row_a_tap_was_unfinished_is_counted(node: Node) -> None:
    tries = []
    for journal in (KILLED, KILLED, KILLED, PRE, KILLED):
        node.save(journal)
        node.look()
        tries.append(node.one().tries)
    assert tries == [0, 1, 2, 0, 0]


def test_a_journal_can_be_looked_at_again_though_it_is_the_same(node: Node) -> None:
    node.save(PRE)
    node.look()
    before = node.one()
    assert node.look(partial(node.taps.look_again_at, before)) == [("tap0", State.ARMING)]
    assert before.state is State.OVER
    assert node.one() is not before


def test_many_changes_within_a_moment_are_one_look(node: Node) -> None:
    node.save(PRE)

    def ask() -> None:
        for _ in range(10):
            node.taps.look_soon()

    assert node.look(ask) == [("tap0", State.ARMING)]
    assert node.looks == 1


def test_an_unreadable_journal_is_said_once_and_keeps_no_other_from_being_found(node: Node) -> None:
    node.save(named("tap1", POST))
    path = node.runner.store.path("tap0")
    path.write_text("{")
    path.chmod(0o600)
    assert node.look() == [("tap1", State.WIRED)]
    node.look()
    assert len([line for line in node.said if "cannot be read" in line]) == 1
    node.save(PRE)
    assert node.look() == [("tap0", State.ARMING)]


def test_a_journal_of_another_namespace_is_not_found(node: Node) -> None:
    node.save(replace(POST, namespace=1))
    assert node.look() == []
    assert len(node.taps) == 0
    assert node.said == []


# --- who relies on what ---------------------------------------------------------------------------------


def test_a_change_concerns_those_that_rely_on_it_and_nobody_else() -> None:
    reliance = Reliance()
    eth0, route, other = ("device", 2), ("route", "192.0.2.8/32"), ("route", "192.0.2.9/32")
    reliance.note("tap0", frozenset({eth0, route}))
    reliance.note("tap1", frozenset({eth0, other}))
    assert reliance.on({eth0}) == {"tap0", "tap1"}
    assert reliance.on({route, ANYTHING}) == {"tap0"}
    reliance.note("tap0", frozenset({other}))
    assert (reliance.on({route}), reliance.on({other})) == (set(), {"tap0", "tap1"})
    reliance.forget("tap0")
    reliance.forget("tap0")
    assert reliance.on({other}) == {"tap1"}
    reliance.forget("tap1")
    assert reliance.on({eth0, route, other}) == set()
    assert (reliance._things, len(reliance._taps)) == ({}, 0), "nothing is left"


def test_journals_removed_again_as_soon_as_they_were_written_come_back(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.save(POST)
    node.look()
    directory = node.runner.store.directory

    def restored(_runner: Runner, journal: Journal) -> bool:
        node.save(journal)  # as `restore` does; this tap is not on any node
        if len(written) == 0:
            shutil.rmtree(directory)
        written.append(journal.nic.tap)
        return True

    written: list[str] = []
    monkeypatch.setattr(Runner, "restore", restored)
    shutil.rmtree(directory)
    node.look()
    node.look()
    assert written == ["tap0", "tap0"]
    assert [tap.name for tap in node.taps] == ["tap0"]
