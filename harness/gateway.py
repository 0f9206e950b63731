"""A gateway that gives addresses away, as a guest's segment may have one: by DHCP, and by announcing a prefix."""

from __future__ import annotations

import ipaddress
import struct

from harness import wire
from harness.addresses import CLIENT_IP4, CLIENT_MAC, GUEST_IP4

# For busybox' udhcpd, in the client's namespace: one address, the guest's.
LEASES = f"""
start {GUEST_IP4}
end {GUEST_IP4}
interface eth0
max_leases 1
lease_file /run/leases
pidfile /run/udhcpd.pid
option subnet 255.255.255.0
option router {CLIENT_IP4}
"""


def announcement() -> bytes:
    """The client is a router, and addresses can be made below this prefix (RFC 4861, 4.6.2)."""
    prefix = ipaddress.IPv6Address("2001:db8::").packed
    information = struct.pack("!BBBBIII16s", 3, 4, 64, 0xC0, 3600, 3600, 0, prefix)
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + information
    return wire.icmp6("33:33:00:00:00:01", CLIENT_MAC, "fe80::ff:fe00:1", "ff02::1", body)
