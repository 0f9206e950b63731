"""Looks at NICs, and puts right what is wrong with them: the part of mending that is done in a thread."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from kvmifup import phases
from kvmifup.agent import rulesets
from kvmifup.agent.announcements import Announcements
from kvmifup.agent.events import DEFAULT_ROUTES, Thing
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.agent.taps import TapRecord
from kvmifup.core.errors import KvmIfupError, LockTimeoutError, VanishedError, as_ours
from kvmifup.core.model import Nic, Phase
from kvmifup.core.ops import LinkMtu, LinkUp, Op, Sysctl
from kvmifup.core.records import record
from kvmifup.node.overview import Overview
from kvmifup.node.procfs import device_name
from kvmifup.node.unheard import Asked, Unheard, differing, is_unheard
from kvmifup.runs import planning
from kvmifup.runs.apply import Change
from kvmifup.runs.journal import Journal
from kvmifup.runs.moves import mend, restrict, restricting
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session, opened
from kvmifup.tell import render

AGAIN = 1.0  # seconds until a failure is tried again, then twice as long, and so on
LONGEST = 60.0
ASKED = 6.0  # seconds until a guest that was to be asked is looked at again, if nothing comes of it
SHOWN = 4  # changes in one line of the log
FEW = 16  # NICs that are looked at one by one: to read the whole node takes longer
TRIES = 2  # to close many guests at once, which fails if one of them has just gone
REASON = "mended"

Key = tuple[object, ...]
JOURNAL: Key = ("journal",)  # in the place of an op's key, where all that differs is what the journal says


class Breakages:
    """How often the same thing was put right in a row: the first few times at once, then less and less often."""

    AT_ONCE, CALM, LONGEST = 4, 60.0, 300.0

    def __init__(self) -> None:
        self._times: dict[str, dict[Key, tuple[int, float]]] = {}  # by tap: in a row, and when last

    def wait(self, tap: str, keys: Iterable[Key], now: float) -> float:
        """For how many seconds *keys* of *tap* are left broken; 0 if one of them is due."""
        return min((self._due(tap, key) - now for key in keys), default=0.0)

    def mended(self, tap: str, keys: Iterable[Key], now: float) -> float:
        """*keys* of *tap* were put right; returns after how many seconds, at the earliest, they will be again."""
        for key in keys:
            times, last = self._times.get(tap, {}).get(key, (0, now))
            calm = now - last > self.CALM + self._delay(times)
            self._times.setdefault(tap, {})[key] = (1 if calm else times + 1), now
        return max((self._due(tap, key) - now for key in keys), default=0.0)

    def forget(self, tap: str) -> None:
        """It has gone."""
        self._times.pop(tap, None)

    def _delay(self, times: int) -> float:
        return 0.0 if times < self.AT_ONCE else min(2.0 ** (times - self.AT_ONCE + 1), self.LONGEST)

    def _due(self, tap: str, key: Key) -> float:
        times, last = self._times.get(tap, {}).get(key, (0, 0.0))
        return last + self._delay(times)


@record
class Looked:
    """What a look at a NIC has found: what it relies on, and its ops of which no event tells.

    Of these, *unheard* are about the tap itself, *outliving* on uplinks.
    *mtu*: the one to give back to the tap, before anything else. *again*: in how many seconds to look once more, None
    if all is well. *suspect*: nothing was done, because the guest has to be asked first whether it runs here.
    """

    tap: TapRecord
    things: tuple[Thing, ...]
    unheard: tuple[Sysctl, ...]
    outliving: tuple[Op, ...] = ()
    mtu: int | None = None
    again: float | None = None
    suspect: bool = False


Look = tuple[list[Looked], Sequence[TapRecord]]  # what was found; at whom to look once more, for it has failed


class Mender:
    """Looks at NICs, and puts right what is wrong: in a thread, and never in two at the same time."""

    def __init__(self, runner: Runner, announcements: Announcements) -> None:
        self._runner = runner
        self._announcements = announcements
        self._breakages = Breakages()
        self._unheard = Unheard()
        self._failed: dict[str, tuple[str, int]] = {}  # by tap: what was said, and how often in a row it has failed
        self._mtus: dict[str, int] = {}  # by tap: its MTU when all was right

    def close(self) -> None:
        """Let go of everything."""
        self._unheard.close()

    def forget(self, tap: str) -> None:
        """It has gone."""
        self._breakages.forget(tap)
        self._failed.pop(tap, None)
        self._mtus.pop(tap, None)

    def check(self, asked: Asked, few: Sequence[tuple[str, tuple[Sysctl, ...]]]) -> tuple[Collection[str], int]:
        """The taps for which one of the ops that are *asked* for is not true, or one of the sysctls of a *few* taps.

        And how many ops had to be looked at. Who asks the same once more, asks with the same object.
        """
        try:
            untrue, compared = self._unheard.untrue(asked)
            return untrue | differing(few), compared + sum(len(ops) for _, ops in few)
        except OSError as error:
            self._runner.complain("not looked at", error)
            return (), len(asked)

    def look(self, taps: Sequence[TapRecord], suspects: frozenset[str]) -> Look:
        """See which of *taps* differ from what they are to be, and put them right; *suspects* may have left."""
        found: list[Looked] = []
        unseen: Sequence[TapRecord] = ()
        broken: list[tuple[Looked, planning.Plan | KvmIfupError]] = []
        try:
            with ExitStack() as stack:
                session = stack.enter_context(self._looking(len(taps)))
                there = [tap for tap in taps if tap.is_there()]
                if self._restrict(there, session):
                    session = stack.enter_context(self._looking(len(taps)))  # what was read is not true any more
                for tap in there:
                    looked, plan = self._compare(tap, session)
                    if plan is None:
                        self._failed.pop(tap.name, None)
                        found.append(looked)
                    else:
                        broken.append((looked, plan))
        except Exception as error:
            self._runner.complain("not looked at", error)
            unseen = taps
        # Those that drag a bridge's MTU down come first: the other taps would have to follow it.
        for looked, plan in sorted(broken, key=lambda one: one[0].mtu is None):
            found.append(self._put_right(looked, plan, suspects))
        return found, unseen

    def _compare(self, tap: TapRecord, session: Session) -> tuple[Looked, planning.Plan | KvmIfupError | None]:
        """What *tap* relies on; and what is to be done for it, None for nothing, or why that cannot be said."""
        journal = tap.journal
        try:
            plan = planning.plan(journal.phase, journal.nic, journal, session, admitted=True)
            mtu = self._mtu_before(plan)
            differs = mtu or plan.due or planning.journal_after(plan, session) != journal
        except Exception as error:
            return Looked(tap, tuple(relied_on(tap, None, session)), ()), as_ours(error)
        same = {entry.op: entry.op for entry in journal.entries}  # there are thousands of them, and each is kept once
        ops = [same.get(change.op, change.op) for change in plan.changes if is_unheard(change.op)]
        unheard = tuple(op for op in ops if isinstance(op, Sysctl) and not op.outlives_tap)
        outliving = tuple(op for op in ops if op not in unheard)
        looked = Looked(tap, tuple(relied_on(tap, plan, session)), unheard, outliving, mtu)
        return looked, plan if differs else None

    def _mtu_before(self, plan: planning.Plan) -> int | None:
        """The MTU that the tap had before somebody has changed it, and its bridge has followed; None if it is right.

        A bridge whose MTU nobody has set takes the lowest among its ports (`br_mtu_auto_adjust`). All other taps would
        have to follow it.
        """
        for change in plan.changes:
            if isinstance(change.op, LinkMtu) and not change.needed:
                if self._mtus.setdefault(plan.nic.tap, change.op.want) != change.op.want:
                    return self._mtus.pop(plan.nic.tap)
            elif isinstance(change.op, LinkMtu):
                self._mtus.pop(plan.nic.tap, None)  # the bridge's has changed: the tap follows
        return None

    def _put_right(self, looked: Looked, plan: planning.Plan | KvmIfupError, suspects: Collection[str]) -> Looked:
        tap = looked.tap
        if isinstance(plan, KvmIfupError):
            return replace(looked, again=self._cannot(tap, plan))
        broken = keys(plan.due) or [LinkMtu(tap.name, looked.mtu).key if looked.mtu else JOURNAL]
        wait = self._breakages.wait(tap.name, broken, time.monotonic())
        if wait > 0:
            return replace(looked, again=wait)
        if tap.name in suspects and self._runner.config.agent.withdraw and draws(plan.due):
            if any(isinstance(change.op, LinkUp) for change in plan.due):  # or it could not be asked
                self._mended(looked, Phase.PRE)
            return replace(looked, again=ASKED, suspect=True)
        return replace(looked, again=self._mended(looked, Phase.POST))

    @contextmanager
    def _looking(self, taps: int) -> Iterator[Session]:
        """A session to look at so many *taps*."""
        kernel = Overview if taps > FEW else None
        with opened(self._runner.run_dir, self._runner.config, dry=True, by="agent", kernel=kernel) as session:
            session.store.trust_index()
            yield session

    def _restrict(self, taps: Sequence[TapRecord], session: Session) -> bool:
        """First of all, and all at once, close those of *taps* whose guests can do too much; whether there were any.

        Also those that may have left: nothing is drawn here by it.
        """
        journals = {tap.name: tap.journal for tap in taps if self._is_open(tap, session)}
        for _ in range(TRIES if journals else 0):
            outcomes = self._runner.attempt_all(partial(restrict, list(journals)), REASON, BUSY)
            if not isinstance(outcomes, KvmIfupError):
                for outcome in outcomes:
                    if any(change.needed for change in outcome.changes):
                        self._done(outcome, journals[outcome.tap])
                break
        return bool(journals)

    def _is_open(self, tap: TapRecord, session: Session) -> bool:
        """Whether the guest on *tap* can do what it must not, and that is not left so for a while."""
        try:
            open_ = [op.key for op in restricting(tap.journal) if session.kernel.read(op) != op.wanted]
        except Exception:  # to plan says what is wrong
            return False
        return bool(open_) and self._breakages.wait(tap.name, open_, time.monotonic()) <= 0

    def _mended(self, looked: Looked, most: Phase) -> float | None:
        """Do it; returns in how many seconds to look once more."""
        tap = looked.tap
        outcome = self._runner.attempt(partial(mend, tap.name, most, mtu=looked.mtu), REASON, BUSY)
        if isinstance(outcome, LockTimeoutError):
            return AGAIN  # whoever has the lock will not have it for long
        if isinstance(outcome, KvmIfupError):
            self._runner.failed([outcome])
            self._runner.metrics.add("kvm_ifup_mend_failures_total")
            return self._cannot(tap, outcome)
        self._failed.pop(tap.name, None)
        if outcome:
            self._done(outcome, tap.journal)
        return None

    def _done(self, outcome: Outcome, journal: Journal) -> None:
        self._failed.pop(outcome.tap, None)
        self._tell(outcome, journal)
        self._announcements.repeat(outcome)

    def _tell(self, outcome: Outcome, journal: Journal) -> None:
        done = [change for change in outcome.changes if change.needed and not change.op.after_change]
        # What leads traffic here comes first, and what is there again before what was taken away.
        done.sort(key=lambda change: (not phases.only_here(change.op), not change.op.wanted))
        renamed = renames(journal)
        if not done and not renamed:  # somebody else has put it right, or only the journal was to be written
            self._breakages.mended(outcome.tap, [JOURNAL], time.monotonic())
            return
        self._runner.metrics.add("kvm_ifup_mends_total")
        more = [f"{len(done) - SHOWN} more"] if len(done) > SHOWN else []
        line = "; ".join((*renamed, *map(render.transition, done[:SHOWN]), *more))
        seconds = self._breakages.mended(outcome.tap, keys(done), time.monotonic())
        if seconds:
            line += f"; it is broken again and again: left alone for the next {seconds:g} s"
        self._runner.say(f"mended: {line}", outcome.label)

    def _cannot(self, tap: TapRecord, error: KvmIfupError) -> float:
        """Say once what stands in the way; returns in how many seconds to try again."""
        said, tries = self._failed.get(tap.name, ("", 0))
        if str(error) != said:
            tries = 0
        if str(error) != said and not isinstance(error, VanishedError):  # it has just gone: an event will tell
            self._runner.complain("not as it is to be, and cannot be mended", error.at(tap.nic.label))
        self._failed[tap.name] = str(error), tries + 1
        return float(min(AGAIN * 2**tries, LONGEST))


def relied_on(tap: TapRecord, plan: planning.Plan | None, session: Session) -> set[Thing]:
    """What *tap* relies on, as events name it."""
    return set(things_of(tap, plan, session))


def things_of(tap: TapRecord, plan: planning.Plan | None, session: Session) -> Iterator[Thing]:
    """The same, one by one, and some of them more than once."""
    nic = tap.nic
    names = {nic.tap, *(dev for dev, _ in tap.journal.devices), *(session.config.routed.uplinks or ())}
    if nic.mode != "routed" and nic.link:
        names.add(nic.link)
    if plan:
        names |= {uplink.name for uplink in (*plan.facts.uplinks, *plan.last)}
        trunks = {trunk.name for trunk in plan.facts.bridge.trunks} if plan.facts.bridge else set()
        names |= trunks
        yield from (("port", index) for name in trunks if (index := session.kernel.ifindex(name)) is not None)
        if nic.link and nic.on_uplinks and nic.mode == "bridged":
            yield "ports", session.kernel.ifindex(nic.link)
        for op in (change.op for change in plan.changes):
            yield from rulesets.relied_on(op, getattr(op, "dev", ""))
    for name in names:
        yield "name", name
        if (index := session.kernel.ifindex(name)) is not None:
            yield "device", index
    yield from (("device", index) for _, index in tap.journal.devices)
    yield "port", tap.ifindex
    yield "address", tap.ifindex
    yield "rule", nic.tap
    yield from routes_and_neighbours(nic, tap.ifindex, session)


def routes_and_neighbours(nic: Nic, ifindex: int, session: Session) -> Iterator[Thing]:
    """Those that *nic* relies on."""
    if nic.mode != "routed":
        return
    for prefix in nic.ip:
        yield "route", str(prefix)
        yield "neighbour", ifindex, phases.bare(prefix)
    if session.config.routed.uplinks is None:
        yield from DEFAULT_ROUTES


def keys(changes: Sequence[Change]) -> list[Key]:
    """What *changes* are about."""
    return [change.op.key for change in changes]


def draws(changes: Sequence[Change]) -> bool:
    """Whether *changes* draw a guest's traffic to this node."""
    return any(change.op.wanted and phases.only_here(change.op) for change in changes)


def renames(journal: Journal) -> list[str]:
    """What the devices of *journal* are called now, where that is not what it says."""
    named = ((dev, index, device_name(index)) for dev, index in journal.devices)
    return [f"{dev} is {name} now" for dev, index, name in named if name not in (dev, f"#{index}")]
