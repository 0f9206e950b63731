"""What is wrong with a NIC that has been wired, since when, and most likely why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kvmifup import phases
from kvmifup.core.errors import KernelError, KvmIfupError, NicError
from kvmifup.core.model import Config, Nic, NodeFacts, Phase, Uplink
from kvmifup.core.ops import (
    AddrGenMode,
    LinkAddress,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Neighbour,
    OvsPort,
    PortForwarding,
    ProxyNeighbour,
    Route,
    Rule,
    Sysctl,
)
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import UPLINK_HINT, Look, State, compared, intended, state_of, stopped
from kvmifup.node import probe
from kvmifup.node.overview import Overview
from kvmifup.runs.apply import Change
from kvmifup.runs.host import Through
from kvmifup.runs.session import Session
from kvmifup.tell import render

RP_FILTER_NAMES = {"0": "off", "1": "strict", "2": "loose"}


@dataclass(frozen=True)
class Finding:
    """*what* is not as it should be, *why* most likely or what it leads to, and what to do: *mend*.

    *wrong* is false for what should merely be known.
    """

    what: str
    why: str = ""
    mend: str = ""
    wrong: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """A NIC, its phase in one word and its state as `show` tells them, and what there is to say about it."""

    one: Known
    phase: str
    state: State
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> bool:
        """Whether anything is."""
        return any(finding.wrong for finding in self.findings)


def diagnose(one: Known, look: Look, *, ask: bool) -> Diagnosis:
    """Everything that is to be said about *one*.

    *ask*: also whether another node answers for its addresses, which takes a second. Raises OSError then.
    """
    state = state_of(one, look.session)
    if one.trouble or stopped(one, look.session):
        found = [of_error(state.problem)] if state.problem else []
    elif one.nic is None or one.journal is None or one.phase is Phase.DOWN:
        found = list(never_wired(one, look.overview))
    else:
        found = list(wired_findings(one, state, look.session, look.overview, ask=ask))
    return Diagnosis(one, look.phase_word(one), state, tuple(found))


def wired_findings(one: Known, state: State, session: Session, overview: Overview, *, ask: bool) -> Iterator[Finding]:
    """What there is to say about a NIC that a phase has been done for."""
    try:
        nic = intended(one, session.config)
    except NicError as error:
        yield of_error(error)
        return
    missing = state.missing
    if state.problem and not state.wired:  # the node could not take it: say why, and compare the rest
        yield of_error(state.problem, why_not_ready(state.problem))
        with suppress(KvmIfupError):
            missing = compared(one, replace(session, kernel=Excused(overview))).missing
    yield from drift(one, nic, missing, overview, session.config)
    if nic.mode == "routed":
        yield from traffic(one, nic, missing, overview, session.config)
        if ask:
            yield from answers(one, nic, overview, session.config)


def of_error(error: KvmIfupError, why: str = "") -> Finding:
    """What an error says, as a finding."""
    return Finding(f"{error.where}: {error}" if error.where.startswith("/") else str(error), why, error.hint)


def never_wired(one: Known, kernel: Overview) -> Iterator[Finding]:
    """A NIC that was never wired. That is right until its guest runs here."""
    if kernel.ifindex(one.tap) is not None:
        yield Finding(
            f"{one.tap} is there, but nothing has wired it",
            "no hook was called for it, or it failed and put everything back",
            f"kvm-ifup-post {one.tap}",
        )


def why_not_ready(error: KvmIfupError) -> str:
    """Why a node that could take the NIC in an earlier phase no longer can."""
    text = str(error)
    if "forwarding is off" in text:
        return "what comes in there for guests is dropped; `sysctl --system` or a restarted firewall turns it off"
    if text.startswith("no such uplink"):
        return "the configuration names it, and it has gone"
    if "is already" in text or "is this node's" in text:
        return "the address has been given to somebody else since"
    return ""


class Excused(Through):
    """The node as it is, but for what would keep it from taking the NIC: so that the rest can still be compared."""

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """The facts, without those that `phases.plan` refuses."""
        facts = self._host.facts(nic, config)
        uplinks = tuple(replace(one, up=True, mend=()) for one in facts.uplinks if one.present)
        bridge = facts.bridge and replace(facts.bridge, up=True, stp=False)
        return replace(facts, uplinks=uplinks, bridge=bridge, taken=(), ipv6_mend=())


# --- op by op -------------------------------------------------------------------------------------------


def drift(one: Known, nic: Nic, missing: Sequence[Change], kernel: Overview, config: Config) -> Iterator[Finding]:
    """What differs from what the NIC's phase wants, each with its likely cause."""
    assert one.journal is not None
    here = one.journal.nic
    if replace(nic, source="", incoming=False) != replace(here, source="", incoming=False):
        keys = ("mac", "mode", "link", "ip", "vlan")
        changed = [key for key in keys if getattr(nic, key) != getattr(here, key)]
        yield Finding(f"described otherwise since: {', '.join(changed)}", f"{nic.source} has been changed")
    moved = moved_uplinks(one, nic, kernel, config)
    if moved:
        before, now = moved
        yield Finding(
            f"uplink: {', '.join(before)} -> {', '.join(now) or 'none'}",
            "the default route has moved, or [routed] uplinks: the node answers for the guest where nobody asks"
            if now or config.routed.uplinks is not None
            else "there is no default route, which tells the uplinks: what was done there stays",
            "" if now or config.routed.uplinks is not None else UPLINK_HINT,
        )
    consequences = {*moved[0], *moved[1]} if moved else set()
    for change in missing:
        if not (isinstance(change.op, ProxyNeighbour | Sysctl) and change.op.dev in consequences):
            yield Finding(render.transition(change), why(change, missing, nic))


