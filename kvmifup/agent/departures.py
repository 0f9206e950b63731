"""A guest that has left: another node announces it on an uplink, and it does not answer here any more."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from select import POLLIN, poll

from kvmifup import phases
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import Place
from kvmifup.core.model import Nic
from kvmifup.node import frames, sockets
from kvmifup.runs.moves import withdraw

ANSWER = 0.05  # seconds that a guest has to answer before it counts as gone
RETRY = 0.01  # seconds until a question that the tap has not taken is asked again
AGAIN = 0.2  # seconds between two such questions
FRAMES = 64  # of one uplink at a time

Which = tuple[str, int]  # uplink, address family (4 or 6)


class Departures:
    """Listens on every uplink where this node answers for a guest, and withdraws those that have left."""

    def __init__(self, loop: Loop, runner: Runner) -> None:
        self._loop = loop
        self._runner = runner
        self._guests: Mapping[Place, Nic] = {}
        self._listeners: dict[Which, tuple[socket.socket, int]] = {}  # with the uplink's index
        self._asked: dict[str, float] = {}  # when a guest was asked last, by tap
        self._asking: set[str] = set()  # taps

    def look_after(self, guests: Mapping[Place, Nic]) -> None:
        """Listen where this node answers for *guests*, and nowhere else."""
        self._guests = guests
        taps = {nic.tap for nic in guests.values()}
        self._asked = {tap: when for tap, when in self._asked.items() if tap in taps}
        self.renew()

    def renew(self) -> None:
        """Leave devices that have gone, or are another one now, and listen on what is there in their place."""
        wanted = {(uplink, phases.family_of(address)) for uplink, address in self._guests}
        for which, (_, index) in list(self._listeners.items()):
            if which not in wanted or not sockets.is_device(which[0], index):
                self._leave(which)
        for which in wanted - self._listeners.keys():
            with suppress(OSError):
                index = socket.if_nametoindex(which[0])
                listener = sockets.uplink_listener(*which)
                self._listeners[which] = listener, index
                self._loop.watch(listener, partial(self._heard, which))

    def close(self) -> None:
        """Let go of everything."""
        for listener, _ in self._listeners.values():
            listener.close()

    def _leave(self, which: Which) -> None:
        listener, _ = self._listeners.pop(which)
        self._loop.ignore(listener)
        sockets.close(listener)

    def _heard(self, which: Which) -> None:
        """Somebody on an uplink announces something: perhaps a guest of ours."""
        uplink = which[0]
        listener, _ = self._listeners[which]
        for _ in range(FRAMES):
            try:
                found = frames.announcement_in(listener.recv(sockets.WHOLE))
            except OSError:  # nothing more; or ENETDOWN, once: it is down, or gone and another look finds that out
                return
            # By ourselves, where two uplinks are on one segment: each hears what goes out of the other.
            if found and found[1] not in self._own_macs():
                address, mac = found
                if nic := self._guests.get((uplink, address)):
                    self._perhaps_gone(nic, f"{address} announced by {mac} on {uplink}")

    def _own_macs(self) -> set[str]:
        """The MACs that this node announces with."""
        return {listener.getsockname()[4].hex(":") for listener, _ in self._listeners.values()}

    def _perhaps_gone(self, nic: Nic, why: str) -> None:
        now = time.monotonic()
        if nic.tap in self._asking or now - self._asked.get(nic.tap, 0) < AGAIN:
            return
        self._asking.add(nic.tap)
        self._asked[nic.tap] = now
        self._loop.work(partial(self._ask_and_withdraw, nic, why), lambda _: self._asking.discard(nic.tap))

    def _ask_and_withdraw(self, nic: Nic, why: str) -> None:
        """In a thread: withdraw the guest unless it answers."""
        runner = self._runner
        try:
            if answers(nic, ANSWER):
                runner.say(f"{why}, but the guest runs here: nothing done", nic.label)
                return
            with runner.session(why) as session:
                outcome = withdraw(nic.tap, session)
        except OSError:
            return  # the tap is gone, and that is dealt with elsewhere
        except Exception as error:
            runner.complain("not withdrawn", error)
            return
        if outcome:
            runner.metrics.add("kvm_ifup_withdrawals_total")
            runner.say(f"{why}, and the guest does not answer here: route and proxy entries withdrawn", nic.label)


def answers(nic: Nic, seconds: float) -> bool:
    """Whether the guest of *nic* is heard on its tap within *seconds*, when it is asked. Raises OSError."""
    listener = sockets.guest_listener(nic.tap, nic.mac)
    try:
        waiting = poll()  # not select: it knows no descriptor above 1023
        waiting.register(listener, POLLIN)
        deadline = time.monotonic() + seconds
        asked = False
        while (left := deadline - time.monotonic()) > 0:
            # The tap's queue may be full for a moment; that of a guest that has left stays full.
            asked = asked or sockets.send(nic.tap, frames.questions(nic))
            events = waiting.poll(1000 * (left if asked else min(left, RETRY)))
            if any(event & POLLIN for _, event in events):
                return True
        return False
    finally:
        sockets.close(listener)
