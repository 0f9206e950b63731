"""The migrations that are compared: bridged and routed, with phases and without, with the agent and without."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import clock, guest, instrument, migrate, observe
from lab.agent import agent
from lab.hooks import TAP, Hook, Hooks, write_nic
from lab.nodes import Mode, Namespace, Network, guest_addresses, network
from lab.observe import Frame, Gap, Observer, Ping, Probe

Progress = Callable[[str], None]

PING_TIMEOUT = 1.0  # seconds
HANDOVER = 0.1  # seconds from the guest's arrival within which the agents see to it that the right node answers
OBSERVED_AFTER = 3.0  # seconds from the guest's arrival; the last announcement is sent after 0.8


@dataclass(frozen=True)
class Case:
    """One way to wire the target's tap.

    `at_start` is QEMU's script= on the target (None: the tap is set up and left unplugged); kvm-ifup-post follows
    `post_after` seconds after the guest's arrival. The source's kvm-ifdown always comes first: its guest has left. With
    `agent`, both nodes have a kvm-ifupd, and kvm-ifdown comes as late as kvm-ifup-post.
    """

    key: str
    title: str
    mode: Mode
    at_start: Hook | None
    incoming: bool
    post_after: float
    agent: bool = False


CASES = (
    Case("bridged", "bridged, with phases", "bridged", "kvm-ifup-pre", True, 0.0),
    Case("bridged-late", "bridged, wired only afterwards", "bridged", None, True, 1.0),
    Case("routed", "routed, with phases", "routed", "kvm-ifup-pre", True, 0.0),
    Case("routed-agent", "routed, with phases and the agent", "routed", "kvm-ifup-pre", True, 1.0, agent=True),
    Case("routed-early", "routed, all of it at the start", "routed", "kvm-ifup-post", False, 0.0),
)


@dataclass(frozen=True)
class Result:
    """What one migration looked like from the client. Times are CLOCK_MONOTONIC seconds, durations are ms.

    `silence` is the time without an IPv4 reply around the guest's arrival, in the parts into which single replies split
    it (see `observe.silence`); pings go out every 5 ms, so that is its resolution. `silence6_ms` is the length of the
    same for IPv6, with a resolution of 20 ms. `lost` counts
    the IPv4 pings that were not answered within `PING_TIMEOUT`: some wait in the target's tap and are answered long
    afterwards. `announcements` are the RARP, gratuitous ARP and unsolicited NA frames that reached the client.
    `contested` are the ARP probes that two nodes answered at the same moment (see `observe.contested`); probes are sent
    while the migration runs, for a routed guest also until the source is withdrawn and the target is wired. Where
    nobody but the agents arranges that, those of the first `HANDOVER` seconds are not counted.
    """

    case: Case
    started: float
    resumed: float
    downtime_ms: float
    silence: tuple[Gap, ...]
    silence6_ms: float
    lost: int
    pings: tuple[Ping, ...]
    announcements: tuple[Frame, ...]
    probes: tuple[Probe, ...]
    contested: tuple[Probe, ...]

    @property
    def silence_ms(self) -> float:
        """All parts together."""
        return observe.length(self.silence)

    @property
    def difference_ms(self) -> float:
        """What the network added to the guest's own downtime."""
        return self.silence_ms - self.downtime_ms

    @property
    def nodes_answering(self) -> int:
        """How many nodes answered ARP for the guest at the same moment: 1, or 2 when any probe was contested."""
        return 2 if self.contested else 1


@dataclass(frozen=True)
class Stage:
    """A guest that runs on node a, is pinged by the client and is wired; everything is set for its move to b."""

    net: Network
    hooks: Hooks
    image: guest.Image
    directory: Path
    observer: Observer
    source: migrate.Guest

    @contextlib.contextmanager
    def target(self, script: Hook | None, incoming: bool, node: Namespace | None = None) -> Iterator[migrate.Guest]:
        """The QEMU on node b, or on `node`, that waits for the guest, with its NIC file written first."""
        node = node or self.net.b
        write_nic(node, self.net.mode, incoming)
        wiring = migrate.Wiring(TAP, script=None if script is None else self.hooks.path(script))
        directory = Path(tempfile.mkdtemp(prefix="target-", dir=self.directory))
        with migrate.start(
            node, self.image, guest_addresses(self.net.mode), wiring, directory, incoming=True
        ) as target:
            yield target


