"""A guest that arrives: its tap is armed, post is prepared, and its first frame has post done.

A guest that is to be asked for its addresses has those wired at once that it answers for; the rest follows (`late`).
"""

from __future__ import annotations

import math
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice

from kvmifup.agent.announcements import Announcements
from kvmifup.agent.late import ASK_AGAIN, Late, LateAnswers
from kvmifup.agent.loop import Loop
from kvmifup.agent.preparing import RECHECK, Preparations
from kvmifup.agent.runner import Runner
from kvmifup.agent.suspects import Handed, Key, ask
from kvmifup.agent.taps import State, TapRecord, Taps
from kvmifup.core.errors import KvmIfupError, LockTimeoutError, as_ours
from kvmifup.core.records import record
from kvmifup.node import frames, sockets
from kvmifup.runs import clock
from kvmifup.runs.arriving import Arriving, PreparedArrival, arrive, arrive_wholly
from kvmifup.runs.moves import limited, run_post
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session
from kvmifup.tell import syslog

FRAMES = 64  # of one guest at a time, so that one that sends a lot keeps nobody from their turn
CROWD = 0.2  # seconds between two guests that come one after the other

ASK_LAST = 200.0  # seconds between the last two questions for a guest that has left

Result = Outcome | KvmIfupError | None  # of post


@record
class Arrival:
    """A guest that has arrived on *tap*: *frame* was its first, and *sent* when.

    *only*: for these of its addresses it has answered, None if it need not be asked for any other. *listener* is for
    those that follow.
    """

    tap: TapRecord
    frame: str
    sent: float
    only: frozenset[str] | None = None
    listener: socket.socket | None = None


@record
class Begun:
    """What has been done for a guest, in *session*, and announced: that took *seconds*, until *done*.

    *stack* lets go of the session.
    """

    arriving: Arriving
    session: Session
    stack: ExitStack
    seconds: float
    done: float  # by the monotonic clock


def listen(runner: Runner, handed: Handed, began: float, tap: TapRecord) -> None:
    """In a thread: arm *tap*, unless its time is up. This comes before post is prepared, so that no frame gets lost.

    *began*: when this agent was started, by the clock of `runs.clock`. Before that, nobody may have listened.
    """
    if time_left(runner, tap) <= 0 or not tap.is_there():  # a new tap of that name is another guest's
        return
    try:
        handed_over = handed.pop((tap.ifindex, tap.nic.mac), None)
        tap.arm(handed_over or sockets.guest_listener(tap.name, tap.nic.mac))
    except OSError as error:
        if tap.complaint != error.strerror and tap.is_there():
            tap.complaint = error.strerror or ""
            runner.say(f"cannot listen: {error.strerror}", tap.nic.label, syslog.ERROR)
        return
    # The guest may have arrived meanwhile: it is asked for a frame. And who is to be asked for its addresses finds the
    # question in its tap when it arrives.
    if tap.doubtful or tap.reached < began or tap.nic.to_ask:
        with suppress(OSError):  # the tap is down: its guest cannot be here
            tap.asked = ask(tap.nic)


def time_left(runner: Runner, tap: TapRecord) -> float:
    """For how many seconds the guest is still waited for: if it has been here, for as long as its tap is there."""
    return math.inf if tap.left else tap.reached + runner.config.agent.arrival_timeout - clock.uptime()


