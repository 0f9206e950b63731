"""What the kernel's messages mean, and that a directory is watched whatever becomes of it."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.agent import directories
from kvmifup.agent.directories import DirectoryEvents, Names
from kvmifup.agent.events import (
    ANYTHING,
    NOT_LEARNT,
    NetlinkMessage,
    not_up,
    removed,
    split,
    touched,
)
from kvmifup.agent.loop import Loop
from kvmifup.core.errors import KernelError
from kvmifup.node import sockets

NEWLINK, DELLINK, NEWROUTE, DELROUTE, NEWNETCONF = 16, 17, 24, 25, 80
AF_BRIDGE = 7


def netlink(kind: int, body: bytes) -> bytes:
    """A message as the kernel sends it, padded."""
    length = 16 + len(body)
    return struct.pack("=IHHII", length, kind, 0, 0, 0) + body + bytes(-length % 4)


def attribute(kind: int, value: bytes) -> bytes:
    """One, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(kind: int, index: int, family: int = socket.AF_UNSPEC) -> bytes:
    """About a device."""
    return netlink(kind, struct.pack("=BxHiII", family, 1, index, 0, 0) + attribute(3, b"tap0\0"))


def route(kind: int, destination: str, length: int) -> bytes:
    """About a route; "" for a default one, whose destination the kernel leaves out."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    packed = socket.inet_pton(family, destination)
    header = struct.pack("=BBBBBBBBI", family, length, 0, 0, 254, 4, 0, 1, 0)
    table = attribute(15, struct.pack("=I", 254))
    return netlink(kind, header + table + (attribute(1, packed) if length else b""))


def netconf(index: int) -> bytes:
    """About what a device forwards."""
    value = struct.pack("=i", index)
    return netlink(NEWNETCONF, struct.pack("=Bxxx", 2) + attribute(1, value) + attribute(2, struct.pack("=i", 1)))


def test_only_a_device_that_goes_is_removed() -> None:
    data = link(NEWLINK, 3) + link(DELLINK, 4) + link(DELLINK, 5, AF_BRIDGE) + link(DELLINK, 6)
    assert removed(list(split(data))) == [4, 6]


def state(index: int, flags: int) -> bytes:
    """How a device is now."""
    return netlink(NEWLINK, struct.pack("=BxHiII", 0, 1, index, flags, 0) + attribute(3, b"eth0\0"))


UP, CARRIER = 0x1, 0x10000


def test_what_is_down_has_no_carrier_or_has_gone_is_not_up() -> None:
    data = state(3, 0) + state(4, UP) + state(5, UP | CARRIER) + link(DELLINK, 6) + link(DELLINK, 7, AF_BRIDGE)
    assert not_up(list(split(data))) == [3, 4, 6]


def rule(kind: int, iif: str | None) -> bytes:
    """About a policy rule."""
    return netlink(kind, bytes([socket.AF_INET]) + bytes(11) + (attribute(3, iif.encode() + b"\0") if iif else b""))


def neighbour(kind: int, index: int, address: str, state: int, family: int = socket.AF_INET) -> bytes:
    """About a neighbour entry; of a bridge, if there is no address."""
    packed = attribute(1, socket.inet_aton(address)) if address else attribute(2, bytes(6))
    return netlink(kind, struct.pack("=BxxxiHBB", family, index, state, 0, 0) + packed)


def limit(kind: int, index: int) -> bytes:
    """A queueing discipline, or a filter."""
    return netlink(kind, struct.pack("=BxxxiIII", 0, index, 0, 0, 0))


NEWNEIGH, DELNEIGH, NEWRULE, DELRULE = 28, 29, 32, 33


def test_what_is_touched() -> None:
    data = (
        link(NEWLINK, 3) + link(DELLINK, 4) + link(NEWLINK, 5, AF_BRIDGE)
        + route(NEWROUTE, "0.0.0.0", 0) + route(DELROUTE, "::", 0)
        + route(NEWROUTE, "192.0.2.8", 32) + route(DELROUTE, "2001:db8::8", 128) + route(NEWROUTE, "198.51.100.0", 29)
        + rule(DELRULE, "tap0") + rule(NEWRULE, None)
        + neighbour(DELNEIGH, 6, "192.0.2.8", 0) + neighbour(NEWNEIGH, 6, "", 0, AF_BRIDGE)
        + netlink(21, struct.pack("=BBBBi", socket.AF_INET6, 64, 0, 253, 8))
        + netconf(9) + netconf(-2)
        + limit(36, 11) + limit(37, 12) + limit(44, 13) + limit(45, 14)
    )  # fmt: skip
    prefixes = ("0.0.0.0/0", "::/0", "192.0.2.8/32", "2001:db8::8/128", "198.51.100.0/29")
    assert set(touched(list(split(data)))) == {
        *(("device", index) for index in (3, 4, 9, 11, 12, 13, 14)),
        ("name", "tap0"),
        ("port", 5),
        *(("route", prefix) for prefix in prefixes),
        ("rule", "tap0"),
        ("rule", None),
        ("neighbour", 6, "192.0.2.8"),
        ("address", 8),
    }


def test_what_holds_for_all_devices_touches_any() -> None:
    assert list(touched(list(split(netconf(-1))))) == [ANYTHING]
    assert list(touched(list(split(netlink(48, bytes(4)))))) == [ANYTHING]  # an action that a limit may use


STALE, FAILED, PERMANENT = 0x04, 0x20, 0x80


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        (neighbour(NEWNEIGH, 3, "192.0.2.8", STALE), False),
        (neighbour(DELNEIGH, 3, "192.0.2.8", STALE), False),
        (neighbour(NEWNEIGH, 3, "", PERMANENT, AF_BRIDGE), False),
        (neighbour(NEWNEIGH, 3, "192.0.2.8", PERMANENT), True),
        (neighbour(DELNEIGH, 3, "192.0.2.8", FAILED), True),
        (neighbour(DELNEIGH, 3, "192.0.2.8", 0), True),
        (link(NEWLINK, 3), True),
        (rule(DELRULE, "tap0"), True),
        (netconf(3), True),
    ],
)
def test_neighbours_that_come_and_go_by_themselves_are_not_heard(message: bytes, heard: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        sockets.attach(ours, NOT_LEARNT)
        ours.setblocking(False)
        theirs.send(message)
        if heard:
            assert ours.recv(4096) == message
        else:
            with pytest.raises(BlockingIOError):
                ours.recv(4096)


@given(st.binary(max_size=200))
def test_cut_or_senseless_messages_are_no_trouble(data: bytes) -> None:
    list(split(data))
    for kind in (NEWROUTE, NEWNETCONF):
        list(touched([NetlinkMessage(kind, b"\x02\x20" + data)]))


@given(st.lists(st.tuples(st.sampled_from([NEWLINK, DELLINK]), st.integers(1, 1 << 30)), max_size=20))
def test_every_message_of_a_bunch_is_read(bunch: list[tuple[int, int]]) -> None:
    data = b"".join(link(kind, index) for kind, index in bunch)
    assert removed(list(split(data))) == [index for kind, index in bunch if kind == DELLINK]


# --- a directory -----------------------------------------------------------------------------------------


class Seen:
    """What is in a directory whenever it has changed, until what is waited for is."""

    def __init__(self, loop: Loop, directory: Path) -> None:
        self.loop, self.directory, self.wanted = loop, directory, {"nothing"}
        self.told: list[Names | None] = []
        self.events = DirectoryEvents(loop, directory, self.changed)
        self.settle()

    def settle(self) -> None:
        """Until it has been told that all may have changed before it was watched."""
        self.told.clear()
        alarm = self.loop.later(30, lambda: pytest.fail("nobody has said so"))
        self.loop._running = True
        while not self.told:
            self.loop.later(0.05, self.loop.stop)
            self.loop._running = True
            self.loop.run()
        alarm.cancel()
        assert self.told == [None]
        self.told.clear()

    def names(self) -> set[str]:
        """Its files."""
        return {path.name for path in self.directory.iterdir()} if self.directory.exists() else set()

    def changed(self, names: Names | None) -> None:
        """As the agent looks."""
        self.told.append(names)
        if self.names() == self.wanted:
            self.loop.stop()

    def wait(self, *wanted: str) -> None:
        """Until just these files are there; the test hangs if nobody says so, and is ended."""
        self.wanted = set(wanted)
        alarm = self.loop.later(30, lambda: pytest.fail(f"nobody has said that there is {wanted}"))
        self.loop._running = True
        self.loop.run()
        alarm.cancel()


@pytest.fixture
def seen(loop: Loop, tmp_path: Path) -> Iterator[Seen]:
    """A directory that is watched."""
    one = Seen(loop, tmp_path / "run" / "state")
    yield one
    one.events.close()


def put(directory: Path, name: str) -> None:
    """A file as a journal is written."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "new").write_text("x")
    (directory / "new").rename(directory / name)


