"""What --json prints of NICs and findings, as kvm-ifup(8) documents it."""

from __future__ import annotations

from typing import Any

from kvmifup.diagnosis.findings import Finding
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import State
from kvmifup.inputs.values import said_of
from kvmifup.tell import render


def nic_object(one: Known, phase: str, state: State) -> dict[str, Any]:
    """One NIC."""
    nic, journal = one.nic, one.journal
    return {
        "instance": nic.instance if nic else None,
        "index": nic.index if nic else None,
        "tap": None if one.told else nic.tap if nic else one.tap,
        "mac": nic.mac if nic else None,
        "mode": nic.mode if nic else None,
        "link": nic.link if nic else None,
        "ip": [render.short(prefix) for prefix in nic.ip] if nic else [],
        "vlan": nic.vlan if nic else None,
        "iface_id": nic.iface_id if nic else None,
        "incoming": nic.incoming if nic else None,
        **said_of(nic),
        "phase": phase,
        "since": journal.since if journal else one.told,
        "by": journal.by if journal else "hook" if one.told else None,
        "reason": journal.reason if journal else None,
        "wired": state.wired,
        "missing": [render.change_object(change) for change in state.missing],
        "dropped": dict(state.dropped),
        "problem": render.error_object(state.problem) if state.problem else None,
    }


def finding_object(finding: Finding) -> dict[str, Any]:
    """One finding."""
    return {
        "what": finding.what,
        "why": finding.why,
        "mend": finding.mend,
        "wrong": finding.wrong,
        "drift": finding.drift,
    }
