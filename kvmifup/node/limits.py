"""Limits of what a tap lets pass, in traffic control: a shaper for what goes to the guest, policing for the rest.

To the guest: TBF, which holds a frame back until it may go. It is one object, in force from the message that makes it,
and its rate is changed in place: nothing that waits is lost. (HTB takes a class as well, and until that is there lets
everything pass.) What waits is shared out fairly by fq_codel below it, if the kernel has that.

From the guest: frames come out of a tap by themselves, and cannot be held back: those above the rate are dropped.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from kvmifup.core import rates
from kvmifup.core.errors import KernelError, NotReadyError
from kvmifup.core.ops import Rate
from kvmifup.node import pyroute
from kvmifup.node.messages import (
    BODY,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_DELQDISC,
    RTM_DELTFILTER,
    RTM_GETQDISC,
    RTM_GETTFILTER,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    TCMSG,
    attribute,
)
from kvmifup.node.netlink import Netlink
from kvmifup.node.procfs import read_file
from kvmifup.node.refusals import forgiven

# linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
TCA_DUMP_INVISIBLE = 10
TC_H_ROOT, TC_H_INGRESS = 0xFFFFFFFF, 0xFFFFFFF1
INGRESS, INGRESS_FILTERS = 0xFFFF0000, 0xFFFFFFF2
TC_ACT_UNSPEC, TC_ACT_SHOT = -1, 2
LINKLAYER_ETHERNET = 1
TICK = 64  # nanoseconds: PSCHED_SHIFT, net/pkt_sched.h
ETH_P_ALL = 0x0003

OURS = 0x6B760000  # the handle of our shaper: "6b76:", which nobody gets by accident
PRIORITY = 27510  # of our filter; the next one is used while it is replaced
SHAPER, QUEUE, FILTER = "tbf", "fq_codel", "matchall"


class Queues:
    """Queueing disciplines and filters, as they have been read since the last change. What asks raises NetlinkError."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self._found: dict[int, list[bytes]] | None = None

    def clear(self) -> None:
        """Forget what was read."""
        self._found = None

    def of(self, index: int) -> list[dict[str, Any]]:
        """The queueing disciplines of the device with *index*, also those that the kernel itself has made.

        The kernel tells only of all devices at once; to ask for one would tell everybody else, as of a change.
        """
        if self._found is None:
            body = TCMSG.pack(0, 0, 0, 0, 0) + attribute(TCA_DUMP_INVISIBLE, b"")
            self._found = {}
            for message in self._netlink.transport.dump(RTM_GETQDISC, body):
                self._found.setdefault(TCMSG.unpack_from(message, BODY)[1], []).append(message)
        return [pyroute.decoded(message) for message in self._found.get(index, ())]

    def filters(self, index: int) -> list[dict[str, Any]]:
        """The filters of what comes in on the device with *index*, which has a queueing discipline there."""
        body = TCMSG.pack(0, index, 0, INGRESS_FILTERS, 0)
        found = [pyroute.decoded(one) for one in self._netlink.transport.dump(RTM_GETTFILTER, body)]
        return [one for one in found if one["handle"]]  # what is without one only opens a priority


class AllQueues(Queues):
    """The same out of one dump. It never forgets anything."""

    def clear(self) -> None:
        """Do nothing: everything is from one moment."""


# --- to the guest -----------------------------------------------------------------------------------------


def read_shaper(op: Rate, index: int, queues: Queues) -> str | None:
    """The limit to the guest; what is not ours counts only where ours is to be."""
    found = queues.of(index)
    root = next((one for one in found if one["parent"] == TC_H_ROOT and one["handle"]), None)
    if root is None:  # the kernel's own has no handle
        return None
    if (root["handle"], root.get("TCA_KIND")) != (OURS, SHAPER):
        return None if op.want is None else f"{root.get('TCA_KIND')} {root['handle'] >> 16:x}:"
    parameters = root["TCA_OPTIONS"]["TCA_TBF_PARMS"]
    said = limit_said(op, 8 * parameters["rate"], parameters["buffer"])
    below = any(one["parent"] == OURS | 1 for one in found)
    return said if below else f"{said}, and nothing passes"