def test_files_that_come_are_replaced_and_go(seen: Seen) -> None:
    put(seen.directory, "a")
    seen.wait("a")
    put(seen.directory, "b")
    seen.wait("a", "b")
    (seen.directory / "a").unlink()
    seen.wait("b")


def test_many_changes_wake_the_loop_up_once_until_somebody_looks(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[DirectoryEvents] = []
    notified = DirectoryEvents._notified

    def counting(one: DirectoryEvents) -> None:
        woken.append(one)
        notified(one)

    monkeypatch.setattr(DirectoryEvents, "_notified", counting)
    seen.events.renew()
    seen.settle()
    woken.clear()
    for number in range(20):
        put(seen.directory, f"file{number}")
    seen.wait(*(f"file{number}" for number in range(20)))
    assert len(woken) == 1
    (told,) = seen.told
    assert told == frozenset({"new", *(f"file{number}" for number in range(20))})


def test_only_what_matters_of_the_files_beside_is_told(loop: Loop, tmp_path: Path) -> None:
    told: list[Names | None] = []

    def run(enough: bool) -> None:
        """Until something is told, or if nothing need be told, for a moment."""
        if told or enough:
            loop.later(0.1, loop.stop)
        else:
            loop.later(0.01, lambda: run(bool(told)))

    events = DirectoryEvents(loop, tmp_path / "run" / "state", told.append, beside=["agent.sock"])
    run(False)
    loop.run()
    assert told == [None]
    told.clear()
    for number, name in enumerate(("agent.sock", "metrics.prom")):
        (tmp_path / "run" / "new").touch()
        (tmp_path / "run" / "new").rename(tmp_path / "run" / name)
        run(number > 0)
        loop._running = True
        loop.run()
        assert (None in told) is (number == 0)
        told.clear()
    events.close()


def test_more_than_the_kernel_can_report_may_be_anything(seen: Seen) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    path = seen.directory / "a"
    path.touch()
    for _ in range(limit // 2 + 10):  # not the same twice in a row: that would be one
        os.utime(path)
        path.rename(seen.directory / "b")
        (seen.directory / "b").rename(path)
    seen.wait("a")
    assert None in seen.told


def test_without_inotify_somebody_looks_from_time_to_time(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "BLIND", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(directories, "_libc", type("Libc", (), {"inotify_init1": staticmethod(lambda _flags: -1)}))
        seen.events.renew()
        for name in ("a", "b"):
            put(seen.directory, name)
            seen.wait(*sorted({"a", name}))
        assert set(seen.told) == {None}
    seen.events.complete()
    seen.settle()
    put(seen.directory, "c")
    seen.wait("a", "b", "c")
    assert seen.told[-1] == frozenset({"new", "c"})


@pytest.mark.parametrize("which", [1, 2], ids=["the directory", "its parent"])
def test_what_cannot_be_watched_does_not_count_as_watched(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Nobody would look then."""
    calls = itertools.count(1)
    add = directories._libc.inotify_add_watch

    def fail(*what: Any) -> int:
        return -1 if next(calls) == which else int(add(*what))

    with monkeypatch.context() as patch:
        patch.setattr(directories._libc, "inotify_add_watch", fail)
        with pytest.raises(KernelError):
            seen.events.renew()
    assert not seen.events.is_watched()
    seen.events.complete()
    assert seen.events.is_watched()
    put(seen.directory, "a")
    seen.wait("a")


@pytest.mark.parametrize("by", ["itself", "somebody"])
def test_what_cannot_be_watched_is_looked_at_until_it_can_be(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Nobody need call anything: what is in memory counts as long as somebody looks."""
    monkeypatch.setattr(directories, "BLIND", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(directories._libc, "inotify_add_watch", lambda *_what: -1)
        if by == "somebody":
            with pytest.raises(KernelError):
                seen.events.renew()
        else:
            seen.directory.rename(seen.directory.parent / "old")
        for name in ("a", "b"):
            put(seen.directory, name)
            seen.wait(*sorted({"a", name}))
        assert set(seen.told) <= {None, frozenset()}
        assert not seen.events.is_watched()
    put(seen.directory, "c")
    seen.wait("a", "b", "c")
    seen.settle()
    assert seen.events.is_watched()
    put(seen.directory, "d")
    seen.wait("a", "b", "c", "d")
    assert seen.told[-1] == frozenset({"new", "d"})


def test_directories_of_others_are_watched_once_they_are_there(loop: Loop, tmp_path: Path) -> None:
    """There files are made where they are, and then written."""
    late = tmp_path / "pid"
    wanted = ""

    def changed(_names: Names | None) -> None:
        if (late / "web1").exists() and (late / "web1").read_text() == wanted:
            loop.stop()

    def wait() -> None:
        alarm = loop.later(30, lambda: pytest.fail(f"nobody has said that it is {wanted!r}"))
        loop._running = True
        loop.run()
        alarm.cancel()

    events = DirectoryEvents(loop, tmp_path / "run" / "state", changed, [late])
    late.mkdir()
    events.complete()
    with (late / "web1").open("w") as file:
        wait()
        wanted = "7"
        file.write("7")
        file.flush()
        wait()
    events.close()


def test_directories_of_others_are_watched_anew_when_they_are_others(loop: Loop, tmp_path: Path) -> None:
    theirs = tmp_path / "pid"
    theirs.mkdir()
    told: list[Names | None] = []

    def changed(names: Names | None) -> None:
        told.append(names)
        loop.stop()

    def wait() -> None:
        alarm = loop.later(30, lambda: pytest.fail(f"nobody has told anything after {told}"))
        loop._running = True
        loop.run()
        alarm.cancel()

    events = DirectoryEvents(loop, tmp_path / "run" / "state", changed, [theirs])
    wait()
    events.complete()  # nothing has happened
    (theirs / "web1").touch()
    wait()
    assert told == [None, frozenset()]
    theirs.rename(tmp_path / "old")
    wait()
    theirs.mkdir()
    events.complete()
    wait()
    (theirs / "web2").touch()
    wait()
    assert told == [None, frozenset(), None, None, frozenset()]
    events.close()


def test_a_directory_that_was_removed_and_made_anew(seen: Seen) -> None:
    for name in ("a", "b", "c"):
        put(seen.directory, name)
        seen.wait(name)
        (seen.directory / name).unlink()
        seen.directory.rmdir()
        seen.wait()
    put(seen.directory, "d")
    seen.wait("d")


def test_a_directory_that_was_put_in_its_place(seen: Seen) -> None:
    other = seen.directory.parent / "other"
    put(other, "a")
    seen.directory.rename(seen.directory.parent / "old")
    other.rename(seen.directory)
    seen.wait("a")
    put(seen.directory, "b")
    seen.wait("a", "b")


def test_after_the_parent_has_gone_renewing_finds_the_new_one(seen: Seen) -> None:
    seen.directory.rmdir()
    seen.directory.parent.rmdir()
    seen.events.renew()
    put(seen.directory, "a")
    seen.wait("a")
