"""Small reads of /proc and /sys, and writing a sysctl."""

from __future__ import annotations

import ipaddress
import os
import socket

from kvmifup.node.messages import Link

NET_ADDR_SET = "3"  # linux/netdevice.h, in /sys/class/net/DEV/addr_assign_type

SYSCTL = "/proc/sys"
SYS_NET = "/sys/class/net"


# --- small reads ------------------------------------------------------------------------------------------


def device_name(index: int) -> str:
    """The name of the device *index*; "#7" for one that is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"#{index}"


def content(path: str) -> str | None:
    """What a file of /proc or /sys says, None when there is none."""
    try:
        # Not through `open`: that takes longer than the kernel does, and a hook reads twenty.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, 4096).decode().strip()
        finally:
            os.close(descriptor)
    except OSError:
        return None


def sysctl(path: str) -> str | None:
    """The value of a sysctl, None when there is no such."""
    return content(f"{SYSCTL}/{path}")


def write_sysctl(path: str, value: str) -> None:
    """Set a sysctl. Raises OSError."""
    descriptor = os.open(f"{SYSCTL}/{path}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def setting(path: str, value: str) -> str:
    """What `sysctl -w` takes to set *path*; with slashes where a device's name has a dot."""
    return f"{path if '.' in path else path.replace('/', '.')}={value}"


def sysfs_of(name: str, link: Link) -> str | None:
    """The directory of the device *name* in /sys, None when /sys shows another network namespace."""
    place = f"{SYS_NET}/{name}"
    same = content(f"{place}/ifindex") == str(link.index) and content(f"{place}/address") == link.address
    return place if same else None


def link_local(dev: str) -> str | None:
    """A link-local address of *dev* that may be sent from; None if it has none."""
    tentative, link_scope = 0x40, 0x20  # linux/if_addr.h, net/ipv6.h
    try:
        with open("/proc/net/if_inet6", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in lines:
        address, _index, _length, scope, flags, name = line.split()
        if name == dev and int(scope, 16) == link_scope and not int(flags, 16) & tentative:
            return str(ipaddress.IPv6Address(bytes.fromhex(address)))
    return None
