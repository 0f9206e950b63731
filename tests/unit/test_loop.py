"""The event loop: what is due, what threads bring, signals; one thing at a time, and nobody starves."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from kvmifup.agent.loop import THREADS, Loop, OneAtATime, Paced, Settling, Timers


class Clock:
    """The loop's time: it goes on only while the loop waits, and then at once to the next timer."""

    def __init__(self, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, wait = 1000.0, loop._wait

        def skip() -> float | None:
            self.now += wait() or 0.0
            return 0.0

        monkeypatch.setattr("kvmifup.agent.loop.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(loop, "_wait", skip)


@pytest.fixture
def clock(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """For timers that have nothing else to wait for."""
    return Clock(loop, monkeypatch)


def test_timers_run_in_the_order_in_which_they_are_due(loop: Loop) -> None:
    done: list[str] = []
    loop.later(0.02, lambda: done.append("late"))
    loop.later(0, lambda: done.append("first"))
    loop.later(-1, lambda: done.append("overdue"))
    loop.later(0, lambda: done.append("second"))
    loop.later(0.03, loop.stop)
    loop.run()
    assert done == ["overdue", "first", "second", "late"]


def test_a_cancelled_timer_does_nothing(loop: Loop) -> None:
    done: list[str] = []
    loop.later(0, lambda: done.append("cancelled")).cancel()
    timer = loop.later(0.01, lambda: done.append("cancelled"))
    loop.later(-1, timer.cancel)
    loop.later(0.02, loop.stop)
    loop.run()
    assert done == []


def test_cancelled_timers_take_no_room_and_the_others_run_in_their_order(loop: Loop, clock: Clock) -> None:
    done: list[int] = []
    for number in range(1000):
        loop.later(3600, lambda: done.append(-1)).cancel()
        if number % 100 == 0:
            loop.later(0.02 - number / 1e6, lambda number=number: done.append(number))  # type: ignore[misc]
    assert len(loop._timers) < 200
    loop.later(0.03, loop.stop)
    loop.run()
    assert done == [*range(900, -1, -100)]


def test_a_timer_may_set_another(loop: Loop) -> None:
    left = [5]

    def again() -> None:
        left[0] -= 1
        loop.later(0, again if left[0] else loop.stop)

    loop.later(0, again)
    loop.run()
    assert left == [0]


def test_work_is_done_in_a_thread_and_its_result_used_in_the_loop(loop: Loop) -> None:
    seen: list[object] = []
    here = threading.current_thread()

    def then(result: object) -> None:
        seen.extend([result, threading.current_thread() is here, loop.working])
        loop.stop()

    loop.work(lambda: threading.current_thread() is here, then)
    assert loop.working == 1
    loop.run()
    assert seen == [False, True, 0]


@pytest.mark.parametrize("hook", [True, False])
def test_what_work_raises_the_loop_raises(loop: Loop, hook: bool) -> None:
    """So that nobody waits for ever for a result."""

    def task() -> None:
        raise ZeroDivisionError("unforeseen")

    loop.work(task, lambda _: pytest.fail("there is no result"), hook=hook)
    with pytest.raises(ZeroDivisionError, match="unforeseen"):
        loop.run()


def test_hooks_that_all_wait_keep_no_other_work_from_being_done(loop: Loop) -> None:
    free = threading.Event()
    for _ in range(2 * THREADS):
        loop.work(free.wait, hook=True)
    done: list[bool] = []

    def then(_: object) -> None:
        done.append(free.is_set())
        free.set()
        loop.stop()

    loop.work(lambda: None, then)
    loop.run()
    assert done == [False]


@pytest.mark.parametrize("hook", [True, False])
def test_without_memory_for_another_thread_work_is_done_all_the_same(
    loop: Loop, hook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    done: list[int] = []

    def then(number: int) -> None:
        done.append(number)
        if len(done) == 5:
            loop.stop()

    for number in range(5):
        loop.work(partial(pow, number, 1), then, hook=hook)
    loop.run()
    assert (done, loop.working) == ([0, 1, 2, 3, 4], 0)


def test_soon_from_many_threads_loses_nothing(loop: Loop) -> None:
    done: list[int] = []

    def one(number: int) -> None:
        done.append(number)
        if len(done) == 1000:
            loop.stop()

    def many(start: int) -> None:
        for number in range(start, start + 100):
            loop.soon(lambda number=number: one(number))  # type: ignore[misc]

    threads = [threading.Thread(target=many, args=(100 * number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    loop.run()
    assert sorted(done) == list(range(1000))
    for thread in threads:
        thread.join()


def test_whoever_sends_all_the_time_keeps_no_timer_from_its_turn(loop: Loop) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"x")
    calls = [0]

    def never_empty() -> None:
        calls[0] += 1

    loop.watch(reading, never_empty)
    loop.later(0.01, loop.stop)
    loop.run()
    assert calls[0] > 0
    loop.ignore(reading)
    os.close(reading)
    os.close(writing)


def test_an_event_does_not_reach_whoever_got_its_descriptors_number_since(loop: Loop) -> None:
    """Two sources are ready; the first one's action ends the second and opens another, which gets the number."""
    pipes = [os.pipe() for _ in range(2)]
    for _, writing in pipes:
        os.write(writing, b"x")
    wrong: list[int] = []
    ended: list[int] = []

    def action(mine: int, other: int) -> None:
        os.read(mine, 1)
        if not ended:
            ended.append(other)
            loop.ignore(other)
            kept = os.dup(other)
            os.close(other)
            silent, _ = os.pipe()
            if silent != other:
                os.dup2(silent, other)
            loop.watch(other, lambda: wrong.append(other))
            os.close(kept)
        loop.later(0.01, loop.stop)

    first, second = pipes[0][0], pipes[1][0]
    loop.watch(first, lambda: action(first, second))
    loop.watch(second, lambda: action(second, first))
    loop.run()
    assert len(ended) == 1
    assert wrong == []


def test_a_signal_runs_its_action_in_the_loop(loop: Loop) -> None:
    seen: list[bool] = []
    here = threading.current_thread()
    loop.on_signal(signal.SIGHUP, lambda: seen.append(threading.current_thread() is here))
    loop.on_signal(signal.SIGTERM, loop.stop)
    os.kill(os.getpid(), signal.SIGHUP)
    loop.later(0.01, lambda: os.kill(os.getpid(), signal.SIGTERM))
    loop.run()
    assert seen == [True]


def test_a_signal_ends_the_wait_also_when_another_thread_gets_it(loop: Loop) -> None:
    loop.on_signal(signal.SIGTERM, loop.stop)
    main = threading.main_thread().ident
    assert main is not None

    def elsewhere() -> None:
        me = threading.get_ident()
        assert me != main
        signal.pthread_kill(me, signal.SIGTERM)

    loop.later(0, threading.Thread(target=elsewhere).start)
    loop.run()


def test_among_thousands_of_signals_none_is_lost(loop: Loop) -> None:
    """The loop is busy meanwhile, so whatever tells of them is full."""
    heard = [0]

    def count() -> None:
        heard[0] += 1

    def busy() -> None:
        for _ in range(3000):
            os.kill(os.getpid(), signal.SIGIO)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.on_signal(signal.SIGIO, count)
    loop.on_signal(signal.SIGTERM, loop.stop)
    loop.later(0, busy)
    loop.run()
    assert heard[0] > 0


def test_a_signal_after_the_end_does_nothing() -> None:
    before = signal.getsignal(signal.SIGHUP)
    loop = Loop()
    loop.on_signal(signal.SIGHUP, lambda: pytest.fail("after the end"))
    loop.close()
    os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


# --- one at a time ----------------------------------------------------------------------------------------


class Job:
    """A job that stays with its thread until it is let go, and how often it was begun and done."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.free = threading.Semaphore(0)
        self.begun = 0
        self.done: list[int] = []
        self.at_once = 0
        self.most_at_once = 0
        self.one = OneAtATime(loop, self.begin, self.then)

    def begin(self) -> Callable[[], int]:
        """In the loop."""
        self.begun += 1
        return partial(self.task, self.begun)

    def task(self, number: int) -> int:
        """In a thread."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.free.acquire(timeout=30)
        self.at_once -= 1
        return number

    def then(self, number: int) -> None:
        """In the loop."""
        assert self.one.busy
        self.done.append(number)


def until_idle(loop: Loop, one: OneAtATime[Any]) -> None:
    """Run *loop* until nothing is done, nor will be."""

    def look() -> None:
        if one.busy:
            loop.later(0.001, look)
        else:
            loop.stop()

    loop.later(0, look)
    loop._running = True
    loop.run()


def test_who_asks_while_it_is_done_has_it_done_once_more_and_once_only(loop: Loop) -> None:
    job = Job(loop)
    assert not job.one.busy
    for _ in range(5):
        job.one.ask()
    assert (job.begun, job.one.busy) == (1, True)
    job.free.release(10)
    until_idle(loop, job.one)
    assert (job.begun, job.done, job.most_at_once) == (2, [1, 2], 1)
    job.one.ask()
    until_idle(loop, job.one)
    assert job.done == [1, 2, 3]


def test_what_is_done_with_a_result_may_ask_for_the_next(loop: Loop) -> None:
    queue = ["a", "b", "c"]
    done: list[str] = []

    def begin() -> Callable[[], str] | None:
        return partial(str.upper, queue.pop(0)) if queue else None

    def then(result: str) -> None:
        done.append(result)
        one.ask()

    one = OneAtATime(loop, begin, then)
    one.ask()
    until_idle(loop, one)
    assert (done, queue) == (["A", "B", "C"], [])


def test_nothing_to_do_is_not_busy_and_may_be_asked_for_again(loop: Loop) -> None:
    answers: list[Callable[[], int] | None] = [None, lambda: 7]
    one: OneAtATime[int] = OneAtATime(loop, lambda: answers.pop(0), lambda result: done.append(result))
    done: list[int] = []
    one.ask()
    assert not one.busy
    one.ask()
    until_idle(loop, one)
    assert done == [7]


def test_asking_within_the_delay_does_not_put_it_off(loop: Loop) -> None:
    job = Job(loop)
    job.free.release(10)
    for expected in (1, 2):
        begun = time.monotonic()

        def again(expected: int = expected) -> None:
            if job.begun == expected:
                loop.stop()
            else:
                job.one.ask_in(0.05)
                loop.later(0.001, again)

        again()
        loop._running = True
        loop.run()
        assert time.monotonic() - begun >= 0.05
        until_idle(loop, job.one)
    assert job.done == [1, 2]


# --- timers of one owner ------------------------------------------------------------------------------------


def test_a_timer_replaces_the_one_for_the_same_purpose_and_no_other(loop: Loop) -> None:
    done: list[str] = []
    timers = Timers(loop)
    for number in range(1000):
        timers.set("flapping", 0.01, partial(done.append, f"flapping {number}"))
    timers.set("other", 0.01, partial(done.append, "other"))
    assert len(timers._timers) == 2
    loop.later(0.03, loop.stop)
    loop.run()
    assert done == ["flapping 999", "other"]


def test_cancelled_timers_do_nothing_and_new_ones_do(loop: Loop) -> None:
    done: list[str] = []
    timers = Timers(loop)
    timers.set("a", 0, partial(done.append, "a"))
    timers.set("b", 0, partial(done.append, "b"))
    timers.cancel()
    timers.set("a", 0, partial(done.append, "a again"))
    loop.later(0.02, loop.stop)
    loop.run()
    assert done == ["a again"]


# --- until it is quiet --------------------------------------------------------------------------------------


def stirring(loop: Loop, clock: Clock, settling: Settling, every: float, seconds: float) -> None:
    """Stir again and again, then run on for a while."""
    end = clock.now + seconds

    def again() -> None:
        if clock.now < end:
            settling.stir()
            loop.later(every, again)

    again()
    loop.later(seconds + 0.3, loop.stop)
    loop.run()


def test_what_is_stirred_once_or_often_settles_once(loop: Loop, clock: Clock) -> None:
    done: list[bool] = []
    settling = Settling(loop, 0.1, done.append)
    for _ in range(1000):
        settling.stir()
    assert len(loop._timers) == 1
    stirring(loop, clock, settling, 0.01, 0.2)
    assert done == [True]


def test_where_it_does_not_get_quiet_it_acts_less_and_less_often(
    loop: Loop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settling, "FIRST", 0.1)
    monkeypatch.setattr(Settling, "LONGEST", 0.4)
    done: list[float] = []
    calm: list[bool] = []

    def act(quiet: bool) -> None:
        calm.append(quiet)
        done.append(clock.now)

    settling = Settling(loop, 0.1, act)
    stirring(loop, clock, settling, 0.005, 2.0)
    assert calm == [*[False] * (len(calm) - 1), True]
    done.pop()
    pauses = [later - earlier for earlier, later in itertools.pairwise(done)]
    assert pauses[0] >= 0.19
    assert all(pause >= 0.39 for pause in pauses[1:])
    assert len(loop._timers) <= 2


# --- what comes first -----------------------------------------------------------------------------------


def test_what_comes_first_is_served_before_all_that_can_wait(loop: Loop) -> None:
    """Whatever it is that waits: another source, what threads have brought, or a timer."""
    done: list[str] = []
    first, tell_first = os.pipe()
    other, tell_other = os.pipe()

    def serve() -> None:
        done.append(os.read(first, 1).decode())

    def wait(what: str) -> None:
        done.append(what)
        os.write(tell_first, what[0].upper().encode())  # somebody comes while there is more to do

    def read_other() -> None:
        os.read(other, 1)
        wait("other")

    loop.watch(other, read_other)
    loop.watch(first, serve, first=True)
    os.write(tell_other, b"!")
    for what in ("soon", "then"):
        loop.soon(lambda what=what: wait(what))  # type: ignore[misc]
    for what in ("late", "later"):
        loop.later(0, lambda what=what: wait(what))  # type: ignore[misc]
    loop.later(0.05, loop.stop)
    os.write(tell_first, b"!")
    loop.run()
    assert done[0] == "!"
    waited = [what for what in done if len(what) > 1]
    assert sorted(waited) == ["late", "later", "other", "soon", "then"]
    assert done[1:] == [said for what in waited for said in (what, what[0].upper())]
    loop.ignore(first)
    os.write(tell_first, b"!")
    loop.later(0.01, loop.stop)
    loop._running = True
    loop.run()
    assert len(done) == 11
    for descriptor in (first, tell_first, other, tell_other):
        os.close(descriptor)


def test_who_comes_first_again_and_again_leaves_the_others_their_turn(loop: Loop) -> None:
    turns = [0]
    ready, tell = os.pipe()
    os.write(tell, b"!")  # never read

    def count() -> None:
        turns[0] += 1

    loop.watch(ready, count, first=True)
    loop.later(0.01, loop.stop)
    loop.run()
    assert turns[0] > 0
    for descriptor in (ready, tell):
        os.close(descriptor)


def test_what_is_paced_is_called_at_once_and_then_once_for_all(loop: Loop, clock: Clock) -> None:
    calls: list[float] = []
    paced = Paced(loop, 0.125, lambda: calls.append(clock.now))
    paced.ask()
    assert len(calls) == 1
    for _ in range(10):
        paced.ask()
    assert len(calls) == 1
    loop.later(0.5, loop.stop)
    loop.run()
    assert calls == [1000.0, 1000.125]
