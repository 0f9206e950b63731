"""Whether any change of nftables since the last look was about our tables: the kernel tells every one, by generation.

On many nodes somebody else changes other tables all the time, and to read ours again takes milliseconds.
"""

from __future__ import annotations

import errno
import socket
import sys

from kvmifup.node.messages import BODY, RECEIVE, attributes
from kvmifup.node.nfmessages import (
    NETLINK_NETFILTER,
    NFNL_SUBSYS_NFTABLES,
    NFNLGRP_NFTABLES,
    NFT_MSG_NEWGEN,
    NFTA_GEN_ID,
    big_of,
)
from kvmifup.node.nfnetlink import ATTRIBUTES
from kvmifup.node.transport import split

NEW_GENERATION = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN


class Heard:
    """Hears of all changes from the moment it is made, in the network namespace that it is made in.

    Raises OSError when it is made without CAP_NET_ADMIN.
    """

    def __init__(self, families: frozenset[int], table: str) -> None:
        """*table*, in each of the *families*, is ours."""
        self._families, self._name = families, table.encode() + b"\0"
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        self._socket.bind((0, 1 << NFNLGRP_NFTABLES - 1))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def only_others(self, before: int, now: int) -> bool:
        """Whether every change that made generation *now* out of *before* was about tables that are not ours.

        False also if that cannot be told: the kernel has had no room for a message, or its last one is not there yet.
        What was told up to *now* is forgotten.
        """
        ours = lost = False
        made = before  # by the messages so far, without a gap
        while made != now:
            try:
                data = self._socket.recv(RECEIVE)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            for message in split(data):
                if int.from_bytes(message[4:6], sys.byteorder) == NEW_GENERATION:
                    generation = big_of(attributes(message, ATTRIBUTES).get(NFTA_GEN_ID))
                    if generation == made + 1:
                        made = generation
                    elif made == before and generation <= before:
                        ours = False  # that was before the last look
                    else:
                        lost = True
                elif self._name in message and message[BODY] in self._families:
                    ours = True
        return not ours and not lost
