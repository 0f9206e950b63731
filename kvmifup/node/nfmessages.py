"""Layouts of the nfnetlink messages that hooks need, with the names of the kernel's headers.

The numbers in them are big-endian, and whatever is of one table begins with the table's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from struct import Struct

from kvmifup.node.messages import (
    NLA_F_NESTED,
    NLATTR,
    NLM_F_CREATE,
    attribute,
    attributes,
    text,
)

# linux/netlink.h, linux/netfilter.h, linux/netfilter/nfnetlink.h
NETLINK_NETFILTER, NFPROTO_INET, NFPROTO_NETDEV, NFPROTO_BRIDGE = 12, 1, 5, 7
NFNL_SUBSYS_NFTABLES, NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 10, 0x10, 0x11, 1
NFNLGRP_NFTABLES = 7
NF_DROP, NF_ACCEPT = 0, 1
NF_INET_PRE_ROUTING = NF_BR_PRE_ROUTING = NF_NETDEV_INGRESS = 0
# linux/netfilter/nf_tables.h
NFT_MSG_NEWTABLE, NFT_MSG_GETTABLE, NFT_MSG_DELTABLE = 0, 1, 2
NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN, NFT_MSG_DELCHAIN = 3, 4, 5
NFT_MSG_NEWRULE, NFT_MSG_GETRULE, NFT_MSG_DELRULE = 6, 7, 8
NFT_MSG_NEWSET, NFT_MSG_GETSET = 9, 10
NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM, NFT_MSG_NEWGEN, NFT_MSG_GETGEN = 12, 13, 14, 15, 16
NFTA_TABLE = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE
NFTA_TABLE_FLAGS, NFTA_TABLE_USE, NFTA_GEN_ID = 2, 3, 1
NFT_TABLE_F_DORMANT, NFT_TABLE_F_OWNER = 1, 2
NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_USE, NFTA_CHAIN_TYPE = 3, 4, 5, 6, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_HOOK_DEV, NFTA_HOOK_DEVS = 1, 2, 3, 4
NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA = 2, 4, 7
NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN, NFTA_SET_DATA_TYPE, NFTA_SET_DATA_LEN = range(2, 8)
NFTA_SET_DESC, NFTA_SET_ID, NFTA_SET_USERDATA, NFTA_SET_EXPR = 9, 10, 13, 17
NFTA_SET_DESC_CONCAT, NFTA_SET_FIELD_LEN, NFTA_LIST_ELEM = 2, 1, 1
NFT_SET_INTERVAL, NFT_SET_MAP, NFT_SET_CONCAT, NFT_DATA_VERDICT = 0x4, 0x8, 0x80, 0xFFFFFF00
NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 2, 3
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_USERDATA, NFTA_SET_ELEM_EXPR = 1, 2, 6, 7
NFTA_SET_ELEM_KEY_END, NFTA_SET_ELEM_EXPRESSIONS = 10, 11
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN = 1, 2, 1, 2
NFT_JUMP, NFT_GOTO = 0xFFFFFFFD, 0xFFFFFFFC
NFTA_EXPR_NAME, NFTA_EXPR_DATA, NFTA_COUNTER_PACKETS = 1, 2, 2
# What nft itself notes and numbers: libnftnl/udata.h, datatype.h. A concatenation has six bits for each type.
NFTNL_UDATA_COMMENT = 0  # NFTNL_UDATA_RULE_COMMENT, NFTNL_UDATA_SET_ELEM_COMMENT
TYPES = {"integer": 4, "ifname": 41, "ether_addr": 9, "ipv4_addr": 7, "ipv6_addr": 8}
IFNAMSIZ = 16  # linux/if.h
AT_ONCE = 400  # elements in one message, whose attributes have at most 64 KiB

NFGENMSG = Struct(">BBH")  # family, version, resource
Request = tuple[int, int, bytes]  # a message of a transaction: NFT_MSG_*, NLM_F_*, attributes without the table's name
Element = Mapping[int, bytes]  # of a set: its attributes NFTA_SET_ELEM_*
Entry = tuple[bytes, bytes, str]  # of an element: its key, that where its range ends, the chain of its verdict


# --- attributes ------------------------------------------------------------------------------------------


def nested(kind: int, payload: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, payload)


def named(kind: int, value: str) -> bytes:
    """An attribute that is a name."""
    return attribute(kind, value.encode() + b"\0")


def big(kind: int, value: int) -> bytes:
    """An attribute that is a number of four bytes."""
    return attribute(kind, value.to_bytes(4, "big", signed=value < 0))


def big_of(data: bytes | None) -> int:
    """The number in an attribute, 0 without the attribute."""
    return int.from_bytes(data or b"", "big")


def plain(value: bytes) -> bytes:
    """An attribute without the marks of those that hold others, which the kernel does not always set."""
    return value.replace(b"\1\x80", b"\1\0").replace(b"\2\x80", b"\2\0")


def valued(kind: int, value: bytes) -> bytes:
    """An attribute that holds a value."""
    return nested(kind, attribute(NFTA_DATA_VALUE, value))


def listed(payload: bytes) -> Iterator[bytes]:
    """What each attribute in *payload* holds: a list has them all of one kind."""
    offset = 0
    while offset + NLATTR.size <= len(payload):
        length, _ = NLATTR.unpack_from(payload, offset)
        if length < NLATTR.size:
            return
        yield payload[offset + NLATTR.size : offset + length]
        offset += length + 3 & ~3


def comment_of(data: bytes) -> str | None:
    """The comment in what nft has noted of a rule or an element; None without one."""
    offset = 0
    while offset + 2 <= len(data):
        what, length = data[offset], data[offset + 1]
        if what == NFTNL_UDATA_COMMENT:
            return data[offset + 2 : offset + 2 + length].rstrip(b"\0").decode("utf-8", "replace")
        offset += 2 + length
    return None


def commented(comment: str) -> bytes:
    """What nft notes of a rule or an element with that comment: the reverse of `comment_of`."""
    return bytes((NFTNL_UDATA_COMMENT, len(comment) + 1)) + comment.encode() + b"\0"


def verdict(code: int, chain: str = "") -> bytes:
    """A verdict: NF_* or NFT_*, and the chain that it leads to."""
    leads = named(NFTA_VERDICT_CHAIN, chain) if chain else b""
    return nested(NFTA_DATA_VERDICT, big(NFTA_VERDICT_CODE, code) + leads)


def verdict_of(element: Element) -> tuple[int, str] | None:
    """The verdict of an element of a map: its code, and the chain that it leads to. None without one."""
    found = attributes(attributes(element.get(NFTA_SET_ELEM_DATA, b"")).get(NFTA_DATA_VERDICT, b""))
    return (big_of(found.get(NFTA_VERDICT_CODE)), text(found.get(NFTA_VERDICT_CHAIN)) or "") if found else None


# --- rules -----------------------------------------------------------------------------------------------


def expression(name: str, payload: bytes) -> bytes:
    """One expression of a rule."""
    return nested(NFTA_LIST_ELEM, typed(name, payload))


def typed(name: str, payload: bytes) -> bytes:
    """The attributes of an expression."""
    return named(NFTA_EXPR_NAME, name) + nested(NFTA_EXPR_DATA, payload)


def then(code: int, chain: str = "") -> bytes:
    """The verdict of a rule."""
    return expression("immediate", big(1, 0) + nested(2, verdict(code, chain)))


def made_rule(chain: str, expressions: bytes) -> Request:
    """The request that makes a rule."""
    return create(NFT_MSG_NEWRULE, named(NFTA_RULE_CHAIN, chain) + nested(NFTA_RULE_EXPRESSIONS, expressions))


# --- elements of sets ------------------------------------------------------------------------------------


def device_key(dev: str) -> bytes:
    """A device's name as a key has it."""
    return os.fsencode(dev).ljust(IFNAMSIZ, b"\0")


