"""Listens for what says that a guest has left: somebody else announces it, or routes to it.

Then it is asked whether it is still here (`suspects`). If it answers, its address is defended (`rivals`); if it does
not, it is withdrawn. However many announcements there are, they are read a few at a time; and what too much is said of
is not listened for, for a moment, so that what is said of others does not get lost.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

from kvmifup import phases
from kvmifup.agent.events import RouteEvents
from kvmifup.agent.loop import Loop
from kvmifup.agent.rivals import Heard, Rivals
from kvmifup.agent.runner import Runner
from kvmifup.agent.suspects import Suspects
from kvmifup.agent.taps import Place
from kvmifup.core.model import Nic
from kvmifup.node import frames, sockets

FRAMES = 64  # of one uplink at a time
MUTED = 0.2  # seconds for which nothing is heard of an address that is in more of them than that

Which = tuple[str, int]  # uplink, address family (4 or 6)
UNHEARD = Heard("its uplink", "was down", patience=0.4)  # many may be asked at once, and the node is busy then


class Departures:
    """Listens where this node answers for guests, and has those asked that others announce.

    *withdrawn* is called after each that has left, *answered* with the tap of each that was `asked_for`, and is here.
    """

    def __init__(
        self, loop: Loop, runner: Runner, withdrawn: Callable[[], None], answered: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._answered = answered
        self.suspects = Suspects(loop, runner, withdrawn, self._here)
        self._rivals = Rivals(loop, runner)
        self._guests: Mapping[Place, Nic] = {}
        self._routed: dict[str, Nic] = {}  # by prefix
        self._listeners: dict[Which, tuple[socket.socket, int]] = {}  # with the uplink's index
        self._about: dict[Which, set[str]] = {}  # the addresses that each is to hear of
        self._muted: dict[Which, set[str]] = {}  # those of which it is not, for a moment
        RouteEvents(loop, self._routed_elsewhere)

    def look_after(self, guests: Mapping[Place, Nic], wired: Sequence[Nic]) -> None:
        """Listen where this node answers for *guests*, and nowhere else; *wired* are all whose guest runs here."""
        self._guests = guests
        self._routed = {prefix: nic for nic in wired if nic.mode == "routed" for prefix in nic.destinations}
        self._rivals.look_after(guests)
        self.renew()

    def renew(self) -> None:
        """Leave devices that have gone, or are another one now, and listen on what is there in their place."""
        wanted: dict[Which, set[str]] = {}
        for uplink, address in self._guests:
            wanted.setdefault((uplink, phases.family_of(address)), set()).add(address)
        for which, (listener, index) in list(self._listeners.items()):
            if which not in wanted or not sockets.is_device(which[0], index):
                del self._listeners[which], self._about[which]
                self._loop.ignore(listener)
                sockets.close(listener)
        for which in wanted:
            addresses = wanted[which] - self._muted.get(which, set())
            if self._about.get(which) != addresses:
                with suppress(OSError):
                    self._listen(which, addresses)
                    self._about[which] = addresses

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
            if found and (nic := self._guests.get((uplink, found[0]))):
                address, mac = found
                # By ourselves, where two uplinks are on one segment: each hears what goes out of the other.
                if mac not in self._own_macs():
                    self.suspects.suspect(nic, Heard(address, f"announced by {mac} on {uplink}", uplink, mac))

        if not told <= self._muted.get(which, set()):
            self._muted[which] = told | self._muted.get(which, set())
            self.renew()
            self._loop.later(MUTED, partial(self._unmute, which))

    def _unmute(self, which: Which) -> None:
        """Hear of all addresses again."""
        if self._muted.pop(which, None):
            self.renew()

    def _own_macs(self) -> set[str]:
        """The MACs that this node announces with."""
        return {listener.getsockname()[4].hex(":") for listener, _ in self._listeners.values()}

    def _routed_elsewhere(self, prefix: str, protocol: int, index: int | None) -> None:
        """A routing daemon has learnt where a prefix is: perhaps a guest's of ours, which runs there now.

        Nobody announces a prefix, so for a guest that has nothing else this is all that there is to hear.
        """
        nic = self._routed.get(prefix)
        if nic and not (index and sockets.is_device(nic.tap, index)):
            self.suspects.suspect(nic, Heard(prefix, f"routed elsewhere by protocol {protocol}"))
