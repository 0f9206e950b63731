"""A netlink socket: sends a request, and takes in its answer or the messages of its dump."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import suppress
from itertools import chain

from kvmifup.node.messages import (
    BODY,
    IFADDRMSG,
    NDA_DST,
    NDMSG,
    NLATTR,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGHDR,
    RECEIVE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWQDISC,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTM_NEWTFILTER,
    RTM_NEWVLAN,
    RTMSG,
    failure,
)

SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 12  # linux/netlink.h
TRIES = 10  # of a dump that other changes disturb
LAST = 1 << 31  # the number of a request after which a socket is not used again
# By kind of message: the size of its header, and the attribute with ages (RTA_CACHEINFO, IFA_CACHEINFO, NDA_CACHEINFO).
HEADERS = {
    RTM_NEWROUTE: (RTMSG.size, 12),
    RTM_NEWADDR: (IFADDRMSG.size, 6),
    RTM_NEWNEIGH: (NDMSG.size, 3),
    RTM_NEWVLAN: (8, 0),  # struct br_vlan_msg
    RTM_NEWQDISC: (20, 7),  # struct tcmsg; counters (TCA_STATS2)
    RTM_NEWTFILTER: (20, 7),
}

Keep = Callable[[bytes], bool] | None  # which messages of a dump; None is all


class Spare:
    """Sockets that nobody uses at the moment, of the network namespace that they were made in. For all threads.

    Not only for the time that it takes to make one. To close one of NETLINK_NETFILTER takes 10 ms after something was
    removed from a ruleset: the kernel waits until that is gone (nft_rcv_nl_event in net/netfilter/nf_tables_api.c).
    """

    MOST = 64  # of each protocol: as many as the agent has threads for hooks

    def __init__(self) -> None:
        self._sockets: dict[int, list[tuple[socket.socket, int]]] = {}  # by protocol

    def take(self, protocol: int) -> tuple[socket.socket, int] | None:
        """A socket that has been used, and the number of its last request; None if there is none."""
        with suppress(LookupError):
            return self._sockets[protocol].pop()
        return None

    def give(self, protocol: int, one: socket.socket, last: int) -> None:
        """Take in a socket whose *last* request has been answered; close it if there are enough."""
        there = self._sockets.setdefault(protocol, [])
        if len(there) < self.MOST:
            there.append((one, last))
        else:
            one.close()

    def close(self) -> None:
        """Close all of them."""
        for one, _ in chain(*self._sockets.values()):
            one.close()


_kept: list[Spare] = []


def keep() -> Callable[[], None]:
    """From now on keep sockets that are closed for who needs one next, for this process; what it returns ends that."""
    spare = Spare()
    _kept.append(spare)

    def end() -> None:
        _kept.remove(spare)
        spare.close()

    return end


class Transport:
    """One request at a time, so not for two threads at once. A request that the kernel refuses raises NetlinkError."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE, *, fresh: bool = False) -> None:
        """*fresh*: by a socket that nobody has used before."""
        self._protocol = protocol
        self._closed = False
        self._answered = True  # whether all has come that was asked for
        self._spares = _kept[0] if _kept else None  # where its socket comes from, and goes back to
        spare = self._spares.take(protocol) if self._spares and not fresh else None
        self.socket, self._sequence = spare or (opened(protocol), 0)
        self._warm = spare is not None  # whether it has received something
        self.undisturbed = True  # whether the kernel has said nothing else of the last dump

    def close(self) -> None:
        """Close the socket, or leave it to who needs one next."""
        if self._closed:
            return
        self._closed = True
        # Not to another one, which may be another network namespace's.
        if self._spares in _kept and self._answered and 0 < self._sequence < LAST:
            self._spares.give(self._protocol, self.socket, self._sequence)
        else:
            self.socket.close()

    def send(self, kind: int, flags: int, body: bytes) -> int:
        """Send a request of the type *kind* (RTM_*) with *flags* (NLM_F_*); returns its sequence number."""
        sequence = self.next_sequence()
        self.socket.send(NLMSGHDR.pack(BODY + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body)
        return sequence

    def next_sequence(self) -> int:
        """The number for the next request."""
        self._answered = False
        self._sequence += 1
        return self._sequence

    def answered(self) -> None:
        """All has come that was asked for."""
        self._answered = True

    def ask(self, kind: int, flags: int, body: bytes) -> bytes:
        """Send a request; returns the message that answers it, empty for a mere acknowledgement."""
        request = self.send(kind, flags, body)
        while True:
            data = self.socket.recv(RECEIVE)
            self._warm = True
            length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(data)
            if sequence != request:  # left over from a request that was interrupted
                continue
            self._answered = True
            if answer == NLMSG_ERROR:
                raise_error(data, BODY)
                return b""
            return data[:length]

    def dump(self, kind: int, body: bytes, wanted: bytes = b"", keep: Keep = None) -> list[bytes]:
        """Send a request for a dump; returns those of its messages that contain the bytes *wanted*, and pass *keep*.

        The kernel sends a large dump in parts, and counts where it was. What is removed between two parts moves the
        rest, and then what comes right after the end of a part is left out, though it was there all the time. Only for
        devices the kernel says so (NLM_F_DUMP_INTR). So a dump in parts is made twice, with parts that end elsewhere.
        """
        every: dict[bytes, bytes] = {}

        def take(parts: Iterable[bytes], known: Set[int] = frozenset()) -> None:
            for part in parts:  # each goes before the next one comes: they may be about thousands of devices
                found = filter(keep, split(part, wanted))
                every.update((identity(one), one) for one in found if not known or hash(one[BODY:]) not in known)

        for _ in range(TRIES):
            warm = self._warm
            parts = self.parts(kind, body)
            first, second = next(parts, b""), next(parts, b"")
            if not second and self.undisturbed and not every:
                return [*filter(keep, split(first, wanted))]
            take(chain((first, second), parts))
            undisturbed = self.undisturbed
            if undisturbed and second:
                # The first part that a socket gets is small, until it has received something (netlink_dump).
                other = Transport(fresh=True) if warm else self
                try:
                    known = {hash(one[BODY:]) for one in every.values()}  # nearly all are the same
                    take(other.parts(kind, body), known)
                finally:
                    if warm:
                        other.close()
                undisturbed = other.undisturbed
            if undisturbed:
                break
        return list(every.values())

    def dump_once(self, kind: int, body: bytes) -> tuple[list[bytes], bool]:
        """All `parts` of a dump; and False if the kernel says that it was disturbed."""
        return list(self.parts(kind, body)), self.undisturbed

    def parts(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The parts of a dump as they come, each with all of its messages. Then `undisturbed` is about it."""
        request = self.send(kind, NLM_F_DUMP, body)
        seen = 0
        unpack = NLMSGHDR.unpack_from
        while True:
            data = self.socket.recv(RECEIVE)
            self._warm = True
            offset, end = 0, len(data)
            while offset + BODY <= end:
                length, answer, flags, sequence, _port = unpack(data, offset)
                if sequence != request or length < BODY:  # left over from a request that was interrupted
                    break
                seen |= flags
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    self._answered, self.undisturbed = True, not seen & NLM_F_DUMP_INTR
                    raise_error(data, offset + BODY)
                    if offset:
                        yield data[:offset]
                    return
                offset += length + 3 & ~3
            else:
                yield data


def opened(protocol: int) -> socket.socket:
    """A new socket. Raises OSError."""
    found = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    # The kernel obeys the filters of a dump, and refuses a request that it does not understand.
    found.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
    # An error does not bring the request back.
    found.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
    return found


def split(part: bytes, wanted: bytes = b"") -> Iterator[bytes]:
    """The messages in one part of a dump that contain the bytes *wanted*."""
    offset, end = 0, len(part)
    # Most are not wanted: search for the next one that is, once for several messages.
    hit = part.find(wanted)
    while hit >= 0 and offset + BODY <= end:
        length = int.from_bytes(part[offset : offset + 4], sys.byteorder)
        if hit < offset + length:
            yield part[offset : offset + length]
            hit = part.find(wanted, offset + length)
        offset += length + 3 & ~3


def identity(message: bytes) -> bytes:
    """What a message of a dump is about, without what changes by itself: ages, counters, states."""
    kind = int.from_bytes(message[4:6], sys.byteorder)
    if kind == RTM_NEWLINK:
        return message[BODY + 4 : BODY + 8]  # the index
    if kind == RTM_NEWRULE:
        return message[BODY:]
    header, ages = HEADERS.get(kind, (0, 0))
    found, offset = [message[4:6], message[BODY : BODY + header]], BODY + header
    if kind == RTM_NEWNEIGH:
        found[1] = message[BODY + 4 : BODY + 8] + message[BODY + 10 : BODY + 12]  # index, flags and type: not its state
    while offset + 4 <= len(message):
        length, attribute = NLATTR.unpack_from(message, offset)
        if length < 4:
            break
        if attribute != ages and (kind != RTM_NEWNEIGH or attribute == NDA_DST):
            found.append(message[offset : offset + length])
        offset += length + 3 & ~3
    return b"".join(found)


def raise_error(data: bytes, offset: int) -> None:
    """Raise NetlinkError if the number at *offset* of an acknowledgement, or of the end of a dump, is an error."""
    if len(data) >= offset + 4:
        code = -int.from_bytes(data[offset : offset + 4], sys.byteorder, signed=True)
        if code > 0:
            raise failure(code)
