"""Tell an uplink's neighbours where an address is now: gratuitous ARP and unsolicited NA."""

from __future__ import annotations

from collections.abc import Sequence

from kvmifup.core.model import Message
from kvmifup.node.frames import gratuitous_arp, unsolicited_na
from kvmifup.node.sockets import mac_of, sender


def send(messages: Sequence[Message]) -> None:
    """Announce each of *messages* once, from its uplink's MAC. Raises OSError, for instance if an uplink is gone."""
    via = sender.socket()
    macs = {dev: mac_of(via, dev) for dev in dict.fromkeys(message[0] for message in messages)}
    for dev, address, source in messages:
        mac = macs[dev]
        frame = unsolicited_na(mac, address, source) if ":" in address else gratuitous_arp(mac, address)
        via.sendto(frame, (dev, 0))
