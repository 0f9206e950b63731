"""kvm-ifupd: hooks run warm, post at a guest's arrival, withdrawal when it has left, nothing lost, nothing left over.

What is to be watched is in the journals, so an agent that starts anew, or that has not run the hooks itself,
watches the same:

=====================  ===================================================================================
a journal in pre       armed: its guest has yet to arrive here, or may come back. The first frame out of the
                       tap that the guest has sent says that it runs here
a journal in post      an announcement of its addresses by another node says that it may have left; an uplink that
                       comes up again has forgotten for whom this node answers
any                    the tap's disappearance says that it is over
=====================  ===================================================================================
"""

from __future__ import annotations

import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvmifup.agent import systemd
from kvmifup.agent.departures import Departures, Place
from kvmifup.agent.events import DirectoryEvents, LinkEvents, NodeEvents, Touched
from kvmifup.agent.hook_server import Service
from kvmifup.agent.loop import Loop, Timer
from kvmifup.agent.runner import Runner
from kvmifup.agent.uplinks import Restorations
from kvmifup.commands import request
from kvmifup.core.errors import JournalError, KvmIfupError, LockTimeoutError, NamespaceError, known
from kvmifup.core.model import Message, Nic, Phase
from kvmifup.core.ops import ProxyNeighbour
from kvmifup.inputs import config
from kvmifup.node import announce, frames, sockets
from kvmifup.runs import announcing
from kvmifup.runs.index import Stamp
from kvmifup.runs.journal import Journal
from kvmifup.runs.leftovers import collect
from kvmifup.runs.moves import Ready, arrive, ready, settle
from kvmifup.runs.outcome import Outcome
from kvmifup.tell import syslog

SOCKET = "agent.sock"

SETTLE = 0.05  # seconds from a change of the journals to the look at them: QEMU takes longer to start
RECHECK = 1.0  # seconds after an arrival, or a failure, until everything is looked at in full
KILLED = 1.0  # seconds that a run's unfinished business stays unchanged before somebody asks whether it was killed
QUIET = 0.2  # seconds after a change on the node until what was prepared is prepared anew
BUSY = 0.5  # seconds to wait for a lock that is not needed at once
DONE = 0.02  # seconds between two looks whether the last hook has come to its end
COUNT = 15.0  # seconds between two writings of the metrics
METRICS = "metrics.prom"
RESYNC = 60.0  # seconds between two looks at everything, whatever has been heard or not


@dataclass
class Watched:
    """What the agent knows of one tap, from its journal. *listener* is there while it is armed."""

    stamp: Stamp
    nic: Nic
    ifindex: int
    phase: Phase
    pending: bool
    since: float
    proxied: frozenset[Place]
    listener: socket.socket | None = None
    ready: Ready | None = None
    said: bool = False  # whether it has been said that it is armed
    tries: int = 0  # to undo what a killed run has left
    timers: list[Timer] = field(default_factory=list)

    def is_of(self, journal: Journal) -> bool:
        """Whether *journal* is about this guest: by now the tap may be another one's, or there for another one."""
        return (journal.ifindex, journal.nic.mac) == (self.ifindex, self.nic.mac)

    def relies_on(self, touched: Touched) -> bool:
        """Whether what is ready may be wrong now that *touched* has changed. The tap is looked at when it is needed."""
        if not self.ready:
            return False
        devices = {index for dev, index in self.ready.devices if dev != self.nic.tap} | {0}
        routes = {str(prefix) for prefix in self.nic.ip} | {"0.0.0.0/0", "::/0", ""}
        return not touched.devices.isdisjoint(devices) or not touched.routes.isdisjoint(routes)


