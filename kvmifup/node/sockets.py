"""Packet sockets: one that sends, and those that hear only what their filter lets through.

The filters are classic BPF programs (linux/filter.h), which the kernel runs on every frame.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kvmifup.inputs import devices
from kvmifup.node.frames import (
    ETH_P_ARP,
    ETH_P_IPV6,
    HOP_OPTIONS,
    NEIGHBOUR_ADVERTISEMENT,
    NEIGHBOUR_SOLICITATION,
    OPTIONS,
    ROUTER_SOLICITATION,
)
from kvmifup.node.messages import mac_bytes, packed

SIOCGIFHWADDR = 0x8927  # linux/sockios.h
ETH_P_ALL = 3  # linux/if_ether.h
SO_ATTACH_FILTER, SO_TIMESTAMPNS = 26, 35  # asm-generic/socket.h
CLOSERS = 8  # threads
NAMESPACE = Path("/proc/thread-self/ns/net")
GONE = frozenset({errno.ENODEV, errno.ENXIO})  # the device is not there; all else says nothing about that
SNAP = 128  # bytes of a guest's frame that we look at, at most
WHOLE = 1 << 16  # bytes of a neighbour's: a checksum is over all of it


_doomed: deque[socket.socket] = deque()
_waiting = threading.Semaphore(0)  # how many of them nobody has taken up
_closers: list[threading.Thread] = []

# --- sending ----------------------------------------------------------------------------------------------


class Sender:
    """A packet socket that only sends, for everything that this process sends; for several threads at once.

    It stays open because closing one takes the kernel a grace period of RCU (`packet_release` in
    net/packet/af_packet.c): 7 to 15 ms, longer than all the rest of a hook. A socket belongs to the network
    namespace that it was opened in, so a thread in another one opens it anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._namespace: Path | None = None
        self._socket: socket.socket | None = None

    def socket(self) -> socket.socket:
        """The socket of the calling thread's network namespace. Raises OSError."""
        with self._lock:
            namespace = NAMESPACE.readlink()
            if self._socket is None or self._namespace != namespace:
                if self._socket:
                    self._socket.close()
                self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
                self._namespace = namespace
            return self._socket

    @property
    def descriptor(self) -> int | None:
        """The descriptor that a child needs to go on sending; None while there is no socket."""
        return self._socket.fileno() if self._socket else None


sender = Sender()


def mac_of(via: socket.socket, dev: str) -> bytes:
    """The MAC of *dev*, asked for through *via*, any socket. Raises OSError."""
    answer = fcntl.ioctl(via, SIOCGIFHWADDR, struct.pack("16s16x", os.fsencode(dev)))
    return answer[18:24]  # struct ifreq: the name, a family, the address


def send(dev: str, frames: Sequence[bytes]) -> bool:
    """Send *frames* out of *dev*, each for itself; returns whether all of them were taken.

    A queue that is full, or a device that is down, takes none. Raises OSError only if the device is not there.
    """
    taken = True
    for frame in frames:
        try:
            sender.socket().sendto(frame, (dev, 0))
        except OSError as error:
            if error.errno in GONE:
                raise
            taken = False
    return taken


# --- filters ----------------------------------------------------------------------------------------------

Instruction = tuple[int, int, int, int]  # struct sock_filter: code, instructions to skip if true and if false, operand
Ranges = list[tuple[int, int]]  # of numbers: the first and the last of each
LOAD_WORD, LOAD_HALF, LOAD_BYTE, LOAD_BYTE_FROM_X, TO_X, SHIFT_LEFT = 0x20, 0x28, 0x30, 0x50, 0x07, 0x64
IF_EQUAL, IF_GREATER, IF_AT_LEAST, IF_ANY, JUMP, RETURN = 0x15, 0x25, 0x35, 0x45, 0x05, 0x06
PACKET_TYPE, INTERFACE = 0xFFFFF004, 0xFFFFF008  # SKF_AD_OFF + SKF_AD_PKTTYPE, + SKF_AD_IFINDEX
PACKET_MULTICAST, PACKET_OUTGOING = 2, 4  # linux/if_packet.h; what is below them is for this node as well
RANGES = 64  # of addresses in one filter: a jump goes over 255 instructions at most

ADVERTISEMENTS: list[Instruction] = [
    (LOAD_BYTE, 0, 0, 20),
    (IF_EQUAL, 0, 3, socket.IPPROTO_ICMPV6),
    (LOAD_BYTE, 0, 0, 54),
    (IF_EQUAL, 0, 1, NEIGHBOUR_ADVERTISEMENT),
    (RETURN, 0, 0, WHOLE),
    (RETURN, 0, 0, 0),
]
EVERYTHING: list[Instruction] = [(RETURN, 0, 0, WHOLE)]


