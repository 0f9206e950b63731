"""The ports of bridges that keep VLANs apart: their VLANs, and which of them lead to other nodes.

Not through pyroute2. To ask one port for its VLANs takes RTM_GETVLAN, which its version 0.7 (Debian 12) does not know:
it asks for those of all ports, which takes 90 ms with 300 taps. And to say 2,000 VLANs that are no neighbours takes it
120 ms, here 3 ms.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from struct import Struct

from kvmifup.core.errors import VanishedError
from kvmifup.core.model import Trunk
from kvmifup.core.ops import LinkMaster, UplinkVlans
from kvmifup.core.vlans import PVID, UNTAGGED, flags_of, ids, ranges, tagged
from kvmifup.node.messages import (
    ARPHRD_ETHER,
    BODY,
    IFINFOMSG,
    IFLA_AF_SPEC,
    NLA_TYPE_MASK,
    NLATTR,
    NLM_F_ACK,
    RTM_DELLINK,
    RTM_GETVLAN,
    RTM_SETLINK,
    Link,
    attribute,
    attributes,
)
from kvmifup.node.netlink import Netlink
from kvmifup.node.procfs import SYS_NET, device_name, ports_of, read_file, sysfs_of

# linux/if_bridge.h
IFLA_BRIDGE_VLAN_INFO = 2
BRIDGE_VLANDB_ENTRY, BRIDGE_VLANDB_ENTRY_INFO, BRIDGE_VLANDB_ENTRY_RANGE = 1, 1, 2
RANGE_BEGIN, RANGE_END = 0x8, 0x10  # BRIDGE_VLAN_INFO_*
VLAN_INFO = Struct("=HH")  # struct bridge_vlan_info: flags, vid
VLAN_MSG = Struct("=BxxxI")  # struct br_vlan_msg: family, ifindex
VID = Struct("=H")

VLAN_DEVICES = "/proc/net/vlan/config"  # there while the kernel has 8021q
NAME_WIDTH = 15  # of the first column there; then comes a bar
Flags = Mapping[int, int]  # VLANs, each with PVID and UNTAGGED


class Ports:
    """The ports of bridges, as they have been read since the last change. What asks raises NetlinkError, OSError."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self._vlans: dict[int, dict[int, int]] = {}

    def clear(self) -> None:
        """Forget what was read."""
        self._vlans.clear()

    def vlans(self, index: int) -> Flags:
        """The VLANs of the port with *index*."""
        if index not in self._vlans:
            body = VLAN_MSG.pack(socket.AF_BRIDGE, index)
            self._vlans |= by_port(self._netlink.transport.dump(RTM_GETVLAN, body)) or {index: {}}
        return self._vlans[index]

    def others(self, bridge: Link) -> list[str]:
        """The names of the ports of *bridge* that are no taps."""
        sysfs = sysfs_of(bridge.name, bridge)
        if sysfs is None:  # /sys is another network namespace's
            links = self._netlink.links().values()
            return sorted({link.name for link in links if link.master == bridge.index and not link.is_tap})
        # A bridge may have hundreds of taps: the kernel is not asked about each.
        return sorted(name for name in ports_of(sysfs) if not os.access(f"{SYS_NET}/{name}/tun_flags", os.F_OK))

    def change(self, index: int, wanted: Flags, unwanted: Collection[int]) -> None:
        """Put the port with *index* into the VLANs *wanted*, then take it out of those that are *unwanted*.

        What it is to have, and has, is left alone: not a frame of it is lost.
        """
        self.clear()
        there = self.vlans(index)
        new = {vid: flags for vid, flags in wanted.items() if there.get(vid) != flags}
        old = [vid for vid in unwanted if vid in there]
        for kind, infos in ((RTM_SETLINK, added(new)), (RTM_DELLINK, removed(old))):
            if infos:
                body = IFINFOMSG.pack(socket.AF_BRIDGE, 0, index, 0, 0) + attribute(IFLA_AF_SPEC, infos)
                self._netlink.transport.ask(kind, NLM_F_ACK, body)
        self.clear()


class AllPorts(Ports):
    """The same out of one dump, for *links*, the devices by name. It never forgets anything."""

    def __init__(self, netlink: Netlink, links: Mapping[str, Link]) -> None:
        super().__init__(netlink)
        self._links = links
        self._read = False

    def clear(self) -> None:
        """Do nothing: everything is from one moment."""

    def vlans(self, index: int) -> Flags:
        """As `Ports.vlans`."""
        if not self._read:
            self._vlans = by_port(self._netlink.transport.dump(RTM_GETVLAN, VLAN_MSG.pack(socket.AF_BRIDGE, 0)))
            self._read = True
        return self._vlans.get(index, {})

    def others(self, bridge: Link) -> list[str]:
        """As `Ports.others`."""
        found = self._links.values()
        return sorted({link.name for link in found if link.master == bridge.index and not link.is_tap})


# --- messages ---------------------------------------------------------------------------------------------


