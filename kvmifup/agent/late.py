"""Addresses for which a guest answers only after it has arrived: they follow those that it has answered for."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import partial

from kvmifup.agent.announcements import Announcements
from kvmifup.agent.answers import Answers
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import Runner
from kvmifup.agent.suspects import ask
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Nic, Phase
from kvmifup.core.text import listed
from kvmifup.node import sockets
from kvmifup.runs.journal import Journal
from kvmifup.runs.moves import limited, run_post
from kvmifup.runs.outcome import Outcome

ASK_AGAIN = 0.05  # seconds from one question to the next; each time twice as many
LATEST = 1.0  # seconds after a guest's arrival: what it has not answered for by then is left to who knows better


@dataclass
class Late:
    """A guest that is here: its *nic* with all addresses, on the device *ifindex*, and those that are *wired*.

    *busy*: a run is at work. *over*: nobody waits for the rest any more.
    """

    nic: Nic
    ifindex: int
    listener: socket.socket
    answers: Answers
    wired: frozenset[str]
    busy: bool = False
    over: bool = False

    def is_as_wired(self, journal: Journal) -> bool:
        """Whether *journal* is about this guest, and nobody else has said anything of its addresses since."""
        ours = (self.ifindex, Phase.POST, limited(self.nic, self.wired))
        return (journal.ifindex, journal.phase, journal.nic) == ours and not journal.left


class LateAnswers:
    """Asks those that have arrived for the rest of their addresses, and has each wired that they answer for."""

    def __init__(self, loop: Loop, runner: Runner, announcements: Announcements) -> None:
        self._loop = loop
        self._runner = runner
        self._announcements = announcements

    def wait_for(self, late: Late) -> None:
        """Its guest has been wired a moment ago, and has more addresses; it has been asked for all of them."""
        self._loop.watch(late.listener, partial(self._heard, late))
        self._loop.later(LATEST, partial(self._end, late))
        self._loop.later(ASK_AGAIN, partial(self._ask, late, 2 * ASK_AGAIN))

    def _ask(self, late: Late, pause: float) -> None:
        if late.over:
            return
        try:
            ask(late.nic)
        except OSError:  # the tap is gone
            self._end(late)
        else:
            self._loop.later(pause, partial(self._ask, late, 2 * pause))

    def _heard(self, late: Late) -> None:
        for frame, sent in sockets.received(late.listener):
            late.answers.take(frame, sent)
        self._go_on(late)

    def _go_on(self, late: Late) -> None:
        if not late.busy and late.answers.given > late.wired:
            late.busy = True
            given = frozenset(late.answers.given)
            post = partial(run_post, late.nic.tap, late.is_as_wired, known=lambda _: limited(late.nic, given))
            task = partial(self._runner.attempt, post, "an address that it has answered for later")
            self._loop.work(task, partial(self._done, late, given))

    def _done(self, late: Late, given: frozenset[str], outcome: Outcome | KvmIfupError | None) -> None:
        late.busy = False
        if not isinstance(outcome, Outcome):
            if outcome:
                self._runner.failed([outcome])
                self._runner.complain("not all of its addresses are wired", outcome)
            self._end(late)
            return
        self._runner.say(f"it has {listed(sorted(given - late.wired))} as well: wired", late.nic.label)
        self._announcements.repeat(outcome)
        late.wired = given
        if late.answers.complete and given == late.answers.given:
            self._end(late)
        elif not late.over:
            self._go_on(late)

    def _end(self, late: Late) -> None:
        if not late.over:
            late.over = True
            self._loop.ignore(late.listener)
            sockets.close(late.listener)
