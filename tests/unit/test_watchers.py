"""Events reach whoever watches, and nobody waits for a watcher."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from kvmifup.core.model import Phase
from kvmifup.core.ops import Route
from kvmifup.runs.apply import Change
from kvmifup.runs.outcome import Outcome
from kvmifup.tell import syslog, watchers

from .samples import ROUTED

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
        for number in range(500):
            watchers.tell(tmp_path, "kvm-ifup-pre", {"number": number, "filler": "x" * 500})
        assert next(events)["number"] == 0


def test_what_is_not_an_event_is_left_out(tmp_path: Path) -> None:
    with watchers.watching(tmp_path) as events:
        (path,) = (tmp_path / "watch").iterdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"{half", str(path))
        watchers.tell(tmp_path, "kvm-ifup-pre", EVENT)
        assert without_time(next(events)) == EVENT


def test_a_watcher_learns_how_many_events_it_has_missed(tmp_path: Path) -> None:
    told = 200
    with watchers.watching(tmp_path) as events:
        for number in range(told):
            watchers.tell(tmp_path, "kvm-ifup-pre", {"number": number, "filler": "x" * 500})
        numbers = [next(events)["number"] for _ in range(5)]
        for _ in range(2):  # now there is room again
            watchers.tell(tmp_path, "kvm-ifup-pre", {"number": told})
        while (event := next(events))["number"] != told:
            numbers.append(event["number"])
        assert numbers == list(range(len(numbers)))
        assert event["missed"] == told - len(numbers) > 0
        assert "missed" not in next(events)


def test_an_event_of_thousands_of_ops_says_how_many_it_leaves_out(tmp_path: Path) -> None:
    changes = tuple(Change(Route(f"2001:db8::{n:x}/128", "tap0", 254, True), False, True) for n in range(4000))
    with watchers.watching(tmp_path) as events:
        outcome = Outcome(ROUTED.label, ROUTED, "tap0", Phase.POST, changes=changes)
        watchers.run(tmp_path, "kvm-ifup-post", [outcome], [], 0.5, "hook", None)
        event = next(events)
    assert len(event["ops"]) + event["more"] == 4000
    assert "4000 changed" in event["what"]


def test_the_systems_log_is_told_what_it_did_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syslog, "SOCKET", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(syslog.SOCKET)
        log.setblocking(False)
        for number in range(500):
            syslog.write("kvm-ifupd", syslog.INFO, f"line {number}")
        taken = 0
        with contextlib.suppress(BlockingIOError):
            while log.recv(4096):
                taken += 1
        syslog.write("kvm-ifupd", syslog.INFO, "after")
        assert log.recv(4096).endswith(b": %d lines lost: this log did not take them" % (500 - taken))
        assert log.recv(4096).endswith(b": after")
