"""What is wrong with a NIC that has been wired, since when, and most likely why."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvmifup import phases
from kvmifup.core.errors import KvmIfupError, NicError
from kvmifup.core.model import Config, Nic, NodeFacts, Phase
from kvmifup.core.ops import PortForwarding, ProxyNeighbour, Sysctl
from kvmifup.core.records import record
from kvmifup.diagnosis.bridged import on_bridge
from kvmifup.diagnosis.causes import cause, described_otherwise, wanted_before
from kvmifup.diagnosis.dropped import dropped_now
from kvmifup.diagnosis.findings import Finding, of_error
from kvmifup.diagnosis.firewall import filtered
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.routed import traffic, uplinks
from kvmifup.diagnosis.state import Look, State, by_ganeti, compared, file_of, intended, state_of, stopped
from kvmifup.node import probe
from kvmifup.node.overview import Overview
from kvmifup.runs import rivals
from kvmifup.runs.apply import Change
from kvmifup.runs.host import Through
from kvmifup.runs.session import followed
from kvmifup.runs.store import set_aside
from kvmifup.tell import render


@record
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

    @property
    def verdict(self) -> str:
        """In a word or two: "right", "wrong", or "not wired", which is neither before the first hook."""
        if self.wrong:
            return "wrong"
        return "not wired" if self.state.wired is None else "right"

    @property
    def blocked(self) -> bool:
        """Whether something else has to be done before its hook can mend anything."""
        return self.state.problem is not None and self.state.wired is False and not self.state.missing

    @property
    def drifted(self) -> bool:
        """Whether anything is wrong that the NIC's hook would mend."""
        return any(finding.wrong and finding.drift for finding in self.findings)


def diagnose(one: Known, look: Look, *, ask: bool) -> Diagnosis:
    """Everything that is to be said about *one*.

    *ask*: also whether another node answers for its addresses, which takes a second.
    """
    state = state_of(one, look)
    if one.trouble or stopped(one, look.session):
        found = [of_error(state.problem)] if state.problem else []
    elif one.nic is None or one.journal is None or one.phase is Phase.DOWN:
        found = [of_error(state.problem, why_not_wired(one, look))] if state.problem else []
    else:
        one = replace(one, journal=followed(one.journal, look.overview))  # an uplink may have been renamed
        found = list(wired_findings(one, state, look, ask=ask))
    return Diagnosis(one, look.phase_word(one), state, tuple(found))


def wired_findings(one: Known, state: State, look: Look, *, ask: bool) -> Iterator[Finding]:
    """What there is to say about a NIC that a phase has been done for."""
    session, kernel = look.session, look.overview
    assert one.nic is not None
    assert one.journal is not None
    changed = described_otherwise(one.nic, one.journal.nic)
    if changed:
        yield Finding(
            f"described otherwise since: {'; '.join(changed)}", f"{one.nic.source} has been changed", drift=True
        )
    try:
        nic = intended(one, session.config)
    except NicError as error:
        yield of_error(error)
        return
    missing = state.missing
    if state.problem:
        unready = "" if changed or state.wired else why_not_ready(state.problem)
        yield replace(of_error(state.problem, unready), wrong=not state.tolerable)
    yield from lost_uplinks(one, kernel)
    if state.problem and not state.wired:  # the node could not take it: compare the rest
        with suppress(KvmIfupError):
            missing = compared(one, replace(session, kernel=Excused(kernel))).missing
    yield from drift(one, nic, missing, look, changed=bool(changed))
    if closed := phases.addressless(nic, session.config):
        yield Finding(closed, mend=f"ip {file_of(nic)}", wrong=nic.mode == "bridged")  # Ganeti's routed one may lack it
    if nic.mode == "routed":
        yield from traffic(one, nic, missing, kernel, session.config)
        yield from rivalled(one, nic, session.run_dir)
        if ask:
            yield from answers(one, nic, kernel, session.config)
    elif nic.mode == "bridged":
        yield from on_bridge(one, nic, missing, look)
    yield from filtered(nic, look)
    yield from dropped_now(one, state, look)


def why_not_wired(one: Known, look: Look) -> str:
    """Why a tap that is there has no journal; of a NIC that is only expected, since when it cannot be taken."""
    if one.told:
        return "this node could take it when Ganeti asked; now the guest would be cut off here"
    wired = any(other.tap == one.tap and other.journal for other in look.everything)
    if wired or not look.overview.is_tap(one.tap):
        return ""  # the problem says it
    if by_ganeti(one):
        return "its guest was started before kvm-ifup was installed, or Ganeti calls another script"
    aside = set_aside(look.session.store.path(one.tap))
    if aside.exists():
        return f"nobody knows what was done for it: its journal could not be read, and is now {aside}"
    return "no hook was called for it, or it failed and put everything back, or kvm-ifdown was called"


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


