"""Whether much of what a guest sends is dropped by our own rules, and why."""

from __future__ import annotations

from collections.abc import Iterator

from kvmifup.diagnosis.findings import Finding
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import Look, State
from kvmifup.node import drops
from kvmifup.runs import clock

LOT = 1.0  # packets in a second: a guest that once had another address, or asks for a router, sends far less
LEAST = 10  # packets: with fewer there is no rate
SHORTEST = 2.0  # seconds between two looks that tell a rate
WHY = {
    "mac": "it sends with a MAC that is not its",
    "address": "it sends from an address that is not in ip of its NIC, or with IPv6 and has no such address",
    "router": "it poses as a router",
    "dhcp": "it poses as a DHCP server",
    "protocol": "it sends what a filter lets nobody send",
}


def dropped_now(one: Known, state: State, look: Look) -> Iterator[Finding]:
    """A finding if many of its packets are dropped now. Nothing of the node is wrong then.

    That is since the agent last looked, some seconds ago; without it, on the average since the phase was reached.
    """
    assert one.journal is not None
    total, before = dict(state.dropped), dict[str, int]()
    seconds = clock.age(one.journal)
    if look.noted and look.noted[0] >= SHORTEST:
        seconds, before = look.noted[0], dict(look.noted[1].get(one.tap, {}))
    for reason, more in drops.grown(before, total).items():
        rate = more / max(seconds, SHORTEST)
        if more >= LEAST and rate >= LOT:
            yield Finding(
                f"{rate:.0f} packets a second from the guest are dropped ({reason}), {total[reason]} so far",
                f"{WHY.get(reason, reason)}: it is configured wrong, or does harm",
                f"`kvm-ifup watch --trace {one.tap}` shows them",
                wrong=False,
            )
