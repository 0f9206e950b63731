"""Listens for what says that a guest has left: somebody else announces it, or routes to it.

Then it is asked whether it is still here (`suspects`). If it answers, its address is defended (`rivals`); if it does
not, it is withdrawn. However many announcements there are, they are read a few at a time; and what too much is said of
is not listened for, for a moment, so that what is said of others does not get lost.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Hashable, Iterable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

from kvmifup import phases
from kvmifup.agent.events import RouteEvents
from kvmifup.agent.loop import Loop
from kvmifup.agent.rivals import Heard, Rivals
from kvmifup.agent.runner import Runner
from kvmifup.agent.suspects import Suspects
from kvmifup.agent.taps import Place, TapRecord
from kvmifup.core.model import Nic, Phase
from kvmifup.node import frames, sockets

FRAMES = 64  # of one uplink at a time
MUTED = 0.2  # seconds for which nothing is heard of an address that is in more of them than that

Key = TypeVar("Key", bound=Hashable)
Which = tuple[str, int]  # uplink, address family (4 or 6)
UNHEARD = Heard("its uplink", "was down", patience=0.4)  # many may be asked at once, and the node is busy then


class Whose(Generic[Key]):
    """Whose something is `now`. For a moment several may have it, such as one that is to be cleared up: the last one
    counts.
    """

    def __init__(self) -> None:
        self.now: dict[Key, Nic] = {}
        self._others: dict[Key, list[Nic]] = {}

    def add(self, key: Key, nic: Nic) -> None:
        """It is that of *nic*, too."""
        if key in self.now:
            self._others.setdefault(key, []).append(self.now[key])
        self.now[key] = nic

    def remove(self, key: Key, nic: Nic) -> None:
        """It is no longer that of *nic*."""
        others = self._others.get(key, [])
        if self.now[key] is not nic:
            others.remove(nic)
        elif others:
            self.now[key] = others.pop()
        else:
            del self.now[key]
        if not others:
            self._others.pop(key, None)


def which_of(place: Place) -> Which:
    """Where announcements of *place* are heard."""
    uplink, address = place
    return uplink, phases.family_of(address)


def routed_here(tap: TapRecord) -> Iterable[str]:
    """The prefixes of a routed guest that runs here."""
    return map(str, tap.nic.ip) if tap.phase is Phase.POST and tap.nic.mode == "routed" else ()


class Departures:
    """Listens where this node answers for guests, and has those asked that others announce.

    *withdrawn* is called with the tap of each that has left, *answered* with that of each that was `asked_for`, and is
    here.
    """

    def __init__(
        self, loop: Loop, runner: Runner, withdrawn: Callable[[str], None], answered: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._answered = answered
        self.suspects = Suspects(loop, runner, withdrawn, self._here)
        self._rivals = Rivals(loop, runner)
        self._guests: Whose[Place] = Whose()
        self._routed: Whose[str] = Whose()  # by prefix
        self._wanted: dict[Which, set[str]] = {}  # the addresses that guests have there
        self._stale: set[Which] = set()  # those of which perhaps not all is heard, or what is muted
        self._listeners: dict[Which, tuple[socket.socket, int]] = {}  # with the uplink's index
        # The addresses that each is to hear of, and how those end of which it hears.
        self._about: dict[Which, tuple[set[str], sockets.Ranges]] = {}
        self._muted: dict[Which, set[str]] = {}  # those of which it is not, for a moment
        RouteEvents(loop, self._routed_elsewhere)

    def found(self, tap: TapRecord) -> None:
        """*tap* has this journal from now on. `renew` is called once for all that are found, or over."""
        for place in tap.places:
            self._guests.add(place, tap.nic)
            self._wanted.setdefault(which_of(place), set()).add(place[1])
            self._stale.add(which_of(place))
        for prefix in routed_here(tap):
            self._routed.add(prefix, tap.nic)

    def over(self, tap: TapRecord) -> None:
        """It had the one of *tap* until now."""
        for place in tap.places:
            self._guests.remove(place, tap.nic)
            if place not in self._guests.now:
                self._wanted[which_of(place)].discard(place[1])  # what is still heard of it means nothing
        for prefix in routed_here(tap):
            self._routed.remove(prefix, tap.nic)

    def renew(self) -> None:
        """Listen where this node answers for guests, and nowhere else: leave devices that have gone, or are another one
        now, and listen on what is there in their place.
        """
        self._rivals.look_after(self._guests.now)
        for which, (listener, index) in list(self._listeners.items()):
            if not self._wanted[which] or not sockets.is_device(which[0], index):
                del self._listeners[which], self._about[which]
                self._loop.ignore(listener)
                sockets.close(listener)
        for which in self._stale | (self._wanted.keys() - self._listeners.keys()):
            addresses = self._wanted[which] - self._muted.get(which, set())
            known, heard = self._about.get(which, (set(), []))
            # What is near to others is heard already: to listen anew takes longer, the more there are.
            told = known.isdisjoint(self._muted.get(which, ())) and all(
                sockets.passes(one, heard) for one in addresses - known
            )
            with suppress(OSError):
                if self._wanted[which] and not told:
                    self._listen(which, addresses)
                    heard = sockets.endings(addresses)
                if which in self._listeners:
                    self._about[which] = addresses, heard
                    known = addresses
            if addresses <= known:
                self._stale.discard(which)

    def _listen(self, which: Which, addresses: set[str]) -> None:
        """Hear what *which* is told about *addresses*. Raises OSError."""
        if which in self._listeners:
            sockets.listen_about(*self._listeners[which], which[1], addresses)
            return
        index = socket.if_nametoindex(which[0])
        listener = sockets.uplink_listener(*which, addresses)
        self._listeners[which] = listener, index
        self._loop.watch(listener, partial(self._heard, which))

    def close(self) -> None:
        """Let go of everything."""
        self.suspects.close()
        for listener, _ in self._listeners.values():
            listener.close()

    def asked_for(self, nic: Nic) -> None:
        """The guest of *nic* may have left while this node could not hear of it."""
        self.suspects.suspect(nic, UNHEARD)

    def _here(self, nic: Nic, heard: Collection[Heard]) -> None:
        """The guest of *nic* has answered, whatever was *heard*."""
        self._rivals.confirm(nic, [one for one in heard if one.what != UNHEARD.what])
        if any(one.what == UNHEARD.what for one in heard):
            self._answered(nic.tap)

    # --- what speaks for it ---------------------------------------------------------------------------------

    def _heard(self, which: Which) -> None:
        """Somebody on an uplink announces something: perhaps a guest of ours."""
        uplink, told = which[0], set()
        listener, _ = self._listeners[which]
        for _ in range(FRAMES):
            try:
                frame = listener.recv(sockets.WHOLE)
            except OSError:  # nothing more; or ENETDOWN, once: it is down, or gone and another look finds that out
                return
            if (probe := frames.probe_in(frame)) and probe[1] not in self._own_macs():
                told.add(probe[0])
                self._rivals.probed((uplink, probe[0]), probe[1])
            found = frames.announcement_in(frame)
            if found:
                told.add(found[0])
            if found and (nic := self._guests.now.get((uplink, found[0]))):
                address, mac = found
                # By ourselves, where two uplinks are on one segment: each hears what goes out of the other.
                if mac not in self._own_macs():
                    self.suspects.suspect(nic, Heard(address, f"announced by {mac} on {uplink}", uplink, mac))

        if not told <= self._muted.get(which, set()):
            self._muted[which] = told | self._muted.get(which, set())
            self._stale.add(which)
            self.renew()
            self._loop.later(MUTED, partial(self._unmute, which))

    def _unmute(self, which: Which) -> None:
        """Hear of all addresses again."""
        if self._muted.pop(which, None):
            self._stale.add(which)
            self.renew()

    def _own_macs(self) -> set[str]:
        """The MACs that this node announces with."""
        return {listener.getsockname()[4].hex(":") for listener, _ in self._listeners.values()}

    def _routed_elsewhere(self, prefix: str, protocol: int, index: int | None) -> None:
        """A routing daemon has learnt where a prefix is: perhaps a guest's of ours, which runs there now.

        Nobody announces a prefix, so for a guest that has nothing else this is all that there is to hear.
        """
        nic = self._routed.now.get(prefix)
        if nic and not (index and sockets.is_device(nic.tap, index)):
            self.suspects.suspect(nic, Heard(prefix, f"routed elsewhere by protocol {protocol}"))
