"""Find out whether another node answers for an address: ask with ARP and neighbour solicitations, and listen."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from select import POLLIN, poll

from kvmifup.node import sockets
from kvmifup.node.frames import ETH_P_ARP, ETH_P_IPV6, answer_in, who_has

# A node that answers for somebody else first waits at random for up to proxy_delay: 0.8 s by default.
PATIENCE = 1.2  # seconds
AT_ONCE = 64  # questions: the answers to thousands at once would not fit into the receive buffer
PAUSE = 0.005  # seconds between them


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
        via = {arp.fileno(): arp, ndp.fileno(): ndp}
        waiting = poll()  # not select: it knows no descriptor above 1023
        for descriptor in via:
            waiting.register(descriptor, POLLIN)

        def hear(seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                for descriptor, _ in waiting.poll(1000 * left):
                    answer = answer_in(via[descriptor].recv(sockets.WHOLE))
                    if answer and answer[0] in found and answer[1] not in own:
                        found[answer[0]].add(answer[1])

        for number, address in enumerate(addresses):
            if number and number % AT_ONCE == 0:
                hear(PAUSE)
            asking = ndp if ":" in address else arp
            asking.setblocking(True)  # many questions wait for room in the send buffer
            asking.send(who_has(mac, address, sources))
            asking.setblocking(False)
        hear(wait)
    return found
