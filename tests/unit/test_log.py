"""The agent's log: nobody waits for who reads it, and nobody can fill it."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from kvmifup.agent import log
from kvmifup.agent.log import BURST, WAITING, Log
from kvmifup.tell import syslog


class Pipe:
    """A pipe, with as little room as there can be."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.reader, False)
        self.seen = b""

    def said(self) -> list[str]:
        """All whole lines so far."""
        with suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                self.seen += data
        return self.seen.decode().rpartition("\n")[0].splitlines()

    def until(self, word: str) -> list[str]:
        """All lines up to one with *word*."""
        end = time.monotonic() + 30
        while not any(word in line for line in self.said()):
            assert time.monotonic() < end, self.said()
            time.sleep(0.001)
        return self.said()


@pytest.fixture
def pipe() -> Pipe:
    """It stays open: a log's thread outlives its test, and must not write to what gets the number next."""
    return Pipe()


def test_lines_come_in_their_order(pipe: Pipe) -> None:
    one = Log("agent", pipe.writer)
    for number in range(BURST):
        assert one.say(f"line {number}")
    one.close()
    assert pipe.said() == [f"agent: line {number}" for number in range(BURST)]


def test_a_line_stays_one(pipe: Pipe) -> None:
    one = Log("agent", pipe.writer)
    one.say("two\nlines \x1b \udcff")
    one.close()
    assert pipe.said() == [r"agent: two\nlines \x1b \udcff"]


def test_a_kind_of_line_has_its_allowance(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "REPORT", 0.05)
    one = Log("agent", pipe.writer)
    allowed = [one.say(f"claimed {number}", kind="claims") for number in range(1000)]
    assert (allowed[:BURST], sum(allowed)) == ([True] * BURST, BURST)
    # The others are not kept from saying what they have to.
    assert one.say("armed", kind="web1")
    assert one.say("claimed and failed", syslog.ERROR, "claims")
    said = pipe.until("left out")
    assert said[-1] == f"agent: {1000 - BURST} lines left out, the last of them: claimed 999"


def test_a_flood_of_kinds_is_summed_up(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "BURST", 1)
    one = Log("agent", pipe.writer)
    reader = threading.Thread(target=pipe.until, args=("of other kinds",))
    reader.start()
    for number in range(300):
        one.say("first", kind=str(number))
        one.say("second", kind=str(number))
    one.close(10)
    reader.join()
    assert sum("left out, the last of them: second" in line for line in pipe.said()) == log.REPORTED
    assert pipe.said()[-1] == f"agent: {300 - log.REPORTED} lines of other kinds left out"


def test_the_allowance_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    allowance = log.Allowance(100.0)
    assert sum(allowance.take(100.0) for _ in range(2 * BURST)) == BURST
    assert sum(allowance.take(100.0 + 5 * log.EVERY) for _ in range(BURST)) == 5


def test_kinds_that_are_over_are_forgotten(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "KINDS", 10)
    monkeypatch.setattr(log, "EVERY", 1e-9)
    one = Log("agent", pipe.writer)
    for number in range(200):
        one.say("x", kind=str(number))
    assert len(one._kinds) <= 11


def test_who_does_not_read_holds_nobody_up(pipe: Pipe) -> None:
    one = Log("agent", pipe.writer)
    for number in range(3 * WAITING):
        one.write(f"line {number:05} {'x' * 100}")
    one.close(0.1)
    said = pipe.until("left out")
    numbers = [int(line.split()[2]) for line in said if "left out" not in line]
    assert numbers == sorted(set(numbers))
    assert numbers[:WAITING] == list(range(WAITING))  # the first ones; most of what came last is left out
    (left_out,) = [line for line in said if "left out" in line]
    assert int(left_out.split()[1]) == 3 * WAITING - len(numbers) > 0
    one.write("and on it goes")
    pipe.until("and on it goes")


def test_one_that_somebody_has_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    one = Log("agent", pipe.writer)
    for number in range(WAITING):
        one.write(f"line {number:05} {'x' * 100}")
    assert len([line for line in pipe.until(f"line {WAITING - 1:05}") if "line" in line]) == WAITING


def test_one_that_nobody_reads_any_more_does_not_matter(pipe: Pipe) -> None:
    one = Log("agent", pipe.writer)
    os.close(pipe.reader)
    for _ in range(10):
        one.say("x")
    one.close(10)
    assert one.say("y")


# --- without memory for a thread ------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No thread can be started, until the test calls this."""
    start = threading.Thread.start

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return lambda: monkeypatch.setattr(threading.Thread, "start", start)


def test_without_a_thread_lines_are_written_at_once(pipe: Pipe, threads: Callable[[], None]) -> None:
    one = Log("agent", pipe.writer)
    assert one.say("first")
    assert pipe.said() == ["agent: first"]
    threads()
    assert one.say("second")
    one.close()
    assert pipe.said() == ["agent: first", "agent: second"]


def test_without_a_thread_who_does_not_read_holds_nobody_up(pipe: Pipe, threads: Callable[[], None]) -> None:
    one = Log("agent", pipe.writer)
    lines = [f"line {number:03} {'x' * 100}" for number in range(200)]
    begun = time.monotonic()
    for line in lines:
        one.write(line)
    one.close(0.05)
    assert time.monotonic() - begun < 30  # for 200 lines; who waits for a reader waits for ever
    # With the next line there is room for some more; and once there is memory, for the rest.
    some = pipe.said()
    assert 0 < len(some) < len(lines)
    one.write("more")
    assert len(pipe.said()) > len(some)
    threads()
    one.write("the end")
    assert [line.removeprefix("agent: ") for line in pipe.until("the end")] == [*lines, "more", "the end"]


def test_without_a_thread_a_line_longer_than_there_is_room_stays_whole(pipe: Pipe, threads: Callable[[], None]) -> None:
    one = Log("agent", pipe.writer)
    one.write("x" * 10_000)
    while not pipe.said():
        one.close(0.01)
    assert pipe.said() == ["agent: " + "x" * 10_000]


def test_without_a_thread_what_was_left_out_is_said(
    pipe: Pipe, threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "REPORT", 0.0)
    one = Log("agent", pipe.writer)
    for number in range(BURST + 1):
        one.say(f"{number}", kind="claims")
        pipe.said()
    assert pipe.said()[-1] == f"agent: 1 line left out, the last of them: {BURST}"
    os.close(pipe.reader)
    one.write("x")
    one.close(0.05)
