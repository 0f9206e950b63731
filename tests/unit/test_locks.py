"""One run at a time, and no two that wait for each other."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmifup.core.errors import InterruptedRun, LockTimeoutError
from kvmifup.runs import locks


def test_locks_are_taken_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that took them in different orders could wait for each other."""
    taken: list[str] = []
    monkeypatch.setattr(locks, "_wait", lambda _descriptor, name, *_: taken.append(name))
    with locks.hold(tmp_path, ["uplink", "tap.b", "tap.a"], 0.0):
        assert taken == ["tap.a", "tap.b", "uplink"]


def test_a_held_lock_is_refused_and_free_afterwards(tmp_path: Path) -> None:
    with locks.hold(tmp_path, ["tap.a", "uplink"], 0.0):
        with pytest.raises(LockTimeoutError, match=r"tap\.a") as caught, locks.hold(tmp_path, ["tap.a"], 0.0):
            pass
        assert caught.value.code == 75
        with locks.hold(tmp_path, ["tap.b"], 0.0):
            pass
    with locks.hold(tmp_path, ["tap.a", "uplink"], 0.0):
        pass


def test_what_was_taken_is_freed_when_another_is_held(tmp_path: Path) -> None:
    with locks.hold(tmp_path, ["uplink"], 0.0):
        with pytest.raises(LockTimeoutError), locks.hold(tmp_path, ["tap.a", "uplink"], 0.0):
            pass
        with locks.hold(tmp_path, ["tap.a"], 0.0):
            pass


def test_a_tap_named_like_the_shared_lock_has_its_own(tmp_path: Path) -> None:
    with locks.hold(tmp_path, [locks.UPLINK], 0.0), locks.hold(tmp_path, [locks.of_tap("uplink")], 0.0):
        pass


@contextmanager
def held_by_another(directory: Path, name: str) -> Iterator[Path]:
    """Another process has the lock *name*; yields its file."""
    with locks.hold(directory, [name], 0.0):
        pass
    file = locks.path(directory, name)
    with file.open("a") as holding:
        fcntl.flock(holding, fcntl.LOCK_EX)
        yield file


@pytest.mark.usefixtures("caught_signals")
@pytest.mark.parametrize("first", [True, False], ids=["first in line", "behind another"])
def test_a_signal_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    from kvmifup.core import signals

    def sleep(*_: object) -> None:
        assert not signals._arrived, "nobody looked for the signal"
        signals._arrived.append(15)

    monkeypatch.setattr("kvmifup.runs.locks.time.sleep", sleep)
    monkeypatch.setattr("kvmifup.runs.locks.threading.Event.wait", sleep)
    with (
        held_by_another(tmp_path, "tap.a") if first else locks.hold(tmp_path, ["tap.a"], 0.0),
        pytest.raises(InterruptedRun),
        locks.hold(tmp_path, ["tap.a"], 3600.0),
    ):
        pass


def test_threads_get_a_lock_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    order: list[int] = []
    threads = []

    def take(number: int) -> None:
        with locks.hold(tmp_path, ["uplink"], 60.0):
            order.append(number)

    with held_by_another(tmp_path, "uplink") as file:
        for number in range(30):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(locks._lines.get(str(file), ())) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(60.0)
    assert order == list(range(30))
    assert not locks._lines


def test_only_the_first_of_those_in_line_asks_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    ask = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX:
            asked.add(threading.current_thread().name)
        ask(descriptor, how)

    def give_up() -> None:
        with pytest.raises(LockTimeoutError), locks.hold(tmp_path, ["uplink"], 0.05):
            pass

    monkeypatch.setattr("kvmifup.runs.locks.fcntl.flock", flock)
    with locks.hold(tmp_path, ["uplink"], 0.0):
        asked.clear()
        threads = [threading.Thread(target=give_up) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert not asked
        with pytest.raises(LockTimeoutError), locks.hold(tmp_path, ["uplink"], 0.0):  # who waits for nobody asks
            pass
        assert asked == {threading.current_thread().name}


@pytest.mark.parametrize("changes", [0, 1, 3, 100])
def test_the_timeout_is_of_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """As long as the lock changes hands somebody is served, and waiting is worth while; but not without end."""
    now, holders, timeout = 0.0, 0, 10.0
    with held_by_another(tmp_path, "uplink") as file:

        def sleep(_seconds: float) -> None:
            nonlocal now, holders
            now += timeout - 1
            if holders < changes:
                holders += 1
                file.write_bytes(b"%16d" % holders)

        monkeypatch.setattr("kvmifup.runs.locks.time.monotonic", lambda: now)
        monkeypatch.setattr("kvmifup.runs.locks.time.sleep", sleep)
        with pytest.raises(LockTimeoutError) as caught, locks.hold(tmp_path, ["uplink"], timeout):
            pass
    expected = min((timeout - 1) * changes + timeout, locks.MOST * timeout)
    assert expected <= now <= expected + timeout
    assert str(caught.value).startswith("other runs have" if changes == 100 else "another run has")