@contextlib.contextmanager
def stage(net: Network, hooks: Hooks, image: guest.Image, progress: Progress) -> Iterator[Stage]:
    """Boots the guest on node a and waits until the client has its replies; ended when the block ends.

    Raises LabError.
    """
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-lab-") as scratch:
        directory = Path(scratch)
        progress("booting the guest on node a")
        write_nic(net.a, net.mode, incoming=False)
        wiring = migrate.Wiring(TAP, script=hooks.path("kvm-ifup-pre"))
        with (
            migrate.start(net.a, image, guest_addresses(net.mode), wiring, directory / "a") as source,
            observe.observer(net) as observer,
        ):
            source.wait_booted()
            observer.wait_for_replies(clock.now(), 90, source.must_run)
            yield Stage(net, hooks, image, directory, observer, source)


def run(case: Case, hooks: Hooks, image: guest.Image, progress: Progress) -> Result:
    """One live migration of a pinged guest from node a to node b, measured. Raises LabError."""
    with network(case.mode) as net, agents(case, net, hooks), stage(net, hooks, image, progress) as on:
        on.observer.probe(True)
        time.sleep(0.3)
        begin = clock.now()
        progress(f"starting the target on node b with script={case.at_start or 'no'}")
        with on.target(case.at_start, case.incoming) as target:
            if case.at_start is None:
                on.net.b.run("ip", "link", "set", TAP, "up")
            progress("migrating")
            started = on.source.order_migration(target)
            migrated = on.source.wait_migrated(target, started)
            if case.mode == "bridged":
                # From here on an answer to the prober would teach the switch what the product has to teach it.
                on.observer.probe(False)
            progress(f"the guest runs on node b, its own downtime was {migrated.downtime_ms:.0f} ms; wiring")
            if case.agent:
                time.sleep(max(0.0, migrated.resumed + case.post_after - clock.now()))
            on.hooks.run("kvm-ifdown", on.net.a)
            time.sleep(max(0.0, migrated.resumed + case.post_after - clock.now()))
            on.hooks.run("kvm-ifup-post", on.net.b)
            on.source.quit()
            progress("waiting until the client has its replies")
            # A client's neighbour cache takes up to 53 s to find out: 45 reachable, 5 delay, 3 probing. Then it asks
            # anew, by broadcast; the guest's answer teaches the switch, whose own entry would last for 300 s.
            on.observer.wait_for_replies(clock.now(), 90, target.must_run)
            if case.mode == "routed":
                on.observer.probe(False)
            time.sleep(max(0.0, migrated.resumed + OBSERVED_AFTER + PING_TIMEOUT - clock.now()))
            record = on.observer.record()
    sent = [p for p in record.pings if begin <= p.sent < record.pings[-1].sent - PING_TIMEOUT]
    return Result(
        case=case,
        started=migrated.started,
        resumed=migrated.resumed,
        downtime_ms=migrated.downtime_ms,
        silence=observe.silence(record.pings, migrated.resumed, instrument.PING_SECONDS[4]),
        silence6_ms=observe.length(observe.silence(record.pings6, migrated.resumed, instrument.PING_SECONDS[6])),
        lost=sum(p.replied is None or p.replied - p.sent > PING_TIMEOUT for p in sent),
        pings=record.pings,
        announcements=tuple(
            f for f in record.at_client if f.at >= begin and f.seen.kind in ("rarp", "garp", "unsolicited-na")
        ),
        probes=record.probes,
        contested=tuple(
            p
            for p in observe.contested(record.probes)
            if not (case.agent and migrated.resumed <= p.sent < migrated.resumed + HANDOVER)
        ),
    )


@contextlib.contextmanager
def agents(case: Case, net: Network, hooks: Hooks) -> Iterator[None]:
    """The agents of both nodes, if the case has any."""
    with contextlib.ExitStack() as stack:
        for node in (net.a, net.b) if case.agent else ():
            stack.enter_context(agent(node, hooks))
        yield
