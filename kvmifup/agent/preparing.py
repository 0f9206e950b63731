"""post, prepared for guests that are waited for: one tap after the other, and anew when what it relies on changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvmifup import phases
from kvmifup.agent.events import ANYTHING, DEFAULT_ROUTES, Thing
from kvmifup.agent.loop import Loop, OneAtATime
from kvmifup.agent.reliance import Reliance
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.agent.taps import LISTENING, Prepared, State, TapRecord, Taps
from kvmifup.core.errors import KvmIfupError, LockTimeoutError, as_ours
from kvmifup.core.model import Nic
from kvmifup.runs.arriving import PreparedArrival, prepare_arrival
from kvmifup.runs.session import Session

RECHECK = 1.0  # seconds after a failure until it is tried again
FEW = 8  # addresses: post is prepared for each of them alone as well

Preparation = tuple[TapRecord, Prepared | KvmIfupError]


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
    return frozenset({ANYTHING, *DEFAULT_ROUTES, *devices, *(("route", str(prefix)) for prefix in nic.ip)})


class Preparations:
    """Has post prepared where a guest is waited for. *stir*: call `anew` when it is quiet."""

    def __init__(self, loop: Loop, runner: Runner, taps: Taps, stir: Callable[[], None]) -> None:
        self._runner = runner
        self._taps = taps
        self._stir = stir
        self._unprepared: dict[str, TapRecord] = {}
        self._preparing = OneAtATime(loop, self._begin, self._done)
        self._ending = False
        self._lacking: dict[str, TapRecord] = {}  # those that are ARMED, and some that were
        self._meanwhile: set[Thing] = set()  # what has changed while one is prepared
        self._reliance = Reliance()  # of those that are prepared

    def prepare(self, tap: TapRecord) -> None:
        """Have post for *tap* prepared: one after the other, in a thread."""
        self._unprepared[tap.name] = tap
        self._preparing.ask()

    def stop(self) -> None:
        """The agent ends: to prepare a thousand taps first would take it longer than it is given."""
        self._ending = True

    def _begin(self) -> Callable[[], Preparation] | None:
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

    def _done(self, result: Preparation) -> None:
        self._preparing.ask()  # the next one
        tap, prepared = result
        if tap.state not in LISTENING:
            return
        first = tap.state is State.ARMING
        if prepared and not isinstance(prepared, KvmIfupError):
            tap.ready(prepared)
            things = relied_on(prepared, tap.nic)
            if things.isdisjoint(self._meanwhile):
                self._reliance.note(tap.name, things)
            else:
                self._armed(tap)
                self._stir()
        elif first:
            self._armed(tap)
        if isinstance(prepared, LockTimeoutError):
            tap.timers.set("prepare", RECHECK, partial(self.prepare, tap))
        elif isinstance(prepared, KvmIfupError) and str(prepared) != tap.complaint:
            tap.complaint = str(prepared)
            self._runner.complain("not ready for its arrival", prepared)
        if first:
            self._runner.say("armed", tap.nic.label)

    def outdate(self, touched: frozenset[Thing]) -> None:
        """Throw away what relies on *touched*, which has changed."""
        if self._preparing.busy:
            self._meanwhile |= touched
        for tap in self._taps.named(sorted(self._reliance.on(touched))):
            self._reliance.forget(tap.name)
            if tap.prepared:
                self._armed(tap)
                self._stir()

    def anew(self) -> None:
        """Have post prepared where it is not: what stood in its way may have changed."""
        self._lacking = {name: tap for name, tap in self._lacking.items() if tap.state is State.ARMED}
        for tap in self._lacking.values():
            self.prepare(tap)

    def _armed(self, tap: TapRecord) -> None:
        tap.become(State.ARMED)
        self._lacking[tap.name] = tap

    def forget(self, tap: TapRecord) -> None:
        """Its guest has come, so what was prepared is done; or its journal is another one now, or gone."""
        self._reliance.forget(tap.name)
        self._lacking.pop(tap.name, None)
