"""How a NIC is now, compared with how its phase wants it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from kvmifup import phases
from kvmifup.core.errors import KvmIfupError, NotReadyError, RollbackError
from kvmifup.core.model import Config, Nic, Phase
from kvmifup.core.ops import ProxyNeighbour
from kvmifup.core.records import record
from kvmifup.diagnosis.nics import Known, all_nics, coming, selected
from kvmifup.inputs import values
from kvmifup.node import drops
from kvmifup.node.bridges import Bridges
from kvmifup.node.drops import Counts
from kvmifup.node.firewall import Chains, chains
from kvmifup.node.frames import is_station
from kvmifup.node.guests import Qemu, behind_taps
from kvmifup.node.overview import Overview, Port
from kvmifup.runs import clock, expected, planning
from kvmifup.runs.admission import refusals
from kvmifup.runs.apply import Change
from kvmifup.runs.drops import noted
from kvmifup.runs.session import Session, alive, opened
from kvmifup.runs.store import Store

UPLINK_HINT = "add a default route, or set [routed] uplinks"


@record
class Look:
    """The NICs that somebody asks about, and the node as it is now, with a dry session on it.

    *everything* are all NICs that this node knows, without those that are only expected. *agent*: somebody answers on
    the agent's socket.
    """

    nics: list[Known]
    everything: list[Known]
    session: Session
    overview: Overview
    agent: bool

    @cached_property
    def by_mac(self) -> dict[str, list[Known]]:
        """*everything*, by the guest's MAC."""
        found: dict[str, list[Known]] = {}
        for one in self.everything:
            if one.nic:
                found.setdefault(one.nic.mac, []).append(one)
        return found

    @cached_property
    def outward(self) -> dict[str, dict[str, Port]]:
        """The ports of bridges that are no guest's tap, as far as somebody has asked: `bridged.ports_of`."""
        return {}

    @cached_property
    def guests(self) -> dict[str, Qemu]:
        """The QEMU behind each tap."""
        return behind_taps()

    @cached_property
    def bridges(self) -> Bridges:
        """What `bridge` knows."""
        return Bridges()

    @cached_property
    def dropped(self) -> Counts:
        """What our rules have dropped of each guest's packets."""
        return drops.counted()

    @cached_property
    def noted(self) -> tuple[float, Counts] | None:
        """The same when the agent last looked, and how many seconds ago that was."""
        return noted(self.session.run_dir)

    @cached_property
    def firewall(self) -> Chains:
        """What filters packets here."""
        return chains()

    def phase_word(self, one: Known) -> str:
        """The phase for people.

        That is "none", "expected" (its guest is to come), "pre", "armed" (pre, and the agent waits for the guest),
        "post", or "left" (after post, the guest has gone to another node, and what drew its traffic here was undone).
        """
        if one.phase is Phase.DOWN:
            return "expected" if one.told else "none"
        if one.journal and one.journal.left:
            return "left"
        if one.phase is Phase.PRE and one.journal and self.agent:
            waited = clock.age(one.journal)
            return "armed" if one.journal.left or waited < self.session.config.agent.arrival_timeout else "pre"
        return one.phase.name.lower()


@contextmanager
def look(name: str | None, run_dir: Path, config: Config) -> Iterator[Look]:
    """Look at the NICs that *name* means (`nics.selected`). Raises NicError."""
    store = Store(run_dir)
    everything = all_nics(run_dir, store)
    agent = agent_lives(run_dir)
    overview = Overview()
    with opened(run_dir, config, dry=True, kernel=lambda: overview, store=store) as session:
        here = [one for one in everything if one.journal and alive(one.journal, session)]
        guests = [one for one in expected.found(run_dir) if one.age < config.agent.arrival_timeout]
        nics = selected(name, [*everything, *coming(guests, here)])
        yield Look(nics, everything, session, overview, agent)