class Arrivals:
    """Waits for guests on taps that are armed, and wires each that arrives.

    *listen* is the function of that name. *came_back* is called with each that only seems to have left. *catch_up*
    has all changes on the node that were made by now reported to *preparations*.
    """

    def __init__(
        self,
        loop: Loop,
        runner: Runner,
        taps: Taps,
        announcements: Announcements,
        preparations: Preparations,
        listen: Callable[[TapRecord], None],
        came_back: Callable[[Key], None],
        catch_up: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._runner = runner
        self._taps = taps
        self._announcements = announcements
        self._preparations = preparations
        self._listen, self._catch_up = listen, catch_up
        self._came_back = came_back
        self._late = LateAnswers(loop, runner, announcements)
        self._last = -CROWD  # when a guest has come
        self._unfinished: deque[tuple[Arrival, Begun]] = deque()  # wired, and the journal does not say so yet

    @property
    def under_way(self) -> int:
        """How many guests are wired, and their journals do not say so yet."""
        return len(self._unfinished)

    def close(self) -> None:
        """Finish these: what their journals say now is to be undone."""
        while self._unfinished:
            self._finish()

    @property
    def crowded(self) -> bool:
        """Whether guests come one after the other."""
        return time.monotonic() - self._last < CROWD

    def wait_for(self, tap: TapRecord) -> None:
        """*tap* is ARMING: wait for its guest, and have post prepared."""
        assert tap.listener
        self._loop.watch(tap.listener, partial(self._heard, tap), first=True)
        if tap.left:
            self._ask(tap, ASK_AGAIN)
        else:
            tap.timers.set("arrival", time_left(self._runner, tap), partial(self._give_up, tap))
        self._preparations.prepare(tap)

    def listen_later(self, tap: TapRecord) -> None:
        """*tap* could not be listened on, or its time is up: try again as long as it is not."""
        if time_left(self._runner, tap) > 0:
            self._loop.later(RECHECK, partial(self._listen_again, tap))

    def _listen_again(self, tap: TapRecord) -> None:
        if tap.state is not State.DISARMED or not tap.is_there():
            return
        tap.doubtful = True
        self._listen(tap)
        if tap.listener:
            self.wait_for(tap)
        else:
            self.listen_later(tap)

    def _ask(self, tap: TapRecord, pause: float) -> None:
        """Ask a guest again and again, after longer and longer pauses: one that has come, or that seems to have left.

        That may have been too busy to answer. If it is heard later than that, it is put back, too.
        """
        with suppress(OSError):  # the tap is down, or going
            ask(tap.nic)
        if pause < ASK_LAST:
            tap.timers.set("ask", pause, partial(self._ask, tap, 2 * pause))

    def _give_up(self, tap: TapRecord) -> None:
        tap.become(State.DISARMED)
        seconds = self._runner.config.agent.arrival_timeout
        self._runner.say(f"the guest has not arrived in {seconds:g} s: disarmed", tap.nic.label)

    # --- the first frame ------------------------------------------------------------------------------------

    def _heard(self, tap: TapRecord) -> None:
        """The guest on *tap* has sent something: it runs here."""
        assert tap.listener
        for data, sent in islice(sockets.received(tap.listener), FRAMES):
            if not tap.nic.to_ask:
                self._arrive(Arrival(tap, frames.name_of(data), sent))
                return
            if tap.answers.first is None:
                self._ask_who_has_come(tap)
            tap.answers.take(data, sent)
        if tap.answers.given:
            self._has_answered(tap)

    def _ask_who_has_come(self, tap: TapRecord) -> None:
        """It runs here, and finds the question in its tap.

        Another one at the same time would only hold it up. A Linux guest has just been told to announce itself; what
        comes while it looks at its first frames is put off until it has done that (`wakeup_softirqd` in
        kernel/softirq.c), and with it the first packets of those who hear of our announcement.
        """
        if tap.asked:
            tap.timers.set("ask", ASK_AGAIN, partial(self._ask, tap, 2 * ASK_AGAIN))
        else:
            self._ask(tap, ASK_AGAIN)

    def _has_answered(self, tap: TapRecord) -> None:
        """The guest has said which of its addresses it has. Any other is left to who knows better, and calls post."""
        assert tap.answers.first
        only = None if tap.answers.whole else frozenset(tap.answers.given)
        self._arrive(Arrival(tap, *tap.answers.first, only, None if tap.answers.complete else tap.hand_over()))

    def _arrive(self, arrival: Arrival) -> None:
        """Have post done: at once if it is prepared. What is left then waits for other guests' first frames."""
        tap = arrival.tap
        self._last = time.monotonic()
        self._catch_up()
        prepared = prepared_for(arrival)
        begun = self._begin(arrival, prepared) if prepared and not prepared.waits else None
        tap.become(State.ARRIVING)
        self._preparations.forget(tap)
        if isinstance(begun, Begun):
            self._unfinished.append((arrival, begun))
            self._loop.soon(self._finish)
        elif begun and not isinstance(begun, LockTimeoutError):
            self._loop.soon(partial(self._arrived, arrival, begun))
        else:
            right = begun or (prepared and prepared.waits)  # nobody has said that it is not as it was prepared
            post = partial(self._post, arrival, prepared if right else None)
            self._loop.work(post, partial(self._arrived, arrival))

    def _begin(self, arrival: Arrival, prepared: PreparedArrival) -> Begun | KvmIfupError | None:
        """Do and announce what is *prepared*; None if it is not right any more."""
        moment = time.monotonic()
        with ExitStack() as stack:
            try:
                session = stack.enter_context(self._runner.session(arrival.frame, patience=0))
                arriving = arrive(prepared, session)
            except Exception as error:
                return as_ours(error)
            done = time.monotonic()
            return Begun(arriving, session, stack.pop_all(), done - moment, done) if arriving else None

    def _finish(self) -> None:
        """What need not come before the announcement: the journal says what is true now, and everybody is told."""
        if not self._unfinished:
            return
        arrival, begun = self._unfinished.popleft()
        try:
            with begun.stack:
                stamp = begun.arriving.finish()
        except Exception as error:
            self._arrived(arrival, as_ours(error))
            return
        record = self._taps.written(begun.arriving.journal, stamp) if stamp else None
        self._runner.tell_of(begun.arriving.outcome, begun.seconds, begun.session)
        self._arrived(arrival, begun.arriving.outcome, begun.done, record)

    def _post(self, arrival: Arrival, prepared: PreparedArrival | None) -> Result:
        """In a thread: post, as it was *prepared*, or else from the beginning."""
        done = prepared and self._runner.attempt(partial(arrive_wholly, prepared), arrival.frame)
        post = partial(run_post, arrival.tap.name, arrival.tap.is_of)
        if arrival.only is not None:
            post = partial(post, known=partial(limited, addresses=arrival.only))
        return done or self._runner.attempt(post, arrival.frame)

    def _arrived(
        self, arrival: Arrival, outcome: Result, done: float | None = None, wired: TapRecord | None = None
    ) -> None:
        """*outcome* is what post has led to; it was *done* when the monotonic clock said so, None is just now.

        *wired*: the record of the journal that says so, if there is one already.
        """
        tap, listener = arrival.tap, arrival.listener
        if tap.left and arrival.frame != frames.RARP:
            self._came_back((tap.ifindex, tap.nic.mac))
        if listener and isinstance(outcome, Outcome):
            late = Late(tap.nic, tap.ifindex, listener, tap.answers, arrival.only or frozenset())
            self._late.wait_for(late)
        elif listener:
            sockets.close(listener)
        if isinstance(outcome, KvmIfupError):
            self._not_arrived(tap, outcome)
        elif outcome:
            now = time.monotonic()
            done = done or now
            seconds = max(0.0, time.time() - (now - done) - arrival.sent)  # the stamp's clock can be set
            self._runner.metrics.add("kvm_ifup_arrivals_total", frame=arrival.frame)
            self._runner.metrics.took("kvm_ifup_arrival_seconds", seconds)
            answered = tap.answers.answered
            waited = f"answered {1000 * (answered - arrival.sent):.1f} ms and " if answered else ""
            self._runner.say(
                f"arrived, first frame {arrival.frame}; {waited}wired {1000 * seconds:.1f} ms after it", outcome.label
            )
            self._announcements.repeat(outcome, done, wired)

    def _not_arrived(self, tap: TapRecord, error: KvmIfupError) -> None:
        """Say it, and try again at the guest's next frame."""
        self._runner.metrics.add("kvm_ifup_arrival_failures_total")
        self._runner.failed([error])
        self._runner.complain("not arrived", error)
        self._loop.later(RECHECK, partial(self._rearm, tap))

    def _rearm(self, tap: TapRecord) -> None:
        if tap.state is State.ARRIVING:
            self._taps.look_again_at(tap)


def prepared_for(arrival: Arrival) -> PreparedArrival | None:
    """What is prepared for the addresses with which the guest has arrived."""
    if arrival.only is None:
        return arrival.tap.prepared.get(None)
    return arrival.tap.prepared.get(*arrival.only) if len(arrival.only) == 1 else None
