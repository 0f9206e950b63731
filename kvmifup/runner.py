"""What the agent runs by itself: each run in a session of its own, its failure a result, both told to the logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvmifup import config, live, log, report
from kvmifup.errors import KvmIfupError, known
from kvmifup.journal import Store
from kvmifup.kernel import Kernel
from kvmifup.metrics import Metrics
from kvmifup.run import Outcome, Session
from kvmifup.timing import Timed

PROGRAM = "kvm-ifupd"


class Runner:
    """What all parts of the agent share: the journals, the settings, what is said and counted. For any thread."""

    def __init__(self, run_dir: Path, say: Callable[[str, int], None]) -> None:
        self.run_dir = run_dir
        self.store = Store(run_dir)
        self.config = config.load(None)
        self.metrics = Metrics()
        self._say = say

    def say(self, line: str, nic: str = "", severity: int = log.INFO) -> None:
        """Tell the log, and whoever watches."""
        what = f"{nic}: {line}" if nic else line
        self._say(what, severity)
        self.tell(what, nic)

    def tell(self, what: str, nic: str = "") -> None:
        """Tell whoever watches, and nobody else."""
        live.tell(self.run_dir, PROGRAM, {"nic": nic, "what": what})

    def complain(self, what: str, error: Exception) -> None:
        """Say what could not be done, and why."""
        self.say(report.error_line(what, known(error)), severity=log.ERROR)

    def failed(self, failure: KvmIfupError | None) -> None:
        """Count what had to be put back because a run has failed."""
        if failure and failure.undone:
            self.metrics.add("kvm_ifup_rollbacks_total")

    @contextmanager
    def session(self, frame: str | None = None, patience: float | None = None) -> Iterator[Session]:
        """What a run works with. *patience*: seconds to wait for locks, if not what is configured."""
        settings = self.config if patience is None else replace(self.config, lock_timeout=patience)
        kernel = Kernel()
        # Somebody who watches wants to know how long each op takes.
        timed = Timed(kernel) if live.watched(self.run_dir) else kernel
        try:
            yield Session(timed, self.store, self.run_dir, settings, by="agent", frame=frame)
        finally:
            kernel.close()

    def attempt(
        self, what: Callable[[Session], Outcome | None], frame: str | None = None, patience: float | None = None
    ) -> Outcome | KvmIfupError | None:
        """Do *what*; an error is a result as well."""
        try:
            begun = time.monotonic()
            with self.session(frame, patience) as session:
                outcome = what(session)
        except Exception as error:
            return known(error)
        if outcome and any(change.needed for change in outcome.changes):
            seconds = time.monotonic() - begun
            log.run(PROGRAM, [outcome], None, seconds, "agent")
            ops = session.kernel.seconds if isinstance(session.kernel, Timed) else None
            live.run(self.run_dir, PROGRAM, [outcome], None, seconds, "agent", ops)
        return outcome