@record
class State:
    """How a NIC is. *wired* is None where nothing has been asked for yet.

    *missing* is what its hook would change, *problem* why that could not be found out, or what keeps it from working.
    *tolerable*: in spite of *problem* the guest can be reached for now. *dropped*: packets, by why they were dropped.
    """

    wired: bool | None
    missing: tuple[Change, ...] = ()
    problem: KvmIfupError | None = None
    tolerable: bool = False
    dropped: tuple[tuple[str, int], ...] = ()


def state_of(one: Known, look: Look) -> State:
    """Compare *one* with what its phase's hook would make of it, and look whether it can work so."""
    state, dropped = as_wired(one, look), look.dropped.get(one.tap)
    return replace(state, dropped=tuple(dropped.items())) if dropped else state


def as_wired(one: Known, look: Look) -> State:
    """The same, but for what was dropped."""
    problem = one.trouble or stopped(one, look.session)
    if problem:
        return State(False, problem=problem)
    if one.told and one.nic:
        return State(None, problem=next(iter(refusals([one.nic], look.session)), None))
    if one.phase is Phase.DOWN:
        return State(None, problem=not_wired(one, look))
    try:
        state = compared(one, look.session)
    except KvmIfupError as error:
        return State(False, problem=error)
    return state if state.problem and not state.tolerable else with_problem(state, who_is_behind(one, look))


def with_problem(state: State, problem: KvmIfupError | None) -> State:
    """*state*, kept from working by *problem*, if there is one."""
    return replace(state, problem=problem, tolerable=False) if problem else state


def stopped(one: Known, session: Session) -> KvmIfupError | None:
    """What has to be cleared up before anything else can be said about *one*."""
    if one.journal and not alive(one.journal, session):
        return NotReadyError("its tap is gone", hint="`kvm-ifup gc` clears up after it", where=one.label)
    if one.journal and one.journal.pending:
        text = "a run on it was killed, or could not put everything back"
        return RollbackError(text, hint="`kvm-ifup gc`, then the hook again", where=one.label)
    return None


def compared(one: Known, session: Session) -> State:
    """How *one* is, by what the hook of the phase that it has reached would do now.

    Raises what `planning.plan` raises.
    """
    found = planning.plan(one.phase, intended(one, session.config), one.journal, session)
    problem, tolerable = without_uplink(found, session.config)
    return State(not found.due, found.due, problem, tolerable)


def without_uplink(found: planning.Plan, config: Config) -> tuple[NotReadyError | None, bool]:
    """What to say of a routed NIC when nothing tells where the node has to answer for it, in a family of its.

    With it, whether the guest can be reached for now: what was done on the uplink has stayed.
    """
    nic = found.nic
    lacking = phases.families_unseen(nic, config, found.facts)
    if not lacking:
        return None, False
    families = {prefix.version for prefix in nic.ip}
    kept = {phases.family_of(entry.op.address) for entry in found.kept if isinstance(entry.op, ProxyNeighbour)}
    kept |= {uplink.family for uplink in found.last}
    which = "" if lacking == families else "".join(f"IPv{family} " for family in lacking)
    stays = "; what was done on the last one stays" if kept else ""
    error = NotReadyError(f"there is no {which}default route, so no {which}uplink is known{stays}", hint=UPLINK_HINT)
    return error, bool(which) and lacking <= kept


def intended(one: Known, config: Config) -> Nic:
    """The NIC as it is to be wired in the phase that it has reached, and in no later one. Raises NicError."""
    assert one.nic is not None
    nic = values.as_wired(one.nic, config)
    return replace(nic, incoming=True) if one.phase is Phase.PRE else nic