class Agent:
    """Everything in one loop; what may take a while is done by its threads."""

    def __init__(
        self, loop: Loop, listener: socket.socket, run_dir: Path, say: Callable[[str, int], None], *, activated: bool
    ) -> None:
        self.loop = loop
        self.runner = Runner(run_dir, say)
        self.activated = activated
        self.taps: dict[str, Watched] = {}
        self._departures = Departures(loop, self.runner)
        self._restorations = Restorations(loop, self.runner, self.announce_later)
        self.announcing = 0
        self._looking = self._look_again = False
        self._settling = False
        self._unprepared: dict[str, Watched] = {}
        self._meanwhile: list[Touched] = []  # what has changed while something is prepared
        self._preparing = self._stopping = False
        self._unreadable: dict[str, Stamp] = {}
        self._elsewhere: dict[str, Stamp] = {}  # journals of other network namespaces: not ours to look after
        self._changed = DirectoryEvents(loop, self.runner.store.directory, self._journals_changed)
        LinkEvents(loop, self._devices_gone, self._restorations.up_again, self._missed)
        self._node = NodeEvents(loop, self._outdate)
        self.service = Service(loop, listener, self.announce_later, self._ran)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, self._stop)
        loop.on_signal(signal.SIGHUP, self._reload)
        self.began = time.time()
        loop.work(partial(self._collect, None, BUSY))
        self.look()
        loop.later(min(RESYNC, self.runner.config.agent.idle_exit or RESYNC), self._periodically)
        self._count()
        self._watchdog = systemd.watchdog() / 2
        self._watched()

    def _ran(self, program: str, code: int, seconds: float, failures: Sequence[KvmIfupError]) -> None:
        """A hook has come to its end. From its thread."""
        if program in request.PHASES:
            self.runner.metrics.add("kvm_ifup_runs_total", program=program, code=str(code))
            self.runner.metrics.took("kvm_ifup_run_seconds", seconds, program=program)
        self.runner.failed(failures)

    def _count(self) -> None:
        """Write down what has been counted, for the node exporter."""
        phases = Counter(one.phase for one in self.taps.values())
        for phase in (Phase.PRE, Phase.POST):
            self.runner.metrics.set("kvm_ifup_nics", phases[phase], phase=phase.name.lower())
        self.runner.metrics.set("kvm_ifup_armed", sum(one.listener is not None for one in self.taps.values()))
        with suppress(OSError):
            self.runner.metrics.write(self.runner.run_dir / METRICS)
        self.loop.later(COUNT, self._count)

    def _watched(self) -> None:
        if self._watchdog:
            systemd.notify("WATCHDOG=1")
            self.loop.later(self._watchdog, self._watched)

    def _stop(self) -> None:
        """Take no more hooks, and let those that run come to their end; at once if somebody insists."""
        if self._stopping:
            self.loop.stop()
            return
        self._stopping = True
        systemd.notify("STOPPING=1")
        if not self.activated:
            (self.runner.run_dir / SOCKET).unlink(missing_ok=True)  # first: whoever comes now does it by itself
        self.service.close()
        self.loop.later(DONE, self._stop_when_done)

    def _stop_when_done(self) -> None:
        # The hooks want a sign of life meanwhile, and an arrival to be announced: so the loop goes on.
        if self.service.callers or self.announcing or self.loop.working:
            self.loop.later(DONE, self._stop_when_done)
        else:
            self.loop.stop()

    def close(self) -> None:
        """Let go of everything."""
        self._count()
        self.service.close()
        self._changed.close()
        self.loop.close()
        for source in (one.listener for one in self.taps.values() if one.listener):
            source.close()
        self._departures.close()

    # --- what there is to watch -------------------------------------------------------------------------

    def _journals_changed(self) -> None:
        """Look soon, and once: a hook writes its journal twice, and is not to share the processor with us."""
        if not self._settling:
            self._settling = True
            self.loop.later(SETTLE, self._settled)

    def _settled(self) -> None:
        self._settling = False
        self.look()

    def look(self) -> None:
        """See what has changed in the journals."""
        if self._looking:
            self._look_again = True
            return
        self._looking = True
        known = {tap: one.stamp for tap, one in self.taps.items()}
        self.loop.work(partial(self._find, known), self._found)

    def _find(self, known: dict[str, Stamp]) -> tuple[set[str], dict[str, Watched]]:
        """In a thread: all taps that have a journal, and what is new of them."""
        now = self.runner.store.stamps()
        stamps = {tap: stamp for tap, stamp in now.items() if self._elsewhere.get(tap) != stamp}
        taps = set(stamps)
        news = {}
        for tap, stamp in sorted(stamps.items()):
            if stamp == known.get(tap):
                continue
            try:
                journal = self.runner.store.load(tap)
            except NamespaceError:
                self._elsewhere[tap] = stamp
                taps.discard(tap)
                continue
            except (JournalError, OSError) as error:
                if self._unreadable.get(tap) != stamp:
                    self.runner.say(f"{tap}: {error}", severity=syslog.ERROR)
                self._unreadable[tap] = stamp
                continue
            if journal is None:
                continue
            proxied = frozenset(
                (entry.op.dev, entry.op.address)
                for entry in journal.entries
                if isinstance(entry.op, ProxyNeighbour) and journal.phase is Phase.POST
            )
            one = Watched(
                stamp, journal.nic, journal.ifindex, journal.phase, bool(journal.pending), journal.since, proxied
            )
            news[tap] = one
            if one.phase is Phase.PRE and not one.pending and self._time_left(one) > 0:
                self._arm(one)
        return taps, news

    def _time_left(self, one: Watched) -> float:
        return one.since + self.runner.config.agent.arrival_timeout - time.time()

    def _arm(self, one: Watched) -> None:
        """In a thread: listen first, so that nothing gets lost while post is prepared."""
        try:
            one.listener = sockets.guest_listener(one.nic.tap, one.nic.mac)
        except OSError as error:
            if sockets.is_device(one.nic.tap, one.ifindex):
                self.runner.say(f"cannot listen: {error.strerror}", one.nic.label, syslog.ERROR)
            return
        if one.since < self.began:  # it may have arrived while nobody listened
            with suppress(OSError):  # the tap is down: its guest cannot be here
                sockets.send(one.nic.tap, frames.questions(one.nic))

    def _found(self, result: tuple[set[str], dict[str, Watched]]) -> None:
        taps, news = result
        self._looking = False
        for tap in self.taps.keys() - taps:
            self._drop(tap)
        for tap, one in news.items():
            old = self.taps.get(tap)
            self._drop(tap)
            self.taps[tap] = one
            if one.listener:
                self.loop.watch(one.listener, partial(self._heard, tap))
                one.timers.append(self.loop.later(self._time_left(one), partial(self._give_up, tap)))
                self._prepare(one)
            if one.pending:
                # What cannot be put back is tried less and less often.
                one.tries = old.tries + 1 if old and old.pending else 0
                delay = min(KILLED * 2**one.tries, RESYNC)
                one.timers.append(self.loop.later(delay, partial(self._perhaps_killed, one)))
            elif not sockets.is_device(tap, one.ifindex):
                self.collect([tap])
        self._look_after()
        if self._look_again:
            self._look_again = False
            self.look()

    def _look_after(self) -> None:
        """Tell the others where this node answers for whom."""
        guests = {place: one.nic for one in self.taps.values() for place in one.proxied}
        self._restorations.look_after(guests)
        self._departures.look_after(guests if self.runner.config.agent.withdraw else {})

    def _prepare(self, one: Watched) -> None:
        """Have post for *one* made ready: one after the other, in a thread."""
        self._unprepared[one.nic.tap] = one
        if not self._preparing:
            self._preparing = True
            self._prepare_next(None)

    def _prepare_next(self, _: object) -> None:
        while self._unprepared:
            tap, one = self._unprepared.popitem()
            if self.taps.get(tap) is one and one.listener:
                self._meanwhile.clear()
                self.loop.work(partial(self._ready_for, one), self._prepare_next)
                return
        self._preparing = False

    def _ready_for(self, one: Watched) -> None:
        """In a thread."""
        found: Ready | None = None
        trouble: KvmIfupError | None = None
        try:
            # Whoever works on the tap may do so for long, and the others wait for us.
            with self.runner.session(patience=BUSY) as session:
                found = ready(one.nic.tap, session)
        except Exception as error:
            trouble = known(error)
        self.loop.soon(partial(self._prepared, one, found, trouble))

    def _prepared(self, one: Watched, found: Ready | None, trouble: KvmIfupError | None) -> None:
        if self.taps.get(one.nic.tap) is not one or not one.listener:
            return
        one.ready = found
        for touched in self._meanwhile:
            self._outdate_one(one, touched)
        if isinstance(trouble, LockTimeoutError):
            one.timers.append(self.loop.later(RECHECK, partial(self._prepare, one)))
        elif trouble:
            self.runner.complain("not ready for its arrival", trouble)
        if not one.said:
            one.said = True
            self.runner.say("armed", one.nic.label)

    def _outdate(self, touched: Touched) -> None:
        """What is ready and relies on *touched* has to be made ready again, once all is quiet."""
        if self._preparing:
            self._meanwhile.append(touched)
        for one in self.taps.values():
            self._outdate_one(one, touched)

    def _outdate_one(self, one: Watched, touched: Touched) -> None:
        if one.listener and one.relies_on(touched):
            one.ready = None
            one.timers.append(self.loop.later(QUIET, partial(self._prepare, one)))

    def _drop(self, tap: str) -> None:
        one = self.taps.pop(tap, None)
        if one:
            self._disarm(one)
            for timer in one.timers:
                timer.cancel()

    def _disarm(self, one: Watched) -> None:
        if one.listener:
            self.loop.ignore(one.listener)
            sockets.close(one.listener)
            one.listener = None

    def _give_up(self, tap: str) -> None:
        one = self.taps[tap]
        self._disarm(one)
        seconds = self.runner.config.agent.arrival_timeout
        self.runner.say(f"the guest has not arrived in {seconds:g} s: disarmed", one.nic.label)

    def _periodically(self) -> None:
        idle = self.runner.config.agent.idle_exit
        busy = self.taps or self.service.callers or self.announcing or self.loop.working
        if self.activated and idle and not busy and time.monotonic() - self.service.last > idle:
            self.runner.say(f"nothing to look after for {idle:g} s: good-bye")
            self._stop()
        self._resync()
        self.loop.later(min(RESYNC, idle or RESYNC), self._periodically)

    def _resync(self) -> None:
        """Whatever may have been missed."""
        with suppress(OSError):
            self._changed.renew()
        self.collect([tap for tap, one in self.taps.items() if not sockets.is_device(tap, one.ifindex)])
        for one in self.taps.values():
            if one.pending:
                self._perhaps_killed(one)
        self.look()

    def _missed(self) -> None:
        """The kernel has not told all about devices."""
        self._resync()
        self._restorations.all_up_again()

    def _reload(self) -> None:
        try:
            self.runner.config = config.load(None)
        except KvmIfupError as error:
            self.runner.complain("configuration not read", error)
            return
        self._look_after()
        self.runner.say("configuration read")

    # --- arrival ------------------------------------------------------------------------------------------

    def _heard(self, tap: str) -> None:
        """The guest on *tap* has sent something: it runs here."""
        one = self.taps[tap]
        assert one.listener
        try:
            data, sent = sockets.receive(one.listener)
        except BlockingIOError:
            return
        except OSError:  # ENETDOWN, once: the device is down, and may come up again; or it is gone, and so will be this
            return
        frame = frames.name_of(data)
        self._node.catch_up()
        if one.ready and not one.ready.waits:
            outcome = self.runner.attempt(partial(arrive, one.ready), frame)
            if outcome:
                self._disarm(one)
                self._arrived(one, frame, sent, outcome)
                return
        self._disarm(one)
        self.loop.work(partial(self._settle, one.is_of, frame, tap), partial(self._arrived, one, frame, sent))

    def _settle(self, wanted: Callable[[Journal], bool], frame: str | None, tap: str) -> Outcome | KvmIfupError | None:
        """In a thread: post, from the beginning."""
        return self.runner.attempt(partial(settle, tap, wanted), frame)

    def _arrived(self, one: Watched, frame: str, sent: float, outcome: Outcome | KvmIfupError | None) -> None:
        if isinstance(outcome, KvmIfupError):
            self._not_arrived(one, outcome)
        elif outcome:
            seconds = time.time() - sent
            self.runner.metrics.add("kvm_ifup_arrivals_total", frame=frame)
            self.runner.metrics.took("kvm_ifup_arrival_seconds", seconds)
            self.runner.say(f"arrived, first frame {frame}; wired {1000 * seconds:.1f} ms after it", outcome.label)
            self._announce(outcome)

            # By then it may have left, and the tap wait for it or for another one.
            def still_here(journal: Journal) -> bool:
                return one.is_of(journal) and journal.phase is Phase.POST

            recheck = partial(self._settle, still_here, None, one.nic.tap)
            self.loop.later(RECHECK, partial(self.loop.work, recheck, self._rechecked))

    def _rechecked(self, outcome: Outcome | KvmIfupError | None) -> None:
        if isinstance(outcome, KvmIfupError):
            self.runner.complain("not looked at again", outcome)
        elif outcome:
            self._announce(outcome)

    def _not_arrived(self, one: Watched, error: KvmIfupError) -> None:
        """Say it, and try again at the guest's next frame."""
        self.runner.metrics.add("kvm_ifup_arrival_failures_total")
        self.runner.failed([error])
        self.runner.complain("not arrived", error)

        def again() -> None:
            if self.taps.get(one.nic.tap) is one:
                self._drop(one.nic.tap)
                self.look()

        self.loop.later(RECHECK, again)

    # --- announcements ----------------------------------------------------------------------------------------

    def _announce(self, outcome: Outcome) -> None:
        announcing.announce_later([outcome], self.runner.store, self.announce_later)

    def announce_later(self, messages: Sequence[Message], still_true: Callable[[], bool]) -> None:
        """Send *messages* again when it is time, as long as they are true. From any thread."""
        self.loop.soon(partial(self._schedule, messages, still_true))

    def _schedule(self, messages: Sequence[Message], still_true: Callable[[], bool]) -> None:
        self.announcing += 1
        begun = time.monotonic()

        def round_from(number: int) -> None:
            try:
                if not still_true():
                    number = len(announcing.SCHEDULE)
                else:
                    announce.send(messages)
                    told = ", ".join(f"{address} on {uplink}" for uplink, address, _ in messages)
                    what = f"announced, round {number + 1} of {len(announcing.SCHEDULE)}: {told}"
                    self.runner.tell(what)
            except OSError:  # the uplink has gone
                number = len(announcing.SCHEDULE)
            if number + 1 < len(announcing.SCHEDULE):
                self.loop.later(
                    begun + announcing.SCHEDULE[number + 1] - time.monotonic(), partial(round_from, number + 1)
                )
            else:
                self.announcing -= 1

        self.loop.later(announcing.SCHEDULE[1], partial(round_from, 1))

    # --- leftovers ----------------------------------------------------------------------------------------------

    def _devices_gone(self, indices: list[int]) -> None:
        gone = set(indices)
        self.collect([tap for tap, one in self.taps.items() if one.ifindex in gone])
        self._departures.renew()

    def collect(self, taps: Sequence[str], patience: float | None = None) -> None:
        """Undo what is left of the dead NICs and killed runs among *taps*; later if somebody works on them."""
        if taps:
            self.loop.work(partial(self._collect, list(taps), patience), partial(self._collected, list(taps)))

    def _collected(self, taps: Sequence[str], busy: bool) -> None:
        if busy:
            self.loop.later(KILLED, partial(self._collect_again, taps))

    def _collect_again(self, taps: Sequence[str]) -> None:
        self.collect([tap for tap in taps if (one := self.taps.get(tap)) and not sockets.is_device(tap, one.ifindex)])
        for tap in taps:
            if (one := self.taps.get(tap)) and one.pending:
                self._perhaps_killed(one)

    def _perhaps_killed(self, one: Watched) -> None:
        """A run has begun some time ago: whoever has its lock still runs."""
        self.collect([one.nic.tap], patience=0)

    def _collect(self, taps: list[str] | None, patience: float | None) -> bool:
        """In a thread; whether somebody works on one of them."""
        try:
            with self.runner.session(patience=patience) as session:
                outcomes, failures = collect(session, taps)
        except Exception as error:
            self.runner.complain("not cleared up", error)
            return False
        busy = [one for one in failures if isinstance(one, LockTimeoutError)]
        for failure in failures:
            if failure not in busy:
                self.runner.complain("not cleared up", failure)
        for outcome in outcomes:
            self.runner.metrics.add("kvm_ifup_leftovers_total", sum(change.needed for change in outcome.undone))
            remarks = "".join(f"; {remark}" for remark in outcome.remarks)
            self.runner.say(f"cleared up, {len(outcome.undone)} undone{remarks}", outcome.label)
        return bool(busy)
