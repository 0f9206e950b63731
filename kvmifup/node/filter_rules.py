"""The rules of filters, as text for nft: all NICs share them.

A chain that judges ends with a drop, so what a test cannot read (a frame that is too short, a header that makes no
sense) is dropped. A test for something that is to be dropped comes before that for the sake of its reason.

What is true of one NIC is in sets, whose keys begin with the name of its tap. nft has no names for what is inside RARP,
neighbour discovery and a second tag: these bytes are looked up in sets of numbers, `inner_…`. A rule that does so must
not name a protocol that nft does not know (RARP), or nft 1.0.6 and 1.1.3 abort when they list it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvmifup.core.filters import REASONS
from kvmifup.core.records import record
from kvmifup.node import filter_tagged

BASE = "prerouting"
# What may stand behind an authentication header, by its number (IPv4, TCP, UDP, …): nothing that could be neighbour
# discovery, or lead to it, for receivers know that header as any other.
SEALED = (4, 6, 17, 41, 47, 50, 89, 103, 112, 115, 132)
UDP = 17
RARP = "meta protocol 0x8035"  # nft has no name for it
ADVERTISED = 16  # times eight bytes of options in a router advertisement
RS, RA, NS, NA, REDIRECT = 133, 134, 135, 136, 137  # messages of neighbour discovery


def sealed(*others: int) -> str:
    """A rule for an authentication header before anything but `SEALED` without *others*."""
    known = ", ".join(str(one) for one in SEALED if one not in others)
    return f"meta l4proto ah ah nexthdr != {{ {known} }} goto drop_protocol"


@record
class Place:
    """Where neighbour discovery is: the words for its type and for the length of the packet, and for its bits."""

    type: str
    length: str
    bits: Callable[[int, int], str]


PLAIN = Place("icmpv6 type", "ip6 length", lambda offset, length: f"@th,{offset},{length}")
TAGGED = Place(filter_tagged.TYPE6, filter_tagged.at(32, 16), filter_tagged.behind)


def options(place: Place) -> Iterator[str]:
    """Tests for all that a message of neighbour discovery may carry: MACs of the guest, and perhaps a nonce."""
    for kind, length, option, nonce in (
        (RS, 8, 1, True),
        (NS, 24, 1, True),
        (NA, 24, 2, False),
        (REDIRECT, 40, 2, False),
    ):
        for test in of_length(place, length, option, nonce=nonce):
            yield f"{place.type} {kind} {test} return"
    # A router may say more before its own MAC than can be followed here: wherever an option could be a MAC, it is the
    # guest's.
    for bit in range(128, 128 + 64 * ADVERTISED, 64):
        mac = f"iifname . {place.bits(bit + 16, 48)} != @inner_macs"
        yield f"{place.type} {RA} {place.bits(bit, 16)} 0x0101 {mac} goto drop_mac"
    yield f"{place.type} {RA} {place.length} <= {16 + 8 * ADVERTISED} return"


def of_length(place: Place, length: int, option: int, *, nonce: bool) -> Iterator[str]:
    """Tests for all the options that a message of *length* bytes may have: a MAC, and perhaps a nonce (RFC 7527)."""

    def own(bit: int) -> str:
        return f"{place.bits(bit, 16)} 0x{option:02x}01 iifname . {place.bits(bit + 16, 48)} @inner_macs"

    first, second = 8 * length, 8 * length + 64
    yield f"{place.length} {length}"
    yield f"{place.length} {length + 8} {own(first)}"
    if nonce:
        yield f"{place.length} {length + 8} {place.bits(first, 16)} 0x0e01"
        yield f"{place.length} {length + 16} {own(first)} {place.bits(second, 16)} 0x0e01"
        yield f"{place.length} {length + 16} {place.bits(first, 16)} 0x0e01 {own(second)}"


RARP_MACS = "iifname . @nh,64,48 @inner_macs iifname . @nh,144,48 @inner_macs"
# `>= 0` is true of whatever can be read. A later fragment has no header of its own to read; one that is the first has.
_JUDGING: dict[str, tuple[str, ...]] = {
    BASE: ("iifname vmap @guests",),
    # --- kind "mac": the MACs, outside and inside, and nothing else
    "mac": (
        "iifname . ether saddr != @macs goto drop_mac",
        "meta protocol arp goto mac_arp",
        f"{RARP} goto mac_rarp",
        "meta protocol ip6 goto mac_six",
        "meta protocol { 8021q, 8021ad } goto mac_tagged",
        # A tag from before there was a standard: nobody here looks behind those.
        "meta protocol { 0x9100, 0x9200, 0x9300 } goto drop_protocol",
        # ARP in an LLC frame (RFC 1042): some systems take it.
        "meta protocol 4 @nh,0,48 0xaaaa03000000 goto drop_protocol",
        "meta protocol 4 @nh,0,48 0xaaaa030000f8 goto drop_protocol",
        "accept",
    ),
    # Asked for what is right: nft lists the opposite as tests that mean less when they are loaded again.
    "mac_arp": (
        "@nh,0,48 0x000108000604 goto mac_arp_sender",
        "goto drop_protocol",
    ),
    "mac_arp_sender": (
        "iifname . arp saddr ether @macs accept",
        "goto drop_mac",
    ),
    "mac_rarp": (
        f"@nh,0,48 0x000108000604 {RARP_MACS} accept",
        "goto drop_mac",
    ),
    "mac_six": (
        "meta l4proto != 255 goto mac_six_known",
        "goto drop_protocol",
    ),
    "mac_six_known": (
        sealed(),
        "meta l4proto != icmpv6 accept",
        "icmpv6 type { 133, 134, 135, 136, 137 } goto mac_nd",
        "icmpv6 type >= 0 accept",
        "frag frag-off != 0 accept",
        "goto drop_protocol",
    ),
    # --- kind "address": that, and the addresses
    "address": (
        "iifname . ether saddr != @macs goto drop_mac",
        "meta protocol ip iifname @with4 goto four",
        "meta protocol ip6 iifname @with6 goto six",
        "meta protocol arp iifname @with4 goto address_arp",
        f"{RARP} goto address_rarp",
        "meta protocol { 8021q, 8021ad } goto address_tagged",
        "meta protocol { ip, ip6, arp } goto drop_address",
        "goto drop_protocol",
    ),
    "address_arp": (
        "@nh,0,48 0x000108000604 goto address_arp_sender",
        "goto drop_protocol",
    ),
    "address_arp_sender": (
        "iifname . arp saddr ether != @macs goto drop_mac",
        "iifname . arp saddr ip @hosts4 accept",
        "iifname . arp saddr ip @nets4 accept",
        # A probe. One for another's address would have that guest give it up.
        "arp saddr ip 0.0.0.0 iifname . arp daddr ip @hosts4 accept",
        "arp saddr ip 0.0.0.0 iifname . arp daddr ip @nets4 accept",
        "goto drop_address",
    ),
    "address_rarp": (
        # QEMU's announcement is a request (3), and has no addresses.
        f"@nh,0,64 0x0001080006040003 @nh,112,32 0 @nh,192,32 0 {RARP_MACS} accept",
        "goto drop_mac",
    ),
    "four": (
        "meta l4proto != 255 goto four_known",
        "goto drop_protocol",
    ),
    "four_known": (
        "meta l4proto udp goto four_udp",
        "meta l4proto icmp goto four_icmp",
        "goto four_source",
    ),
    "four_udp": (
        # First: kernels read ports in a later fragment of IPv4, too, where there are none.
        "ip frag-off & 0x1fff != 0 goto four_source",
        "udp sport 67 goto drop_dhcp",
        "udp dport 68 goto drop_dhcp",
        "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept",
        "udp length >= 0 goto four_source",
        "goto drop_protocol",
    ),
    "four_icmp": (
        "ip frag-off & 0x1fff != 0 goto four_source",
        "icmp type { redirect, router-advertisement } goto drop_router",
        "icmp type >= 0 goto four_source",
        "goto drop_protocol",
    ),
    "four_source": (
        "iifname . ip saddr @hosts4 accept",
        "iifname . ip saddr @nets4 accept",
        "goto drop_address",
    ),
    "six": (
        "meta l4proto != 255 goto six_known",
        "goto drop_protocol",
    ),
    "six_known": (
        "meta l4proto udp goto six_udp",
        "meta l4proto icmpv6 goto six_icmp",
        sealed(UDP),
        "goto six_source",
    ),
    "six_udp": (
        "udp sport 547 goto drop_dhcp",
        "udp dport 546 goto drop_dhcp",
        "udp length >= 0 goto six_source",
        "frag frag-off != 0 goto six_source",
        "goto drop_protocol",
    ),
    "six_icmp": (
        "icmpv6 type { 134, 137 } goto drop_router",
        "icmpv6 type { 133, 135, 136 } goto address_nd",
        "ip6 saddr :: icmpv6 type { 131, 132, 143 } accept",
        "icmpv6 type >= 0 goto six_source",
        "frag frag-off != 0 goto six_source",
        "goto drop_protocol",
    ),
    "six_source": (
        "iifname . ip6 saddr @hosts6 accept",
        "iifname . ip6 saddr @nets6 accept",
        "goto drop_address",
    ),
    # --- neighbour discovery
    "mac_nd": (
        "ip6 nexthdr != icmpv6 goto drop_protocol",
        "jump options",
        "accept",
    ),
    "address_nd": (
        "ip6 nexthdr != icmpv6 goto drop_protocol",
        f"icmpv6 type {NA} goto about_itself",
        # Another guest that is just asking for this address would give it up.
        f"ip6 saddr :: icmpv6 type {NS} goto about_itself",
        "goto asking",
    ),
    "about_itself": (
        "iifname . @th,64,128 @inner_hosts6 goto asking",
        "iifname . @th,64,128 @inner_nets6 goto asking",
        "goto drop_address",
    ),
    # Who has no address yet asks from `::`.
    "asking": (
        "jump options",
        "ip6 saddr :: accept",
        "goto six_source",
    ),
    "options": (*options(PLAIN), "goto drop_mac"),
    # --- inside a second tag
    **filter_tagged.tagged(tuple(options(TAGGED))),
    **{f"drop_{reason}": (f"iifname @dropped_{reason} drop", "drop") for reason in REASONS},
}

# What a chain is about. nft by itself puts a test of the frame's own type before one of a header, which sees the tag of
# a VLAN there.
ABOUT = {
    "mac_arp": "arp",
    "address_arp": "arp",
    "four": "ip",
    "six": "ip6",
    "mac_six": "ip6",
    "mac_nd": "ip6",
    "address_nd": "ip6",
    "about_itself": "ip6",
    "asking": "ip6",
    "options": "ip6",
}


def about(chain: str, rule: str) -> str:
    """*rule*, with a test of the protocol, which sees through VLAN tags."""
    protocol = next((ABOUT[one] for one in ABOUT if chain == one or chain.startswith(f"{one}_")), None)
    plain = rule.split(" ")[0] in ("goto", "jump", "drop", "accept")
    return rule if plain or protocol is None else f"meta protocol {protocol} {rule}"


# In the table on the taps themselves: what is for a reserved address, from a MAC that is not the guest's.
RESERVED = "reserved"
# Nothing leads to this chain: the comment of its rule is what the rules of both tables looked like in the kernel right
# after they were made. nft has other words for them than these, and a comment stays when a rule is replaced.
MADE = "made"
_PORT = ("ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 iifname . ether saddr != @port_macs drop",)

RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "bridge kvm-ifup": {chain: tuple(about(chain, rule) for rule in rules) for chain, rules in _JUDGING.items()},
    "netdev kvm-ifup": {RESERVED: _PORT},
}
