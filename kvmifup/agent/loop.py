"""One event loop: descriptors, timers, and work that threads do for it.

Not asyncio. It was tried: a guest that arrives is wired 35 to 50 µs later than with `selectors`. A run is blocking code
anyway: it waits for locks, for netlink, for a bridge that learns. At an arrival such code runs in the loop's own
thread, and there pyroute2 0.9, which writes other people's policy rules, does not work inside a running asyncio loop.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
THREADS = 64
ROOM = 64  # timers that may wait before those that were cancelled are looked for


@dataclass(order=True)
class Timer:
    """Something to do at *due*, in seconds of the monotonic clock; *action* None once it is cancelled."""

    due: float
    number: int
    action: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        """Do not do it."""
        self.action = None


class Loop:
    """Runs what is due, one thing at a time, in the thread that called `run`.

    Some sources come first: before anything else is begun, all of these have their turn.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._first = selectors.EpollSelector()
        self._timers: list[Timer] = []
        self._room = ROOM
        self._numbers = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Hooks may all wait for one lock: what else there is to do must not wait with them.
        self._hooks = ThreadPoolExecutor(THREADS, "hook")
        self._threads = ThreadPoolExecutor(THREADS, "worker")
        for pool in (self._hooks, self._threads):
            pool.submit(int).result()  # from now on it has a thread, whatever the node may lack later
        self._running = True
        self._broken: BaseException | None = None
        self.working = 0
        self.watch(self._woken, self._wake)
        self.watch(self._first, lambda: None)  # they have had their turn before
        # A signal that another thread gets does not end our wait; what Python writes here does.
        self._signalled, self._tell = socket.socketpair()
        for end in (self._signalled, self._tell):
            end.setblocking(False)
        self.watch(self._signalled, lambda: self._signalled.recv(4096))

    def watch(self, source: Any, action: Callable[[], object], *, first: bool = False) -> None:
        """Call *action* whenever *source*, a descriptor or a socket, has something to read.

        *first*: before anything else that is to be done.
        """
        (self._first if first else self._selector).register(source, selectors.EVENT_READ, action)

    def __contains__(self, source: Any) -> bool:
        """Whether *source* is watched."""
        return source in self._selector.get_map()

    def ignore(self, source: Any) -> None:
        """Watch *source* no longer."""
        (self._first if source in self._first.get_map() else self._selector).unregister(source)

    def on_signal(self, number: int, action: Callable[[], None]) -> None:
        """Call *action* in the loop after signal *number* has come; once, if it came several times meanwhile."""
        signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        # Not by what can be read from there: when many signals come it gets full, and one of them could be lost.
        signal.signal(number, lambda _number, _frame: self.soon(action))

    def later(self, delay: float, action: Callable[[], None]) -> Timer:
        """Call *action* in *delay* seconds."""
        timer = Timer(time.monotonic() + delay, next(self._numbers), action)
        if len(self._timers) >= self._room:  # by now many may be cancelled, of those that wait an hour for a guest
            self._timers = [one for one in self._timers if one.action]
            heapq.heapify(self._timers)
            self._room = max(ROOM, 2 * len(self._timers))
        heapq.heappush(self._timers, timer)
        return timer

    def soon(self, action: Callable[[], None]) -> None:
        """Call *action* in the loop. For other threads."""
        self._soon.append(action)
        if self._woken >= 0:
            os.eventfd_write(self._woken, 1)

    def work(self, task: Callable[[], T], then: Callable[[T], None] | None = None, *, hook: bool = False) -> None:
        """Let a thread do *task*, one of those for hooks or of the others, and then the loop *then* with its result.

        What *task* raises, `run` raises.
        """

        def in_thread() -> None:
            try:
                result = task()
            except BaseException as error:
                self._broken = error
                self.soon(self.stop)
            else:
                self.soon(lambda: done(result))

        def done(result: T) -> None:
            self.working -= 1
            if then:
                then(result)

        self.working += 1
        with suppress(RuntimeError):  # no memory for one more thread: those that there are do it
            (self._hooks if hook else self._threads).submit(in_thread)

    def stop(self) -> None:
        """Let `run` return."""
        self._running = False

    def run(self) -> None:
        """Until `stop` is called."""
        while self._running:
            # One event of each source, then timers: whoever sends a lot cannot keep the others from their turn.
            for key, _ in self._selector.select(self._wait()):
                self._serve_first()
                self._serve(self._selector, key)
            now = time.monotonic()
            while self._timers and self._timers[0].due <= now:
                timer = heapq.heappop(self._timers)
                if timer.action:
                    self._serve_first()
                if timer.action:
                    timer.action()
        if self._broken:
            raise self._broken

    def _serve_first(self) -> None:
        """One event of each source that comes first."""
        for key, _ in self._first.select(0):
            self._serve(self._first, key)

    def _serve(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        # An earlier event may have ended it, and even given its number to another one.
        if selector.get_map().get(key.fd) is key:
            key.data()

    def close(self) -> None:
        """Wait for the threads, then let go of everything."""
        self._hooks.shutdown()
        self._threads.shutdown()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._first.close()
        self._signalled.close()
        self._tell.close()
        woken, self._woken = self._woken, -1
        os.close(woken)

    def _wait(self) -> float | None:
        while self._timers and self._timers[0].action is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].due - time.monotonic()) if self._timers else None

    def _wake(self) -> None:
        os.eventfd_read(self._woken)
        for _ in range(len(self._soon)):
            self._serve_first()
            self._soon.popleft()()


