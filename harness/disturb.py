"""Disturbing a run in this process at one of its writes: the kernel refuses, or the run is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

Disturbance = Callable[[int, Any], None]


def nothing(_number: int, _op: Any) -> None:
    """No disturbance."""


@contextlib.contextmanager
def disturbed(before: Disturbance = nothing, after: Disturbance = nothing) -> Iterator[list[Any]]:
    """Around every write of a run in this process call *before* and *after* with its number, from 1, and its op.

    Yields the list of the ops written so far, undoing ones included.
    """
    from kvmifup.node.kernel import Kernel
    from kvmifup.runs import session

    written: list[Any] = []

    class Disturbed(Kernel):
        def write(self, op: Any) -> None:
            written.append(op)
            number = len(written)
            before(number, op)
            super().write(op)
            after(number, op)

        def write_all(self, ops: Sequence[Any]) -> None:
            first = len(written) + 1
            for number, op in enumerate(ops, first):
                written.append(op)
                before(number, op)
            super().write_all(ops)
            for number, op in enumerate(ops, first):
                after(number, op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Kernel", Disturbed)
        yield written


def refuse(number: int) -> Disturbance:
    """A disturbance: the kernel says no, at write *number*."""

    def disturb(at: int, op: Any) -> None:
        from kvmifup.core.errors import KernelError

        if at == number:
            raise KernelError(f"injected at write {number}: {op.describe()}", errno=5)

    return disturb


def kill(number: int) -> Disturbance:
    """A disturbance: the run is killed, at write *number* (before the first, if put before it and 1)."""

    def disturb(at: int, _op: Any) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return disturb