def about(family: int, addresses: Collection[str]) -> list[Instruction]:
    """What tells a segment where *addresses* are, all of *family*, 4 or 6, or that somebody wants one of them."""
    return arp_about(addresses) if family == 4 else discovery_about(addresses)


def arp_about(addresses: Collection[str]) -> list[Instruction]:
    """ARP messages whose sender is one of *addresses*; or that have no sender, and ask for one of them.

    The first tell where it is, the second are what somebody asks who wants it for itself (RFC 5227, section 2.1.1).
    """
    return [
        (LOAD_WORD, 0, 0, 28),
        (IF_EQUAL, 0, 1, 0),
        (LOAD_WORD, 0, 0, 38),
        *one_of(addresses),
    ]


def discovery_about(addresses: Collection[str]) -> list[Instruction]:
    """Advertisements about *addresses*, and solicitations of theirs; by their last four bytes.

    Behind options all of these messages pass: nobody sends them that way who means well, so they are few.
    """
    return [
        (LOAD_BYTE, 0, 0, 20),
        (IF_EQUAL, 14, 0, socket.IPPROTO_ICMPV6),
        (IF_EQUAL, 1, 0, HOP_OPTIONS),
        (IF_EQUAL, 0, 10, OPTIONS),
        (LOAD_BYTE, 0, 0, 55),  # how long they are
        (SHIFT_LEFT, 0, 0, 3),
        (TO_X, 0, 0, 0),
        (LOAD_BYTE, 0, 0, 54),
        (IF_EQUAL, 6, 0, OPTIONS),
        (IF_EQUAL, 0, 4, socket.IPPROTO_ICMPV6),
        (LOAD_BYTE_FROM_X, 0, 0, 62),
        (IF_EQUAL, 3, 0, ROUTER_SOLICITATION),
        (IF_EQUAL, 2, 0, NEIGHBOUR_SOLICITATION),
        (IF_EQUAL, 1, 0, NEIGHBOUR_ADVERTISEMENT),
        (RETURN, 0, 0, 0),
        (RETURN, 0, 0, WHOLE),
        (LOAD_BYTE, 0, 0, 54),
        (IF_EQUAL, 3, 0, NEIGHBOUR_ADVERTISEMENT),
        (IF_EQUAL, 4, 0, NEIGHBOUR_SOLICITATION),
        (IF_EQUAL, 3, 0, ROUTER_SOLICITATION),
        (RETURN, 0, 0, 0),
        (LOAD_WORD, 0, 0, 74),  # the target's end
        (JUMP, 0, 0, 1),
        (LOAD_WORD, 0, 0, 34),  # the sender's
        *one_of(addresses),
    ]


def one_of(addresses: Collection[str]) -> list[Instruction]:
    """Let pass what was loaded if it is how one of *addresses* ends, or near to that where there are many."""
    ranges = endings(addresses)
    rest = 2 * len(ranges)
    checks: list[Instruction] = []
    for low, high in ranges:
        rest -= 2
        checks += [(IF_AT_LEAST, 0, 1, low), (IF_GREATER, 0, rest + 1, high)]
    return [*checks, (RETURN, 0, 0, 0), (RETURN, 0, 0, WHOLE)]


def endings(addresses: Iterable[str]) -> Ranges:
    """How those addresses end, by their last four bytes, that a filter about *addresses* lets pass."""
    return ranges_of(map(ending, addresses))


def passes(address: str, ranges: Ranges) -> bool:
    """Whether *address* ends as a filter lets pass that has these *ranges*."""
    return any(low <= ending(address) <= high for low, high in ranges)


def ending(address: str) -> int:
    """The last four bytes of *address*."""
    return int.from_bytes(packed(address)[-4:], "big")


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """At most `RANGES` ranges in which all *numbers* are, and as few others as can be: what is nearest is joined."""
    found = sorted(set(numbers))
    widest = sorted(range(1, len(found)), key=lambda at: found[at] - found[at - 1])[1 - RANGES :]
    begins = [0, *sorted(widest)]
    ends = [*begins[1:], len(found)]
    return [(found[at], found[end - 1]) for at, end in zip(begins, ends, strict=True)] if found else []


def for_this_node(index: int, program: list[Instruction]) -> list[Instruction]:
    """*program* for what the node itself takes in on the device with *index*, and for nothing else.

    A frame with a VLAN tag is of another network. The kernel has taken the tag off before a socket for one ethertype
    gets the frame: it then belongs to the VLAN's device, though the socket is the one below, or without such a device
    to another host (`__netif_receive_skb_core` in net/core/dev.c). A tag with VID 0 is no VLAN, and taken as none.
    """
    return [
        (LOAD_WORD, 0, 0, PACKET_TYPE),
        (IF_GREATER, 2, 0, PACKET_MULTICAST),
        (LOAD_WORD, 0, 0, INTERFACE),
        (IF_EQUAL, 1, 0, index),
        (RETURN, 0, 0, 0),
        *program,
    ]