def moved_uplinks(one: Known, nic: Nic, kernel: Overview, config: Config) -> tuple[list[str], list[str]] | None:
    """The uplinks where the node answers for *nic* and those where it should; None if they are the same."""
    if one.journal is None or nic.mode != "routed":
        return None
    answering = (entry.op for entry in one.journal.entries if isinstance(entry.op, ProxyNeighbour))
    before = list(dict.fromkeys(op.dev for op in answering))
    now = list(dict.fromkeys(uplink.name for uplink in uplinks(nic, kernel, config)))
    return (before, now) if set(before) - set(now) else None


def uplinks(nic: Nic, kernel: Overview, config: Config) -> list[Uplink]:
    """Where the node has to answer for *nic*."""
    return [uplink for uplink in kernel.facts(nic, config).uplinks if uplink.present and uplink.arp]


def why(change: Change, missing: Sequence[Change], nic: Nic) -> str:
    """The likely cause of one difference, or what it leads to."""
    down = any(isinstance(other.op, LinkUp) for other in missing)
    unplugged = any(isinstance(other.op, LinkMaster) for other in missing)
    went = "it went when the tap went down"
    match change.op:
        case LinkMaster(want=None):
            return f"somebody has put it on the bridge {change.now}: what comes in on a bridge port is not routed"
        case LinkMaster():
            if change.now is None:
                return "something took it off its bridge: restarting the network does that"
            return "somebody has moved it to another bridge"
        case LinkUp():
            return "somebody has set it down: every frame for and from the guest is lost"
        case LinkMtu():
            if isinstance(change.now, int) and change.now < change.op.want:
                return (
                    "it is smaller than the bridge's, so larger frames are lost: set by hand, or the bridge's has grown"
                )
            return "it is larger than the bridge's: set by hand, or the bridge's has shrunk"
        case PortForwarding():
            if down or unplugged:
                return "because the tap is down or on no bridge"
            if change.now in ("listening", "learning"):
                return "the bridge runs STP and has just changed: look again in a moment"
            return "STP has found a loop, or somebody has set the state: no frame passes"
        case Sysctl(name="rp_filter"):
            now = RP_FILTER_NAMES.get(str(change.now), change.now)
            dropped = ": what the guest sends from any other address than its own is dropped" if now == "strict" else ""
            return f"somebody has made it {now}; configured is {RP_FILTER_NAMES[change.op.want]}{dropped}"
        case Sysctl(on_uplink=True):
            return "somebody has set it back; the node answers for its guests late, or not at all"
        case Sysctl():
            return "somebody has set it; `sysctl --system` and changing ip_forward set it on all devices"
        case Rule(want=False):
            return f"stale: made for an earlier guest on {nic.tap}, and not by us; it catches this guest's packets"
        case Rule():
            return "something has deleted it: a restarted network, or `ip rule flush`"
        case Route(want=False) | Neighbour(want=None):
            return "the NIC is not to have it any more"
        case Route():
            return went if down else "something has deleted it: a routing daemon, or the tap was down for a moment"
        case Neighbour():
            return went if down else "something has deleted it: `ip neigh flush`, or the tap was down for a moment"
        case ProxyNeighbour(want=False):
            return "the NIC is not to have it any more"
        case ProxyNeighbour():
            return "something has deleted it, or the uplink was down for a moment: nobody answers for the guest there"
        case LinkAddress():
            return "somebody has changed it: the guest's neighbours know the tap by the other"
        case AddrGenMode():
            return "somebody has changed it: the node gets an address of its own among the guests"
        case OvsPort():
            return "somebody has changed it, or the switch's database is another one"
    return ""