def agent_lives(run_dir: Path) -> bool:
    """Whether somebody answers on the agent's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as caller:
        caller.settimeout(1.0)
        try:
            caller.connect(str(run_dir / "agent.sock"))
        except OSError:
            return False
        return True


# --- who is behind the tap -------------------------------------------------------------------------------


def not_wired(one: Known, look: Look) -> KvmIfupError | None:
    """What to say of a NIC that was never wired. That is right until its tap is there."""
    if look.overview.ifindex(one.tap) is None:
        return None
    if not look.overview.is_tap(one.tap):
        text = f"{one.tap} is there, but is not a tap"
        return NotReadyError(text, hint="correct tap in its NIC file", where=one.label)
    for other in look.everything:
        if other.tap == one.tap and other.journal and alive(other.journal, look.session):
            text = f"{one.tap} is wired for another NIC{'' if other.label == one.tap else f', {other.label}'}"
            hint = f"`kvm-ifdown {one.tap}` when that NIC is no more, then `kvm-ifup-pre {one.tap}`; or correct tap"
            return NotReadyError(text, hint=hint, where=one.label)
    if by_ganeti(one):
        return NotReadyError(
            f"kvm-ifup has not wired {one.tap}", hint=f"`kvm-ifup-post {one.tap}` takes it over", where=one.label
        )
    text, hint = f"{one.tap} is there, but nothing has wired it", f"`kvm-ifup-pre {one.tap}`"
    refusal = refused(one, look.session)
    if refusal:  # the reason was said when the hook failed, perhaps long ago
        text, hint = f"{text}, and nothing can now: {refusal}", f"{refusal.hint or 'mend that'}; then {hint}"
    return NotReadyError(text, hint=hint, where=one.label)


def refused(one: Known, session: Session) -> KvmIfupError | None:
    """What the hook would say of *one*, which has not been wired yet, if it failed now."""
    assert one.nic is not None
    try:
        planning.plan(Phase.POST, values.as_wired(one.nic, session.config), None, session)
    except KvmIfupError as error:
        return error
    return None


def by_ganeti(one: Known) -> bool:
    """Whether only Ganeti's own files tell of *one*: its guest was started before Ganeti called kvm-ifup."""
    return one.journal is None and one.nic is not None and one.nic.by_ganeti


def who_is_behind(one: Known, look: Look) -> NotReadyError | None:
    """What contradicts the description of a NIC that is wired: the process behind its tap, or its frames."""
    nic, qemu = intended(one, look.session.config), look.guests.get(one.tap)
    file = file_of(nic)
    mac, by = seen_mac(nic, qemu, look)
    if mac and mac != nic.mac:
        text = f"the guest's MAC is {mac}, as {by} shows, not {nic.mac}"
        return NotReadyError(text, hint=f"correct mac {file}, then `kvm-ifup-pre {one.tap}`", where=one.label)
    runs = runs_here(one, nic, qemu, look)
    if runs:
        text = f"{runs}, so it runs here, and pre alone does not wire it"
        return NotReadyError(text, hint=f"`kvm-ifup-post {one.tap}`, and take incoming out {file}", where=one.label)
    return None


def file_of(nic: Nic) -> str:
    """Where *nic* is described, for a hint: "in" its file, if that is one that a person can correct."""
    return f"in {nic.source}" if nic.source.endswith(".toml") else "where it is described"


def seen_mac(nic: Nic, qemu: Qemu | None, look: Look) -> tuple[str | None, str]:
    """The MAC that the guest has, None if nobody knows, and what shows it.

    QEMU's command line counts. Only without it do frames: a guest may well send with other MACs, too.
    """
    if qemu and qemu.mac:
        return qemu.mac, f"the command line of its QEMU (process {qemu.pid})"
    if nic.mode == "bridged" and nic.link:
        seen = [one.mac for one in look.bridges.behind(nic.link, nic.tap) if not one.own]
    elif nic.mode == "routed":
        seen = list(filter(None, look.overview.neighbours(nic.tap).values()))
    else:
        return None, ""
    seen = [mac for mac in seen if is_station(bytes.fromhex(mac.replace(":", "")))]  # a cache takes what it is told
    return nic.mac if nic.mac in seen else next(iter(seen), None), f"what comes in on {nic.tap}"


def runs_here(one: Known, nic: Nic, qemu: Qemu | None, look: Look) -> str:
    """How it is known of a NIC that waits for its guest, with nobody to notice it, that the guest is here already.

    Empty if it is not, or if post would add nothing.
    """
    if nic.mode in ("bridged", "openvswitch") or look.phase_word(one) != "pre":
        return ""
    return look.overview.sign_given(one.tap, qemu)
