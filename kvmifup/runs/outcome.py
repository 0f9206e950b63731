"""What a run did for a NIC, or would do."""

from __future__ import annotations

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Message, Nic, Phase
from kvmifup.core.ops import Announce
from kvmifup.core.records import record
from kvmifup.runs.apply import Change


@record
class Outcome:
    """What was done for one NIC, or would be: *undone* first (leftovers of a dead NIC), then *changes*."""

    label: str
    nic: Nic | None
    tap: str
    phase: Phase
    undone: tuple[Change, ...] = ()
    changes: tuple[Change, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was announced: the first round has been sent."""
        return tuple(
            message
            for change in self.changes
            if change.needed and isinstance(change.op, Announce)
            for message in change.op.messages
        )


Results = tuple[list[Outcome], list[KvmIfupError]]  # what was done, and what went wrong: each NIC is in one of them
