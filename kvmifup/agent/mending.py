"""Keeps true what is wired: puts back what the node has lost of it, whoever took it away.

One way for all of it. Something changes: an event says so (`events.NodeEvents`), or a look from time to time at what
the kernel tells nobody about. Once it is quiet, the planner compares all NICs that it may concern with the node, out of
one dump of each kind. Where something differs, the phase that the NIC has reached is run again, with locks and journal
like any run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from kvmifup.agent.announcements import Announcements
from kvmifup.agent.events import ANYTHING, Thing
from kvmifup.agent.loop import Loop, OneAtATime
from kvmifup.agent.mender import REASON, Look, Looked, Mender
from kvmifup.agent.reliance import Reliance
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import LISTENING, State, TapRecord, Taps
from kvmifup.core.model import Nic
from kvmifup.node.unheard import Asked
from kvmifup.runs import clock

RECENT = 5.0  # seconds since an arrival
# Seconds between two looks at what the kernel tells nobody about: that, or so many for each op that had to be compared.
# So a node with thousands of NICs does not spend its time on it where something changes all the time.
PERIOD, FOR_EACH = 5.0, 0.002
SHARE, MOST = 2, 8  # each is at one tap in so many, at so many at most, and at all that is on uplinks
# Seconds in which everything is looked at, whatever has been heard or not: some taps in each of so many turns, at most
# so many. All at once would take the processor from a guest that arrives.
EVERYTHING, TURNS, A_TURN = 300.0, 20, 1

PUT_OFF = 3  # times in a row that a look is put off

KEPT = {State.WIRED, State.DISARMED, *LISTENING}


class Mending:
    """Says when to look at which NIC; a `Mender` does so in a thread.

    *ask* whether a guest is here that may have left unheard, before it is answered for again: it is withdrawn, or
    `answered` is called.
    """

    def __init__(
        self,
        loop: Loop,
        runner: Runner,
        taps: Taps,
        announcements: Announcements,
        ask: Callable[[Nic], None],
        stir: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._runner = runner
        self._taps = taps
        self._ask, self._stir = ask, stir
        self._mender = Mender(runner, announcements)
        self._due: set[str] = set()
        self._known: dict[str, Looked] = {}
        self._reliance = Reliance()
        self._suspects: set[str] = set()  # taps whose guest may have left unheard
        self._uplinks: Counter[int] = Counter()  # for how many this node answers on each, by its index
        self._looking = OneAtATime(loop, self._begin, self._looked)
        self._checking = OneAtATime(loop, self._begin_check, self._checked)
        self._turn = self._checks = self._put_off = 0
        # The names of those that are known, and what is on uplinks and has to be looked at; None: to be gathered anew.
        self._names: list[str] | None = None
        self._asked: Asked | None = None
        loop.later(PERIOD, self._checking.ask)
        loop.later(EVERYTHING / TURNS, self._from_time_to_time)

    def close(self) -> None:
        """Let go of everything."""
        self._mender.close()

    # --- what has happened ----------------------------------------------------------------------------------

    def found(self, tap: TapRecord) -> None:
        """*tap* has a new journal."""
        self._uplinks.update(tap.uplinks)
        if tap.journal.reason != REASON:
            self._suspects.discard(tap.name)
        # In any case after an arrival: `arriving.arrive` has read only what others may change at any time.
        arrived = tap.state is State.WIRED and tap.journal.by == "agent" and clock.uptime() - tap.reached < RECENT
        if self._runner.config.agent.mend or arrived:
            self._due.add(tap.name)
            self._stir()

    def over(self, tap: TapRecord) -> None:
        """Its journal is that of *tap* no longer."""
        self._uplinks -= Counter(tap.uplinks)
        if not self._taps.named([tap.name]):  # it has none any more
            self._know(tap.name, None)
            self._reliance.forget(tap.name)
            self._suspects.discard(tap.name)
            self._mender.forget(tap.name)

    def touched(self, things: frozenset[Thing]) -> None:
        """*things* have changed."""
        if ANYTHING in things:
            self.look_at_all()
        else:
            self._soon(self._reliance.on(things))

    def went_down(self, devices: Iterable[int]) -> None:
        """*devices* are down, or gone: whose guest leaves meanwhile is not announced there to us."""
        indices = self._uplinks.keys() & set(devices)
        if indices:  # each tap that is made is down at first
            self._suspects |= {tap.name for tap in self._taps if not indices.isdisjoint(tap.uplinks)}

    def events_lost(self) -> None:
        """The kernel could not tell all that has happened to devices."""
        self._suspects |= {tap.name for tap in self._taps}
        self.look_at_all()

    def answered(self, name: str) -> None:
        """The guest on the tap *name* runs here."""
        self._suspects.discard(name)
        self._soon([name])

    def look_at_all(self) -> None:
        """Anything may have changed."""
        self._soon([tap.name for tap in self._taps])

    def _from_time_to_time(self) -> None:
        self._turn += 1
        names = share(self._taps.names(), self._turn, TURNS, A_TURN)
        if self._due or not self._runner.config.agent.mend:
            self._soon(names)  # with those for which it waits until it is quiet
        else:
            self._due.update(names)
            self._looking.ask()
        self._loop.later(EVERYTHING / TURNS, self._from_time_to_time)

    def look(self, *, later: bool = False) -> None:
        """Look at what is due; *later* if it can wait, but not for ever."""
        self._put_off += 1
        if not later or self._put_off > PUT_OFF:
            self._put_off = 0
            self._looking.ask()

    def _soon(self, names: Collection[str]) -> None:
        if names and self._runner.config.agent.mend:
            self._due.update(names)
            self._stir()

    # --- looking ----------------------------------------------------------------------------------------------

    def _begin(self) -> Callable[[], Look] | None:
        taps = [tap for tap in self._taps.named(sorted(self._due)) if tap.state in KEPT and tap.nic.mode != "ext"]
        self._due.clear()
        return partial(self._mender.look, taps, frozenset(self._suspects)) if taps else None

    def _looked(self, look: Look) -> None:
        found, unseen = look
        if unseen:
            self._loop.later(PERIOD, partial(self._soon, [tap.name for tap in unseen]))
        for one in found:
            name = one.tap.name
            if one.tap.state is State.OVER:
                continue  # whoever has its journal now is looked at for itself
            if one.suspect:
                self._ask(one.tap.nic)
            self._know(name, one)
            self._reliance.note(name, one.things)
            if one.again is not None:
                one.tap.timers.set("mend", one.again, partial(self._soon, [name]))

    # --- what the kernel tells nobody about ---------------------------------------------------------------------

    def _know(self, name: str, looked: Looked | None) -> None:
        """From now on *looked* is what is known of the tap *name*; None: nothing."""
        before = self._known.get(name)
        if looked:
            self._known[name] = looked
        else:
            self._known.pop(name, None)
        if (before is None) != (looked is None):
            self._names = None
        if (before.outliving if before else ()) != (looked.outliving if looked else ()):
            self._asked = None

    def _begin_check(self) -> Callable[[], tuple[Collection[str], int]] | None:
        self._checks += 1
        if not self._known or not self._runner.config.agent.mend:
            self._checking.ask_in(PERIOD)
            return None
        if self._asked is None:
            self._asked = [(name, known.outliving) for name, known in self._known.items() if known.outliving]
        if self._names is None:
            self._names = list(self._known)
        names = share(self._names, self._checks, SHARE, MOST)
        return partial(self._mender.check, self._asked, [(name, self._known[name].unheard) for name in names])

    def _checked(self, found: tuple[Collection[str], int]) -> None:
        differing, compared = found
        self._soon(differing)
        self._checking.ask_in(max(PERIOD, FOR_EACH * compared))


def share(names: Sequence[str], turn: int, turns: int, most: int) -> Sequence[str]:
    """Those of *names* whose *turn* it is: one in *turns*, or in more so that they are at most *most*."""
    turns = max(turns, -(-len(names) // most))
    return names[turn % turns :: turns]
