"""What a run needs of a node, and hosts that pass their calls on to another one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from kvmifup.core.model import Config, Nic, NodeFacts
from kvmifup.core.ops import Op, Value
from kvmifup.runs.apply import Node


class Host(Node, Protocol):
    """A node that can also be asked for facts: `kvmifup.node.kernel.Kernel`, or a stand-in."""

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """What a plan for *nic* needs to know. Raises KernelError."""

    def ifindex(self, dev: str) -> int | None:
        """The index of *dev*, None if there is no such device."""

    def device(self, index: int) -> str | None:
        """The name of the device with *index*, None if there is none."""

    def sign_of(self, tap: str) -> str:
        """How it is known that the guest on *tap* runs here by now; "" if nothing shows it. Raises KernelError."""

    def refresh(self) -> None:
        """Forget what was read: something may have changed."""


class Through:
    """A host that passes its calls on to another one; subclasses change an answer, or note something."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def refresh(self) -> None:
        """As the host's."""
        self._host.refresh()

    def ifindex(self, dev: str) -> int | None:
        """As the host's."""
        return self._host.ifindex(dev)

    def device(self, index: int) -> str | None:
        """As the host's."""
        return self._host.device(index)

    def sign_of(self, tap: str) -> str:
        """As the host's."""
        return self._host.sign_of(tap)

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """As the host's."""
        return self._host.facts(nic, config)

    def read(self, op: Op) -> Value:
        """As the host's."""
        return self._host.read(op)

    def write(self, op: Op) -> None:
        """As the host's."""
        self._host.write(op)

    def write_all(self, ops: Sequence[Op]) -> None:
        """As the host's."""
        self._host.write_all(ops)


class Timed(Through):
    """A host that notes how long reading and writing take: *seconds*, by op key."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.seconds: dict[tuple[object, ...], float] = defaultdict(float)

    def read(self, op: Op) -> Value:
        """As the host's."""
        with self._timed(op):
            return self._host.read(op)

    def write(self, op: Op) -> None:
        """As the host's."""
        with self._timed(op):
            self._host.write(op)

    def write_all(self, ops: Sequence[Op]) -> None:
        """As the host's; each has its share."""
        with self._timed(*ops):
            self._host.write_all(ops)

    @contextmanager
    def _timed(self, *ops: Op) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            for op in ops:
                self.seconds[op.key] += (time.monotonic() - begun) / len(ops)
