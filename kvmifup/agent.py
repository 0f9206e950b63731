"""kvm-ifupd: hooks run warm, post at a guest's arrival, withdrawal when it has left, and no leftovers.

What is to be watched is in the journals, so an agent that starts anew, or that has not run the hooks itself,
watches the same:

=====================  ===================================================================================
a journal in pre       armed: its guest has yet to arrive here, or may come back. The first frame out of the
                       tap that the guest has sent says that it runs here
a journal in post      an announcement of its addresses by another node says that it may have left
any                    the tap's disappearance says that it is over
=====================  ===================================================================================
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from select import select
from typing import NoReturn

from kvmifup import __version__, announce, cli, config, packets, report, run
from kvmifup.errors import BugError, JournalError, KvmIfupError, LockTimeoutError, UsageError
from kvmifup.events import DirectoryEvents, LinkEvents
from kvmifup.journal import Stamp, Store
from kvmifup.kernel import Kernel
from kvmifup.loop import Loop, Timer
from kvmifup.model import Nic, Phase
from kvmifup.ops import ProxyNeighbour
from kvmifup.run import Outcome, Ready, Session
from kvmifup.service import Service

PROGRAM = "kvm-ifupd"
BACKLOG = 256
FIRST_ACTIVATED = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)

SWITCH = 0.0005  # seconds that a thread may keep the others waiting: an arrival must not wait for hooks
ANSWER = 0.05  # seconds that a guest has to answer before it counts as gone
AGAIN = 0.2  # seconds between two such questions
SETTLE = 0.05  # seconds from a change of the journals to the look at them: QEMU takes longer to start
RECHECK = 1.0  # seconds after an arrival, or a failure, until everything is looked at in full
KILLED = 1.0  # seconds that a run's unfinished business stays unchanged before somebody asks whether it was killed
RESYNC = 60.0  # seconds between two looks at everything, whatever has been heard or not
FRAMES = 64  # of one uplink at a time

Address = tuple[str, str]  # uplink, address


@dataclass
class Watched:
    """What the agent knows of one tap, from its journal. *listener* is there while it is armed."""

    stamp: Stamp
    nic: Nic
    ifindex: int
    phase: Phase
    pending: bool
    since: float
    proxied: frozenset[Address]
    listener: socket.socket | None = None
    ready: Ready | None = None
    trouble: KvmIfupError | None = None
    timers: list[Timer] = field(default_factory=list)
    asked: float = 0.0
    asking: bool = False


class Agent:
    """Everything in one loop; what may take a while is done by its threads."""

    def __init__(
        self, loop: Loop, listener: socket.socket, run_dir: Path, say: Callable[[str], None], *, activated: bool
    ) -> None:
        self.loop = loop
        self.say = say
        self.run_dir = run_dir
        self.store = Store(run_dir)
        self.config = config.load(None)
        self.activated = activated
        self.taps: dict[str, Watched] = {}
        self.uplinks: dict[tuple[str, int], socket.socket] = {}  # by device and family
        self.counts: Counter[str] = Counter()
        self.announcing = 0
        self._looking = self._look_again = False
        self._settling = False
        self._changed = DirectoryEvents(loop, self.store.directory, self._journals_changed)
        LinkEvents(loop, self._devices_gone, self._resync)
        self.service = Service(loop, listener, self.announce_later)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, loop.stop)
        loop.on_signal(signal.SIGHUP, self._reload)
        self.began = time.time()
        loop.work(partial(self._collect, None))
        self.look()
        loop.later(RESYNC, self._periodically)
        # sd_watchdog_enabled(3): systemd ends and restarts an agent that it has not heard for twice as long.
        self._watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self._watched()

    def _watched(self) -> None:
        if self._watchdog:
            notify("WATCHDOG=1")
            self.loop.later(self._watchdog, self._watched)

    def close(self) -> None:
        """Take no more hooks, and let those that run come to their end."""
        self.service.close()
        self.loop.close()
        self._changed.close()
        for source in (*self.uplinks.values(), *(one.listener for one in self.taps.values() if one.listener)):
            source.close()

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
        stamps = self.store.stamps()
        taps = set(stamps)
        news = {}
        for tap, stamp in sorted(stamps.items()):
            if stamp == known.get(tap):
                continue
            try:
                journal = self.store.load(tap)
            except (JournalError, OSError) as error:
                self.say(f"{tap}: {error}")
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
        return one.since + self.config.agent.arrival_timeout - time.time()

    def _arm(self, one: Watched) -> None:
        """In a thread: listen first, so that nothing gets lost while post is prepared."""
        tap = one.nic.tap
        try:
            one.listener = packets.guest_listener(tap, one.nic.mac)
            if one.since < self.began:  # it may have arrived while nobody listened
                packets.send(tap, packets.questions(one.nic))
        except OSError as error:
            self.say(f"{one.nic.label}: cannot listen: {error.strerror}")
            return
        with self.session("agent") as session:
            try:
                one.ready = run.ready(tap, session)
            except KvmIfupError as error:
                self.say(report.error_line("not ready for its arrival", error))
            except Exception as error:
                self.say(f"{one.nic.label}: unexpected {type(error).__name__}: {error}")

    def _found(self, result: tuple[set[str], dict[str, Watched]]) -> None:
        taps, news = result
        self._looking = False
        for tap in self.taps.keys() - taps:
            self._drop(tap)
        for tap, one in news.items():
            self._drop(tap)
            self.taps[tap] = one
            if one.listener:
                self.loop.watch(one.listener, partial(self._heard, tap))
                one.timers.append(self.loop.later(self._time_left(one), partial(self._give_up, tap)))
                self.say(f"{one.nic.label}: armed")
            if one.pending:
                one.timers.append(self.loop.later(KILLED, partial(self.collect, [tap])))
            elif not is_device(tap, one.ifindex):
                self.collect([tap])
        self._watch_uplinks()
        if self._look_again:
            self._look_again = False
            self.look()

    def _drop(self, tap: str) -> None:
        one = self.taps.pop(tap, None)
        if one:
            self._disarm(one)
            for timer in one.timers:
                timer.cancel()

    def _disarm(self, one: Watched) -> None:
        if one.listener:
            self.loop.ignore(one.listener)
            announce.close(one.listener)
            one.listener = None

    def _give_up(self, tap: str) -> None:
        one = self.taps[tap]
        self._disarm(one)
        self.say(f"{one.nic.label}: the guest has not arrived in {self.config.agent.arrival_timeout:g} s: disarmed")

    def _periodically(self) -> None:
        self._resync()
        idle = self.config.agent.idle_exit
        busy = self.taps or self.service.callers or self.announcing
        if self.activated and idle and not busy and time.monotonic() - self.service.last > idle:
            self.say(f"nothing to look after for {idle:g} s: good-bye")
            self.loop.stop()
        self.loop.later(min(RESYNC, idle or RESYNC), self._periodically)

    def _resync(self) -> None:
        """Whatever may have been missed."""
        with suppress(OSError):
            self._changed.renew()
        self.collect([tap for tap, one in self.taps.items() if not is_device(tap, one.ifindex)])
        self.look()

    def _reload(self) -> None:
        try:
            self.config = config.load(None)
        except KvmIfupError as error:
            self.say(report.error_line(PROGRAM, error))
        self._watch_uplinks()

    # --- arrival ------------------------------------------------------------------------------------------

    def _heard(self, tap: str) -> None:
        """The guest on *tap* has sent something: it runs here."""
        one = self.taps[tap]
        assert one.listener
        try:
            data, sent = packets.receive(one.listener)
        except BlockingIOError:
            return
        except OSError:  # the device has gone down, or away
            self._disarm(one)
            return
        frame = packets.name_of(data)
        if one.ready and not one.ready.waits:
            outcome = self._attempt(partial(run.arrive, one.ready), frame)
            if outcome:
                self._disarm(one)
                self._arrived(tap, sent, outcome)
                return
        self._disarm(one)
        self.loop.work(partial(self._settle, tap, frame), partial(self._arrived, tap, sent))

    def _settle(self, tap: str, frame: str | None) -> Outcome | KvmIfupError | None:
        """In a thread: post, from the beginning."""
        return self._attempt(partial(run.settle, tap), frame)

    def _attempt(self, what: Callable[[Session], Outcome | None], frame: str | None) -> Outcome | KvmIfupError | None:
        """Do *what* in a session of ours; an error is a result as well."""
        try:
            with self.session("agent", frame) as session:
                return what(session)
        except KvmIfupError as error:
            return error
        except Exception as error:  # one NIC's trouble is not the others'
            return BugError(f"unexpected {type(error).__name__}: {error}", hint="please report it")

    def _arrived(self, tap: str, sent: float, outcome: Outcome | KvmIfupError | None) -> None:
        if isinstance(outcome, KvmIfupError):
            self._not_arrived(tap, outcome)
        elif outcome:
            self.counts["arrivals"] += 1
            self.say(f"{outcome.label}: arrived; wired {1000 * (time.time() - sent):.1f} ms after its first frame")
            self._announce(outcome)
            self.loop.later(RECHECK, partial(self.loop.work, partial(self._settle, tap, None), self._rechecked))

    def _rechecked(self, outcome: Outcome | KvmIfupError | None) -> None:
        if isinstance(outcome, KvmIfupError):
            self.say(report.error_line(PROGRAM, outcome))
        elif outcome:
            self._announce(outcome)

    def _not_arrived(self, tap: str, error: KvmIfupError) -> None:
        """Say it, and try again at the guest's next frame."""
        self.counts["failures"] += 1
        self.say(report.error_line(PROGRAM, error))

        def again() -> None:
            self._drop(tap)
            self.look()

        self.loop.later(RECHECK, again)

    # --- announcements ----------------------------------------------------------------------------------------

    def _announce(self, outcome: Outcome) -> None:
        cli.announce_later([outcome], self.store, self.announce_later)

    def announce_later(self, messages: Sequence[announce.Message], still_true: Callable[[], bool]) -> None:
        """Send *messages* again when it is time, as long as they are true. From any thread."""
        self.loop.soon(partial(self._schedule, messages, still_true))

    def _schedule(self, messages: Sequence[announce.Message], still_true: Callable[[], bool]) -> None:
        self.announcing += 1
        begun = time.monotonic()

        def round_from(number: int) -> None:
            try:
                if not still_true():
                    number = len(announce.SCHEDULE)
                else:
                    announce.send(messages)
            except OSError:  # the uplink has gone
                number = len(announce.SCHEDULE)
            if number + 1 < len(announce.SCHEDULE):
                self.loop.later(
                    begun + announce.SCHEDULE[number + 1] - time.monotonic(), partial(round_from, number + 1)
                )
            else:
                self.announcing -= 1

        self.loop.later(announce.SCHEDULE[1], partial(round_from, 1))

    # --- departure --------------------------------------------------------------------------------------------

    def _watch_uplinks(self) -> None:
        """Listen on every uplink where this node answers for a guest."""
        wanted: set[tuple[str, int]] = set()
        if self.config.agent.withdraw:
            for one in self.taps.values():
                wanted |= {(uplink, 6 if ":" in address else 4) for uplink, address in one.proxied}
        for which in self.uplinks.keys() - wanted:
            self._leave_uplink(which)
        for which in wanted - self.uplinks.keys():
            with suppress(OSError):
                self.uplinks[which] = packets.uplink_listener(*which)
                self.loop.watch(self.uplinks[which], partial(self._heard_of, which))

    def _leave_uplink(self, which: tuple[str, int]) -> None:
        listener = self.uplinks.pop(which)
        self.loop.ignore(listener)
        announce.close(listener)

    def _heard_of(self, which: tuple[str, int]) -> None:
        """Somebody on an uplink announces something: perhaps a guest of ours."""
        for _ in range(FRAMES):
            try:
                found = packets.announced(self.uplinks[which].recv(packets.SNAP))
            except BlockingIOError:
                return
            except OSError:  # gone, or down; the next look at the journals opens another
                self._leave_uplink(which)
                return
            if found:
                uplink = which[0]
                address, mac = found
                for tap, one in self.taps.items():
                    if (uplink, address) in one.proxied:
                        self._perhaps_gone(tap, one, f"{address} announced by {mac} on {uplink}")

    def _perhaps_gone(self, tap: str, one: Watched, why: str) -> None:
        now = time.monotonic()
        if one.asking or now - one.asked < AGAIN:
            return
        one.asking, one.asked = True, now
        self.loop.work(partial(self._ask_and_withdraw, one.nic, why), partial(self._asked, one))

    def _asked(self, one: Watched, _: object) -> None:
        one.asking = False

    def _ask_and_withdraw(self, nic: Nic, why: str) -> None:
        """In a thread."""
        try:
            if answers(nic, ANSWER):
                self.say(f"{nic.label}: {why}, but the guest runs here: nothing done")
                return
            with self.session("agent", why) as session:
                outcome = run.withdraw(nic.tap, session)
        except OSError:
            return  # the tap is gone, and that is dealt with elsewhere
        except KvmIfupError as error:
            self.say(report.error_line(PROGRAM, error))
            return
        if outcome:
            self.counts["withdrawals"] += 1
            self.say(f"{nic.label}: {why}, and the guest does not answer here: route and proxy entries withdrawn")

    # --- leftovers ----------------------------------------------------------------------------------------------

    def _devices_gone(self, indices: list[int]) -> None:
        gone = set(indices)
        self.collect([tap for tap, one in self.taps.items() if one.ifindex in gone])

    def collect(self, taps: Sequence[str]) -> None:
        """Undo what is left of the dead NICs among *taps*."""
        if taps:
            self.loop.work(partial(self._collect, list(taps)))

    def _collect(self, taps: list[str] | None) -> None:
        """In a thread."""
        with self.session("agent") as session:
            try:
                outcomes = run.gc(session, taps)
            except Exception as error:
                self.say(f"clearing up: {error}")
                return
        for outcome in outcomes:
            self.counts["leftovers"] += len(outcome.undone)
            remarks = "".join(f"; {remark}" for remark in outcome.remarks)
            self.say(f"{outcome.label}: cleared up, {len(outcome.undone)} undone{remarks}")

    # --- helpers --------------------------------------------------------------------------------------------------

    @contextmanager
    def session(self, by: str, frame: str | None = None) -> Iterator[Session]:
        """What a run of ours works with."""
        kernel = Kernel()
        try:
            yield Session(kernel, self.store, self.run_dir, self.config, by=by, frame=frame)
        finally:
            kernel.close()


