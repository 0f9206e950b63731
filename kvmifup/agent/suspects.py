"""Guests that may have left are asked whether they are still here, and those that do not answer are withdrawn.

Withdrawn: what draws its traffic to this node is undone. This is the only way to it, whatever speaks for a guest's
having left. A guest that does not answer may only be slow. Two things tell:

- The machine behind the tap takes the frames out of it as long as it runs, however busy its guest is. One that has
  been stopped at the end of a migration takes none. So a guest whose machine takes them has `LONGEST` to answer.
- Who has been withdrawn and is heard again, not from QEMU at the end of a migration, was late. It has more time then.

Whoever listens for its answer goes on listening while it is withdrawn, and hands that over to who waits for guests
(`arrivals`): no frame gets lost in between. However many are suspected: at most `SLOTS` guests are asked at once, each
at most every `AGAIN` seconds, and one thread withdraws one guest after the other.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from kvmifup import phases
from kvmifup.agent.loop import Loop, OneAtATime, Timer
from kvmifup.agent.rivals import Heard
from kvmifup.agent.runner import BUSY, Runner
from kvmifup.core.errors import KvmIfupError, LockTimeoutError, as_ours
from kvmifup.core.model import Nic
from kvmifup.inputs import devices
from kvmifup.node import frames, sockets
from kvmifup.node.procfs import frames_into
from kvmifup.runs.moves import withdraw
from kvmifup.runs.outcome import Outcome

ANSWER, PATIENT = 0.05, 1.0  # seconds that a guest has to answer before it counts as gone; one with prefixes only
LONGEST = 5.0  # seconds, at most: for one that is known to be slow, or whose machine runs
SLOWER = 1.5  # how much longer than the last time a slow one may take
TAKES = 0.5  # seconds until a machine has to have taken another frame
RETRY = 0.01  # seconds until a question that the tap has not taken is asked again
AGAIN = 0.2  # seconds from an answer to the next question, if there is still a reason
LATER, LATEST = 1.0, 60.0  # seconds until what could not be done is tried again, then twice as long, and so on
WRONG = 60.0  # seconds after which a guest that comes back has really been away
TAKEN = 5.0  # seconds until a listener is taken over, or never will be
SLOTS = 64  # guests that are asked at once
SLOW = 1000  # guests that are known to be
STALE = 512  # frames that the guest may have sent before it was asked

Key = tuple[int, str]  # which guest: by the tap's index, and the guest's MAC
Handed = dict[Key, socket.socket]  # listeners for guests


class Suspect:
    """A guest that may have left. *heard* is why, by what it is about; *listener* is there once it has been asked.

    *asked*: when that was; *taken*: how many frames its machine had taken then, None if nobody knows. *tries*: how
    often it could not be withdrawn.
    """

    def __init__(self, nic: Nic) -> None:
        self.nic = nic
        self.heard: dict[str, Heard] = {}
        self.index = 0  # of the tap
        self.listener: socket.socket | None = None
        self.timer: Timer | None = None
        self.asking = False
        self.asked = 0.0
        self.taken: int | None = None
        self.tries = 0

    @property
    def key(self) -> Key:
        """Who it is."""
        return self.index, self.nic.mac

    @property
    def why(self) -> str:
        """The first reason, for people."""
        return next(iter(self.heard.values())).sentence


Verdict = tuple[Suspect, Outcome | KvmIfupError | bool | None]  # True: it has answered after all


class Suspects:
    """Asks guests that may have left, and withdraws those that have.

    *withdrawn* is called with the tap of each that is, *here* for each that has answered, with what was said of it.
    *handed* are the listeners for those that were withdrawn.
    """

    def __init__(
        self,
        loop: Loop,
        runner: Runner,
        withdrawn: Callable[[str], None],
        here: Callable[[Nic, Collection[Heard]], None],
    ) -> None:
        self._loop = loop
        self._runner = runner
        self._then, self._here = withdrawn, here
        self.handed: Handed = {}
        self._suspects: dict[str, Suspect] = {}  # by tap
        self._waiting: deque[Suspect] = deque()  # for a slot
        self._asking = 0  # how many have one
        self._silent: deque[Suspect] = deque()
        self._withdrawing = OneAtATime(loop, self._begin_withdrawing, self._withdrawn)
        self._left: dict[Key, tuple[float, float]] = {}  # when guests were asked, and withdrawn
        self._patience: dict[Key, float] = {}  # with those that are known to be slow

    def close(self) -> None:
        """Let go of everything."""
        for listener in (*(one.listener for one in self._suspects.values()), *self.handed.values()):
            if listener:
                listener.close()

    def came_back(self, key: Key) -> None:
        """A guest that was withdrawn has sent a frame, and has not come from another node: it had not left."""
        asked, withdrawn = self._left.pop(key, (0.0, -WRONG))
        now = time.monotonic()
        if now - withdrawn < WRONG:
            self._learn(key, now - asked)

    def _learn(self, key: Key, seconds: float) -> None:
        """The guest has answered *seconds* after it was asked."""
        patience = min(max(SLOWER * seconds, self._patience.pop(key, 0.0) / 2), LONGEST)
        if patience > ANSWER:
            self._patience[key] = patience
        for one in list(self._patience)[:-SLOW]:  # guests of long ago, which are somewhere else
            del self._patience[one]

    def suspect(self, nic: Nic, heard: Heard) -> None:
        """The guest of *nic* may have left, by what was *heard*."""
        suspect = self._suspects.get(nic.tap)
        if suspect and suspect.nic.mac != nic.mac:
            self._acquit(suspect)
            suspect = None
        if suspect is None:
            suspect = self._suspects[nic.tap] = Suspect(nic)
            self._waiting.append(suspect)
        before = suspect.heard.get(heard.what)
        suspect.heard[heard.what] = heard if before is None else heard.again(before)
        self._ask_next()

    # --- asking ---------------------------------------------------------------------------------------------

    def _ask_next(self) -> None:
        while self._waiting and self._asking < SLOTS:
            suspect = self._waiting.popleft()
            if self._suspects.get(suspect.nic.tap) is suspect:
                self._ask(suspect)

    def _ask(self, suspect: Suspect) -> None:
        nic = suspect.nic
        try:
            if suspect.listener is None:
                index = devices.index_of(nic.tap)
                if index is None:  # the tap is gone, and that is dealt with elsewhere
                    self._acquit(suspect)
                    return
                suspect.listener, suspect.index = sockets.guest_listener(nic.tap, nic.mac), index
        except OSError:  # no descriptors, no memory: that says nothing about it
            suspect.timer = self._loop.later(LATER, partial(self._once_more, suspect))
            return
        suspect.asking = True
        self._asking += 1
        self._loop.watch(suspect.listener, partial(self._maybe_answered, suspect))
        for _ in range(STALE):
            if not heard_from(suspect.listener):
                break
        suspect.asked, suspect.taken = time.monotonic(), taken(suspect)
        question(suspect, self._loop)
        patience = max(one.patience or ANSWER for one in suspect.heard.values())
        if not any(map(phases.is_host, nic.ip)):
            patience = max(patience, PATIENT)
        patience = max(patience, self._patience.get(suspect.key, 0.0))
        suspect.timer = self._loop.later(ANSWER / 2, partial(self._ask_twice, suspect, patience - ANSWER / 2))

    def _ask_twice(self, suspect: Suspect, patience: float) -> None:
        """A machine that stands still still takes one frame, which it keeps: so it gets two.

        It has *patience* seconds from this one on: when the node is busy, both questions may come late.
        """
        question(suspect, self._loop)
        suspect.timer = self._loop.later(patience, partial(self._late, suspect, 2))

    def _maybe_answered(self, suspect: Suspect) -> None:
        assert suspect.listener
        if heard_from(suspect.listener):
            self._asked(suspect)
            self._is_here(suspect)

    def _late(self, suspect: Suspect, least: int) -> None:
        """It has not answered in time; there is more if its machine has taken at *least* so many frames meanwhile."""
        before, now = suspect.taken, taken(suspect)
        suspect.taken = now
        runs = before is not None and now is not None and now - before >= least
        if runs and time.monotonic() - suspect.asked < LONGEST:
            question(suspect, self._loop)
            suspect.timer = self._loop.later(TAKES, partial(self._late, suspect, 1))
        else:
            self._no_answer(suspect)

    def _no_answer(self, suspect: Suspect) -> None:
        self._asked(suspect)
        if self._runner.config.agent.withdraw:
            self._give_up(suspect)
        else:
            self._acquit(suspect)

    def _give_up(self, suspect: Suspect) -> None:
        """Have it withdrawn, unless it answers before its turn."""
        self._silent.append(suspect)
        self._withdrawing.ask()

    def _asked(self, suspect: Suspect) -> None:
        assert suspect.listener
        if suspect.timer:
            suspect.timer.cancel()
        suspect.asking = False
        self._asking -= 1
        self._loop.ignore(suspect.listener)
        self._loop.soon(self._ask_next)

    def _is_here(self, suspect: Suspect) -> None:
        """It has answered; after a while it is asked again, if there is still a reason."""
        self._learn(suspect.key, time.monotonic() - suspect.asked)
        self._here(suspect.nic, suspect.heard.values())
        suspect.heard = {}
        suspect.timer = self._loop.later(AGAIN, partial(self._once_more, suspect))

    def _once_more(self, suspect: Suspect) -> None:
        if suspect.heard:
            self._waiting.append(suspect)
            self._ask_next()
        else:
            self._acquit(suspect)

    def _acquit(self, suspect: Suspect) -> None:
        """Nothing speaks for its having left any more."""
        if suspect.asking:
            self._asked(suspect)
        if suspect.timer:
            suspect.timer.cancel()
        if self._suspects.get(suspect.nic.tap) is suspect:
            del self._suspects[suspect.nic.tap]
        if suspect.listener:
            sockets.close(suspect.listener)
            suspect.listener = None

    # --- withdrawing ----------------------------------------------------------------------------------------

    def _begin_withdrawing(self) -> Callable[[], Verdict] | None:
        while self._silent:
            suspect = self._silent.popleft()
            if suspect.listener:
                self.handed[suspect.key] = suspect.listener  # before: who waits for guests may look at once
                return partial(try_to_withdraw, self._runner, suspect, suspect.listener)
        return None

    def _withdrawn(self, verdict: Verdict) -> None:
        suspect, outcome = verdict
        self._withdrawing.ask()  # the next one
        nic = suspect.nic
        if isinstance(outcome, Outcome):
            self._loop.later(TAKEN, partial(self._not_taken, suspect.key, suspect.listener))
            suspect.listener = None  # from now on it is another room's
            self._remember(suspect)
            said = f"{suspect.why}, and the guest does not answer here any more: route and proxy entries withdrawn"
            self._acquit(suspect)
            self._runner.metrics.add("kvm_ifup_withdrawals_total")
            self._runner.say(said, nic.label)
            self._then(nic.tap)
            return
        self.handed.pop(suspect.key, None)
        if outcome is True and suspect.listener:
            self._is_here(suspect)
            return
        if isinstance(outcome, KvmIfupError):
            if not suspect.tries and not isinstance(outcome, LockTimeoutError):
                self._runner.complain("not withdrawn", outcome)
            suspect.timer = self._loop.later(min(LATER * 2**suspect.tries, LATEST), partial(self._give_up, suspect))
            suspect.tries += 1
            return
        self._acquit(suspect)

    def _remember(self, suspect: Suspect) -> None:
        """When it was asked and withdrawn, as long as that tells whether it was late."""
        now = time.monotonic()
        self._left = {key: one for key, one in self._left.items() if now - one[1] < WRONG}
        self._left[suspect.key] = suspect.asked, now

    def _not_taken(self, key: Key, listener: socket.socket | None) -> None:
        """Nobody waits for that guest: its NIC has been taken down."""
        if listener and self.handed.get(key) is listener:
            del self.handed[key]
            sockets.close(listener)


def try_to_withdraw(runner: Runner, suspect: Suspect, listener: socket.socket) -> Verdict:
    """In a thread: withdraw *suspect*, unless it is heard first."""
    if heard_from(listener):
        return suspect, True
    spoke = False

    def silent() -> bool:
        nonlocal spoke
        spoke = heard_from(listener)
        return not spoke

    try:
        with runner.session(suspect.why, BUSY) as session:
            return suspect, withdraw(suspect.nic.tap, session, suspect.key, silent) or spoke or None
    except Exception as error:
        return suspect, as_ours(error)


def question(suspect: Suspect, loop: Loop) -> None:
    """Ask *suspect* what is said of it; while the tap's queue is full, again in a moment."""
    if not suspect.asking:
        return
    about = next((what for what in suspect.heard if what in map(phases.bare, suspect.nic.ip)), "")
    with suppress(OSError):  # the tap is gone: then there will be no answer
        if not ask(suspect.nic, about):
            loop.later(RETRY, partial(question, suspect, loop))


def taken(suspect: Suspect) -> int | None:
    """How many frames its machine has taken by now, None if nobody can tell."""
    with suppress(OSError):
        return frames_into(suspect.nic.tap, suspect.index)
    return None


def heard_from(listener: socket.socket) -> bool:
    """Take one frame out of *listener*; whether there was one."""
    try:
        return bool(listener.recv(1))
    except OSError:  # nothing there; or ENETDOWN, once: the tap is down
        return False


def ask(nic: Nic, about: str = "") -> bool:
    """Ask the guest of *nic* whether it is here; whether the tap has taken it. Raises OSError if that is gone."""
    return sockets.send(nic.tap, frames.questions(nic, about))
