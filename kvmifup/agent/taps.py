"""The taps that have a journal, and what the agent does for each of them at the moment."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import cached_property, partial
from pathlib import Path

from kvmifup.agent.answers import Answers
from kvmifup.agent.loop import Loop, OneAtATime, Timers
from kvmifup.agent.runner import Runner
from kvmifup.core.errors import BugError, KernelError, KvmIfupError, NamespaceError
from kvmifup.core.model import Phase
from kvmifup.core.ops import ProxyNeighbour
from kvmifup.node import sockets
from kvmifup.runs import clock
from kvmifup.runs.arriving import PreparedArrival
from kvmifup.runs.index import Stamp
from kvmifup.runs.journal import Journal
from kvmifup.runs.store import Store
from kvmifup.tell import syslog

SETTLE = 0.03  # seconds from the news of a change of the journals to the look at them: QEMU takes longer to start
REST, REST_AT_MOST = 4.0, 0.5  # times what the last look took, until the next; and seconds
AGAIN = 1.0  # seconds from a look that failed to the next one
REMOVING = 2.0  # seconds that somebody may take to remove the whole directory

Prepared = Mapping[str | None, PreparedArrival]
Place = tuple[str, str]  # where this node answers for a guest: uplink, address


class State(Enum):
    """What the agent does for a tap, as far as one version of its journal goes.

    A run that changes the journal ends this: the record becomes OVER, and the new journal gets a new one.
    """

    WIRED = "post is done: the guest runs here"
    UNFINISHED = "a run is at work on it, or was killed"
    DISARMED = "nobody listens for its guest: not yet, no longer, or it is not possible"
    ARMING = "its guest's first frame is listened for, and post is prepared for the first time"
    ARMED = "its guest's first frame is listened for, and nothing is prepared: post begins at the beginning"
    READY = "its guest's first frame is listened for, and post is prepared"
    ARRIVING = "its guest has sent a frame: post is at work, has been done, or has failed and will be tried again"
    OVER = "the journal has changed, or is gone"


LISTENING = {State.ARMING, State.ARMED, State.READY}
NEXT: dict[State, set[State]] = {
    State.WIRED: {State.OVER},
    State.UNFINISHED: {State.OVER},
    State.DISARMED: {State.ARMING, State.OVER},
    State.ARMING: {State.ARMED, State.READY, State.ARRIVING, State.DISARMED, State.OVER},
    State.ARMED: {State.READY, State.ARRIVING, State.DISARMED, State.OVER},
    State.READY: {State.ARMED, State.ARRIVING, State.DISARMED, State.OVER},
    State.ARRIVING: {State.OVER},
    State.OVER: set(),
}


class TapRecord:
    """One tap, from its journal.

    *stamp* tells this version of the journal from others. *reached*: when it reached its phase, by the clock of
    `runs.clock`. *places* are where this node answers for the guest, *uplinks* the indices of those devices.
    *listener* is there while the state is one of `LISTENING`, *prepared* while it is READY: post for all of its
    addresses, by None, and where the guest is asked for each alone, by that. *timers* are
    cancelled by a change to a state in which nobody listens. *tries*: how many versions of the journal right before
    this one were UNFINISHED too. *complaint*: what was last said to keep post from being prepared.
    *doubtful*: its guest may be here, and have nothing more to say, so it is asked. *asked*: the question has
    been put into its tap.
    """

    def __init__(self, loop: Loop, journal: Journal, stamp: Stamp) -> None:
        self.journal = journal
        self.nic = journal.nic
        self.ifindex = journal.ifindex
        self.phase = journal.phase
        self.reached = clock.uptime() - clock.age(journal)
        self.left = journal.left
        self.stamp = stamp
        self.places = tuple(
            (entry.op.dev, entry.op.address)
            for entry in journal.entries
            if isinstance(entry.op, ProxyNeighbour) and journal.phase is Phase.POST
        )
        answering = {dev for dev, _ in self.places}
        self.uplinks = tuple(index for dev, index in journal.devices if dev in answering)
        self.state = state_of(journal)
        self.listener: socket.socket | None = None
        self.prepared: Prepared = {}
        self.timers = Timers(loop)
        self.tries = 0
        self.complaint = ""
        self.doubtful = False
        self.asked = False
        self._loop = loop

    @property
    def name(self) -> str:
        """The device's name."""
        return self.nic.tap

    @cached_property
    def answers(self) -> Answers:
        """What its guest says of its addresses; nearly all guests are here already, and nobody asks them."""
        return Answers(self.nic)

    def become(self, state: State) -> None:
        """Go on to *state*, and let go of what is not needed there. Raises BugError if that cannot follow."""
        if state not in NEXT[self.state]:
            raise BugError(f"{self.nic.label} cannot become {state.name}, being {self.state.name}")
        self.state = state
        if state is not State.READY:
            self.prepared = {}
        if state not in LISTENING:
            self.timers.cancel()
            if self.listener:
                self._loop.ignore(self.listener)
                sockets.close(self.listener)
                self.listener = None

    def arm(self, listener: socket.socket) -> None:
        """*listener* has been opened for the guest's frames."""
        self.become(State.ARMING)
        self.listener = listener

    def take_over(self, before: TapRecord) -> None:
        """Go on listening where *before* did, if for the same guest: what it has not read yet does not get lost."""
        if self.listener and before.listener and self.is_of(before.journal):
            self._loop.ignore(before.listener)
            sockets.close(self.listener)
            self.listener, before.listener = before.listener, None

    def hand_over(self) -> socket.socket:
        """Let go of the listener: somebody else listens on."""
        assert self.listener
        listener, self.listener = self.listener, None
        self._loop.ignore(listener)
        return listener

    def ready(self, prepared: Prepared) -> None:
        """post is *prepared*."""
        self.become(State.READY)
        self.prepared = prepared

    def is_there(self) -> bool:
        """Whether the device still exists, and its name is still its own."""
        return sockets.is_device(self.name, self.ifindex)

    def is_same(self, store: Store) -> bool:
        """Whether device and journal are still those that this is about."""
        return store.stamp(self.name) == self.stamp and self.is_there()

    def is_of(self, journal: Journal) -> bool:
        """Whether *journal* is about this guest: by now the tap may be another one's, or there for another one."""
        return (journal.ifindex, journal.nic.mac) == (self.ifindex, self.nic.mac)