def is_device(name: str, index: int) -> bool:
    """Whether *name* is still the device with *index*."""
    try:
        return socket.if_nametoindex(name) == index
    except OSError:
        return False


def answers(nic: Nic, seconds: float) -> bool:
    """Whether the guest of *nic* is heard on its tap within *seconds*, when it is asked. Raises OSError."""
    listener = packets.guest_listener(nic.tap, nic.mac)
    try:
        packets.send(nic.tap, packets.questions(nic))
        return bool(select([listener], [], [], seconds)[0])
    finally:
        announce.close(listener)


# --- the process ---------------------------------------------------------------------------------------------------


def script() -> NoReturn:
    """What scripts/kvm-ifupd is. Never returns; the exit codes are those of the other commands."""
    try:
        main(sys.argv[1:])
        code = 0
    except KvmIfupError as error:
        sys.stderr.write(report.error_line(PROGRAM, error) + "\n")
        code = error.code
    sys.exit(code)


def main(argv: Sequence[str], run_dir: Path = cli.RUN_DIR) -> None:
    """Run until a signal says otherwise, or there is nothing left to look after. Raises KvmIfupError."""
    parser = cli.Parser(
        prog=PROGRAM,
        description="The node's agent: runs hooks without the time that Python takes to start, wires an incoming "
        "guest when its first frame arrives, and clears up when a tap disappears. Stays in the foreground.",
        epilog=cli.EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    try:
        parser.parse_args(list(argv))
    except cli.Told as told:
        sys.stdout.write(str(told))
        return
    cli.need_privileges()
    run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with only_one(run_dir):
        listener = activated() or own_socket(run_dir / "agent.sock")
        sys.setswitchinterval(SWITCH)
        loop = Loop()
        agent = Agent(loop, listener, run_dir, say, activated=listener.fileno() == FIRST_ACTIVATED)
        gc.collect()
        gc.freeze()  # what has been loaded stays: the collector need not look at it again and again
        say("ready")
        notify("READY=1")
        try:
            loop.run()
        finally:
            notify("STOPPING=1")
            if not agent.activated:
                (run_dir / "agent.sock").unlink(missing_ok=True)
            agent.close()


def say(line: str) -> None:
    """One line for the log: systemd's journal, or whoever has started us."""
    with suppress(OSError):
        os.write(2, f"{PROGRAM}: {report.printable(line)}\n".encode())


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Raise LockTimeoutError if another agent runs; keep others from running."""
    with open(run_dir / "agent.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockTimeoutError("another agent runs on this node", hint="`systemctl stop kvm-ifupd`") from None
        yield


def activated() -> socket.socket | None:
    """The socket that systemd has opened for us; None if we were started in another way. See sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise UsageError("systemd hands over more or less than one socket", hint="see kvm-ifupd.socket")
    listener = socket.socket(fileno=FIRST_ACTIVATED)
    os.set_inheritable(FIRST_ACTIVATED, False)
    listener.setblocking(False)
    return listener


def own_socket(path: Path) -> socket.socket:
    """A socket at *path*, for root alone."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener


def notify(state: str) -> None:
    """Tell systemd, if it wants to know: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
