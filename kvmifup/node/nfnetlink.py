"""The nfnetlink requests that hooks make: what there is of a table of nftables, and changes as one transaction.

libnftables reads all rules of all chains to tell one, which takes 60 ms with 500 NICs, a whole set to find one element
in it, and need not be installed. So what every hook looks at is read here, and a dump is searched as bytes for the tap.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from functools import lru_cache

from kvmifup.node.messages import (
    BODY,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    NLMSGHDR,
    RECEIVE,
    NetlinkError,
    attributes,
    failure,
    text,
)
from kvmifup.node.nfmessages import (
    NETLINK_NETFILTER,
    NFGENMSG,
    NFNL_BATCH_GENID,
    NFNL_MSG_BATCH_BEGIN,
    NFNL_MSG_BATCH_END,
    NFNL_SUBSYS_NFTABLES,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETGEN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETSET,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TYPE,
    NFTA_CHAIN_USE,
    NFTA_GEN_ID,
    NFTA_HOOK_DEVS,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_RULE_CHAIN,
    NFTA_RULE_USERDATA,
    NFTA_SET_DATA_TYPE,
    NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_FLAGS,
    NFTA_SET_KEY_LEN,
    NFTA_SET_KEY_TYPE,
    NFTA_SET_NAME,
    NFTA_TABLE,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_USE,
    Element,
    Request,
    among,
    big,
    big_of,
    comment_of,
    keys_of,
    listed,
    named,
)
from kvmifup.node.refusals import forgiven
from kvmifup.node.transport import TRIES, Transport, raise_error, split

# What a request says if another change has come before it. The last: the ruleset is of another generation.
DISTURBED = (errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.ERESTART)
NO_NFTABLES = (errno.EINVAL, errno.EPROTONOSUPPORT)
LARGE, SO_SNDBUFFORCE = 1 << 17, 32  # bytes that any socket can send at once; asm-generic/socket.h
ATTRIBUTES = BODY + NFGENMSG.size  # where the attributes of a message begin

SetTypes = tuple[int, ...]  # flags; the numbers that nft has for the types of key and data; the key's bytes
ABOUT_SETS = (NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_DATA_TYPE, NFTA_SET_KEY_LEN)
Chain = tuple[int, int, int, str, tuple[str, ...]]  # of a base chain: hook, priority, policy, type, devices


class Nftables:
    """One table, of the *family* NFPROTO_* and the *name*, in the network namespace of its first request.

    Not for two threads at once. What the kernel refuses raises NetlinkError.
    """

    def __init__(self, family: int, name: str, beside: Nftables | Transport | None = None) -> None:
        """*beside* is another table whose socket it uses, or a socket."""
        self.family, self._name = family, named(NFTA_TABLE, name)
        self._called = name.encode() + b"\0"
        self._beside = beside
        self._own: Transport | None = None  # most NICs need none

    @property
    def _transport(self) -> Transport:
        if self._beside:
            return self._beside if isinstance(self._beside, Transport) else self._beside._transport
        self._own = self._own or Transport(NETLINK_NETFILTER)
        return self._own

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self._own:
            self._own.close()
            self._own = None

    # --- reading ---------------------------------------------------------------------------------------------

    def generation(self) -> int:
        """The number of the ruleset: each change of any table makes it another one."""
        message = self._transport.ask(kind(NFT_MSG_GETGEN), 0, NFGENMSG.pack(0, 0, 0))
        return big_of(attributes(message, ATTRIBUTES)[NFTA_GEN_ID])

    def itself(self) -> tuple[int, int] | None:
        """The flags of the table (NFT_TABLE_F_*), and how many chains and sets it has.

        None if there is none, as in a kernel without nftables.
        """
        try:
            found = self._get(NFT_MSG_GETTABLE, b"")
        except OSError as error:
            if error.errno not in NO_NFTABLES:
                raise
            return None
        return None if found is None else (big_of(found.get(NFTA_TABLE_FLAGS)), big_of(found.get(NFTA_TABLE_USE)))

    def chain(self, name: str) -> Chain | tuple[()] | None:
        """What there is to know of a base chain, nothing of another one; None if there is no such chain."""
        found = self._get(NFT_MSG_GETCHAIN, named(NFTA_CHAIN_NAME, name))
        return None if found is None else chain_in(found)

    def chains(self) -> dict[str, Chain | tuple[()]]:
        """The same of all chains, by name."""
        found = (attributes(one, ATTRIBUTES) for one in self._dump(NFT_MSG_GETCHAIN, b""))
        ours = (one for one in found if one.get(NFTA_TABLE) == self._called)  # older kernels tell those of all tables
        return {text(one.get(NFTA_CHAIN_NAME)) or "": chain_in(one) for one in ours}

    def uses(self, chain: str) -> int:
        """How many rules *chain* has, and how often it is led to by rules and elements; 0 without it."""
        found = self._get(NFT_MSG_GETCHAIN, named(NFTA_CHAIN_NAME, chain))
        return big_of(found.get(NFTA_CHAIN_USE)) if found else 0

    def sets(self) -> dict[str, SetTypes]:
        """What there is to know of each set, by its name."""
        found = (attributes(one, ATTRIBUTES) for one in self._dump(NFT_MSG_GETSET, b""))
        return {
            text(one.get(NFTA_SET_NAME)) or "": tuple(big_of(one.get(kind)) for kind in ABOUT_SETS) for one in found
        }

    def rules(self, chain: str = "") -> list[bytes]:
        """The rules of *chain*, or of the table, each as attributes NFTA_RULE_*; none if there is no such thing."""
        with forgiven(errno.ENOENT):
            found = self._dump(NFT_MSG_GETRULE, named(NFTA_RULE_CHAIN, chain) if chain else b"")
            return [one[ATTRIBUTES:] for one in found]
        return []

    def comments(self, chain: str = "") -> Mapping[str, tuple[str, ...]]:
        """By chain, the comment of each rule of *chain*, or of the table; empty for a rule without."""
        return comments_of(tuple(self.rules(chain)))

    def element(self, name: str, element: bytes) -> Element | None:
        """What the set *name* has for the *element* (`keyed`); None if it is not in it, or there is no such set."""
        found = self._get(NFT_MSG_GETSETELEM, named(NFTA_SET_ELEM_LIST_SET, name) + among([element]))
        for one in listed(found.get(NFTA_SET_ELEM_LIST_ELEMENTS, b"") if found else b""):
            return attributes(one)
        return None

    def elements(self, name: str) -> list[Element]:
        """All elements of the set *name*. Raises NetlinkError, also if there is no such set."""
        found = (held(one) for one in self._dump(NFT_MSG_GETSETELEM, named(NFTA_SET_ELEM_LIST_SET, name)))
        return [attributes(element) for part in found for element in listed(part)]

    def messages(self, name: str) -> list[bytes]:
        """The messages that have the elements of the set *name* (`nfmessages.entries`); none without such a set."""
        with forgiven(errno.ENOENT):
            return self._dump(NFT_MSG_GETSETELEM, named(NFTA_SET_ELEM_LIST_SET, name))
        return []

    def _get(self, what: int, payload: bytes) -> dict[int, bytes] | None:
        with forgiven(errno.ENOENT):
            message = self._transport.ask(kind(what), 0, NFGENMSG.pack(self.family, 0, 0) + self._name + payload)
            return attributes(message, ATTRIBUTES)
        return None

    def _dump(self, what: int, payload: bytes) -> list[bytes]:
        body = NFGENMSG.pack(self.family, 0, 0) + self._name + payload
        for _ in range(TRIES):
            parts, undisturbed = self._transport.dump_once(kind(what), body)
            if undisturbed:
                return [one for part in parts for one in split(part)]
        raise failure(errno.EINTR)

    # --- changing --------------------------------------------------------------------------------------------

    def change(
        self,
        requests: Sequence[Request],
        others: tuple[Nftables, Sequence[Request]] | None = None,
        *,
        generation: int | None = None,
        really: bool = True,
    ) -> None:
        """Do all *requests* as one transaction, or none; after them those of another table.

        With a *generation*, NetlinkError with ERESTART if the ruleset is not of it any more. Not *really*: only ask the
        kernel whether it would.
        """
        every = [(self, one) for one in requests] + ([(others[0], one) for one in others[1]] if others else [])
        if not every:
            return
        transport = self._transport
        expected = b"" if generation is None else big(NFNL_BATCH_GENID, generation)
        subsystem = NFGENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)
        first = transport.next_sequence()
        whole = [packed(NFNL_MSG_BATCH_BEGIN, 0, first, subsystem + expected)]
        last = first + len(every)
        for table, (what, flags, payload) in every:
            sequence = transport.next_sequence()
            body = NFGENMSG.pack(table.family, 0, 0) + table._name + payload
            whole.append(packed(kind(what), flags | NLM_F_ACK * (sequence == last), sequence, body))
        if really:
            whole.append(packed(NFNL_MSG_BATCH_END, 0, transport.next_sequence(), subsystem))
        send(transport.socket, b"".join(whole))
        failed: NetlinkError | None = None
        while True:
            data = transport.socket.recv(RECEIVE)
            _length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(data)
            if answer != NLMSG_ERROR or not first <= sequence <= last:
                continue
            try:
                raise_error(data, BODY)
            except NetlinkError as error:
                failed = failed or error
            if sequence == last or (sequence == first and failed):  # the first: not even the transaction is allowed
                if failed:
                    raise failed
                transport.answered()
                return


@lru_cache(4)  # they take a while to take apart, and are mostly those of the last time
def comments_of(rules: tuple[bytes, ...]) -> Mapping[str, tuple[str, ...]]:
    """By chain, the comments of *rules*, which are attributes NFTA_RULE_*."""
    found: dict[str, list[str]] = {}
    for one in map(attributes, rules):
        said = comment_of(one.get(NFTA_RULE_USERDATA, b"")) or ""
        found.setdefault(text(one.get(NFTA_RULE_CHAIN)) or "", []).append(said)
    return {name: tuple(every) for name, every in found.items()}


def chain_in(found: Mapping[int, bytes]) -> Chain | tuple[()]:
    """The chain that these attributes NFTA_CHAIN_* describe."""
    if NFTA_CHAIN_HOOK not in found:
        return ()
    hook = attributes(found[NFTA_CHAIN_HOOK])
    priority = int.from_bytes(hook[NFTA_HOOK_PRIORITY], "big", signed=True)
    policy, what = big_of(found.get(NFTA_CHAIN_POLICY)), text(found.get(NFTA_CHAIN_TYPE)) or ""
    devices = attributes(hook.get(NFTA_HOOK_DEVS, b"")).values()
    return big_of(hook[NFTA_HOOK_HOOKNUM]), priority, policy, what, tuple(text(one) or "" for one in devices)


def kind(what: int) -> int:
    """The type of a message of nf_tables."""
    return NFNL_SUBSYS_NFTABLES << 8 | what


def held(message: bytes) -> bytes:
    """The list of elements in a message."""
    return attributes(message, ATTRIBUTES).get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")


def packed(what: int, flags: int, sequence: int, body: bytes) -> bytes:
    """A message; its length is a multiple of four."""
    return NLMSGHDR.pack(BODY + len(body), what, NLM_F_REQUEST | flags, sequence, 0) + body


def send(asked: socket.socket, batch: bytes) -> None:
    """Send a *batch*: a NIC may have thousands of addresses."""
    if len(batch) > LARGE:
        for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first is not for a user namespace
            try:
                asked.setsockopt(socket.SOL_SOCKET, option, 2 * len(batch))
                break
            except OSError:
                continue
    asked.send(batch)


class ReadOnce(Nftables):
    """The table as it was at the first question about each set, for who only looks, and at all of it."""

    def __init__(self, family: int, name: str, beside: Nftables | Transport | None = None) -> None:
        super().__init__(family, name, beside)
        self._sets: dict[str, dict[tuple[bytes, bytes], Element]] = {}

    def element(self, name: str, element: bytes) -> Element | None:
        """As `Nftables.element`; of a range only the whole one."""
        if name not in self._sets:
            self._sets[name] = {}
            with forgiven(errno.ENOENT):
                self._sets[name] = {keys_of(one): one for one in self.elements(name)}
        return self._sets[name].get(keys_of(attributes(element)))
