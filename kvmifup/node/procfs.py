"""Small reads of /proc and /sys, and writing a sysctl."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import cache

from kvmifup.inputs import trust
from kvmifup.node.messages import Link

SYSCTL = "/proc/sys"
SYS_NET = "/sys/class/net"
NET_ADDR_SET = "3"  # linux/netdevice.h, in /sys/class/net/DEV/addr_assign_type
IFF_PERSIST = 0x0800  # linux/if_tun.h, in /sys/class/net/TAP/tun_flags
Read = Callable[[str], str | None]  # as `read_file`, for who has the text already


def read_file(path: str, *, whole: bool = False) -> str | None:
    """The text of a file in /proc or /sys, without white space around it; None if it cannot be read.

    Without *whole* only what fits into a page. Raises OSError if that says nothing about it: no descriptors, no memory.
    """
    try:
        # Not with `open`: that takes longer than the kernel does, and a hook reads twenty files.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096)
            while whole and (more := os.read(descriptor, 4096)):
                text += more
            return text.decode(errors="surrogateescape").strip()
        finally:
            os.close(descriptor)
    except OSError as error:
        trust.need_answer(error)
        return None


@cache
def boot() -> str:
    """Which start of the node this is. Raises OSError."""
    return read_file(f"{SYSCTL}/kernel/random/boot_id") or ""


# --- sysctls ----------------------------------------------------------------------------------------------


def sysctl(path: str) -> str | None:
    """The value of the sysctl *path*, which has slashes; None if there is no such sysctl."""
    return read_file(f"{SYSCTL}/{path}")


def write_sysctl(path: str, value: str) -> None:
    """Set the sysctl *path*. Raises OSError."""
    descriptor = os.open(f"{SYSCTL}/{path}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def assignment(path: str, value: str) -> str:
    """The argument with which `sysctl -w` sets *path*; it keeps its slashes if a device's name has a dot."""
    return f"{path if '.' in path else path.replace('/', '.')}={value}"


def has_ipv6() -> bool:
    """Whether the kernel has IPv6 at all."""
    return os.access(f"{SYSCTL}/net/ipv6", os.F_OK)


def has_module(name: str) -> bool:
    """Whether the kernel has the module *name* now; one that cannot load modules has all that it will ever have."""
    return os.access(f"/sys/module/{name}", os.F_OK) or not os.access("/proc/modules", os.F_OK)


# --- devices ----------------------------------------------------------------------------------------------


def device_name(index: int) -> str:
    """The name of the device *index*; "#7" if it is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"#{index}"


def sysfs_of(name: str, link: Link, read: Read = read_file) -> str | None:
    """The directory of the device *name* in /sys; None if /sys shows another network namespace."""
    directory = f"{SYS_NET}/{name}"
    same = read(f"{directory}/ifindex") == str(link.index) and read(f"{directory}/address") == link.address
    return directory if same else None


def frames_into(tap: str, index: int) -> int | None:
    """How many frames the machine behind *tap* has taken out of it; None if /sys shows another network namespace.

    A tap counts a frame as sent when somebody reads it (`tun_put_user` in drivers/net/tun.c). Raises OSError.
    """
    directory = f"{SYS_NET}/{tap}"
    if read_file(f"{directory}/ifindex") != str(index):
        return None
    count = read_file(f"{directory}/statistics/tx_packets")
    return int(count) if count else None


def address_is_set(sysfs: str, read: Read = read_file) -> bool:
    """Whether somebody has set the MAC of the device whose directory in /sys is *sysfs*."""
    return read(f"{sysfs}/addr_assign_type") == NET_ADDR_SET


def ports_of(sysfs: str) -> set[str]:
    """The names of the ports of the bridge whose directory in /sys is *sysfs*. Raises OSError."""
    return set(os.listdir(f"{sysfs}/brif"))
