"""One run at a time, and no two that wait for each other."""

from __future__ import annotations

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


@pytest.mark.usefixtures("caught_signals")
def test_a_signal_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmifup.core import signals

    def sleep(_seconds: float) -> None:
        assert not signals._arrived, "nobody looked for the signal"
        signals._arrived.append(15)

    monkeypatch.setattr("kvmifup.runs.locks.time.sleep", sleep)
    with (
        locks.hold(tmp_path, ["tap.a"], 0.0),
        pytest.raises(InterruptedRun),
        locks.hold(tmp_path, ["tap.a"], 3600.0),
    ):
        pass
