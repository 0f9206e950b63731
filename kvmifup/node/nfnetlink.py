"""What a hook must know of a table of nftables, by netlink; and the removal of elements, chains and the table.

libnftables reads all rules of all chains to tell one, which takes 60 ms with 500 NICs. So what every hook looks at is
read here, and a dump is searched as bytes for the tap. Names are those of linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator, Sequence
from struct import Struct

from kvmifup.node.messages import (
    BODY,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    NLMSGHDR,
    NetlinkError,
    attribute,
    attributes,
    failure,
    text,
)
from kvmifup.node.transport import TRIES, Transport, split

NETLINK_NETFILTER, NFPROTO_NETDEV, NFPROTO_BRIDGE = 12, 5, 7
NFNL_SUBSYS_NFTABLES, NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 10, 0x10, 0x11, 1
NFT_MSG_GETTABLE, NFT_MSG_DELTABLE, NFT_MSG_GETCHAIN, NFT_MSG_DELCHAIN = 1, 2, 4, 5
NFT_MSG_GETRULE, NFT_MSG_DELRULE, NFT_MSG_GETSET, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM = 7, 8, 10, 13, 14
NFT_MSG_GETGEN = 16
NFTA_GEN_ID = 1
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS, NFTA_TABLE_USE = 1, 2, 3
NFT_TABLE_F_DORMANT, NFT_TABLE_F_OWNER = 1, 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 1, 3, 4, 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_HOOK_DEVS = 1, 2, 4
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_USERDATA = 1, 2, 7
NFTNL_UDATA_RULE_COMMENT = 0
NFTA_SET_TABLE, NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_DATA_TYPE = 1, 2, 3, 4, 6
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_KEY_END = 1, 1, 2, 10
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN = 1, 2, 1, 2
NFT_GOTO = 0xFFFFFFFC
NESTED = 0x8000
IFNAMSIZ = 16
ERESTART = 85  # the batch is for another generation of the ruleset than there is now
SO_SNDBUFFORCE, SENT = 32, 1 << 24  # a NIC may have thousands of addresses

NFGENMSG = Struct(">BBH")  # family, version, what the batch is for
BE32 = Struct(">I")
HEADER = Struct("=HH")
Chain = tuple[int, int, int, str, tuple[str, ...]]  # of a base chain: hook, priority, policy, type, devices
Message = tuple[int, int, bytes]  # of a batch: family, type, body
Entry = tuple[bytes, bytes, str]  # of an element: its key, that where its range ends, the chain of its verdict


class Nftables:
    """One table of a *family*, in this network namespace. Not for two threads at once. Raises NetlinkError."""

    def __init__(self, table: str, family: int, transport: Transport | None = None) -> None:
        self.table, self.family = table, family
        self.transport = self._transport = transport or Transport(NETLINK_NETFILTER)
        self._dumps: dict[str, list[bytes]] = {}  # of sets, as they were at a generation
        self._seen = -1

    def close(self) -> None:
        """Close the socket."""
        self._transport.close()

    def generation(self) -> int:
        """The number of the ruleset: each change of any table makes it another one."""
        message = self._transport.ask(kind(NFT_MSG_GETGEN), 0, NFGENMSG.pack(0, 0, 0))
        found: int = BE32.unpack_from(attributes(message, BODY + 4)[NFTA_GEN_ID])[0]
        if found != self._seen:
            self._dumps.clear()
            self._seen = found
        return found

    def itself(self) -> tuple[int, int] | None:
        """The flags of the table (NFT_TABLE_F_*), and how many chains and sets it has; None if there is none."""
        found = self._get(NFT_MSG_GETTABLE, named(NFTA_TABLE_NAME, self.table))
        if found is None:
            return None
        return be32(found.get(NFTA_TABLE_FLAGS)) or 0, be32(found.get(NFTA_TABLE_USE)) or 0

    def chain(self, name: str) -> Chain | tuple[()] | None:
        """What there is to know of a base chain, nothing of another one; None if there is no such chain."""
        found = self._get(NFT_MSG_GETCHAIN, named(NFTA_CHAIN_TABLE, self.table) + named(NFTA_CHAIN_NAME, name))
        if found is None or NFTA_CHAIN_HOOK not in found:
            return None if found is None else ()
        hook = attributes(found[NFTA_CHAIN_HOOK])
        priority = int.from_bytes(hook[NFTA_HOOK_PRIORITY], "big", signed=True)
        policy, what = be32(found.get(NFTA_CHAIN_POLICY)) or 0, text(found.get(NFTA_CHAIN_TYPE)) or ""
        devices = attributes(hook.get(NFTA_HOOK_DEVS, b"")).values()
        return be32(hook[NFTA_HOOK_HOOKNUM]) or 0, priority, policy, what, tuple(text(one) or "" for one in devices)

    def set_types(self, name: str) -> tuple[int, int, int] | None:
        """Flags, and the numbers that nft has for the types of key and data; None if there is no such set."""
        found = self._get(NFT_MSG_GETSET, named(NFTA_SET_TABLE, self.table) + named(NFTA_SET_NAME, name))
        if found is None:
            return None
        flags, key, data = (
            be32(found.get(one)) or 0 for one in (NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_DATA_TYPE)
        )
        return flags, key, data

    def comments(self, chain: str) -> tuple[str, ...]:
        """The comment of each rule of *chain*, empty for one without."""
        body = named(NFTA_RULE_TABLE, self.table) + named(NFTA_RULE_CHAIN, chain)
        found = self._dump(NFT_MSG_GETRULE, body)
        return tuple(comment(attributes(one, BODY + 4).get(NFTA_RULE_USERDATA, b"")) for one in found)

    def elements(self, name: str, tap: bytes) -> list[Entry]:
        """The elements of the set *name* whose key begins with *tap*."""
        wanted = tap.ljust(IFNAMSIZ, b"\0")
        return [one for message in self._every(name) for one in entries(message, wanted)]

    def element(self, name: str, tap: bytes) -> list[Entry]:
        """The same of a set that has nothing but taps: without reading all of it."""
        wanted = tap.ljust(IFNAMSIZ, b"\0")
        which = nested(NFTA_SET_ELEM_LIST_ELEMENTS, nested(NFTA_LIST_ELEM, keys((wanted, b"", ""))))
        body = named(NFTA_SET_ELEM_LIST_TABLE, self.table) + named(NFTA_SET_ELEM_LIST_SET, name) + which
        found = self._get(NFT_MSG_GETSETELEM, body)
        return [] if found is None else list(entries(found.get(NFTA_SET_ELEM_LIST_ELEMENTS, b""), wanted))

    def count(self, name: str) -> int:
        """How many elements the set *name* has."""
        found = (attributes(message, BODY + 4).get(NFTA_SET_ELEM_LIST_ELEMENTS, b"") for message in self._every(name))
        return sum(map(length, found))

    def _every(self, name: str) -> list[bytes]:
        """All elements of the set *name*, as the messages that have them."""
        if name not in self._dumps:
            body = named(NFTA_SET_ELEM_LIST_TABLE, self.table) + named(NFTA_SET_ELEM_LIST_SET, name)
            self._dumps[name] = self._dump(NFT_MSG_GETSETELEM, body)
        return self._dumps[name]

    def _get(self, what: int, body: bytes) -> dict[int, bytes] | None:
        try:
            message = self._transport.ask(kind(what), 0, NFGENMSG.pack(self.family, 0, 0) + body)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return attributes(message, BODY + 4)

    def _dump(self, what: int, body: bytes) -> list[bytes]:
        for _ in range(TRIES):
            try:
                parts, undisturbed = self._transport.dump_once(kind(what), NFGENMSG.pack(self.family, 0, 0) + body)
            except NetlinkError as error:
                if error.errno == errno.ENOENT:
                    return []
                raise
            if undisturbed:
                break
        return [one for part in parts for one in split(part)]

    # --- removing -------------------------------------------------------------------------------------------

    def without(self, elements: Sequence[tuple[str, Entry]], chains: Sequence[str]) -> Iterator[Message]:
        """What removes elements (the set of each, and what it is) and chains."""
        table = named(NFTA_TABLE_NAME, self.table)  # the first attribute of all of them
        for name, entry in elements:
            element = nested(NFTA_SET_ELEM_LIST_ELEMENTS, nested(NFTA_LIST_ELEM, keys(entry)))
            yield self.family, NFT_MSG_DELSETELEM, table + named(NFTA_SET_ELEM_LIST_SET, name) + element
        for chain in chains:
            yield self.family, NFT_MSG_DELRULE, table + named(NFTA_RULE_CHAIN, chain)
            yield self.family, NFT_MSG_DELCHAIN, table + named(NFTA_CHAIN_NAME, chain)

    def gone(self) -> Message:
        """What removes the table."""
        return self.family, NFT_MSG_DELTABLE, named(NFTA_TABLE_NAME, self.table)

    def commit(self, generation: int, messages: Sequence[Message]) -> None:
        """Do all of it in one transaction. NetlinkError, ERESTART: the ruleset is not of *generation* any more."""
        request = self._transport.next_sequence()
        subsystem = NFGENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)
        whole = [
            packed(NFNL_MSG_BATCH_BEGIN, 0, request, subsystem + attribute(NFNL_BATCH_GENID, BE32.pack(generation)))
        ]
        for position, (family, what, body) in enumerate(messages, 1):
            flags = NLM_F_ACK if position == len(messages) else 0
            whole.append(packed(kind(what), flags, request, NFGENMSG.pack(family, 0, 0) + body))
        whole.append(packed(NFNL_MSG_BATCH_END, 0, request, subsystem))
        batch = b"".join(whole)
        if len(batch) > 1 << 17:
            for option, size in ((SO_SNDBUFFORCE, SENT), (socket.SO_SNDBUF, SENT)):
                try:
                    self._transport.socket.setsockopt(socket.SOL_SOCKET, option, size)
                    break
                except OSError:
                    continue
        self._transport.socket.send(batch)
        while True:
            data = self._transport.socket.recv(1 << 16)
            _length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(data)
            if sequence == request and answer == NLMSG_ERROR:
                code = -int.from_bytes(data[BODY : BODY + 4], sys.byteorder, signed=True)
                if code:
                    raise failure(code)
                return


def kind(what: int) -> int:
    """The type of a message of nf_tables."""
    return NFNL_SUBSYS_NFTABLES << 8 | what


def named(attr: int, name: str) -> bytes:
    """An attribute that is a name."""
    return attribute(attr, name.encode() + b"\0")


def nested(attr: int, inner: bytes) -> bytes:
    """An attribute that has others in it."""
    return attribute(attr | NESTED, inner)


def packed(what: int, flags: int, sequence: int, body: bytes) -> bytes:
    """A message; its length is a multiple of four."""
    return NLMSGHDR.pack(BODY + len(body), what, NLM_F_REQUEST | flags, sequence, 0) + body


def keys(entry: Entry) -> bytes:
    """What names an element: its key, or both ends of its range."""
    key, end, _ = entry
    found = nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key))
    return found + (nested(NFTA_SET_ELEM_KEY_END, attribute(NFTA_DATA_VALUE, end)) if end else b"")


def be32(data: bytes | None) -> int | None:
    """A number as nf_tables has it."""
    return None if data is None else int(BE32.unpack_from(data)[0])


def comment(data: bytes) -> str:
    """The comment in what nft has noted of a rule; empty without one."""
    offset = 0
    while offset + 2 <= len(data):
        what, length = data[offset], data[offset + 1]
        if what == NFTNL_UDATA_RULE_COMMENT:
            return data[offset + 2 : offset + 2 + length].rstrip(b"\0").decode("utf-8", "replace")
        offset += 2 + length
    return ""


def length(data: bytes) -> int:
    """How many attributes there are in *data*."""
    offset = found = 0
    while offset + HEADER.size <= len(data):
        offset += HEADER.unpack_from(data, offset)[0] + 3 & ~3
        found += 1
    return found


def entries(message: bytes, wanted: bytes) -> Iterator[Entry]:
    """The elements in *message* whose key begins with *wanted*.

    Each is an attribute with others in it. The first is the key, in which there is one with the value.
    """
    hit = message.find(wanted)
    while hit >= 0:
        start = hit - 3 * HEADER.size
        if start >= 0:
            (whole, outer), (_, key), (size, value) = (HEADER.unpack_from(message, start + 4 * one) for one in range(3))
            if (outer & ~NESTED, key & ~NESTED, value) == (NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE):
                inner = attributes(message[start + 4 : start + whole])
                end = attributes(inner.get(NFTA_SET_ELEM_KEY_END, b"")).get(NFTA_DATA_VALUE, b"")
                data = attributes(inner.get(NFTA_SET_ELEM_DATA, b""))
                yield message[hit : hit + size - 4], end, verdict(attributes(data.get(NFTA_DATA_VERDICT, b"")))
        hit = message.find(wanted, hit + 1)


def verdict(found: dict[int, bytes]) -> str:
    """The chain of a `goto`; another verdict as a number."""
    if not found:
        return ""
    code = be32(found.get(NFTA_VERDICT_CODE))
    return text(found.get(NFTA_VERDICT_CHAIN)) or "" if code == NFT_GOTO else f"verdict {code}"
