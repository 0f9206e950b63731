"""The rules of filters for what is inside a second VLAN tag, as text for nft.

The kernel takes off the first tag. Then the network header is the second one: two bytes, and the type of what is
inside. nft has no names for that, so all of it is numbers, and bits are counted from the network header.

What nobody can look into here is dropped: a third tag, IPv4 options before ports, extension headers of IPv6. But a
router alert of eight bytes, which all reports about groups have, and fragments are looked into.
"""

from __future__ import annotations

from collections.abc import Callable

# Extension headers, and what else may come before neighbour discovery.
HEADERS = "{ 0, 43, 44, 51, 60 }"
REPORTS = "{ 131, 132, 143 }"


def at(offset: int, length: int) -> str:
    """So many bits of a message or a packet."""
    return f"@nh,{32 + offset},{length}"


def behind(offset: int, length: int) -> str:
    """The same behind the header of IPv6."""
    return at(320 + offset, length)


def own(what: str, sets: str, then: str) -> tuple[str, str]:
    """Rules for *what* is this NIC's, as a single one or in a range."""
    return f"iifname . {what} @inner_hosts{sets} {then}", f"iifname . {what} @inner_nets{sets} {then}"


INNER = at(-16, 16)  # the type of what is inside
ARP_MACS, ARP_SENDER, ARP_TARGET = f"iifname . {at(64, 48)}", at(112, 32), at(192, 32)
RARP = f"{ARP_MACS} @inner_macs iifname . {at(144, 48)} @inner_macs accept"
# ARP in an LLC frame, of which the type is a length.
LLC = tuple(f"{INNER} < 0x0600 {at(0, 48)} {snap} goto drop_protocol" for snap in ("0xaaaa03000000", "0xaaaa030000f8"))
FRAGMENT4, PROTOCOL4, SOURCE4 = at(48, 16), at(72, 8), at(96, 32)
NEXT6, SOURCE6, TYPE6 = at(48, 8), at(64, 128), behind(0, 8)
FRAGMENT6 = behind(16, 16)
REPORT = f"{NEXT6} 0 {behind(0, 16)} 0x3a00 {behind(64, 8)} {REPORTS}"  # behind a router alert
LATER = "& 0xfff8 != 0"


def of_dhcp(place: Callable[[int, int], str], ports: tuple[int, int], then: str) -> tuple[str, ...]:
    """Rules for a datagram: not from a DHCP server; *ports* are its and the client's."""
    server, client = ports
    return (
        f"{place(0, 16)} {server} goto drop_dhcp",
        f"{place(16, 16)} {client} goto drop_dhcp",
        f"{place(16, 16)} >= 0 {then}",
        "goto drop_protocol",
    )


