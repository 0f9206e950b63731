"""The rtnetlink requests about addresses of devices. Every one raises NetlinkError if the kernel refuses it."""

from __future__ import annotations

import errno
import socket

from kvmifup.node.messages import (
    BODY,
    IFA_F_NODAD,
    IFA_F_TENTATIVE,
    IFADDRMSG,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    RT_SCOPE_LINK,
    RTM_DELADDR,
    RTM_GETADDR,
    RTM_NEWADDR,
    NetlinkError,
    address_body,
    address_in,
)
from kvmifup.node.refusals import forgiven
from kvmifup.node.transport import Transport


def addresses(via: Transport, family: int, index: int = 0) -> list[tuple[int, str]]:
    """The addresses of *family*, AF_*, on the device *index*, 0 for all: each with its device's, and prefix length."""
    return [address_in(one) for one in via.dump(RTM_GETADDR, IFADDRMSG.pack(family, 0, 0, 0, index))]


def link_local(via: Transport, index: int) -> str | None:
    """A link-local address of the device *index* that may be sent from, because it is not tentative; None without one.

    Not from /proc/net/if_inet6, which has a line for each tap.
    """
    try:
        found = via.dump(RTM_GETADDR, IFADDRMSG.pack(socket.AF_INET6, 0, 0, 0, index))
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise
        return None
    for message in found:
        family, _length, flags, scope, _index = IFADDRMSG.unpack_from(message, BODY)
        if (family, scope) == (socket.AF_INET6, RT_SCOPE_LINK) and not flags & IFA_F_TENTATIVE:
            return address_in(message)[1].partition("/")[0]
    return None


def write(via: Transport, index: int, address: str, *, there: bool) -> None:
    """Have *address*, with its prefix length, on the device *index*, or not: *there*.

    It is for use at once: nobody is asked whether it is a duplicate.
    """
    with forgiven(errno.EEXIST if there else errno.EADDRNOTAVAIL):
        if there:
            via.ask(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, address_body(index, address, IFA_F_NODAD))
        else:
            via.ask(RTM_DELADDR, NLM_F_ACK, address_body(index, address))