def drift(one: Known, nic: Nic, missing: Sequence[Change], look: Look, *, changed: bool) -> Iterator[Finding]:
    """What differs from what the NIC's phase wants, each with its likely cause; *changed*: described otherwise."""
    assert one.journal is not None
    config = look.session.config
    moved = moved_uplinks(one, nic, look.overview, config)
    if moved and (moved[1] or config.routed.uplinks is not None):  # else the state says that nothing tells the uplink
        because = "the NIC is described otherwise" if changed else "the default route has moved, or [routed] uplinks"
        yield Finding(
            f"uplink: {', '.join(moved[0])} -> {', '.join(moved[1]) or 'none'}",
            f"{because}: the node answers for the guest where nobody asks",
            drift=True,
        )
    consequences = {*moved[0], *moved[1]} if moved else set()
    wanted = wanted_before(one, look.session) if changed and missing else None
    kinds = {type(change.op) for change in missing}
    for change in missing:
        if not (isinstance(change.op, ProxyNeighbour | Sysctl) and change.op.dev in consequences):
            because = cause(change, kinds, one.journal, wanted)
            if isinstance(change.op, PortForwarding) and nic.link and not look.overview.is_up(nic.link):
                because = f"because {nic.link} is down"
            yield Finding(render.transition(change), because, drift=True)


def lost_uplinks(one: Known, kernel: Overview) -> Iterator[Finding]:
    """Devices where this node has answered for the guest, and that cannot carry anything now."""
    assert one.journal is not None
    answering = (entry.op for entry in one.journal.entries if isinstance(entry.op, ProxyNeighbour))
    for name in dict.fromkeys(op.dev for op in answering):
        if kernel.ifindex(name) is None:
            yield Finding(f"{name}, where this node answered for the guest, is gone")
        elif not kernel.is_up(name):
            what = f"{name}, where this node answers for the guest, is down"
            yield Finding(what, "its routes went with it, and nothing comes in there", f"`ip link set {name} up`")


def moved_uplinks(one: Known, nic: Nic, kernel: Overview, config: Config) -> tuple[list[str], list[str]] | None:
    """The uplinks where the node answers for *nic* and those where it should; None if they are the same."""
    if one.journal is None or nic.mode != "routed":
        return None
    answering = (entry.op for entry in one.journal.entries if isinstance(entry.op, ProxyNeighbour))
    found = uplinks(nic, kernel, config)
    # One family's default route may be gone for a while: what is on its uplink stays.
    seen = {uplink.family for uplink in found}
    before = list(dict.fromkeys(op.dev for op in answering if phases.family_of(op.address) in seen))
    now = list(dict.fromkeys(uplink.name for uplink in found))
    return (before, now) if set(before) - set(now) else None


def rivalled(one: Known, nic: Nic, run_dir: Path) -> Iterator[Finding]:
    """Who else has announced the guest's addresses lately while it was here, as the agent has heard it."""
    hosts = {phases.bare(prefix) for prefix in nic.ip if phases.is_host(prefix)} if one.phase is Phase.POST else set()
    now = time.monotonic()
    for rival in rivals.recent(run_dir):
        if rival.address in hosts:
            often = f"{rival.times} times in {rival.last - rival.first:.0f} s" if rival.times > 1 else "once"
            yield Finding(
                f"{rival.mac} on {rival.uplink} announces {rival.address}, too: {often}, the last time "
                f"{now - rival.last:.0f} s ago",
                "the guest runs here, so another machine uses its address, or somebody forges: traffic goes astray",
                f"find {rival.mac} in the segment of {rival.uplink}, and give it another address",
            )


def answers(one: Known, nic: Nic, kernel: Overview, config: Config) -> Iterator[Finding]:
    """Who else answers for the guest's addresses. Before its arrival somebody has to: it runs there."""
    hosts = [phases.bare(prefix) for prefix in nic.ip if phases.is_host(prefix)]
    for name in dict.fromkeys(uplink.name for uplink in uplinks(nic, kernel, config)):
        try:
            others = probe.others(name, hosts, kernel.addresses(name), kernel.macs.keys())
        except OSError as error:  # it is down, or what it should send does not get out
            yield Finding(f"nobody could be asked on {name}", error.strerror or str(error), wrong=False)
            continue
        for address, macs in others.items():
            for mac in sorted(macs):
                if one.phase is Phase.POST:
                    yield Finding(
                        f"{mac} on {name} answers for {address}, too",
                        "another node still has it, or another machine uses the address: traffic goes astray",
                        f"`kvm-ifdown {nic.tap}` on whichever node the guest has left",
                    )
                else:
                    yield Finding(f"{mac} on {name} answers for {address}", "the guest runs there", wrong=False)
