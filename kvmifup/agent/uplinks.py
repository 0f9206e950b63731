"""An uplink that comes up again: the kernel has dropped its proxy neighbours, and they are put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from kvmifup.agent.announcements import Announcements
from kvmifup.agent.loop import Loop, OneAtATime
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.agent.taps import Place
from kvmifup.core.errors import KvmIfupError, LockTimeoutError
from kvmifup.core.model import Nic
from kvmifup.runs.moves import restore

AGAIN = 1.0  # seconds until a failure is tried again, then twice as long, and so on
TRIES = 6

Failures = dict[tuple[str, str], int]  # by uplink and tap: how often it has failed


class Uplinks:
    """Puts back what NICs have lost on an uplink, one after the other: hundreds may be on the one that comes up.

    What that was is in the journals. A plan would find no uplink before its default route is back, which may take
    long.
    """

    def __init__(self, loop: Loop, runner: Runner, announcements: Announcements) -> None:
        self._loop = loop
        self._runner = runner
        self._announcements = announcements
        self._taps: dict[str, set[str]] = {}  # by uplink
        self._due: Failures = {}
        self._restoring = OneAtATime(loop, self._begin, self._restored)

    def look_after(self, guests: Mapping[Place, Nic]) -> None:
        """This node answers for *guests*."""
        self._taps = {}
        for (uplink, _), nic in guests.items():
            self._taps.setdefault(uplink, set()).add(nic.tap)

    def came_up(self, devices: Iterable[str]) -> None:
        """*devices* have come up: some may be uplinks."""
        self._due |= {(dev, tap): 0 for dev in devices for tap in self._taps.get(dev, ())}
        self._restoring.ask()

    def all_came_up(self) -> None:
        """Any uplink may have come up."""
        self.came_up(self._taps)

    def _again(self, failed: Failures) -> None:
        for (uplink, tap), tries in failed.items():
            if tap in self._taps.get(uplink, ()):
                self._due.setdefault((uplink, tap), tries)
        self._restoring.ask()

    def _begin(self) -> Callable[[], Failures] | None:
        due, self._due = self._due, {}
        return partial(self._restore, due) if due else None

    def _restored(self, failed: Failures) -> None:
        if failed:
            self._loop.later(AGAIN * 2 ** (min(failed.values()) - 1), partial(self._again, failed))

    def _restore(self, due: Failures) -> Failures:
        """In a thread: put back what is *due*; returns what is to be tried again."""
        runner = self._runner
        mended: Counter[str] = Counter()
        failed: Failures = {}
        for (uplink, tap), tries in sorted(due.items()):
            outcome = runner.attempt(partial(restore, tap, uplink), f"{uplink} is up again", BUSY)
            if isinstance(outcome, KvmIfupError):
                runner.failed([outcome])
                last = tries + 1 == TRIES
                if not last:
                    failed[uplink, tap] = tries + 1
                # Once, and when nothing more will be done. Whoever has the lock will not have it for long.
                if last or not (tries or isinstance(outcome, LockTimeoutError)):
                    runner.complain(f"not put back on {uplink}", outcome)
            elif outcome and any(change.needed for change in outcome.changes):
                mended[uplink] += 1
                runner.metrics.add("kvm_ifup_restorations_total")
                self._announcements.repeat(outcome)
        for uplink, number in mended.items():
            runner.say(f"{uplink} is up again: proxy entries put back for {number} NIC{'s' * (number > 1)}")
        return failed
