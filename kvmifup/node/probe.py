"""Does another node answer for an address? ARP requests and neighbour solicitations, and who replies."""

from __future__ import annotations

import select
import socket
import struct
import time
from array import array
from collections.abc import Sequence

from kvmifup.node.frames import ETH_P_ARP, ETH_P_IPV6, NEIGHBOUR_ADVERTISEMENT, answered, question

# A node that answers for somebody else waits at random for up to proxy_delay, 0.8 s unless somebody has set it.
PATIENCE = 1.2  # seconds
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# On a busy uplink only advertisements are worth waking up for. Classic BPF, linux/filter.h: next header and type.
ADVERTISEMENTS = (
    (0x30, 0, 0, 20),
    (0x15, 0, 3, socket.IPPROTO_ICMPV6),
    (0x30, 0, 0, 54),
    (0x15, 0, 1, NEIGHBOUR_ADVERTISEMENT),
    (0x06, 0, 0, 256),
    (0x06, 0, 0, 0),
)


def others(
    uplink: str, addresses: Sequence[str], sources: Sequence[str], wait: float = PATIENCE
) -> dict[str, set[str]]:
    """For each of *addresses* the MACs, other than the uplink's own, that answer for it on *uplink*.

    *sources* are addresses of this node there: a node does not answer a question without a sender for an address
    that it only stands in for (`arp_process` in net/ipv4/arp.c). *wait* is in seconds. Raises OSError.
    """
    found: dict[str, set[str]] = {address: set() for address in addresses}
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as arp,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as ndp,
    ):
        code = array("B", b"".join(struct.pack("=HBBI", *line) for line in ADVERTISEMENTS))
        option = struct.pack("@HP", len(ADVERTISEMENTS), code.buffer_info()[0])
        ndp.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)
        arp.bind((uplink, ETH_P_ARP))
        ndp.bind((uplink, ETH_P_IPV6))
        mac: bytes = arp.getsockname()[4]
        for address in addresses:
            (ndp if ":" in address else arp).send(question(mac, address, sources))
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            for ready in select.select([arp, ndp], [], [], left)[0]:
                answer = answered(ready.recv(256))
                if answer and answer[0] in found and answer[1] != mac.hex(":"):
                    found[answer[0]].add(answer[1])
    return found
