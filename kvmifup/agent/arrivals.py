"""A guest that arrives: its tap is armed, post is prepared, and its first frame has post done.

A guest that is to be asked for its addresses has those wired at once that it answers for; the rest follows (`late`).
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from kvmifup import phases
from kvmifup.agent.announcements import Announcements
from kvmifup.agent.events import ANYTHING, DEFAULT_ROUTES, Thing
from kvmifup.agent.late import ASK_SOON, Late, LateAnswers
from kvmifup.agent.loop import Loop, OneAtATime
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.agent.suspects import Handed, Key, ask
from kvmifup.agent.taps import LISTENING, Prepared, State, TapRecord, Taps
from kvmifup.core.errors import KvmIfupError, LockTimeoutError, as_ours
from kvmifup.core.model import Nic
from kvmifup.core.records import record
from kvmifup.node import frames, sockets
from kvmifup.runs import clock
from kvmifup.runs.moves import PreparedArrival, arrive, limited, prepare_arrival, run_post
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session
from kvmifup.tell import syslog

RECHECK = 1.0  # seconds after a failure until it is tried again

ASK_AGAIN, ASK_LAST = 0.05, 200.0  # seconds from one question for a guest that has left to the next; to the last
FEW = 8  # addresses: post is prepared for each of them alone as well

Result = Outcome | KvmIfupError | None  # of post
Preparation = tuple[TapRecord, Prepared | KvmIfupError]


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
            ask(tap.nic)


def time_left(runner: Runner, tap: TapRecord) -> float:
    """For how many seconds the guest is still waited for: if it has been here, for as long as its tap is there."""
    return math.inf if tap.left else tap.reached + runner.config.agent.arrival_timeout - clock.uptime()


def prepare_all(tap: TapRecord, session: Session) -> Prepared:
    """post for *tap*, prepared; where the guest is asked, for each address alone as well: it may come before others.

    Nothing if its NIC does not wait for its guest any more. Raises as `prepare_arrival`.
    """
    hosts = [phases.bare(prefix) for prefix in tap.nic.ip if phases.is_host(prefix)]
    alone = hosts if tap.nic.to_ask and 1 < len(tap.nic.ip) <= FEW else []
    found: dict[str | None, PreparedArrival | None] = {None: prepare_arrival(tap.name, session)}
    found |= {address: prepare_arrival(tap.name, session, [address]) for address in alone}
    return {address: one for address, one in found.items() if one}


def relied_on(prepared: Prepared, nic: Nic) -> frozenset[Thing]:
    """The things whose change may make wrong what is *prepared* for *nic*.

    The tap does not count: `arrive` looks at it when it is needed.
    """
    devices: set[Thing] = {
        ("device", index) for one in prepared.values() for dev, index in one.devices if dev != nic.tap
    }
    return frozenset({ANYTHING, *DEFAULT_ROUTES, *devices, *(("route", to) for to in nic.destinations)})


class Arrivals:
    """Waits for guests on taps that are armed, and wires each that arrives.

    *listen* is the function of that name. *came_back* is called with each that only seems to have left. *catch_up*
    has all changes on the node that were made by now reported to `outdate`. *stir*: call `prepare_anew` when it is
    quiet.
    """

    def __init__(
        self,
        loop: Loop,
        runner: Runner,
        taps: Taps,
        announcements: Announcements,
        listen: Callable[[TapRecord], None],
        came_back: Callable[[Key], None],
        catch_up: Callable[[], None],
        stir: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._runner = runner
        self._taps = taps
        self._announcements = announcements
        self._listen, self._catch_up, self._stir = listen, catch_up, stir
        self._came_back = came_back
        self._late = LateAnswers(loop, runner, announcements)
        self._unprepared: dict[str, TapRecord] = {}
        self._preparing = OneAtATime(loop, self._begin_preparing, self._prepared)
        self._ending = False
        self._meanwhile: set[Thing] = set()  # what has changed while one is prepared
        # What any of those that are prepared relies on. Nearly all that changes on a node is about other guests, and
        # to look at each of a thousand for it takes longer than what has changed it.
        self._relied: set[Thing] = set()

    def wait_for(self, tap: TapRecord) -> None:
        """*tap* is ARMING: wait for its guest, and have post prepared."""
        assert tap.listener
        self._loop.watch(tap.listener, partial(self._heard, tap))
        if tap.left:
            self._ask(tap, ASK_AGAIN)
        else:
            tap.timers.set("arrival", time_left(self._runner, tap), partial(self._give_up, tap))
        self._prepare(tap)

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
        """Ask a guest that seems to have left again and again, after longer and longer pauses.

        It may have been too busy to answer. If it is heard later than that, it is put back, too.
        """
        with suppress(OSError):  # the tap is down, or going
            ask(tap.nic)
        if pause < ASK_LAST:
            tap.timers.set("ask", pause, partial(self._ask, tap, 2 * pause))

    def _give_up(self, tap: TapRecord) -> None:
        tap.become(State.DISARMED)
        seconds = self._runner.config.agent.arrival_timeout
        self._runner.say(f"the guest has not arrived in {seconds:g} s: disarmed", tap.nic.label)

    # --- preparing ----------------------------------------------------------------------------------------

    def _prepare(self, tap: TapRecord) -> None:
        """Have post for *tap* prepared: one after the other, in a thread."""
        self._unprepared[tap.name] = tap
        self._preparing.ask()

    def stop_preparing(self) -> None:
        """The agent ends: to prepare a thousand taps first would take it longer than it is given."""
        self._ending = True

    def _begin_preparing(self) -> Callable[[], Preparation] | None:
        while self._unprepared and not self._ending:
            _, tap = self._unprepared.popitem()
            if tap.state in (State.ARMING, State.ARMED):
                self._meanwhile.clear()
                return partial(self._try_to_prepare, tap)
        return None

    def _try_to_prepare(self, tap: TapRecord) -> Preparation:
        """In a thread: compute and admit post."""
        try:
            # Whoever works on the tap may do so for long, and the others wait for us.
            with self._runner.session(patience=BUSY) as session:
                return tap, prepare_all(tap, session)
        except Exception as error:
            return tap, as_ours(error)

    def _prepared(self, result: Preparation) -> None:
        self._preparing.ask()  # the next one
        tap, prepared = result
        if tap.state not in LISTENING:
            return
        first = tap.state is State.ARMING
        if prepared and not isinstance(prepared, KvmIfupError):
            tap.ready(prepared)
            things = relied_on(prepared, tap.nic)
            if things.isdisjoint(self._meanwhile):
                self._relied |= things
            else:
                tap.become(State.ARMED)
                self._stir()
        elif first:
            tap.become(State.ARMED)
        if isinstance(prepared, LockTimeoutError):
            tap.timers.set("prepare", RECHECK, partial(self._prepare, tap))
        elif isinstance(prepared, KvmIfupError) and str(prepared) != tap.complaint:
            tap.complaint = str(prepared)
            self._runner.complain("not ready for its arrival", prepared)
        if first:
            self._runner.say("armed", tap.nic.label)

    def outdate(self, touched: frozenset[Thing]) -> None:
        """Throw away what relies on *touched*, which has changed."""
        if self._preparing.busy:
            self._meanwhile |= touched
        if touched.isdisjoint(self._relied):
            return
        self._relied.clear()
        for tap in self._taps:
            if tap.prepared:
                things = relied_on(tap.prepared, tap.nic)
                if things.isdisjoint(touched):
                    self._relied |= things
                else:
                    tap.become(State.ARMED)
                    self._stir()

    def prepare_anew(self) -> None:
        """Have post prepared where it is not: what stood in its way may have changed."""
        for tap in self._taps:
            if tap.state is State.ARMED:
                self._prepare(tap)

    # --- the first frame ------------------------------------------------------------------------------------

    def _heard(self, tap: TapRecord) -> None:
        """The guest on *tap* has sent something: it runs here."""
        assert tap.listener
        for data, sent in sockets.received(tap.listener):
            if not tap.nic.to_ask:
                self._arrive(Arrival(tap, frames.name_of(data), sent))
                return
            if tap.answers.first is None:
                self._ask(tap, ASK_SOON)
            tap.answers.take(data, sent)
        if tap.answers.given:
            self._has_answered(tap)

    def _has_answered(self, tap: TapRecord) -> None:
        """The guest has said which of its addresses it has. Any other is left to who knows better, and calls post."""
        assert tap.answers.first
        only = None if tap.answers.whole else frozenset(tap.answers.given)
        self._arrive(Arrival(tap, *tap.answers.first, only, None if tap.answers.complete else tap.hand_over()))

    def _arrive(self, arrival: Arrival) -> None:
        """Have post done."""
        tap, frame = arrival.tap, arrival.frame
        if tap.left and frame != frames.RARP:
            self._came_back((tap.ifindex, tap.nic.mac))
        self._catch_up()
        prepared = prepared_for(arrival)
        if prepared and not prepared.waits:
            outcome = self._runner.attempt(partial(arrive, prepared), frame)
            if outcome:
                tap.become(State.ARRIVING)
                self._arrived(arrival, outcome)
                return
            prepared = None
        tap.become(State.ARRIVING)
        self._loop.work(partial(self._post, arrival, prepared), partial(self._arrived, arrival))

    def _post(self, arrival: Arrival, prepared: PreparedArrival | None) -> Result:
        """In a thread: post, as it was *prepared*, or else from the beginning."""
        done = prepared and self._runner.attempt(partial(arrive, prepared), arrival.frame)
        post = partial(run_post, arrival.tap.name, arrival.tap.is_of)
        if arrival.only is not None:
            post = partial(post, known=partial(limited, addresses=arrival.only))
        return done or self._runner.attempt(post, arrival.frame)

    def _arrived(self, arrival: Arrival, outcome: Result) -> None:
        tap, listener = arrival.tap, arrival.listener
        if listener and isinstance(outcome, Outcome):
            late = Late(tap.nic, tap.ifindex, listener, tap.answers, arrival.only or frozenset())
            self._late.wait_for(late)
        elif listener:
            sockets.close(listener)
        if isinstance(outcome, KvmIfupError):
            self._not_arrived(tap, outcome)
        elif outcome:
            seconds = max(0.0, time.time() - arrival.sent)  # the kernel's stamp is of the clock that can be set
            self._runner.metrics.add("kvm_ifup_arrivals_total", frame=arrival.frame)
            self._runner.metrics.took("kvm_ifup_arrival_seconds", seconds)
            answered = tap.answers.answered
            waited = f"answered {1000 * (answered - arrival.sent):.1f} ms and " if answered else ""
            self._runner.say(
                f"arrived, first frame {arrival.frame}; {waited}wired {1000 * seconds:.1f} ms after it", outcome.label
            )
            self._announcements.repeat(outcome)

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
