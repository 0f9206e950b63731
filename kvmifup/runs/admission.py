"""Whether this node can take a guest whose taps are not there yet: what pre would find out, before the guest moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvmifup import phases
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Nic, Phase, Tap
from kvmifup.runs.session import Session, about
from kvmifup.runs.shared import with_claims
from kvmifup.runs.up import need_own_addresses

NEW = Tap(ifindex=0, is_tap=True)  # as a process manager makes it


def refusals(nics: Sequence[Nic], session: Session) -> list[KvmIfupError]:
    """Why this node cannot run a guest with *nics*: for each NIC that it cannot take, the error of its plan."""
    found: list[KvmIfupError] = []
    for nic in nics:
        try:
            with about(nic.label):
                facts = with_claims(session.kernel.facts(nic, session.config), nic, session)
                phases.plan(Phase.POST, nic, session.config, replace(facts, tap=NEW))
        except KvmIfupError as error:
            found.append(error)
    try:
        need_own_addresses(nics)
    except KvmIfupError as error:
        found.append(error)
    return found
