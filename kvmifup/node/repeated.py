"""Dumps that are made again and again, and mostly say what they said the last time: then nobody need read them."""

from __future__ import annotations

import socket

from kvmifup.node.messages import BODY, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSGHDR, RECEIVE
from kvmifup.node.transport import opened, raise_error

NUMBER = 1  # of every request: so what has not changed is the same, byte for byte
END = BODY + 4  # bytes of the message that ends a dump: a number follows its header


class Repeated:
    """Makes dumps by a socket of its own, in the network namespace of the first one. Not for two threads at once.

    A dump in parts may leave out what is there (`Transport.dump`). So what is not in it has to be asked for once more.
    """

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the socket; the next dump opens another one."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def dump(self, kind: int, body: bytes) -> bytes:
        """All messages that answer a request of the type *kind*, in a row. Raises NetlinkError, and other OSErrors."""
        self._socket = self._socket or opened(self._protocol)
        parts: list[bytes] = []
        try:
            self._socket.send(NLMSGHDR.pack(BODY + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, NUMBER, 0) + body)
            while not parts or not is_end(parts[-1]):
                # Not to wait for ever: the kernel makes the next part before it hands over the one before it.
                parts.append(self._socket.recv(RECEIVE, socket.MSG_DONTWAIT))
        except BaseException:
            self.close()  # what is left of the answer would be taken for the next one
            raise
        whole = b"".join(parts)
        raise_error(whole, BODY if is_refusal(whole) else len(whole) - 4)
        return whole[:-END]


def is_refusal(part: bytes) -> bool:
    """Whether *part* says that there will be no dump."""
    return bool(NLMSGHDR.unpack_from(part)[1] == NLMSG_ERROR)


def is_end(part: bytes) -> bool:
    """Whether *part* of a dump is the last one."""
    length, kind, _flags, number, _port = NLMSGHDR.unpack_from(part, len(part) - END)
    return is_refusal(part) or (length, kind, number) == (END, NLMSG_DONE, NUMBER)