def by_port(found: Iterable[bytes]) -> dict[int, dict[int, int]]:
    """The VLANs in RTM_NEWVLAN messages, by the index of the port."""
    ports: dict[int, dict[int, int]] = {}
    for message in found:
        _family, index = VLAN_MSG.unpack_from(message, BODY)
        vlans = ports.setdefault(index, {})
        for entry in entries(message, BODY + VLAN_MSG.size):
            attrs = attributes(entry)
            flags, first = VLAN_INFO.unpack_from(attrs[BRIDGE_VLANDB_ENTRY_INFO])
            last: int = VID.unpack_from(attrs.get(BRIDGE_VLANDB_ENTRY_RANGE, VID.pack(first)))[0]
            vlans |= dict.fromkeys(range(first, last + 1), flags & (PVID | UNTAGGED))
    return ports


def entries(message: bytes, offset: int) -> Iterator[bytes]:
    """The attributes BRIDGE_VLANDB_ENTRY in *message* from *offset* on."""
    while offset + NLATTR.size <= len(message):
        length, kind = NLATTR.unpack_from(message, offset)
        if kind & NLA_TYPE_MASK == BRIDGE_VLANDB_ENTRY:
            yield message[offset + NLATTR.size : offset + length]
        offset += max(length + 3 & ~3, NLATTR.size)


def added(vlans: Flags) -> bytes:
    """The attributes that put a port into *vlans*."""
    kinds = sorted(set(vlans.values()))
    return b"".join(infos((vid for vid, how in vlans.items() if how == flags), flags) for flags in kinds)


def removed(vids: Iterable[int]) -> bytes:
    """The attributes that take a port out of *vids*."""
    return infos(vids, 0)


def infos(vids: Iterable[int], flags: int) -> bytes:
    """IFLA_BRIDGE_VLAN_INFO for *vids*, neighbours as a range."""
    found = []
    for first, last in ranges(vids):
        if flags & PVID or first == last:  # a PVID cannot be a range
            found += [(flags, vid) for vid in range(first, last + 1)]
        else:
            found += [(flags | RANGE_BEGIN, first), (flags | RANGE_END, last)]
    return b"".join(attribute(IFLA_BRIDGE_VLAN_INFO, VLAN_INFO.pack(*one)) for one in found)


# --- what the ops are about ---------------------------------------------------------------------------------


def present(op: UplinkVlans, there: Flags) -> str:
    """Those of the VLANs of *op* that its port has, as *there* says.

    One that nobody wants there, and that goes out untagged, is not ours: we put a port only into tagged ones.
    """
    wanted = ids(op.want)
    return tagged(vid for vid in op.vids if vid in there and (vid in wanted or not there[vid]))


def share(op: UplinkVlans, there: Flags) -> tuple[Flags, Collection[int]]:
    """What `Ports.change` has to do for *op*, on a port that is in the VLANs *there*."""
    wanted = ids(op.want)
    return {vid: there.get(vid, 0) for vid in wanted}, [vid for vid in op.vids - wanted if there.get(vid) == 0]


def exactly(op: LinkMaster, there: Flags) -> tuple[Flags, Collection[int]]:
    """What `Ports.change` has to do for a port in the VLANs *there* to have exactly those of *op*."""
    wanted = flags_of(op.vlans)
    return wanted, there.keys() - wanted.keys()


# --- which ports lead to other nodes ------------------------------------------------------------------------


def trunks(bridge: Link, named: Iterable[str] | None, ports: Ports, link: Callable[[str], Link]) -> tuple[Trunk, ...]:
    """The ports of *bridge* that are *named*, or with None those that lead out of the node; *link* knows devices."""
    used = vlan_devices()
    if named is None:
        found = [one for name in ports.others(bridge) if leads_out(one := link(name), link)]
        return tuple(Trunk(one.name, used=tuple(taken(one, used, link))) for one in found)
    chosen: dict[str, Trunk] = {}  # one device may be named twice, by an alternative name
    for name in named:
        try:
            one = link(name)
        except VanishedError:
            chosen[name] = Trunk(name, is_port=False)
        else:
            is_port = one.port_of == "bridge" and one.master == bridge.index
            chosen[one.name] = Trunk(one.name, is_port, one.is_tap, tuple(taken(one, used, link)))
    return tuple(chosen.values())


def leads_out(port: Link, link: Callable[[str], Link]) -> bool:
    """Whether *port* is hardware, a bond, or a VLAN of one of these; anything else may lead to guests.

    To guess more has put guests' VLANs on ports that they had nothing to do with.
    """
    if port.type != ARPHRD_ETHER:
        return False
    if port.kind == "vlan" and port.lower:
        return leads_out(link(device_name(port.lower)), link)
    return port.kind in (None, "bond")


def taken(port: Link, used: Iterable[tuple[str, int, str]], link: Callable[[str], Link]) -> Iterator[tuple[int, str]]:
    """The VLANs that reach a device of their own, and not *port*: they are taken off it, or off a part of a bond."""
    for name, vid, below in used:
        try:
            if below == port.name or link(below).master == port.index:
                yield vid, name
        except VanishedError:
            continue


def vlan_devices() -> list[tuple[str, int, str]]:
    """The devices that are VLANs of others: name, VLAN, and the device below."""
    found = []
    for line in (read_file(VLAN_DEVICES, whole=True) or "").splitlines():
        name, rest = line[:NAME_WIDTH].rstrip(), line[NAME_WIDTH:].split(maxsplit=3)
        if len(rest) == 4 and rest[1].isdigit():  # "|", VLAN, "|", device: no heading
            found.append((name, int(rest[1]), rest[3]))
    return found
