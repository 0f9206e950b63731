"""How a NIC is now, compared with how its phase wants it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kvmifup.core.errors import KvmIfupError, NotReadyError, RollbackError
from kvmifup.core.model import Config, Nic, Phase
from kvmifup.diagnosis.nics import Known, all_nics, selected
from kvmifup.inputs import values
from kvmifup.node.overview import Overview
from kvmifup.runs import planning
from kvmifup.runs.apply import Change
from kvmifup.runs.session import Session, alive, opened
from kvmifup.runs.store import Store

UPLINK_HINT = "add a default route, or set [routed] uplinks"


@dataclass(frozen=True)
class Look:
    """The NICs that somebody asks about, and the node as it is now, with a dry session on it.

    *agent*: somebody answers on the agent's socket.
    """

    nics: list[Known]
    session: Session
    overview: Overview
    agent: bool

    def phase_word(self, one: Known) -> str:
        """The phase for people: "none", "pre", "armed" (pre, and the agent waits for the guest), "post"."""
        if one.phase is Phase.DOWN:
            return "none"
        if one.phase is Phase.PRE and one.journal and self.agent:
            waited = time.time() - one.journal.since
            return "armed" if waited < self.session.config.agent.arrival_timeout else "pre"
        return one.phase.name.lower()


@contextmanager
def look(name: str | None, run_dir: Path, config: Config) -> Iterator[Look]:
    """Look at the NICs that *name* means (`nics.selected`). Raises NicError."""
    nics = selected(name, all_nics(run_dir, Store(run_dir)))
    agent = agent_lives(run_dir)
    overview = Overview()
    with opened(run_dir, config, dry=True, kernel=lambda: overview) as session:
        yield Look(nics, session, overview, agent)


@dataclass(frozen=True)
class State:
    """How a NIC is. *wired* is None where nothing has been asked for yet.

    *missing* is what its hook would change, *problem* why that could not be found out, or what keeps it from working.
    """

    wired: bool | None
    missing: tuple[Change, ...] = ()
    problem: KvmIfupError | None = None


def state_of(one: Known, session: Session) -> State:
    """Compare *one* with what its phase's hook would make of it. *session* must be a dry one."""
    problem = one.trouble or stopped(one, session)
    if problem:
        return State(False, problem=problem)
    if one.phase is Phase.DOWN:
        return State(None)
    try:
        return compared(one, session)
    except KvmIfupError as error:
        return State(False, problem=error)


def stopped(one: Known, session: Session) -> KvmIfupError | None:
    """What has to be cleared up before anything else can be said about *one*."""
    if one.journal and not alive(one.journal, session):
        return NotReadyError("its tap is gone", hint="`kvm-ifup gc` clears up after it", where=one.label)
    if one.journal and one.journal.pending:
        return RollbackError("a run on it was killed", hint="`kvm-ifup gc`, then the hook again", where=one.label)
    return None


def compared(one: Known, session: Session) -> State:
    """How *one* is, by what the hook of the phase that it has reached would do now.

    Raises what `planning.plan` raises.
    """
    found = planning.plan(one.phase, intended(one, session.config), one.journal, session)
    return State(not found.due, found.due, without_uplink(found, session.config))


def without_uplink(found: planning.Plan, config: Config) -> NotReadyError | None:
    """What to say of a routed NIC when nothing tells where the node has to answer for it."""
    if found.nic.mode != "routed" or not found.nic.ip or found.facts.uplinks or config.routed.uplinks is not None:
        return None
    stays = "; what was done on it stays" if found.kept else ""
    return NotReadyError(f"there is no default route, which tells the uplink{stays}", hint=UPLINK_HINT)


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
