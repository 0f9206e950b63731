"""The node agent in the lab: kvm-ifupd on a node, from its start until the block ends."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lab import clock
from lab.errors import LabError
from lab.hooks import Hooks
from lab.nodes import Namespace, end

NAME = "kvm-ifupd.service"
# What tests of an installed package have of the source lacks the first.
UNITS = Path(__file__).parents[1] / f"integration/systemd/{NAME}", Path(f"/usr/lib/systemd/system/{NAME}")


@cache
def scheduled() -> tuple[str, ...]:
    """What starts a command as systemd's unit does the agent: what is measured is what a node has."""
    unit = next(path for path in UNITS if path.exists())
    text = unit.read_text()
    niceness, environment = (re.search(rf"^{key}=(.+)$", text, re.MULTILINE) for key in ("Nice", "Environment"))
    assert niceness, f"{unit} has no Nice="
    assert environment, f"{unit} has no Environment="
    return "env", environment[1], "nice", "-n", niceness[1]


class Agent:
    """A running kvm-ifupd. Made by `agent`."""

    def __init__(self, node: Namespace, hooks: Hooks, log: Path) -> None:
        self._node, self._hooks, self._log = node, hooks, log
        self.start()

    def start(self) -> None:
        """Starts it and returns when it takes hooks. LabError when it does not get there."""
        before = self.said().count(": ready")
        with self._log.open("a") as log:
            self.process: subprocess.Popen[str] = self._node.popen(
                [*scheduled(), str(self._hooks.path("kvm-ifupd"))], stderr=log
            )
        deadline = clock.now() + 60
        while self.said().count(": ready") == before:
            if self.process.poll() is not None or clock.now() > deadline:
                raise LabError(f"the agent on {self._node.name} does not start: {self.said()}", "run it by hand")
            time.sleep(0.01)

    def said(self) -> str:
        """All that it has written, across restarts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill(self) -> None:
        """Ends it in the worst way."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends it as systemd does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        end(self.process, seconds=10)


@contextlib.contextmanager
def agent(node: Namespace, hooks: Hooks) -> Iterator[Agent]:
    """The agent of `node`; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-agent-") as scratch:
        one = Agent(node, hooks, Path(scratch) / f"{node.name}.log")
        try:
            yield one
        finally:
            one.stop()