def keyed(key: bytes, end: bytes = b"") -> bytes:
    """What names an element: its key, or both ends of its range."""
    return valued(NFTA_SET_ELEM_KEY, key) + (valued(NFTA_SET_ELEM_KEY_END, end) if end else b"")


def keys_of(element: Element) -> tuple[bytes, bytes]:
    """The key of *element*, and that where its range ends: the reverse of `keyed`."""
    key, end = (element.get(kind, b"") for kind in (NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_KEY_END))
    return attributes(key).get(NFTA_DATA_VALUE, b""), attributes(end).get(NFTA_DATA_VALUE, b"")


def entry_of(element: Element) -> Entry:
    """The *element*; a verdict that is no `goto` as a number."""
    code, chain = verdict_of(element) or (NFT_GOTO, "")
    return *keys_of(element), chain if code == NFT_GOTO else f"verdict {code}"


def entries(message: bytes, wanted: bytes) -> Iterator[Entry]:
    """The elements in *message* whose key begins with *wanted*.

    Each is an attribute with others in it. The first is the key, in which there is one with the value.
    """
    hit = message.find(wanted)
    while hit >= 0:
        start = hit - 3 * NLATTR.size
        if start >= 0:
            (whole, outer), (_, key), (_, value) = (NLATTR.unpack_from(message, start + 4 * one) for one in range(3))
            kinds = outer & ~NLA_F_NESTED, key & ~NLA_F_NESTED, value
            if kinds == (NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE):
                yield entry_of(attributes(message[start + 4 : start + whole]))
        hit = message.find(wanted, hit + 1)


def among(elements: Sequence[bytes]) -> bytes:
    """*elements* as a request has them."""
    return nested(NFTA_SET_ELEM_LIST_ELEMENTS, b"".join(nested(NFTA_LIST_ELEM, one) for one in elements))


# --- requests --------------------------------------------------------------------------------------------


def create(kind: int, payload: bytes) -> Request:
    """The request that makes something; it may be there."""
    return kind, NLM_F_CREATE, payload


def put(name: str, *elements: bytes) -> Request:
    """The request that puts *elements* into the set *name*; they may be there."""
    return create(NFT_MSG_NEWSETELEM, named(NFTA_SET_ELEM_LIST_SET, name) + among(elements))


def remove(name: str, *elements: bytes) -> Request:
    """The request that removes *elements*, which are there, from the set *name*."""
    return NFT_MSG_DELSETELEM, 0, named(NFTA_SET_ELEM_LIST_SET, name) + among(elements)


def for_each_set(how: Callable[..., Request], elements: Iterable[tuple[str, bytes]]) -> Iterator[Request]:
    """The requests that `put`, or `remove`, all *elements*, each with its set: as few as it takes."""
    found: dict[str, list[bytes]] = {}
    for name, element in elements:
        found.setdefault(name, []).append(element)
    for name, every in found.items():
        yield from (how(name, *every[first : first + AT_ONCE]) for first in range(0, len(every), AT_ONCE))


def emptied(chain: str) -> Request:
    """The request that removes all rules of *chain*."""
    return NFT_MSG_DELRULE, 0, named(NFTA_RULE_CHAIN, chain)


def without_chain(chain: str) -> tuple[Request, Request]:
    """The requests that remove *chain* with its rules."""
    return emptied(chain), (NFT_MSG_DELCHAIN, 0, named(NFTA_CHAIN_NAME, chain))


WITHOUT_TABLE: Request = NFT_MSG_DELTABLE, 0, b""
