"""A guest that may have left: somebody else announces it, or routes to it, so it is asked whether it is still here.

If it answers, it is here, and its address is defended (`rivals`). If it does not, it is withdrawn: what draws its
traffic to this node is undone. It may only have been slow. So whoever listens for its answer goes on listening while
it is withdrawn, and hands that over to who waits for guests (`arrivals`): no frame gets lost in between.

However many announcements there are: they are read a few at a time, at most `SLOTS` guests are asked at once, each at
most every `AGAIN` seconds, and one thread withdraws one guest after the other.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from select import POLLIN, poll

from kvmifup import phases
from kvmifup.agent.events import RouteEvents
from kvmifup.agent.loop import Loop, OneAtATime, Timer
from kvmifup.agent.rivals import Heard, Rivals
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import Place
from kvmifup.core.errors import KvmIfupError, as_ours
from kvmifup.core.model import Nic
from kvmifup.node import frames, sockets
from kvmifup.runs.moves import withdraw
from kvmifup.runs.outcome import Outcome

ANSWER, PATIENT = 0.05, 1.0  # seconds that a guest has to answer before it counts as gone; one with prefixes only
RETRY = 0.01  # seconds until a question that the tap has not taken is asked again
AGAIN = 0.2  # seconds between two such questions
WRONG = 10.0  # seconds after which a guest that comes back has really been away
TAKEN = 5.0  # seconds until a listener is taken over, or never will be
SLOTS = 64  # guests that are asked at once
FRAMES = 64  # of one uplink at a time
STALE = 512  # frames that the guest may have sent before it was asked

Which = tuple[str, int]  # uplink, address family (4 or 6)
Handed = dict[tuple[int, str], socket.socket]  # listeners for guests: by the tap's index, and the guest's MAC


class Suspect:
    """A guest that may have left. *heard* is why, by address or prefix; *listener* is there once it has been asked."""

    def __init__(self, nic: Nic) -> None:
        self.nic = nic
        self.heard: dict[str, Heard] = {}
        self.index = 0  # of the tap
        self.listener: socket.socket | None = None
        self.timer: Timer | None = None
        self.asking = False

    @property
    def key(self) -> tuple[int, str]:
        """Who it is, for `Handed`."""
        return self.index, self.nic.mac


Verdict = tuple[Suspect, Outcome | KvmIfupError | bool | None]  # True: it has answered after all


class Departures:
    """Listens where this node answers for guests, asks those that others announce, and withdraws those that have left.

    *withdrawn* is called after each that is. *handed* are the listeners for those.
    """

    def __init__(self, loop: Loop, runner: Runner, withdrawn: Callable[[], None]) -> None:
        self._loop = loop
        self._runner = runner
        self._then = withdrawn
        self.handed: Handed = {}
        self._rivals = Rivals(loop, runner)
        self._guests: Mapping[Place, Nic] = {}
        self._routed: dict[str, Nic] = {}  # by prefix
        self._listeners: dict[Which, tuple[socket.socket, int]] = {}  # with the uplink's index
        self._about: dict[Which, set[str]] = {}  # the addresses that each is to hear of
        self._suspects: dict[str, Suspect] = {}  # by tap
        self._waiting: deque[Suspect] = deque()  # for a slot
        self._asking = 0  # how many have one
        self._silent: deque[Suspect] = deque()
        self._withdrawing = OneAtATime(loop, self._begin_withdrawing, self._withdrawn)
        self._left: dict[str, float] = {}  # when a guest was withdrawn, by tap
        self._patience: dict[str, float] = {}  # with those that were withdrawn though they were here
        RouteEvents(loop, self._routed_elsewhere)

    def look_after(self, guests: Mapping[Place, Nic], wired: Sequence[Nic]) -> None:
        """Listen where this node answers for *guests*, and nowhere else; *wired* are all whose guest runs here."""
        self._guests = guests
        self._routed = {str(prefix): nic for nic in wired if nic.mode == "routed" for prefix in nic.ip}
        self._rivals.look_after(guests)
        now = time.monotonic()
        for nic in wired:
            if now - self._left.pop(nic.tap, -WRONG) < WRONG:  # the next time it gets longer to answer
                self._patience[nic.tap] = min(2 * self._patience.get(nic.tap, ANSWER), PATIENT)
        here = {nic.tap for nic in wired}
        self._patience = {tap: one for tap, one in self._patience.items() if tap in here or tap in self._left}
        self._left = {tap: when for tap, when in self._left.items() if now - when < WRONG}
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
        for which, addresses in wanted.items():
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
        suspects = [suspect.listener for suspect in self._suspects.values() if suspect.listener]
        for listener in (*suspects, *self.handed.values(), *(one for one, _ in self._listeners.values())):
            listener.close()

    # --- what speaks for it ---------------------------------------------------------------------------------

    def _heard(self, which: Which) -> None:
        """Somebody on an uplink announces something: perhaps a guest of ours."""
        uplink = which[0]
        listener, _ = self._listeners[which]
        for _ in range(FRAMES):
            try:
                frame = listener.recv(sockets.WHOLE)
            except OSError:  # nothing more; or ENETDOWN, once: it is down, or gone and another look finds that out
                return
            if (probe := frames.probe_in(frame)) and probe[1] not in self._own_macs():
                self._rivals.probed((uplink, probe[0]), probe[1])
            found = frames.announcement_in(frame)
            if found and (nic := self._guests.get((uplink, found[0]))):
                address, mac = found
                # By ourselves, where two uplinks are on one segment: each hears what goes out of the other.
                if mac not in self._own_macs():
                    self._perhaps_gone(nic, Heard(address, f"announced by {mac} on {uplink}", uplink, mac))

    def _own_macs(self) -> set[str]:
        """The MACs that this node announces with."""
        return {listener.getsockname()[4].hex(":") for listener, _ in self._listeners.values()}

    def _routed_elsewhere(self, prefix: str, protocol: int, index: int | None) -> None:
        """A routing daemon has learnt where a prefix is: perhaps a guest's of ours, which runs there now.

        Nobody announces a prefix, so for a guest that has nothing else this is all that there is to hear.
        """
        nic = self._routed.get(prefix)
        if nic and not (index and sockets.is_device(nic.tap, index)):
            self._perhaps_gone(nic, Heard(prefix, f"routed elsewhere by protocol {protocol}"))

    def _perhaps_gone(self, nic: Nic, heard: Heard) -> None:
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
                suspect.index = socket.if_nametoindex(nic.tap)
                suspect.listener = sockets.guest_listener(nic.tap, nic.mac)
            suspect.asking = True
            self._asking += 1
            self._loop.watch(suspect.listener, partial(self._maybe_answered, suspect))
            for _ in range(STALE):
                if not heard_from(suspect.listener):
                    break
            question(suspect, self._loop)
        except OSError:  # the tap is gone, and that is dealt with elsewhere
            self._acquit(suspect)
            return
        hosts = any(map(phases.is_host, nic.ip))
        patience = self._patience.get(nic.tap, ANSWER) if hosts else PATIENT
        suspect.timer = self._loop.later(patience, partial(self._no_answer, suspect))

    def _maybe_answered(self, suspect: Suspect) -> None:
        assert suspect.listener
        if heard_from(suspect.listener):
            self._asked(suspect)
            self._is_here(suspect)

    def _no_answer(self, suspect: Suspect) -> None:
        self._asked(suspect)
        if self._runner.config.agent.withdraw:
            self._silent.append(suspect)
            self._withdrawing.ask()
        else:
            self._acquit(suspect)

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
        self._rivals.confirm(suspect.nic, suspect.heard.values())
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
                return partial(self._try_to_withdraw, suspect, suspect.listener)
        return None

    def _try_to_withdraw(self, suspect: Suspect, listener: socket.socket) -> Verdict:
        """In a thread."""
        if heard_from(listener):
            return suspect, True
        nic, why = suspect.nic, next(iter(suspect.heard.values())).sentence
        try:
            with self._runner.session(why) as session:
                return suspect, withdraw(nic.tap, session, suspect.key)
        except Exception as error:
            return suspect, as_ours(error)

    def _withdrawn(self, verdict: Verdict) -> None:
        suspect, outcome = verdict
        self._withdrawing.ask()  # the next one
        nic = suspect.nic
        if isinstance(outcome, Outcome):
            self._loop.later(TAKEN, partial(self._not_taken, suspect.key, suspect.listener))
            suspect.listener = None  # from now on it is another room's
            why = next(iter(suspect.heard.values())).sentence
            self._left[nic.tap] = time.monotonic()
            self._acquit(suspect)
            self._runner.metrics.add("kvm_ifup_withdrawals_total")
            self._runner.say(f"{why}, and the guest does not answer here: route and proxy entries withdrawn", nic.label)
            self._then()
            return
        self.handed.pop(suspect.key, None)
        if outcome is True and suspect.listener:
            self._is_here(suspect)
            return
        if isinstance(outcome, KvmIfupError):
            self._runner.complain("not withdrawn", outcome)
        self._acquit(suspect)

    def _not_taken(self, key: tuple[int, str], listener: socket.socket | None) -> None:
        """Nobody waits for that guest: its NIC has been taken down."""
        if listener and self.handed.get(key) is listener:
            del self.handed[key]
            sockets.close(listener)


def question(suspect: Suspect, loop: Loop) -> None:
    """Ask *suspect* what is said of it; while the tap's queue is full, again in a moment."""
    with suppress(OSError):  # the tap is gone: then there will be no answer
        if suspect.asking and not ask(suspect.nic, next(iter(suspect.heard)).partition("/")[0]):
            loop.later(RETRY, partial(question, suspect, loop))


def heard_from(listener: socket.socket) -> bool:
    """Take one frame out of *listener*; whether there was one."""
    try:
        return bool(listener.recv(1))
    except OSError:  # nothing there; or ENETDOWN, once: the tap is down
        return False


def ask(nic: Nic, about: str = "") -> bool:
    """Ask the guest of *nic* whether it is here; whether the tap has taken it. Raises OSError if that is gone."""
    return sockets.send(nic.tap, frames.questions(nic, about))


def answers(nic: Nic, seconds: float) -> bool:
    """Whether the guest of *nic* is heard on its tap within *seconds*, when it is asked. In a thread.

    Raises OSError if its tap is gone.
    """
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