def state_of(journal: Journal) -> State:
    """What *journal* says, before anybody listens."""
    if journal.pending:
        return State.UNFINISHED
    return State.WIRED if journal.phase is Phase.POST else State.DISARMED


def identity_of(directory: Path) -> tuple[int, int] | None:
    """What tells *directory* from another one at its path; None if there is none."""
    with suppress(OSError):
        info = directory.stat()
        return info.st_dev, info.st_ino
    return None


# The taps that have no journal any more; those whose journal is new; whether all that there is could be read.
Found = tuple[set[str], dict[str, TapRecord], bool]


class Taps:
    """All taps that have a journal in this network namespace.

    A thread reads the journals, those that are said to have changed, or all. For a new one in pre it calls *listen*
    with the record, so that no frame gets lost while others are read. Then the loop calls *over* with each record that
    is no more, *found* with each new one, and *looked* once, after all of them, with whether any has come or gone since
    the last time.
    """

    def __init__(
        self,
        loop: Loop,
        runner: Runner,
        listen: Callable[[TapRecord], None],
        found: Callable[[TapRecord], None],
        looked: Callable[[bool], None],
        over: Sequence[Callable[[TapRecord], None]] = (),
    ) -> None:
        self._loop = loop
        self._runner = runner
        self._listen, self._found, self._looked = listen, found, looked
        self._when_over = over
        self._asked: set[str] | None = set()  # the taps at which to look next; None: all
        self._taps: dict[str, TapRecord] = {}
        self._look = OneAtATime(loop, self._begin, self._done)
        self._begun = self._took = 0.0  # when the last look began, and how long it took, in seconds
        # Of the thread that looks: journals that it need not read again while they stay as they are.
        self._unreadable: dict[str, Stamp] = {}
        self._heeded = False  # the store has been told of all that has changed (`Store.heed`)
        self._complaint = ""  # why the directory could not be looked at, the last time
        self._elsewhere: dict[str, Stamp] = {}  # of other network namespaces
        self._directory = identity_of(runner.store.directory)  # the one that was looked at last
        self._missing: dict[str, tuple[Journal, float]] = {}  # those that have gone a moment ago, and when
        self._doubtful: set[str] = set()  # those whose guest has sent a frame that has led to nothing
        self._changed = True  # there are others than when `looked` was called last
        self._written: set[str] = set()  # those whose journal the loop itself has written since the last look began

    def __iter__(self) -> Iterator[TapRecord]:
        return iter(self._taps.values())

    def __len__(self) -> int:
        return len(self._taps)

    def names(self) -> list[str]:
        """The names of all."""
        return list(self._taps)

    def named(self, names: Sequence[str]) -> list[TapRecord]:
        """Those of *names* that have a record."""
        return [self._taps[name] for name in names if name in self._taps]

    def look(self, names: Collection[str] | None = None) -> None:
        """See what has changed in the journals of the taps *names*; None for all that there are."""
        self._want(names)
        self._look.ask()

    def _want(self, names: Collection[str] | None) -> None:
        self._asked = None if names is None or self._asked is None else self._asked.union(names)

    def look_again(self) -> None:
        """See whether what could not be read can be now, and what is the matter with it."""
        if not self._look.busy:
            self.look(list(self._unreadable) if self._heeded else None)

    def look_soon(self, names: Collection[str] | None = None) -> None:
        """The same in a moment, once for all changes until then.

        A hook writes its journal twice, and we should not compete with it for the processor. With thousands of
        journals a look takes long, so there are pauses that are longer in proportion.
        """
        self._want(names)
        self._look.ask_in(max(SETTLE, min(REST * self._took, REST_AT_MOST)))

    def look_again_at(self, tap: TapRecord) -> None:
        """Read its journal again, though it is the same, and begin anew with it: its arrival has failed."""
        tap.become(State.OVER)
        del self._taps[tap.name]
        self._over(tap)
        self._doubtful.add(tap.name)
        self.look([tap.name])

    def written(self, journal: Journal, stamp: Stamp) -> TapRecord:
        """The loop itself has written *journal*, with this *stamp*: nobody need read it. Returns its record."""
        tap = TapRecord(self._loop, journal, stamp)
        self._take(tap)
        self._written.add(tap.name)
        self._doubtful.discard(tap.name)
        self.look_soon([tap.name])
        return tap

    def close(self) -> None:
        """Let go of everything. The loop is closed."""
        for tap in self:
            if tap.listener:
                tap.listener.close()

    def _over(self, tap: TapRecord) -> None:
        for call in self._when_over:
            call(tap)

    def _begin(self) -> Callable[[], Found]:
        self._begun = time.monotonic()
        self._written.clear()
        names, self._asked = self._asked, set()
        if names is not None and identity_of(self._runner.store.directory) != self._directory:
            names = None  # it is another directory
        known = (
            {name: tap.stamp for name, tap in self._taps.items()}
            if names is None
            else {tap.name: tap.stamp for tap in self.named([*names])}
        )
        return partial(self._find, known, frozenset(self._doubtful), names)

    def _find(self, known: dict[str, Stamp], doubtful: frozenset[str], names: Collection[str] | None) -> Found:
        """In a thread: see which journals there are of *names*, or at all, and read those that are not *known*."""
        try:
            now = self._runner.store.stamps(names)
            restored = self._restored(known.keys() - now.keys())
            if restored:
                now = self._runner.store.stamps(names)
        except OSError as error:  # nothing is known of any: all stay as they are
            if self._complaint != str(error):
                self._complaint = str(error)
                self._runner.complain("cannot look at the journals", error)
            return set(), {}, False
        try:
            self._runner.store.heed(now, names)
            self._heeded = self._heeded or names is None
        except (KvmIfupError, OSError):  # then hooks look for themselves
            self._heeded = False
        self._complaint, sure = "", True
        stamps = {name: stamp for name, stamp in now.items() if self._elsewhere.get(name) != stamp}
        gone = (known.keys() | doubtful if names is None else set(names)) - stamps.keys()
        self._unreadable = {name: stamp for name, stamp in self._unreadable.items() if name not in gone}
        new = {}
        for name, stamp in sorted(stamps.items()):
            if stamp == known.get(name):
                continue
            try:
                journal = self._runner.store.load(name)
            except NamespaceError:
                self._elsewhere[name] = stamp
                gone.add(name)
                continue
            except (KvmIfupError, OSError) as error:
                if self._unreadable.get(name) != stamp:
                    self._runner.say(f"{name}: {error}", severity=syslog.ERROR)
                self._unreadable[name] = stamp
                sure = sure and not isinstance(error, KernelError | OSError)
                continue
            self._unreadable.pop(name, None)
            if journal is None:
                continue
            new[name] = tap = TapRecord(self._loop, journal, stamp)
            tap.doubtful = name in restored or name in doubtful
            if tap.phase is Phase.PRE and tap.state is State.DISARMED:
                self._listen(tap)
        return gone, new, sure

    def _restored(self, missing: Collection[str]) -> list[str]:
        """Write journals again that are *missing* because somebody has removed the whole directory; returns the taps.

        What is in memory counts then. Who removes it may take a while, so those count that went a moment ago, too. Of
        what was undone before, nothing stands any more (`leftovers.stands`).
        """
        now = time.monotonic()
        self._missing = {name: one for name, one in self._missing.items() if now - one[1] < REMOVING}
        self._missing |= {name: (tap.journal, now) for name in missing if (tap := self._taps.get(name))}
        before, self._directory = self._directory, identity_of(self._runner.store.directory)
        # Without a directory before, it was removed again right after they were written.
        if (before is not None and before == self._directory) or not self._missing:
            return []
        lost = self._missing
        names = [name for name, (journal, _) in sorted(lost.items()) if self._runner.restore(journal)]
        self._missing = {name: (lost[name][0], now) for name in names}  # it may be removed again before we look
        if names:
            self._directory = identity_of(self._runner.store.directory)
            self._runner.say(f"the journals were removed: written again for {', '.join(names)}", severity=syslog.ERROR)
        return names

    def _done(self, found: Found) -> None:
        gone, new, sure = found
        for name in gone:
            if tap := self._taps.pop(name, None):
                tap.become(State.OVER)
                self._over(tap)
                self._changed = True
        self._doubtful -= new.keys()
        if sure:
            self._doubtful -= gone
        for name, tap in new.items():
            if name in self._written:  # what was read may be older, and the next look sees whether it is
                tap.become(State.OVER)
            else:
                self._take(tap)
        self._looked(self._changed)
        self._changed = False
        self._took = time.monotonic() - self._begun
        if not sure:  # a guest may have come of which we know nothing
            self._want(None)
            self._look.ask_in(AGAIN)

    def _take(self, tap: TapRecord) -> None:
        """From now on *tap* counts, and no earlier one of its name."""
        if before := self._taps.get(tap.name):
            if tap.state is before.state is State.UNFINISHED:
                tap.tries = before.tries + 1
            tap.take_over(before)
            before.become(State.OVER)
        self._taps[tap.name] = tap
        if before:
            self._over(before)
        self._changed = True
        self._found(tap)
