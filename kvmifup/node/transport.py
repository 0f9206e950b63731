"""The rtnetlink socket: sends a request, and takes in its answer or the messages of its dump."""

from __future__ import annotations

import socket
import sys

from kvmifup.node.messages import (
    BODY,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGHDR,
    RECEIVE,
    failure,
)

SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 12  # linux/netlink.h
TRIES = 10  # of a dump that other changes disturb


class Transport:
    """One request at a time, so not for two threads at once. A request that the kernel refuses raises NetlinkError."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0
        # The kernel obeys the filters of a dump, and refuses a request that it does not understand.
        self.socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        # An error does not bring the request back.
        self.socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def send(self, kind: int, flags: int, body: bytes) -> int:
        """Send a request of the type *kind* (RTM_*) with *flags* (NLM_F_*); returns its sequence number."""
        self._sequence += 1
        header = NLMSGHDR.pack(BODY + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0)
        self.socket.send(header + body)
        return self._sequence

    def ask(self, kind: int, flags: int, body: bytes) -> bytes:
        """Send a request; returns the message that answers it, empty for a mere acknowledgement."""
        request = self.send(kind, flags, body)
        while True:
            data = self.socket.recv(RECEIVE)
            length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(data)
            if sequence != request:  # left over from a request that was interrupted
                continue
            if answer == NLMSG_ERROR:
                raise_error(data, BODY)
                return b""
            return data[:length]

    def dump(self, kind: int, body: bytes, wanted: bytes = b"") -> list[bytes]:
        """Send a request for a dump; returns those of its messages that contain the bytes *wanted*.

        A dump that was disturbed may lack something (NLM_F_DUMP_INTR), so it is asked for again, but not for ever.
        """
        found: list[bytes] = []
        for _ in range(TRIES):
            found, whole = self._dump_once(kind, body, wanted)
            if whole:
                break
        return found

    def _dump_once(self, kind: int, body: bytes, wanted: bytes) -> tuple[list[bytes], bool]:
        request = self.send(kind, NLM_F_DUMP, body)
        found: list[bytes] = []
        seen = 0
        unpack = NLMSGHDR.unpack_from
        while True:
            data = self.socket.recv(RECEIVE)
            offset, end = 0, len(data)
            hit = data.find(wanted)
            while offset + BODY <= end:
                length, answer, flags, sequence, _port = unpack(data, offset)
                if sequence != request or length < BODY:  # left over from a request that was interrupted
                    break
                seen |= flags
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    raise_error(data, offset + BODY)
                    return found, not seen & NLM_F_DUMP_INTR
                # Most messages of a dump are not wanted: search for the next one that is, once for several messages.
                if 0 <= hit < offset + length:
                    found.append(data[offset : offset + length])
                    hit = data.find(wanted, offset + length)
                offset += length + 3 & ~3


def raise_error(data: bytes, offset: int) -> None:
    """Raise NetlinkError if the number at *offset* of an acknowledgement, or of the end of a dump, is an error."""
    if len(data) >= offset + 4:
        code = -int.from_bytes(data[offset : offset + 4], sys.byteorder, signed=True)
        if code > 0:
            raise failure(code)