def tagged(options: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The chains; *options* are the tests for those of neighbour discovery there."""
    return {
        # --- kind "mac"
        "mac_tagged": (
            f"{INNER} 0x0806 goto mac_tagged_arp",
            f"{INNER} 0x8035 goto mac_tagged_rarp",
            f"{INNER} 0x86dd goto mac_tagged_six",
            f"{INNER} {{ 0x8100, 0x88a8, 0x9100, 0x9200, 0x9300 }} goto drop_protocol",
            *LLC,
            f"{INNER} >= 0 accept",
            "goto drop_protocol",
        ),
        "mac_tagged_arp": (
            f"{at(0, 48)} 0x000108000604 goto mac_tagged_sender",
            "goto drop_protocol",
        ),
        "mac_tagged_sender": (
            f"{ARP_MACS} @inner_macs accept",
            "goto drop_mac",
        ),
        "mac_tagged_rarp": (
            f"{at(0, 48)} 0x000108000604 {RARP}",
            "goto drop_mac",
        ),
        "mac_tagged_six": (
            f"{at(0, 8)} & 0xf0 != 0x60 goto drop_protocol",
            f"{NEXT6} 58 goto mac_tagged_icmp",
            f"{NEXT6} 44 {TYPE6} 58 {FRAGMENT6} {LATER} accept",
            f"{NEXT6} 44 {TYPE6} {{ 0, 43, 44, 51, 58, 60 }} goto drop_protocol",
            f"{NEXT6} 44 {FRAGMENT6} >= 0 accept",
            f"{REPORT} accept",
            f"{NEXT6} {HEADERS} goto drop_protocol",
            f"{at(288, 32)} >= 0 accept",
            "goto drop_protocol",
        ),
        "mac_tagged_icmp": (
            f"{TYPE6} {{ 133, 134, 135, 136, 137 }} goto mac_tagged_nd",
            f"{TYPE6} >= 0 accept",
            "goto drop_protocol",
        ),
        "mac_tagged_nd": ("jump tagged_options", "accept"),
        # --- kind "address"
        "address_tagged": (
            f"{INNER} 0x0800 iifname @with4 goto tagged_four",
            f"{INNER} 0x86dd iifname @with6 goto tagged_six",
            f"{INNER} 0x0806 iifname @with4 goto address_tagged_arp",
            f"{INNER} 0x8035 goto address_tagged_rarp",
            f"{INNER} {{ 0x0800, 0x0806, 0x86dd }} goto drop_address",
            "goto drop_protocol",
        ),
        "address_tagged_arp": (
            f"{at(0, 48)} 0x000108000604 goto address_tagged_sender",
            "goto drop_protocol",
        ),
        "address_tagged_sender": (
            f"{ARP_MACS} != @inner_macs goto drop_mac",
            *own(ARP_SENDER, "4", "accept"),
            # A probe. One for another's address would have that guest give it up.
            *(f"{ARP_SENDER} 0 {rule}" for rule in own(ARP_TARGET, "4", "accept")),
            "goto drop_address",
        ),
        "address_tagged_rarp": (
            f"{at(0, 64)} 0x0001080006040003 {ARP_SENDER} 0 {ARP_TARGET} 0 {RARP}",
            "goto drop_mac",
        ),
        "tagged_four": (
            f"{at(0, 8)} < 0x45 goto drop_protocol",
            f"{at(0, 8)} > 0x4f goto drop_protocol",
            f"{PROTOCOL4} {{ 1, 17 }} goto tagged_four_ports",
            f"{at(128, 32)} >= 0 goto tagged_four_source",
            "goto drop_protocol",
        ),
        "tagged_four_ports": (
            f"{FRAGMENT4} & 0x1fff != 0 goto tagged_four_source",
            f"{at(0, 8)} != 0x45 goto drop_protocol",
            f"{PROTOCOL4} 1 goto tagged_four_icmp",
            f"{SOURCE4} 0 {at(160, 32)} 0x00440043 accept",
            *of_dhcp(lambda offset, length: at(160 + offset, length), (67, 68), "goto tagged_four_source"),
        ),
        "tagged_four_icmp": (
            f"{at(160, 8)} {{ 5, 9 }} goto drop_router",
            f"{at(160, 8)} >= 0 goto tagged_four_source",
            "goto drop_protocol",
        ),
        "tagged_four_source": (*own(SOURCE4, "4", "accept"), "goto drop_address"),
        "tagged_six": (
            f"{at(0, 8)} & 0xf0 != 0x60 goto drop_protocol",
            f"{NEXT6} 17 goto tagged_six_udp",
            f"{NEXT6} 58 goto tagged_six_icmp",
            f"{NEXT6} 44 goto tagged_six_part",
            f"{REPORT} {SOURCE6} 0 accept",
            f"{REPORT} goto tagged_six_source",
            f"{NEXT6} {HEADERS} goto drop_protocol",
            f"{at(288, 32)} >= 0 goto tagged_six_source",
            "goto drop_protocol",
        ),
        "tagged_six_udp": of_dhcp(behind, (547, 546), "goto tagged_six_source"),
        "tagged_six_part": (
            f"{TYPE6} {HEADERS} goto drop_protocol",
            f"{FRAGMENT6} {LATER} goto tagged_six_source",
            f"{TYPE6} 58 goto drop_protocol",
            f"{TYPE6} 17 goto tagged_six_first",
            f"{FRAGMENT6} >= 0 goto tagged_six_source",
            "goto drop_protocol",
        ),
        "tagged_six_first": of_dhcp(
            lambda offset, length: behind(64 + offset, length), (547, 546), "goto tagged_six_source"
        ),
        "tagged_six_icmp": (
            f"{TYPE6} {{ 134, 137 }} goto drop_router",
            f"{TYPE6} 136 goto tagged_about_itself",
            f"{TYPE6} 135 {SOURCE6} 0 goto tagged_about_itself",
            f"{TYPE6} {{ 133, 135 }} goto tagged_asking",
            f"{TYPE6} {REPORTS} {SOURCE6} 0 accept",
            f"{TYPE6} >= 0 goto tagged_six_source",
            "goto drop_protocol",
        ),
        "tagged_six_source": (*own(SOURCE6, "6", "accept"), "goto drop_address"),
        # --- neighbour discovery
        "tagged_about_itself": (*own(behind(64, 128), "6", "goto tagged_asking"), "goto drop_address"),
        "tagged_asking": ("jump tagged_options", f"{SOURCE6} 0 accept", "goto tagged_six_source"),
        "tagged_options": (*options, "goto drop_mac"),
    }
