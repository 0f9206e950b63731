"""Events reach whoever watches, and nobody waits for a watcher."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from kvmifup.tell import watchers

EVENT = {"nic": "web1/0 (tap0)", "what": "armed"}


def without_time(event: dict[str, Any]) -> dict[str, Any]:
    """What an event says, beside when."""
    assert event.pop("at") > 0
    assert event.pop("program") == "kvm-ifup-pre"
    return event


def test_every_watcher_gets_every_event(tmp_path: Path) -> None:
    with watchers.watching(tmp_path) as events:
        watchers.tell(tmp_path, "kvm-ifup-pre", EVENT)
        watchers.tell(tmp_path, "kvm-ifup-pre", {"label": "second"})
        assert without_time(next(events)) == EVENT
        assert without_time(next(events)) == {"label": "second"}
    assert list((tmp_path / "watch").iterdir()) == []


def test_with_no_watcher_nothing_happens(tmp_path: Path) -> None:
    watchers.tell(tmp_path, "kvm-ifup-pre", EVENT)
    assert list(tmp_path.iterdir()) == []


def test_only_root_may_tell(tmp_path: Path) -> None:
    with watchers.watching(tmp_path):
        assert (tmp_path / "watch").stat().st_mode & 0o777 == 0o700


def test_a_watcher_that_was_killed_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "watch").mkdir()
    dead = tmp_path / "watch/99.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(dead))
    with watchers.watching(tmp_path) as events:
        watchers.tell(tmp_path, "kvm-ifup-pre", EVENT)
        assert without_time(next(events)) == EVENT
    assert not dead.exists()


def test_a_watcher_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    with watchers.watching(tmp_path) as events:
        for number in range(5000):
            watchers.tell(tmp_path, "kvm-ifup-pre", {"number": number, "filler": "x" * 500})
        assert next(events)["number"] == 0


def test_what_is_not_an_event_is_left_out(tmp_path: Path) -> None:
    with watchers.watching(tmp_path) as events:
        (path,) = (tmp_path / "watch").iterdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"{half", str(path))
        watchers.tell(tmp_path, "kvm-ifup-pre", EVENT)
        assert without_time(next(events)) == EVENT