class Timers:
    """At most one timer for each purpose."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._timers: dict[str, Timer] = {}

    def set(self, purpose: str, delay: float, action: Callable[[], None]) -> None:
        """Call *action* in *delay* seconds, instead of what was set for *purpose* before."""
        if earlier := self._timers.get(purpose):
            earlier.cancel()
        self._timers[purpose] = self._loop.later(delay, action)

    def cancel(self) -> None:
        """Cancel all of them."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()


class Settling:
    """Calls *action* with True once all has been quiet for *quiet* seconds after something was stirred up.

    Where it does not get quiet, it calls it with False, less and less often: after `FIRST` seconds, then after twice as
    many, up to `LONGEST`; and with True in the end. One timer, however often it is stirred.
    """

    FIRST, LONGEST = 1.0, 8.0

    def __init__(self, loop: Loop, quiet: float, action: Callable[[bool], None]) -> None:
        self._loop = loop
        self._quiet = quiet
        self._action = action
        self._timer: Timer | None = None
        self._patience = self.FIRST
        self._first = self._last = 0.0

    def stir(self) -> None:
        """Something has changed."""
        self._last = time.monotonic()
        if self._timer is None:
            self._first = self._last
            self._timer = self._loop.later(min(self._quiet, self._patience), self._due)

    def _due(self) -> None:
        now = time.monotonic()
        quiet, late = self._last + self._quiet - now, self._first + self._patience - now
        if quiet > 0 and late > 0:
            self._timer = self._loop.later(min(quiet, late), self._due)
            return
        if quiet <= 0:
            self._timer, self._patience = None, self.FIRST
        else:
            self._first, self._patience = now, min(2 * self._patience, self.LONGEST)
            self._timer = self._loop.later(self._quiet, self._due)
        self._action(quiet <= 0)


class Paced:
    """Calls *action* when it is asked for, but not again in the next *pause* seconds: then it is called after them."""

    def __init__(self, loop: Loop, pause: float, action: Callable[[], None]) -> None:
        self._loop = loop
        self._pause = pause
        self._action = action
        self._timer: Timer | None = None
        self._last = -pause

    def ask(self) -> None:
        """Call it, now or later; once, however often it is asked for until then."""
        if self._timer is None:
            wait = self._last + self._pause - time.monotonic()
            if wait > 0:
                self._timer = self._loop.later(wait, self._call)
            else:
                self._call()

    def _call(self) -> None:
        self._timer = None
        self._last = time.monotonic()
        self._action()


class OneAtATime(Generic[T]):
    """A job for a thread that is never done twice at the same time: who asks meanwhile has it done once more.

    When it is its turn, the loop calls *begin*, which returns what the thread has to do, or None if there is
    nothing to do. With the result of that, the loop calls *then*. Not for other threads.
    """

    def __init__(self, loop: Loop, begin: Callable[[], Callable[[], T] | None], then: Callable[[T], None]) -> None:
        self._loop = loop
        self._begin = begin
        self._then = then
        self._asked = False
        self._timer: Timer | None = None
        self.busy = False

    def ask(self) -> None:
        """Do it now; once more when it is done, if it is being done."""
        self._asked = True
        self._next()

    def ask_in(self, delay: float) -> None:
        """Do it in *delay* seconds. Asking again before that neither postpones it nor has it done twice."""
        if self._timer is None:
            self._timer = self._loop.later(delay, self._due)

    def _due(self) -> None:
        self._timer = None
        self.ask()

    def _next(self) -> None:
        if self._asked and not self.busy:
            self._asked = False
            task = self._begin()
            if task:
                self.busy = True
                self._loop.work(task, self._done)

    def _done(self, result: T) -> None:
        self._then(result)
        self.busy = False
        self._next()
