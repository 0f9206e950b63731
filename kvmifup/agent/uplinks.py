"""What an uplink loses while it is down, put back when it comes up again: the kernel forgets proxy neighbours then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

from kvmifup.agent.departures import Place
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import Runner
from kvmifup.core.errors import KvmIfupError, LockTimeoutError
from kvmifup.core.model import Background, Nic
from kvmifup.runs import announcing
from kvmifup.runs.moves import restore

AGAIN = 1.0  # seconds until a failure is tried again, then twice as long, and so on
TRIES = 6
BUSY = 0.5  # seconds to wait for whoever works on a NIC: the others' guests are unreachable meanwhile

Which = tuple[str, str]  # uplink, tap


class Restorations:
    """Mends one NIC after the other, in one thread: hundreds may be on the uplink that has come up again.

    By the journals. A plan would find no uplink before its default route is back, which may take long.
    """

    def __init__(self, loop: Loop, runner: Runner, background: Background) -> None:
        self._loop = loop
        self._runner = runner
        self._background = background
        self._taps: dict[str, set[str]] = {}  # by uplink
        self._due: dict[Which, int] = {}  # how often it has failed
        self._busy = False

    def look_after(self, guests: Mapping[Place, Nic]) -> None:
        """This node answers for *guests*."""
        self._taps = {}
        for (uplink, _), nic in guests.items():
            self._taps.setdefault(uplink, set()).add(nic.tap)

    def up_again(self, devices: Iterable[str]) -> None:
        """*devices* have come up: some may be uplinks."""
        self._add({(dev, tap): 0 for dev in devices for tap in self._taps.get(dev, ())})

    def all_up_again(self) -> None:
        """Any of them may have."""
        self.up_again(self._taps)

    def _again(self, failed: dict[Which, int]) -> None:
        for (uplink, tap), tries in failed.items():
            if tap in self._taps.get(uplink, ()):
                self._due.setdefault((uplink, tap), tries)
        self._next()

    def _add(self, more: dict[Which, int]) -> None:
        self._due |= more
        self._next()

    def _next(self) -> None:
        if self._due and not self._busy:
            self._busy = True
            due, self._due = self._due, {}
            self._loop.work(partial(self._restore, due), self._restored)

    def _restored(self, failed: dict[Which, int]) -> None:
        self._busy = False
        if failed:
            self._loop.later(AGAIN * 2 ** (min(failed.values()) - 1), partial(self._again, failed))
        self._next()

    def _restore(self, due: dict[Which, int]) -> dict[Which, int]:
        """In a thread; returns what is to be tried again."""
        runner = self._runner
        mended: Counter[str] = Counter()
        failed: dict[Which, int] = {}
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
                announcing.announce_later([outcome], runner.store, self._background)
        for uplink, number in mended.items():
            runner.say(f"{uplink} is up again: proxy entries put back for {number} NIC{'s' * (number > 1)}")
        return failed
