"""What dead NICs and killed runs leave behind: undone by threads, and later where somebody is at work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial

from kvmifup.agent.events import ANYTHING, Thing
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.agent.taps import State, TapRecord, Taps
from kvmifup.core.errors import LockTimeoutError
from kvmifup.inputs import devices
from kvmifup.runs.leftovers import collect

KILLED = 1.0  # seconds that a run's unfinished business stays unchanged before somebody asks whether it was killed
LONGEST = 60.0  # seconds between two tries to put back what a killed run has left


class Leftovers:
    """Undoes what is left of NICs whose tap has gone, and of runs that were killed."""

    def __init__(self, loop: Loop, runner: Runner, taps: Taps) -> None:
        self._loop = loop
        self._runner = runner
        self._taps = taps
        self._names: dict[object, str] = {}  # of the taps that have a journal, by their indices
        self._dead: set[str] = set()  # those whose device has gone, and whose journal has not
        self._unseen = False  # nobody could say of some whether their device has gone

    def found(self, tap: TapRecord) -> None:
        """*tap* has a new journal."""
        self._names[tap.ifindex] = tap.name
        if tap.state is State.UNFINISHED:
            self._unfinished(tap)
        else:
            self.collect_dead([tap])

    def over(self, tap: TapRecord) -> None:
        """Its journal is that of *tap* no longer."""
        if self._names.get(tap.ifindex) == tap.name:
            del self._names[tap.ifindex]
        self._dead.discard(tap.name)

    def collect_all(self) -> None:
        """Of all taps: what has happened while no agent ran."""
        self._loop.work(partial(self._collect, None, BUSY))

    def look_again(self) -> None:
        """Once more at those that could not be cleared up; at all if it could not be seen which these are."""
        names, self._unseen = self._taps.names() if self._unseen else sorted(self._dead), False
        self._collect_again(names)
        self.collect_killed()

    def _died(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._dead]
        self._dead.update(new)
        self._collect_some(new)

    def _collect_some(self, names: Sequence[str], patience: float | None = None) -> None:
        """Undo what is left of the dead NICs and killed runs among the taps with *names*.

        Later if somebody works on them for longer than *patience*, in seconds; None is what is configured.
        """
        if names:
            self._loop.work(partial(self._collect, list(names), patience), partial(self._collected, list(names)))

    def collect_dead(self, taps: Sequence[TapRecord] | None = None) -> None:
        """Those of *taps*, or of all, whose device has gone, or has another name."""
        known = self._taps if taps is None else taps
        if known:
            try:
                self._died(devices.no_longer((tap.name, tap.ifindex) for tap in known))
            except OSError:  # nobody can be asked now
                self._unseen = True

    def devices_gone(self, indices: Sequence[int]) -> None:
        """The devices with *indices* have disappeared: some may be taps."""
        self._died([self._names[index] for index in indices if index in self._names])

    def devices_changed(self, things: Collection[Thing]) -> None:
        """Of *things* that have changed some may be taps that have another name now: they count as gone."""
        if ANYTHING in things:
            self.collect_dead()
            return
        names = [name for what, which, *_ in things if what == "device" and (name := self._names.get(which))]
        self.collect_dead(self._taps.named(names))

    def _unfinished(self, tap: TapRecord) -> None:
        """*tap* is UNFINISHED: see in a moment whether the run was killed.

        What cannot be put back changes the journal with each try, and is tried less and less often.
        """
        delay = min(KILLED * 2**tap.tries, LONGEST)
        tap.timers.set("unfinished", delay, partial(self._collect_some, [tap.name], 0))

    def collect_killed(self, taps: Sequence[TapRecord] | None = None) -> None:
        """Those of *taps*, or of all, on which a run has begun some time ago: who has its lock is still at work."""
        for tap in self._taps if taps is None else taps:
            if tap.state is State.UNFINISHED:
                self._collect_some([tap.name], patience=0)

    def _collected(self, names: list[str], busy: bool) -> None:
        taps = self._taps.named(names)
        with suppress(OSError):  # nobody can be asked now: who was dead still is
            gone = devices.no_longer((tap.name, tap.ifindex) for tap in taps)
            self._dead.difference_update({tap.name for tap in taps}.difference(gone))
        if busy:
            self._loop.later(KILLED, partial(self._collect_again, names))

    def _collect_again(self, names: list[str]) -> None:
        self._dead.difference_update(names)
        taps = self._taps.named(names)
        self.collect_dead(taps)
        self.collect_killed(taps)

    def _collect(self, names: list[str] | None, patience: float | None) -> bool:
        """In a thread; returns whether somebody works on one of them."""
        runner = self._runner
        try:
            with runner.session(patience=patience) as session:
                outcomes, failures = collect(session, names)
        except Exception as error:
            runner.complain("not cleared up", error)
            return False
        busy = [one for one in failures if isinstance(one, LockTimeoutError)]
        for failure in failures:
            if failure not in busy:
                runner.complain("not cleared up", failure)
        for outcome in outcomes:
            runner.metrics.add("kvm_ifup_leftovers_total", sum(change.needed for change in outcome.undone))
            remarks = "".join(f"; {remark}" for remark in outcome.remarks)
            runner.say(f"cleared up, {len(outcome.undone)} undone{remarks}", outcome.label)
        return bool(busy)
