"""What the agent runs by itself: each run has a session of its own, its error is returned, and the log is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from kvmifup.agent.metrics import Metrics
from kvmifup.commands import request
from kvmifup.core.errors import KvmIfupError, as_ours
from kvmifup.inputs import config
from kvmifup.runs.journal import Journal
from kvmifup.runs.leftovers import stands
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session, opened
from kvmifup.runs.store import Store
from kvmifup.tell import render, syslog, watchers

PROGRAM = "kvm-ifupd"
BUSY = 0.5  # seconds to wait for a lock while other NICs wait for the thread


Say = Callable[[str, int, str], bool]  # `kvmifup.agent.log.Log.say`


class Runner:
    """What all parts of the agent share: the journals, the settings, what is said and counted. For any thread."""

    def __init__(self, run_dir: Path, say: Say) -> None:
        self.run_dir = run_dir
        self.store = Store(run_dir)
        self.config = config.load(None)
        self.metrics = Metrics()
        self._say = say

    def say(self, line: str, nic: str = "", severity: int = syslog.INFO, kind: str = "") -> None:
        """Tell the log, and whoever watches, unless there have been too many lines of the *kind*, or of the NIC."""
        what = f"{nic}: {line}" if nic else line
        if self._say(what, severity, kind or nic):
            self.tell(what, nic)

    def tell(self, what: str, nic: str = "") -> None:
        """Tell whoever watches, and nobody else."""
        watchers.tell(self.run_dir, PROGRAM, {"nic": nic, "what": what})

    def complain(self, what: str, error: Exception) -> None:
        """Say what could not be done, and why."""
        self.say(render.error_line(what, as_ours(error)), severity=syslog.ERROR)

    def hook_done(self, program: str, code: int, seconds: float, failures: Sequence[KvmIfupError]) -> None:
        """Count a command that the agent has run for a script: a `kvmifup.commands.main.Observer`."""
        if program in request.PHASES:
            self.metrics.add("kvm_ifup_runs_total", program=program, code=str(code))
            self.metrics.took("kvm_ifup_run_seconds", seconds, program=program)
        self.failed(failures)

    def failed(self, failures: Sequence[KvmIfupError]) -> None:
        """Count the runs that had to put something back because they have failed."""
        self.metrics.add("kvm_ifup_rollbacks_total", sum(failure.undone for failure in failures))

    def session(self, reason: str | None = None, patience: float | None = None) -> AbstractContextManager[Session]:
        """What a run works with. *patience*: seconds to wait for locks, if not what is configured."""
        settings = self.config if patience is None else replace(self.config, lock_timeout=patience)
        # Somebody who watches wants to know how long each op takes.
        timed = watchers.watched(self.run_dir)
        return opened(self.run_dir, settings, by="agent", reason=reason, timed=timed, store=self.store)

    def restore(self, journal: Journal) -> bool:
        """Write *journal* again, unless its tap has one, or all of it was undone; returns whether it was written."""
        try:
            with self.session(patience=BUSY) as session, ExitStack() as stack:
                session.locked(stack, [journal.nic.tap])
                if session.store.load(journal.nic.tap) is not None or not stands(journal, session):
                    return False
                session.store.save(journal)
                return True
        except (KvmIfupError, OSError) as error:
            self.complain(f"journal of {journal.nic.label} not written again", error)
            return False

    def attempt(
        self, what: Callable[[Session], Outcome | None], reason: str | None = None, patience: float | None = None
    ) -> Outcome | KvmIfupError | None:
        """Do *what* in a session of its own; returns its outcome, or the error that it raises."""
        found = self.attempt_all(lambda session: [one for one in (what(session),) if one], reason, patience)
        return found if isinstance(found, KvmIfupError) else next(iter(found), None)

    def attempt_all(
        self, what: Callable[[Session], Sequence[Outcome]], reason: str | None = None, patience: float | None = None
    ) -> Sequence[Outcome] | KvmIfupError:
        """The same for what has many outcomes."""
        try:
            begun = time.monotonic()
            with self.session(reason, patience) as session:
                outcomes = what(session)
        except Exception as error:
            return as_ours(error)
        for outcome in outcomes:
            self.tell_of(outcome, (time.monotonic() - begun) / len(outcomes), session)
        return outcomes

    def tell_of(self, outcome: Outcome, seconds: float, session: Session) -> None:
        """Tell of a run in *session* that took so many *seconds*, if it has changed anything."""
        if any(change.needed for change in outcome.changes):
            syslog.run(PROGRAM, [outcome], [], seconds, "agent")
            watchers.run(self.run_dir, PROGRAM, [outcome], [], seconds, "agent", session.seconds)
