"""`kvm-ifup gc`: clear up after dead NICs and killed runs."""

from __future__ import annotations

from kvmifup.commands import running
from kvmifup.commands.call import Call
from kvmifup.runs.leftovers import collect
from kvmifup.runs.outcome import Results
from kvmifup.runs.session import Session


def run(call: Call) -> int:
    """Clear up; returns 0. Raises KvmIfupError, or a group of them."""

    def work(session: Session) -> Results:
        results = collect(session)
        # In the wrong network namespace, silence must not look like success.
        for namespace, number in sorted(session.store.elsewhere().items()):
            hint = "(run gc there; `lsns -t net` finds it)"
            call.add([f"kvm-ifup: NICs of network namespace {namespace} left alone: {number} {hint}"])
        return results

    return running.run(call, work)
