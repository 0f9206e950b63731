"""Guests that are to come, of which only a hook of Ganeti's has told: pre is run for them once QEMU waits for them.

Ganeti calls no script for a routed NIC before its guest has arrived. But QEMU notes its process where Ganeti looks for
it, and that process has the taps open; its command line says which MAC is on which. Then there is a journal in pre,
and the rest is as for any other guest (`arrivals`), but that it is asked first which of its addresses it has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from kvmifup.agent.loop import Loop, OneAtATime
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.core.errors import KvmIfupError
from kvmifup.inputs import ganeti
from kvmifup.inputs.environment import GANETI_OWN
from kvmifup.node import guests
from kvmifup.runs import expected
from kvmifup.runs.expected import Expected
from kvmifup.runs.moves import begin

AGAIN = 1.0  # seconds from one look to the next while somebody is expected, whatever has been heard or not
SETTLE = 0.05  # seconds from a change to the look, if nobody was expected before
WHY = "Ganeti is to move it here"


class Expectations:
    """Waits for the QEMU of each guest that is expected. *looking* is called before each look."""

    def __init__(self, loop: Loop, runner: Runner, looking: Callable[[], None]) -> None:
        self._runner = runner
        self._looking = looking
        self._look = OneAtATime(loop, self._begin, self._done)
        self._complaints: dict[str, str] = {}  # what was said last, by guest
        self.waiting: list[Expected] = []

    def look(self) -> None:
        """See who is expected, and who has come; soon, or at once if somebody is waited for."""
        if self.waiting:
            self._look.ask()
        else:
            self._look.ask_in(SETTLE)

    def _begin(self) -> Callable[[], list[Expected]] | None:
        with suppress(OSError):
            if os.listdir(self._runner.run_dir / expected.DIRECTORY):
                self._looking()
                return self._try_all
        self.waiting = []
        return None

    def _try_all(self) -> list[Expected]:
        """In a thread: run pre for those who have come; returns those who are still waited for."""
        try:
            told = expected.found(self._runner.run_dir)
            waiting = [one for one in told if not self._is_over(one)]
            for one in told:
                if one not in waiting:
                    expected.forget(self._runner.run_dir, one)
        except OSError as error:
            self._runner.complain("cannot look who is expected", error)
            return self.waiting
        return waiting

    def _is_over(self, one: Expected) -> bool:
        """Whether *one* need not be waited for any more: it has come, or never will."""
        patience = self._runner.config.agent.arrival_timeout
        if one.age > patience:
            self._runner.say(f"was to come, and has not in {patience:g} s: expected no longer", one.instance)
            return True
        pid = ganeti.process_of(one.instance)
        held = guests.behind_taps_of(str(pid)) if pid else {}
        nics = {nic.mac: nic for nic in one.nics}
        # By their MACs: the pid file may be an old one, and its number another guest's by now.
        found = {tap: (nics[qemu.mac], qemu) for tap, qemu in held.items() if qemu.mac in nics}
        if not any(qemu.incoming for _, qemu in found.values()):
            return bool(found)  # it has been started here, so scripts have wired it
        results = [
            self._runner.attempt(partial(begin, replace(nic, tap=tap, to_ask=True)), WHY, BUSY)
            for tap, (nic, _) in found.items()
            if not tap.startswith(GANETI_OWN)
        ]
        failures = [result for result in results if isinstance(result, KvmIfupError)]
        self._complain(one.instance, failures)
        return not failures

    def _complain(self, instance: str, failures: list[KvmIfupError]) -> None:
        said = "; ".join(map(str, failures))
        if said != self._complaints.pop(instance, ""):
            for failure in failures:
                self._runner.complain("not prepared for its arrival", failure)
        if said:
            self._complaints[instance] = said

    def _done(self, waiting: list[Expected]) -> None:
        self.waiting = waiting
        if waiting:
            self._look.ask_in(AGAIN)
