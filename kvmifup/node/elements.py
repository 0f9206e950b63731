"""The nfnetlink requests that a hook makes: elements of sets, and whether the rules that use them are there.

Layouts of ours, because every routed NIC needs them at every hook: libnftables reads a whole set to find one element
in it, and need not be installed. The numbers in them are big-endian.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from struct import Struct

from kvmifup.node.messages import (
    BODY,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGHDR,
    RECEIVE,
    NetlinkError,
    attribute,
    attributes,
    failure,
)
from kvmifup.node.transport import raise_error, split

NETLINK_NETFILTER, NFPROTO_INET, NFPROTO_BRIDGE = 12, 1, 7  # linux/netlink.h, linux/netfilter.h
BATCH_BEGIN, BATCH_END = 0x10, 0x11  # linux/netfilter/nfnetlink.h
NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
# linux/netfilter/nf_tables.h: NFT_MSG_*
NEWTABLE, GETTABLE, NEWCHAIN, DELCHAIN, NEWRULE, GETRULE, DELRULE = 0, 1, 3, 5, 6, 7, 8
NEWSET, NEWSETELEM, GETSETELEM, DELSETELEM = 9, 12, 13, 14
TABLE, NAME = 1, 2  # NFTA_*_TABLE and NFTA_TABLE_NAME; NFTA_TABLE_FLAGS, and the name of a set
ELEMENTS, ELEMENT = 3, 1  # NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_LIST_ELEM
KEY, DATA, USERDATA, EXPRESSION, KEY_END, EXPRESSIONS = 1, 2, 6, 7, 10, 11  # NFTA_SET_ELEM_*
VALUE, VERDICT = 1, 2  # NFTA_DATA_*
NESTED = 0x8000
LARGE, SO_SNDBUFFORCE = 1 << 17, 32  # bytes that any socket can send at once; asm-generic/socket.h
TRIES = 10  # of a dump that other changes disturb
HEADER = Struct(">BBH")  # family, version, resource

Request = tuple[int, int, bytes]  # a message of a transaction: NFT_MSG_*, flags (NLM_F_*), attributes


def nested(kind: int, payload: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NESTED, payload)


def text(kind: int, value: str) -> bytes:
    """An attribute that is text."""
    return attribute(kind, value.encode() + b"\0")


def big(kind: int, value: int) -> bytes:
    """An attribute that is a number of four bytes."""
    return attribute(kind, value.to_bytes(4, "big", signed=value < 0))


def listed(payload: bytes) -> Iterator[bytes]:
    """What each attribute in *payload* holds: a list has them all of one kind."""
    offset = 0
    while offset + 4 <= len(payload):
        length = int.from_bytes(payload[offset : offset + 2], "little" if LITTLE else "big")
        if length < 4:
            return
        yield payload[offset + 4 : offset + length]
        offset += length + 3 & ~3


LITTLE = NLMSGHDR.pack(1, 0, 0, 0, 0)[0] == 1


class Nfnetlink:
    """A socket for one table, of the *family* NFPROTO_* and the *name*. What the kernel refuses raises NetlinkError."""

    def __init__(self, family: int, name: str) -> None:
        self._family, self._table = family, text(TABLE, name)
        self._socket: socket.socket | None = None  # most NICs need none
        self._sequence = 0

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        return self._socket

    def _message(self, kind: int, flags: int, payload: bytes, family: int, resource: int = 0) -> bytes:
        self._sequence += 1
        body = HEADER.pack(family, 0, resource) + payload
        return NLMSGHDR.pack(BODY + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0) + body

    def flags(self) -> int | None:
        """The flags (NFT_TABLE_F_*) of the table, None if there is none, as in a kernel without nftables."""
        try:
            found = self._get(GETTABLE, self._table)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPROTONOSUPPORT):
                raise
            return None
        return None if found is None else int.from_bytes(found.get(NAME, b""), "big")

    def element(self, name: str, element: bytes) -> dict[int, bytes] | None:
        """What the set *name* has for the *element*, by NFTA_SET_ELEM_*; None if it is not in it, or there is none."""
        found = self._get(GETSETELEM, text(NAME, name) + nested(ELEMENTS, nested(ELEMENT, element)))
        for one in listed(found.get(ELEMENTS, b"") if found else b""):
            return attributes(one, 0)
        return None

    def _get(self, kind: int, payload: bytes) -> dict[int, bytes] | None:
        if kind != GETTABLE:
            payload = self._table + payload
        asked = self._open()
        asked.send(self._message(NFTABLES << 8 | kind, 0, payload, self._family))
        while True:
            data = asked.recv(RECEIVE)
            _length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(data)
            if sequence != self._sequence:  # left over from a request that was interrupted
                continue
            if answer != NLMSG_ERROR:
                return attributes(data, BODY + HEADER.size)
            try:
                raise_error(data, BODY)
            except NetlinkError as error:
                if error.errno != errno.ENOENT:
                    raise
            return None

    def rules(self) -> list[bytes]:
        """All rules of the table, each as the attributes NFTA_RULE_*; none if there is no table."""
        return [one[BODY + HEADER.size :] for one in self._dump(GETRULE, self._table)]

    def elements(self, name: str) -> list[dict[int, bytes]]:
        """All elements of the set *name*, by NFTA_SET_ELEM_*. Raises NetlinkError, also if there is no such set."""
        found = self._dump(GETSETELEM, self._table + text(NAME, name))
        held = (attributes(one, BODY + HEADER.size).get(ELEMENTS, b"") for one in found)
        return [attributes(element, 0) for part in held for element in listed(part)]

    def _dump(self, kind: int, payload: bytes) -> list[bytes]:
        for _ in range(TRIES):
            found, undisturbed = self._dump_once(kind, payload)
            if undisturbed:
                return found
        raise failure(errno.EINTR)

    def _dump_once(self, kind: int, payload: bytes) -> tuple[list[bytes], bool]:
        asked = self._open()
        asked.send(self._message(NFTABLES << 8 | kind, NLM_F_DUMP, payload, self._family))
        found: list[bytes] = []
        seen = 0
        while True:
            for one in split(asked.recv(RECEIVE)):
                _length, answer, flags, sequence, _port = NLMSGHDR.unpack_from(one)
                if sequence != self._sequence:
                    continue
                seen |= flags
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    raise_error(one, BODY)
                    return found, not seen & NLM_F_DUMP_INTR
                found.append(one)

    def change(self, requests: Sequence[Request], *, really: bool = True) -> None:
        """Do all *requests* as one transaction, or none; not *really*: only ask the kernel whether it would."""
        if not requests:
            return
        begin = self._message(BATCH_BEGIN, 0, b"", 0, NFTABLES)
        first = self._sequence
        last = first + len(requests)
        done = [
            self._message(
                NFTABLES << 8 | kind,
                flags | NLM_F_ACK * (self._sequence + 1 == last),
                self._table + payload,
                self._family,
            )
            for kind, flags, payload in requests
        ]
        end = self._message(BATCH_END, 0, b"", 0, NFTABLES) if really else b""
        asked, whole = self._open(), begin + b"".join(done) + end
        if len(whole) > LARGE:
            with suppress(OSError):  # in a user namespace it may be too large
                asked.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * len(whole))
        asked.send(whole)
        failed: NetlinkError | None = None
        while True:
            for one in split(asked.recv(RECEIVE)):
                _length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(one)
                if answer != NLMSG_ERROR or not first <= sequence <= last:
                    continue
                try:
                    raise_error(one, BODY)
                except NetlinkError as error:
                    failed = failed or error
                if sequence == last or (sequence == first and failed):  # the first: not even the transaction is allowed
                    if failed:
                        raise failed
                    return


def create(kind: int, payload: bytes, *, exclusive: bool = False) -> Request:
    """The request that makes something; *exclusive*: it must not be there."""
    return kind, NLM_F_CREATE | (NLM_F_EXCL if exclusive else 0), payload


def put(name: str, *elements: bytes) -> Request:
    """The request that puts *elements* into the set *name*; they may be there."""
    return NEWSETELEM, NLM_F_CREATE, text(NAME, name) + among(elements)


def remove(name: str, *elements: bytes) -> Request:
    """The request that removes *elements*, which are there, from the set *name*."""
    return DELSETELEM, 0, text(NAME, name) + among(elements)


def among(elements: Sequence[bytes]) -> bytes:
    """*elements* as a request has them."""
    return nested(ELEMENTS, b"".join(nested(ELEMENT, one) for one in elements))