def from_the_guest(mac: str) -> list[Instruction]:
    """Frames that come out of a tap with the source address *mac*, not those that we send into it.

    With a VLAN tag or to whomever: who has sent it is the guest, and that is all that it has to prove.
    """
    packed = mac_bytes(mac)
    return [
        (LOAD_WORD, 0, 0, PACKET_TYPE),
        (IF_EQUAL, 5, 0, PACKET_OUTGOING),
        (LOAD_WORD, 0, 0, 6),
        (IF_EQUAL, 0, 3, int.from_bytes(packed[:4], "big")),
        (LOAD_HALF, 0, 0, 10),
        (IF_EQUAL, 0, 1, int.from_bytes(packed[4:], "big")),
        (RETURN, 0, 0, SNAP),
        (RETURN, 0, 0, 0),
    ]


# --- listening --------------------------------------------------------------------------------------------


def guest_listener(tap: str, mac: str) -> socket.socket:
    """A non-blocking socket for what the guest with *mac* sends on *tap*. Raises OSError.

    It takes every ethertype: a bridge takes a port's frames away before a socket for one ethertype would get them
    (`__netif_receive_skb_core` in net/core/dev.c).
    """
    made = listener(tap, ETH_P_ALL, from_the_guest(mac))
    made.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return made


def uplink_listener(uplink: str, family: int, addresses: Collection[str]) -> socket.socket:
    """A non-blocking socket for what tells *uplink* where *addresses* are, all of *family*, 4 or 6. Raises OSError.

    It takes one ethertype. So the uplink's other traffic does not pass the filter at all, and what this node sends
    is never heard.
    """
    return neighbour_listener(uplink, ETH_P_ARP if family == 4 else ETH_P_IPV6, about(family, addresses))


def listen_about(to: socket.socket, index: int, family: int, addresses: Collection[str]) -> None:
    """From now on *to*, an `uplink_listener` on the device with *index*, is for these *addresses*. Raises OSError."""
    attach(to, for_this_node(index, about(family, addresses)))


def neighbour_listener(dev: str, ethertype: int, program: list[Instruction]) -> socket.socket:
    """A non-blocking socket for what neighbours on *dev* send to this node. Raises OSError."""
    return listener(dev, ethertype, for_this_node(socket.if_nametoindex(dev), program))


def listener(dev: str, ethertype: int, program: list[Instruction]) -> socket.socket:
    """A non-blocking socket for the frames of *ethertype* on *dev* that *program* lets through. Raises OSError."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        attach(made, program)
        made.bind((dev, ethertype))  # after the filter is attached, or other frames would get in before
    except OSError:
        made.close()
        raise
    return made


def attach(to: socket.socket, program: list[Instruction]) -> None:
    """From now on *to* hears only what *program* lets through. Raises OSError."""
    code = array("B", b"".join(struct.pack("=HBBI", *line) for line in program))
    to.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), code.buffer_info()[0]))


def receive(via: socket.socket) -> tuple[bytes, float]:
    """A frame of a `guest_listener`, and when the kernel got it, in seconds since 1970. Raises OSError."""
    frame, ancillary, _flags, _address = via.recvmsg(SNAP, 64)
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("@ll", value[:16])
            return frame, seconds + nanoseconds / 1e9
    return frame, time.time()


def received(via: socket.socket) -> Iterator[tuple[bytes, float]]:
    """All frames that have come by now, as `receive` gives them. An error ends them."""
    with suppress(OSError):  # EAGAIN: no more; ENETDOWN, once: the device is down, and may come up again, or is gone
        while True:
            yield receive(via)


def is_device(name: str, index: int) -> bool:
    """Whether *name* is still the device with *index*; a listener stays with the device that it was bound to."""
    try:
        return devices.index_of(name) == index
    except OSError:  # nobody can be asked now, so nothing has been heard of its end
        return True


def close(packet_socket: socket.socket) -> None:
    """Close *packet_socket* in another thread, because that takes long: see `Sender`. At most `CLOSERS` at a time."""
    _doomed.append(packet_socket)
    _waiting.release()
    # Threads stay for the next ones: to start one takes longer than to tell it.
    if len(_closers) < CLOSERS and len(_doomed) > len(_closers):
        closer = threading.Thread(target=_close_all, daemon=True)
        with suppress(RuntimeError):  # no memory for a thread: the next one closes this as well
            closer.start()
            _closers.append(closer)


def _close_all() -> None:
    while True:
        _waiting.acquire()
        _doomed.popleft().close()
