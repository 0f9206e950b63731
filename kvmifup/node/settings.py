"""The sysctls of a device as RTM_GETLINK has them: all at once, for who looks at thousands of devices."""

from __future__ import annotations

import socket
from struct import Struct

from kvmifup.node.messages import attributes

IFLA_INET_CONF, IFLA_INET6_CONF = 1, 2  # linux/if_link.h
# Where each is among the numbers of its family, net/FAMILY/conf/DEV/NAME. linux/ip.h (IPV4_DEVCONF_*, which count from
# one), linux/ipv6.h (DEVCONF_*): what is new there comes at the end.
PLACES = {
    ("ipv4", "forwarding"): 0,
    ("ipv4", "proxy_arp"): 2,
    ("ipv4", "accept_redirects"): 3,
    ("ipv4", "send_redirects"): 5,
    ("ipv4", "rp_filter"): 7,
    ("ipv4", "accept_source_route"): 8,
    ("ipv4", "arp_ignore"): 18,
    ("ipv4", "drop_unicast_in_l2_multicast"): 29,
    ("ipv6", "forwarding"): 0,
    ("ipv6", "accept_ra"): 3,
    ("ipv6", "accept_redirects"): 4,
    ("ipv6", "autoconf"): 5,
    ("ipv6", "proxy_ndp"): 22,
    ("ipv6", "disable_ipv6"): 26,
    ("ipv6", "accept_dad"): 27,
}
NUMBER = Struct("=i")
KINDS = {"ipv4": (socket.AF_INET, IFLA_INET_CONF), "ipv6": (socket.AF_INET6, IFLA_INET6_CONF)}

Settings = dict[str, bytes]  # the numbers of each family, as the kernel has them: thousands of devices have dozens


def settings_of(spec: bytes) -> Settings:
    """The settings in an attribute IFLA_AF_SPEC."""
    families = attributes(spec)
    return {name: attributes(families.get(family, b"")).get(kind, b"") for name, (family, kind) in KINDS.items()}


def named(settings: Settings, family: str, name: str) -> str | None:
    """The setting *name* of *family*, "ipv4" or "ipv6"; None if it is not among them."""
    place, numbers = PLACES.get((family, name)), settings[family]
    if place is None or len(numbers) < (place + 1) * NUMBER.size:
        return None
    return str(NUMBER.unpack_from(numbers, place * NUMBER.size)[0])
