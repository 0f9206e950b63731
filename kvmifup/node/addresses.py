"""The rtnetlink requests about addresses of devices. Every one raises NetlinkError if the kernel refuses it."""

from __future__ import annotations

from kvmifup.node.messages import (
    IFA_F_NODAD,
    IFADDRMSG,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_DELADDR,
    RTM_GETADDR,
    RTM_NEWADDR,
    address_body,
    address_in,
)
from kvmifup.node.transport import Transport


def addresses(via: Transport, family: int, index: int = 0) -> list[tuple[int, str]]:
    """The addresses of *family*, AF_*, on the device *index*, 0 for all: each with its device's, and prefix length."""
    return [address_in(one) for one in via.dump(RTM_GETADDR, IFADDRMSG.pack(family, 0, 0, 0, index))]


def add(via: Transport, index: int, address: str) -> None:
    """Add *address*, with its prefix length, for use at once: nobody is asked whether it is a duplicate."""
    via.ask(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, address_body(index, address, IFA_F_NODAD))


def delete(via: Transport, index: int, address: str) -> None:
    """Remove *address*, with its prefix length."""
    via.ask(RTM_DELADDR, NLM_F_ACK, address_body(index, address))