def write_shaper(op: Rate, index: int, queues: Queues) -> None:
    """Make it so. A shaper of somebody else goes only if ours is to be there instead."""
    now = read_shaper(op, index, queues)
    if op.want is None:
        if now is not None:
            pyroute.traffic_control(RTM_DELQDISC, 0, {"index": index, "parent": TC_H_ROOT, "handle": OURS}, [])
        return
    rate, burst = rates.parts(op.want)
    # What it may hold back is said to the queue that it begins with. fq_codel decides for itself.
    options = {"rate": rate // 8, "rate___reserved": LINKLAYER_ETHERNET, "buffer": ticks(rate, burst)}
    parameters = [("TCA_TBF_PARMS", options | {"limit": rates.queue(rate, burst)})]
    header = {"index": index, "parent": TC_H_ROOT, "handle": OURS}
    pyroute.traffic_control(
        RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, header, [("TCA_KIND", SHAPER), ("TCA_OPTIONS", parameters)]
    )
    queues.clear()
    if not any(one["parent"] == OURS | 1 and one["handle"] for one in queues.of(index)):
        with forgiven(errno.ENOENT):  # a kernel without it: who sends most gets most
            below = {"index": index, "parent": OURS | 1}
            pyroute.traffic_control(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, below, [("TCA_KIND", QUEUE)])


# --- from the guest ---------------------------------------------------------------------------------------


def read_police(op: Rate, index: int, queues: Queues) -> str | None:
    """The limit from the guest."""
    there = policing(index, queues)
    ours = {priority_of(one): one for one in there if priority_of(one) in (PRIORITY, PRIORITY + 1)}
    if not ours:  # perhaps a run was killed that had begun
        return "no filter" if not there and incoming(index, queues) == "ingress" else None
    if ours.keys() != {PRIORITY}:
        return "half replaced"
    action = ours[PRIORITY].get("TCA_OPTIONS", {}).get("TCA_MATCHALL_ACT", {}).get("TCA_ACT_PRIO_1", {})
    found = action.get("TCA_ACT_OPTIONS", {})
    if action.get("TCA_ACT_KIND") != "police" or not isinstance(found, dict):
        return "no limit"
    parameters = found["TCA_POLICE_TBF"]
    return limit_said(op, 8 * parameters["rate"], parameters["burst"])


def policing(index: int, queues: Queues) -> list[dict[str, Any]]:
    """All filters of what comes in, if there can be any."""
    return queues.filters(index) if incoming(index, queues) else []


def incoming(index: int, queues: Queues) -> str | None:
    """The kind of queueing discipline for what comes in: "ingress" is ours, or like it; "clsact" is of others."""
    return next((str(one.get("TCA_KIND")) for one in queues.of(index) if one["parent"] == TC_H_INGRESS), None)


def priority_of(found: dict[str, Any]) -> int:
    """The priority of a filter."""
    return int(found["info"] >> 16)


def write_police(op: Rate, index: int, queues: Queues) -> None:
    """Make it so, beside what others have there. At every moment the old limit or the new one is in force, or both.

    Raises NotReadyError if the kernel cannot do it.
    """
    there = {priority_of(one) for one in policing(index, queues)}
    if op.want is None:
        for priority in sorted(there & {PRIORITY, PRIORITY + 1}):
            delete_filter(index, priority)
        if incoming(index, queues) == "ingress" and not there - {PRIORITY, PRIORITY + 1}:
            pyroute.traffic_control(
                RTM_DELQDISC, 0, {"index": index, "parent": TC_H_INGRESS, "handle": INGRESS}, [("TCA_KIND", "ingress")]
            )
        return
    try:
        if incoming(index, queues) is None:
            header = {"index": index, "parent": TC_H_INGRESS, "handle": INGRESS}
            pyroute.traffic_control(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, header, [("TCA_KIND", "ingress")])
        # matchall cannot change a filter, so there are two for a moment.
        if PRIORITY in there:
            if PRIORITY + 1 in there:  # left by a run that was killed
                delete_filter(index, PRIORITY + 1)
            add_filter(op, index, PRIORITY + 1)
            delete_filter(index, PRIORITY)
        add_filter(op, index, PRIORITY)
        if PRIORITY in there or PRIORITY + 1 in there:
            delete_filter(index, PRIORITY + 1)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        raise NotReadyError(
            f"the kernel cannot limit what comes from {op.dev}: it lacks sch_ingress, cls_matchall or act_police",
            hint="`modprobe -a sch_ingress cls_matchall act_police`, or leave out rate.from_guest",
        ) from None


def add_filter(op: Rate, index: int, priority: int) -> None:
    """Police everything that comes in; what is within the limit goes on to the filters of others."""
    assert op.want is not None
    rate, burst = rates.parts(op.want)
    # A frame larger than the burst never passes; "mtu" says the same.
    parameters = {"rate": rate // 8, "rate___reserved": LINKLAYER_ETHERNET, "burst": ticks(rate, burst), "mtu": burst}
    police = [
        ("TCA_POLICE_TBF", parameters | {"action": TC_ACT_SHOT}),
        ("TCA_POLICE_RATE", True),
        ("TCA_POLICE_RESULT", TC_ACT_UNSPEC & 0xFFFFFFFF),
    ]
    action = [("TCA_ACT_KIND", "police"), ("TCA_ACT_OPTIONS", police)]
    options = [("TCA_MATCHALL_ACT", [("TCA_ACT_PRIO_1", action)])]
    pyroute.traffic_control(
        RTM_NEWTFILTER,
        NLM_F_CREATE | NLM_F_EXCL,
        filter_header(index, priority),
        [("TCA_KIND", FILTER), ("TCA_OPTIONS", options)],
    )


def delete_filter(index: int, priority: int) -> None:
    """Remove one of our filters."""
    pyroute.traffic_control(RTM_DELTFILTER, 0, filter_header(index, priority), [("TCA_KIND", FILTER)])


def filter_header(index: int, priority: int) -> dict[str, int]:
    """Where a filter is; the protocol is in the order of bytes that networks have."""
    return {"index": index, "parent": INGRESS_FILTERS, "info": priority << 16 | socket.htons(ETH_P_ALL)}


def has_queue() -> bool:
    """Whether the kernel has fq_codel, for what people are told; it may be in no list and be there all the same."""
    lists = (f"/lib/modules/{os.uname().release}/modules.{name}" for name in ("builtin", "dep"))
    loaded = os.access(f"/sys/module/sch_{QUEUE}", os.F_OK)
    return loaded or any(f"sch_{QUEUE}.ko" in (read_file(name, whole=True) or "") for name in lists)


# --- both -------------------------------------------------------------------------------------------------


class Limits:
    """The limits of taps, as they are and as they are to be. What asks raises NetlinkError."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues

    def clear(self) -> None:
        """Forget what was read."""
        self._queues.clear()

    def read(self, op: Rate, index: int) -> str | None:
        """The limit that the device with *index* has in the direction of *op*."""
        return (read_shaper if op.direction == rates.TO_GUEST else read_police)(op, index, self._queues)

    def write(self, op: Rate, index: int) -> None:
        """Make the limit of *op* true. Raises also NotReadyError, KernelError."""
        if op.want is not None and not rates.is_limit(op.want):
            what = f"{op.dev} had {op.want}, which others have made: only they can make it again"
            raise KernelError(what, errno=errno.EOPNOTSUPP)
        self.clear()
        (write_shaper if op.direction == rates.TO_GUEST else write_police)(op, index, self._queues)
        self.clear()


def ticks(rate: int, burst: int) -> int:
    """How long *burst* bytes take at *rate*, in the kernel's ticks: it remembers this, and not the bytes.

    Rather more than less, or a frame that just fits would not pass.
    """
    return -(-burst * 8 * 10**9 // (rate * TICK))


def limit_said(op: Rate, rate: int, buffer: int) -> str:
    """The limit with *rate* whose burst takes *buffer* ticks; that of *op* if they are the same."""
    if op.want is not None and rates.is_limit(op.want):
        wanted, burst = rates.parts(op.want)
        if (wanted, ticks(wanted, burst)) == (rate, buffer):
            return op.want
    return rates.limit(rate, buffer * TICK * rate // (8 * 10**9))
