"""`kvm-ifup expect`: a guest is to move to this node, so see whether it can, before it leaves the other one."""

from __future__ import annotations

from kvmifup.commands.call import Call
from kvmifup.core.errors import raise_all
from kvmifup.inputs import coming
from kvmifup.inputs.values import as_wired
from kvmifup.runs.admission import refusals
from kvmifup.runs.session import opened


def run(call: Call) -> int:
    """Check all of its NICs; returns 0. Raises KvmIfupError, or a group of them."""
    nics = [as_wired(nic, call.config) for nic in coming.from_hook(call.environ)]
    with opened(call.run_dir, call.config, dry=True, by=call.by) as session:
        raise_all(refusals(nics, session))
    return 0
