"""How long each op takes: for -vv."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from kvmifup.model import Config, Nic, NodeFacts
from kvmifup.ops import Op, Value

if TYPE_CHECKING:
    from kvmifup.run import Host


class Timed:
    """A node that takes note of what it is asked, and for how long. *seconds* has reading and writing, by op key."""

    def __init__(self, node: Host) -> None:
        self._node = node
        self.seconds: dict[tuple[object, ...], float] = defaultdict(float)

    def refresh(self) -> None:
        """As the node's."""
        self._node.refresh()

    def ifindex(self, dev: str) -> int | None:
        """As the node's."""
        return self._node.ifindex(dev)

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """As the node's."""
        return self._node.facts(nic, config)

    def read(self, op: Op) -> Value:
        """As the node's."""
        begun = time.monotonic()
        try:
            return self._node.read(op)
        finally:
            self.seconds[op.key] += time.monotonic() - begun

    def write(self, op: Op) -> None:
        """As the node's."""
        begun = time.monotonic()
        try:
            self._node.write(op)
        finally:
            self.seconds[op.key] += time.monotonic() - begun
