"""`kvm-ifup expect`: a guest is to move to this node, so see whether it can, before it leaves the other one."""

from __future__ import annotations

from kvmifup.commands.call import Call
from kvmifup.core.errors import KvmIfupError, as_ours, raise_all
from kvmifup.inputs import coming
from kvmifup.inputs.values import as_wired
from kvmifup.runs import expected
from kvmifup.runs.admission import refusals
from kvmifup.runs.session import opened
from kvmifup.tell import render, syslog


def run(call: Call) -> int:
    """Check all of its NICs, and have the agent wait for it; returns 0. Raises KvmIfupError, or a group of them."""
    told = coming.from_hook(call.environ)
    nics = [as_wired(nic, call.config) for nic in told]
    with opened(call.run_dir, call.config, dry=True, by=call.by) as session:
        raise_all(refusals(nics, session))
    # Those in other modes are wired by now when QEMU starts, and who starts afresh is.
    routed = [nic for nic in nics if nic.mode == "routed" and nic.incoming]
    if routed:
        try:
            told_now = expected.told(routed[0].instance or "", routed)
            expected.put(call.run_dir, told_now, call.config.agent.arrival_timeout)
        except (KvmIfupError, OSError) as error:  # it moves all the same, and is wired when Ganeti says so
            what = render.error_line("its arrival will not be noticed", as_ours(error))
            syslog.write(call.program, syslog.WARNING, what)
    if call.options.json:
        call.say_json([render.described(nic) | {"tap": None} for nic in nics])
    return 0
