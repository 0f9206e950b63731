"""The agent put together: its rooms, the events that they get, periodic work, and stopping.

What is to be watched is in the journals, so an agent that starts anew, or that has not run the hooks itself, watches
the same:

=====================  ===================================================================================
a guest that is        its QEMU says which taps it has; for those pre is run, which leaves a journal
expected               (`expectations`)
a journal in pre       armed: its guest has yet to arrive here, or may come back. The first frame out of the
                       tap that the guest has sent says that it runs here (`arrivals`)
a journal in post      an announcement of its addresses by another node says that it may have left
                       (`departures`)
an unfinished one      a run is at work, or was killed (`leftovers`)
any                    the tap's disappearance says that it is over (`leftovers`); what the node loses of what
                       is wired is put back (`mending`)
=====================  ===================================================================================
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from kvmifup.agent import systemd
from kvmifup.agent.announcements import Announcements
from kvmifup.agent.arrivals import Arrivals, listen
from kvmifup.agent.departures import Departures
from kvmifup.agent.directories import DirectoryEvents, Names
from kvmifup.agent.events import LinkEvents, NodeEvents, Thing
from kvmifup.agent.expectations import Expectations
from kvmifup.agent.hook_server import HookServer
from kvmifup.agent.leftovers import Leftovers
from kvmifup.agent.listening import Listener
from kvmifup.agent.loop import Loop, Paced, Settling
from kvmifup.agent.mending import Mending
from kvmifup.agent.metrics import Labels
from kvmifup.agent.preparing import Preparations
from kvmifup.agent.rulesets import RulesetEvents
from kvmifup.agent.runner import Runner, Say
from kvmifup.agent.taps import State, TapRecord, Taps
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Phase
from kvmifup.inputs import config, ganeti
from kvmifup.node import drops, standing
from kvmifup.node.drops import Counts
from kvmifup.runs import clock, expected
from kvmifup.runs.drops import STALE
from kvmifup.runs.drops import save as save_drops
from kvmifup.tell import syslog

SOCKET = "agent.sock"
METRICS = "metrics.prom"

QUIET = 0.2  # seconds after a change on the node until NICs are compared with it, and arrivals prepared anew
PACE = 0.2  # seconds between two changes of what is listened for: with hundreds of guests each takes milliseconds
DONE = 0.02  # seconds between two looks whether the last hook has come to its end
COUNT = 15.0  # seconds between two writings of the metrics
# Between two looks at what was dropped there are `COUNT` seconds, or where the kernel tells more, a second for so many
# bytes, and at most so many seconds: about thousands of NICs that have filters it takes ten milliseconds to tell.
A_SECOND, SELDOM = 20_000, 45.0
COUNTED = (Phase.PRE, Phase.POST)
RETRY = 60.0  # seconds between two tries of what could not be done: nobody tells when it can be


class Agent:
    """All rooms in one loop; hooks come in by *listener*."""

    def __init__(self, loop: Loop, listener: Listener, run_dir: Path, say: Say) -> None:
        self._loop = loop
        self._forget = standing.keep()
        self._runner = Runner(run_dir, say)
        self._listener = listener
        self._counting = drops.Counting()
        self._dropped: Counts = {}
        self._noted = 0.0  # when that was written down
        self._announcements = Announcements(loop, self._runner)
        self._departures = Departures(
            loop, self._runner, lambda tap: self._taps.look([tap]), lambda tap: self._mending.answered(tap)
        )
        self._listening = Paced(loop, PACE, self._departures.renew)
        suspects = self._departures.suspects
        arm = partial(listen, self._runner, suspects.handed, clock.uptime())
        self._taps = Taps(
            loop,
            self._runner,
            listen=arm,
            found=self._found,
            looked=self._look_after,
            over=[
                self._departures.over,
                lambda tap: self._leftovers.over(tap),
                lambda tap: self._mending.over(tap),
                lambda tap: self._preparations.forget(tap),
            ],
        )
        self._node = NodeEvents(loop, self._node_changed)
        self._settling = Settling(loop, QUIET, self._settled)
        stir = self._settling.stir
        self._preparations = Preparations(loop, self._runner, self._taps, stir)
        self._arrivals = Arrivals(
            loop,
            self._runner,
            self._taps,
            self._announcements,
            self._preparations,
            listen=arm,
            came_back=suspects.came_back,
            catch_up=self._node.catch_up,
        )
        ask = self._departures.asked_for
        self._mending = Mending(loop, self._runner, self._taps, self._announcements, ask, stir)
        self._leftovers = Leftovers(loop, self._runner, self._taps)
        self._expectations = Expectations(loop, self._runner, lambda: self._journals.complete())
        also = (run_dir / expected.DIRECTORY, ganeti.pids())
        self._journals = DirectoryEvents(
            loop, self._runner.store.directory, self._files_changed, also, [SOCKET, expected.DIRECTORY]
        )
        with suppress(OSError):  # a kernel without nftables has nothing to tell
            RulesetEvents(loop, self._mending.touched)
        LinkEvents(loop, self._devices_gone, self._mending.went_down, self._events_lost)
        self._hooks = HookServer(
            loop, listener.socket, self._announcements.begin, self._runner.hook_done, self._runner.say
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, self._stop)
        loop.on_signal(signal.SIGHUP, self._reload)
        self._leftovers.collect_all()
        self._taps.look()
        self._expectations.look()
        loop.later(min(RETRY, self._runner.config.agent.idle_exit or RETRY), self._periodically)
        self._write_metrics()
        self._count_drops()
        self._sign_of_life()

    def close(self) -> None:
        """Let go of everything."""
        self._arrivals.close()
        self._write_metrics()
        self._hooks.close()
        self._journals.close()
        self._loop.close()
        self._counting.close()
        self._mending.close()
        self._taps.close()
        self._departures.close()
        self._forget()

    # --- events -------------------------------------------------------------------------------------------

    def _found(self, tap: TapRecord) -> None:
        """*tap* has a new journal."""
        if tap.state is State.ARMING:
            self._arrivals.wait_for(tap)
        if tap.state is State.DISARMED:
            self._arrivals.listen_later(tap)
        self._leftovers.found(tap)
        self._mending.found(tap)
        self._departures.found(tap)

    def _look_after(self, changed: bool = True) -> None:
        """The journals were looked at; listen for other guests if any has *changed*."""
        self._keep_run_dir()
        if changed:
            self._listening.ask()

    def _keep_run_dir(self) -> None:
        """Make anew what hooks find the agent by, and what it finds journals by, if somebody has removed it."""
        if self._hooks.closed:
            return
        try:
            if not self._listener.is_there():
                self._listener.renew()
                self._hooks.listen_on(self._listener.socket)
                self._runner.say(f"{self._listener.path} was removed: made again", severity=syslog.ERROR)
            if not self._runner.store.directory.exists() or not self._journals.is_watched():
                self._journals.renew()
        except (KvmIfupError, OSError) as error:  # tried again at the next look
            self._runner.complain("not made again", error)

    def _files_changed(self, names: Names | None) -> None:
        taps = None if names is None else [one.removesuffix(".json") for one in names if one.endswith(".json")]
        if taps is None or taps:
            self._taps.look_soon(taps)
        self._expectations.look()

    def _node_changed(self, things: frozenset[Thing]) -> None:
        """*things* have changed: NICs may rely on them, and what is prepared for arrivals."""
        self._preparations.outdate(things)
        self._mending.touched(things)
        self._leftovers.devices_changed(things)

    def _settled(self, quiet: bool) -> None:
        """After a change the node has been *quiet* for a while, or it does not get quiet at all."""
        # Many hooks, or guests, at once want the processor first: their NICs would be looked at while others wait.
        self._mending.look(later=not quiet and (self._hooks.crowded or self._arrivals.crowded))
        if quiet:  # or what is prepared would be thrown away at once
            self._preparations.anew()

    def _devices_gone(self, indices: list[int]) -> None:
        self._leftovers.devices_gone(indices)
        self._departures.renew()

    def _events_lost(self) -> None:
        """The kernel could not report all about devices."""
        self._mending.events_lost()
        self._leftovers.collect_dead()
        self._departures.renew()

    def _reload(self) -> None:
        try:
            self._runner.config = config.load(None)
        except KvmIfupError as error:
            self._runner.complain("configuration not read; the agent goes on with the one it has", error)
            return
        self._look_after()
        self._mending.look_at_all()
        self._runner.say("configuration read")

    # --- from time to time --------------------------------------------------------------------------------

    def _periodically(self) -> None:
        idle = self._runner.config.agent.idle_exit
        busy = self._taps or self._expectations.waiting or self._at_work()
        if self._listener.given and idle and not busy and time.monotonic() - self._hooks.last > idle:
            self._runner.say(f"nothing to look after for {idle:g} s: good-bye")
            self._stop()
        self._look_again()
        self._loop.later(min(RETRY, idle or RETRY), self._periodically)

    def _look_again(self) -> None:
        """At what could not be done or read, and whether the directories are still those that are watched.

        The kernel tells of all else, so nothing else is looked at: a node may have thousands of NICs.
        """
        self._keep_run_dir()
        self._journals.complete()
        self._leftovers.look_again()
        self._departures.renew()
        watched = False
        with suppress(OSError):
            watched = self._journals.is_watched()
        if watched:
            self._taps.look_again()
        else:
            self._taps.look()
        self._expectations.look()

    def _write_metrics(self) -> None:
        """Write down what has been counted, for the node exporter."""
        metrics = self._runner.metrics
        phases = ((phase.name.lower(), sum(tap.phase is phase for tap in self._taps)) for phase in COUNTED)
        metrics.set("kvm_ifup_nics", {(("phase", name),): many for name, many in phases})
        metrics.set("kvm_ifup_armed", {(): sum(tap.listener is not None for tap in self._taps)})
        dropped: dict[Labels, float] = {
            (("tap", tap.name), ("instance", tap.nic.instance or ""), ("reason", reason)): packets
            for tap in self._taps.named([*self._dropped])
            for reason, packets in self._dropped[tap.name].items()
        }
        metrics.set("kvm_ifup_dropped_packets_total", dropped)
        with suppress(OSError):
            metrics.write(self._runner.run_dir / METRICS)
        self._loop.later(COUNT, self._write_metrics)

    def _count_drops(self) -> None:
        """Have a thread read what was dropped, from time to time."""
        self._loop.work(self._counting.counted, self._drops_counted)

    def _drops_counted(self, counts: Counts) -> None:
        changed, now = counts is not self._dropped, time.monotonic()
        if (changed and (counts or self._dropped)) or (counts and now - self._noted > STALE / 2):
            with suppress(OSError):
                save_drops(self._runner.run_dir, counts)
                self._noted = now
        self._dropped = counts
        self._loop.later(max(COUNT, min(self._counting.size / A_SECOND, SELDOM)), self._count_drops)

    def _sign_of_life(self) -> None:
        """Tell systemd's watchdog, if there is one, twice as often as it wants to hear of us."""
        if limit := systemd.watchdog():
            systemd.notify("WATCHDOG=1")
            self._loop.later(limit / 2, self._sign_of_life)

    # --- the end ------------------------------------------------------------------------------------------

    def _at_work(self) -> bool:
        under_way = self._announcements.under_way or self._arrivals.under_way
        return bool(self._hooks.exchanges or under_way or self._loop.working)

    def _stop(self) -> None:
        """Take no more hooks, and let those that run come to their end; at once if somebody insists."""
        if self._hooks.closed:
            self._loop.stop()
            return
        systemd.notify("STOPPING=1")
        self._listener.remove()  # first: whoever comes now does it by itself
        self._preparations.stop()
        self._hooks.close()
        self._loop.later(DONE, self._stop_when_done)

    def _stop_when_done(self) -> None:
        # The hooks want a sign of life meanwhile, and an arrival to be announced: so the loop goes on.
        if self._at_work():
            self._loop.later(DONE, self._stop_when_done)
        else:
            self._loop.stop()