# --- what the kernel would do with a packet -----------------------------------------------------------------


def traffic(one: Known, nic: Nic, missing: Sequence[Change], kernel: Overview, config: Config) -> Iterator[Finding]:
    """Whether the packets from and for a routed guest that runs here would pass, as the kernel says."""
    yield from reverse_path(nic, missing, kernel, config)
    if one.phase is not Phase.POST or any(isinstance(c.op, Route | LinkUp | Rule) for c in missing):
        return
    for prefix in filter(phases.is_host, nic.ip):
        for uplink in uplinks(nic, kernel, config):
            neighbour = kernel.gateway(prefix.version, uplink.name)
            if uplink.family == prefix.version and neighbour and not uplink.mend:
                with suppress(KernelError):  # no route there at all is not the NIC's fault
                    yield from passage(nic, phases.bare(prefix), neighbour, uplink, kernel)


def passage(nic: Nic, address: str, neighbour: str, uplink: Uplink, kernel: Overview) -> Iterator[Finding]:
    """Whether packets pass between a guest's *address* and *neighbour* on *uplink*. Raises KernelError."""
    table = nic.link or "main"
    rule = f"`ip{' -6' if uplink.family == 6 else ''} rule add iif {uplink.name} lookup {table}`"
    arrives = kernel.way(neighbour, address, uplink.name)
    if arrives not in (None, nic.tap):
        yield Finding(
            f"what comes in on {uplink.name} for {address} does not go out of {nic.tap}",
            f"another route or rule comes first, or nothing looks up {uplink.name}'s traffic in table {table}; "
            "so neither is ARP or NDP answered there",
            rule,
        )
    # The reverse look-up is made as for a packet from the uplink (`fib_validate_source`).
    if uplink.family == 4 and kernel.way(address, neighbour, nic.tap) is None:
        yield Finding(
            f"what the guest sends from {address} to {uplink.name} is dropped: reverse path filter on {nic.tap}",
            f"looked up, {address} is not behind {nic.tap}: another route or rule comes first",
            f"{rule}, or [routed] rp_filter",
        )


def reverse_path(nic: Nic, missing: Sequence[Change], kernel: Overview, config: Config) -> Iterator[Finding]:
    """The kernel takes the larger of a device's rp_filter and that of "all" (IN_DEV_RPFILTER)."""
    wanted = phases.RP_FILTER.get(config.routed.rp_filter)
    overall = kernel.setting("net/ipv4/conf/all/rp_filter")
    if wanted is None or overall is None or overall <= wanted:
        return
    if any(isinstance(change.op, Sysctl) and change.op.name == "rp_filter" for change in missing):
        return
    yield Finding(
        f"rp_filter on {nic.tap} is {RP_FILTER_NAMES.get(overall, overall)} in effect, not {config.routed.rp_filter}",
        f"net.ipv4.conf.all.rp_filter is {overall}, and the larger of the two counts",
        "`sysctl -w net.ipv4.conf.all.rp_filter=0`",
    )


def answers(one: Known, nic: Nic, kernel: Overview, config: Config) -> Iterator[Finding]:
    """Who else answers for the guest's addresses. Before its arrival somebody has to: it runs there."""
    hosts = [phases.bare(prefix) for prefix in nic.ip if phases.is_host(prefix)]
    for name in dict.fromkeys(uplink.name for uplink in uplinks(nic, kernel, config)):
        for address, macs in probe.others(name, hosts, kernel.addresses(name)).items():
            for mac in sorted(macs):
                if one.phase is Phase.POST:
                    yield Finding(
                        f"{mac} on {name} answers for {address}, too",
                        "another node still has it, or another machine uses the address: traffic goes astray",
                        f"`kvm-ifdown {nic.tap}` on whichever node the guest has left",
                    )
                else:
                    yield Finding(f"{mac} on {name} answers for {address}", "the guest runs there", wrong=False)
