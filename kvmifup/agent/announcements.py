"""The later rounds of announcements, each sent when it is time and as long as it is true."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import TapRecord
from kvmifup.core.errors import KvmIfupError, as_ours
from kvmifup.core.model import Message
from kvmifup.core.records import record
from kvmifup.core.text import listed
from kvmifup.node import announce
from kvmifup.node.sockets import sender
from kvmifup.runs import announcing
from kvmifup.runs.announcing import SCHEDULE
from kvmifup.runs.outcome import Outcome
from kvmifup.tell import syslog

MANY = 100  # frames: more of them take so long that a thread sends them


@record
class Announcement:
    """*messages*, as long as they are *still_true*; its first round was sent when the monotonic clock said *begun*."""

    messages: Sequence[Message]
    still_true: Callable[[], bool]
    begun: float


class Announcements:
    """Sends the rounds after the first, by `kvmifup.runs.announcing.SCHEDULE`.

    *under_way*: how many announcements have rounds left.
    """

    def __init__(self, loop: Loop, runner: Runner) -> None:
        self._loop = loop
        self._runner = runner
        self.under_way = 0
        sender.socket()  # it stays open: what is to be sent must not wait for a descriptor

    def repeat(self, outcome: Outcome, since: float | None = None, wired: TapRecord | None = None) -> None:
        """Repeat what was announced with *outcome*, if anything was: at *since*, or just now. From any thread.

        *wired*: as long as this is the same, it is true; else, or without it, the journal is read each time.
        """
        store = self._runner.store

        def begin(messages: Sequence[Message], still_true: Callable[[], bool]) -> None:
            self.begin(messages, lambda: bool(wired and wired.is_same(store)) or still_true(), since)

        announcing.announce_later([outcome], store, begin)

    def begin(self, messages: Sequence[Message], still_true: Callable[[], bool], since: float | None = None) -> None:
        """Send *messages* again and again, as long as they are *still_true*. From any thread."""
        self._loop.soon(partial(self._begin, Announcement(messages, still_true, since or time.monotonic())))

    def _begin(self, one: Announcement) -> None:
        self.under_way += 1
        self._send_in_time(one, 1)

    def _send_in_time(self, one: Announcement, number: int) -> None:
        """Round *number*; the first is 0."""
        self._loop.later(one.begun + SCHEDULE[number] - time.monotonic(), partial(self._send, one, number))

    def _send(self, one: Announcement, number: int) -> None:
        if len(one.messages) > MANY:
            self._loop.work(partial(self._sent, one, number), partial(self._go_on, one, number))
        else:
            self._go_on(one, number, self._sent(one, number))

    def _go_on(self, one: Announcement, number: int, sent: bool) -> None:
        if sent and number + 1 < len(SCHEDULE):
            self._send_in_time(one, number + 1)
        else:
            self.under_way -= 1

    def _sent(self, one: Announcement, number: int) -> bool:
        """Send round *number*, from any thread; False if it is not true any more, or its uplink has gone."""
        try:
            if not one.still_true():
                return False
        except (KvmIfupError, OSError) as error:  # nobody knows; the next round asks again
            self._runner.say(
                f"round {number + 1} of {len(SCHEDULE)} left out: {as_ours(error)}", severity=syslog.WARNING
            )
            return True
        lost = announce.send(one.messages)
        if lost:
            self._runner.say(f"round {number + 1} of {len(SCHEDULE)}: {announce.say(lost)}", severity=syslog.WARNING)
        else:
            # An address is told in more than one way.
            told = listed(list(dict.fromkeys(f"{address} on {uplink}" for uplink, address, _ in one.messages)))
            self._runner.tell(f"announced, round {number + 1} of {len(SCHEDULE)}: {told}")
        return len(lost) < len(one.messages) or not all(failure.gone for failure in lost)
