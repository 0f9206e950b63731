"""Announcing: the first round when a job is done, the later ones as long as it is true. All of it is best effort.

Announcing begins when what it says is true, and a failure changes nothing: what draws the guest's traffic
here is in place, the neighbours' caches expire, and each round is for itself. It is told, though.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Background, Message
from kvmifup.node.announce import say, send
from kvmifup.node.sockets import sender
from kvmifup.runs.apply import Job, Node, apply
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.store import Store

# When QEMU announces a guest after a migration, in seconds (net/announce.c: 50 ms at first, growing by
# 100 ms, five rounds). We use the same schedule, because our frames can get lost in the same way.
SCHEDULE = (0.0, 0.05, 0.2, 0.45, 0.8)


def carry_out(
    prepared: Sequence[tuple[Outcome, Job]], node: Node, store: Store, rest: Callable[[], object] = lambda: None
) -> list[Outcome]:
    """Do all that is *prepared*, or none of it; then announce it. What cannot be announced is a remark.

    For *rest* see `apply.apply`, which raises the same.
    """
    apply([job for _, job in prepared], node, store, rest)
    return [replace(outcome, remarks=(*outcome.remarks, *first_round(job, node))) for outcome, job in prepared]


def first_round(job: Job, node: Node) -> Iterator[str]:
    """Announce what *job* has made true; yields what could not be announced, and why."""
    for change in job.needed:
        if change.op.after_change:
            try:
                node.write(change.op)
            except KvmIfupError as error:
                yield str(error)


def repeat_detached(
    messages: Sequence[Message], still_true: Callable[[], bool], complain: Callable[[str], None]
) -> None:
    """Send the later rounds of `SCHEDULE` from a child process, and return at once.

    The child gives up when *still_true* says so before a round: the guest may have left in the meantime. *complain* is
    told what could not be sent; the next round is sent all the same.
    """
    if os.fork():
        return
    try:
        # The caller may wait until our output is closed; and a tap stays while anything holds its descriptor.
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        kept = sender.descriptor or 2  # it is 3 or more, if there is one
        os.closerange(3, kept)
        os.closerange(kept + 1, 65536)
        start = time.monotonic()
        for moment in SCHEDULE[1:]:
            time.sleep(max(0.0, start + moment - time.monotonic()))
            try:
                if not still_true():
                    break
            except (KvmIfupError, OSError) as error:  # nobody knows; the next round asks again
                complain(f"a round left out: {error}")
            else:
                if lost := send(messages):
                    complain(say(lost))
    except OSError:
        pass
    finally:
        os._exit(0)


def announce_later(outcomes: Sequence[Outcome], store: Store, background: Background | None) -> None:
    """Have *background* send the later rounds of what was announced; they stop when the guest leaves."""
    for outcome in outcomes:
        if outcome.messages and background:
            addresses = {address for _, address, _ in outcome.messages}
            background(outcome.messages, partial(store.has_here, outcome.tap, addresses))
