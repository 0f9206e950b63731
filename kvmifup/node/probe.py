"""Find out whether another node answers for an address: ask with ARP and neighbour solicitations, and listen."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from select import POLLIN, poll

from kvmifup.node import sockets
from kvmifup.node.frames import ETH_P_ARP, ETH_P_IPV6, answer_in, who_has

# A node that answers for somebody else first waits at random for up to proxy_delay: 0.8 s by default.
PATIENCE = 1.2  # seconds


def others(
    uplink: str, addresses: Sequence[str], sources: Sequence[str], own: Collection[str], wait: float = PATIENCE
) -> dict[str, set[str]]:
    """For each of *addresses* the MACs that answer for it on *uplink*, but for those that are this node's *own*.

    A node with two devices in one segment answers itself. *sources* are addresses of this node there. Without one as
    the sender, a node does not answer for an address that it only stands in for (`arp_process` in net/ipv4/arp.c).
    *wait* is in seconds. Raises OSError.
    """
    found: dict[str, set[str]] = {address: set() for address in addresses}
    with (
        sockets.neighbour_listener(uplink, ETH_P_ARP, sockets.EVERYTHING) as arp,
        sockets.neighbour_listener(uplink, ETH_P_IPV6, sockets.ADVERTISEMENTS) as ndp,
    ):
        mac: bytes = arp.getsockname()[4]
        for via in (arp, ndp):
            via.setblocking(True)  # many questions at once wait for room in the send buffer
        for address in addresses:
            (ndp if ":" in address else arp).send(who_has(mac, address, sources))
        waiting = poll()  # not select: it knows no descriptor above 1023
        by_number = {via.fileno(): via for via in (arp, ndp)}
        for number in by_number:
            waiting.register(number, POLLIN)
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            for number, _ in waiting.poll(1000 * left):
                answer = answer_in(by_number[number].recv(sockets.WHOLE))
                if answer and answer[0] in found and answer[1] not in own:
                    found[answer[0]].add(answer[1])
    return found
