"""What was done for each tap and what was there before, on disk before the kernel is touched.

One JSON file per tap, `state/<tap>.json` below the run directory::

    {"mark": " ", "version": 2, "namespace": 4026531840, "cookie": 1, "nic": {...}, "ifindex": 7, "phase": "pre",
     "since": 1790000000.25, "uptime": 3600.5, "boot": "5b6b…", "by": "hook", "reason": null, "left": false,
     "devices": {"eth0": 2},
     "entries": [{"op": "link-mtu", "dev": "tap0", "want": 9000, "prior": 1500}, ...],
     "pending": [...]}

`mark` is one letter that is changed in place, which takes no space: see `Mark`.
`namespace` is the network namespace that the tap is in, by the number that `lsns` shows. Runs in several namespaces
can share one run directory, and a live tap of one does not exist in another. The number of one that is gone is given to
another; `cookie` (SO_NETNS_COOKIE) never, as long as the node runs. 0: not known.
`since` (seconds since 1970) is when the phase was reached or last changed something; `uptime` is the same by a clock
that nobody can set, in seconds since the start of the node that is called `boot`. `by` says who did that: "hook",
"person" (at a terminal) or "agent". `reason` says why the agent did it: the guest's first frame, or a sentence.
`left`: the guest ran here and has gone to another node since, so that the phase is pre again.
`devices` are those that entries are about, other than the tap, each with its index: an uplink may be renamed.
`entries` is what successful runs did, each op with the value from before the first of them. `pending` is
what a run is about to do, or was doing when it was killed, with the values from before that run.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable
from dataclasses import field, replace
from enum import Enum
from functools import cached_property
from typing import Any

from kvmifup import phases
from kvmifup.core.model import Nic, Phase
from kvmifup.core.ops import KINDS, RTPROT_STATIC, Op, Value
from kvmifup.core.records import field_names, record

VERSION = 2
READS = (1, 2)  # what `decode` understands
NIC_KEYS = set(field_names(Nic))
PLAIN = (str, int, float, tuple, type(None))  # what the fields of an op can be
HEAD = b'{"mark": "'  # how every journal begins; then comes the mark


class Mark(Enum):
    """What has become of a journal since it was written: one letter in its file, for which there is always room.

    What is undone is undone once more after a crash, which changes nothing.
    """

    NONE = " "  # as it is written
    UNDO = "u"  # all of it is to be undone
    UNDO_ENTRIES = "U"  # the same, once what was pending has been undone
    LEAVING = "w"  # the guest has left: what draws its traffic here is to be undone
    LEFT = "l"  # that has been undone
    SETTLED = "r"  # what was pending has been undone


class OtherVersion(ValueError):
    """A journal that another version of kvm-ifup has written."""


@record
class Entry:
    """An op that was or will be done, and the value that the kernel had before."""

    __slots__ = ("op", "prior")  # there are thousands of them
    op: Op
    prior: Value

    @property
    def undo(self) -> Op:
        """The op that puts the old value back."""
        return self.op.turned(self.prior)


@record
class Journal:
    """Everything remembered about one tap; *phase* is the last one that succeeded, DOWN for none."""

    nic: Nic
    ifindex: int
    phase: Phase = Phase.DOWN
    entries: tuple[Entry, ...] = field(default=())
    pending: tuple[Entry, ...] = field(default=())
    since: float = 0.0
    by: str = ""
    reason: str | None = None
    left: bool = False
    devices: tuple[tuple[str, int], ...] = ()
    uptime: float = 0.0
    boot: str = ""
    cookie: int = 0
    namespace: int = field(kw_only=True)

    @property
    def earlier(self) -> bool:
        """Whether a version of kvm-ifup has written it that may do less for a NIC than this one."""
        return not self.boot

    def prior(self, key: tuple[object, ...]) -> Entry | None:
        """The committed entry about *key*."""
        return self._committed.get(key)

    def noted(self, key: tuple[object, ...]) -> Entry | None:
        """The entry about *key*, also one that is pending: a killed run's, whose value was read before ours."""
        return self._committed.get(key) or self._pending.get(key)

    # A NIC may have thousands of addresses, and each is asked for.
    @cached_property
    def _committed(self) -> dict[tuple[object, ...], Entry]:
        return {entry.op.key: entry for entry in reversed(self.entries)}

    @cached_property
    def _pending(self) -> dict[tuple[object, ...], Entry]:
        return {entry.op.key: entry for entry in reversed(self.pending)}


def marked(journal: Journal, mark: Mark) -> Journal:
    """What *journal* is once it has the *mark*."""
    match mark:
        case Mark.UNDO:
            return replace(journal, phase=Phase.DOWN, entries=(), pending=(*journal.entries, *journal.pending))
        case Mark.UNDO_ENTRIES:
            return replace(journal, phase=Phase.DOWN, entries=(), pending=journal.entries)
        case Mark.LEAVING | Mark.LEFT:
            away = tuple(entry for entry in journal.entries if phases.only_here(entry.op))
            rest = tuple(entry for entry in journal.entries if not phases.only_here(entry.op))
            pending = away if mark is Mark.LEAVING else ()
            return replace(journal, phase=Phase.PRE, entries=rest, pending=pending, left=True)
        case Mark.SETTLED:
            return replace(journal, pending=())
        case Mark.NONE:
            return journal


# --- JSON ---------------------------------------------------------------------------------------------


def encode(journal: Journal) -> dict[str, Any]:
    """*journal* as JSON's types."""
    return {
        "mark": Mark.NONE.value,
        "version": VERSION,
        "namespace": journal.namespace,
        "cookie": journal.cookie,
        "nic": encode_nic(journal.nic),
        "ifindex": journal.ifindex,
        "phase": journal.phase.name.lower(),
        "since": journal.since,
        "uptime": journal.uptime,
        "boot": journal.boot,
        "by": journal.by,
        "reason": journal.reason,
        "left": journal.left,
        "devices": dict(journal.devices),
        "entries": [encode_entry(entry) for entry in journal.entries],
        "pending": [encode_entry(entry) for entry in journal.pending],
    }


def encode_nic(nic: Nic) -> dict[str, Any]:
    """*nic* as JSON's types."""
    return shallow(nic) | {"ip": [str(prefix) for prefix in nic.ip]}


def decode_nic(data: dict[str, Any]) -> Nic:
    """The NIC that `encode_nic` gave. Raises OtherVersion; ValueError or TypeError for anything else."""
    if not data.keys() <= NIC_KEYS:
        raise OtherVersion
    ip = tuple(ipaddress.ip_network(prefix) for prefix in data["ip"])
    known: dict[str, Any] = {**data, "ip": ip, "given": pairs(data.get("given", ()))}
    if data.get("rate") is not None:
        known["rate"] = pairs(data["rate"])
    if data.get("allow_mac") is not None:
        known["allow_mac"] = tuple(data["allow_mac"])
    return Nic(**known)


def pairs(found: Iterable[Iterable[str]]) -> tuple[tuple[str, str], ...]:
    """What JSON has as a list of lists."""
    return tuple((name, value) for name, value in found)


def encode_entry(entry: Entry) -> dict[str, Any]:
    """*entry* as JSON's types."""
    return {"op": entry.op.kind, **shallow(entry.op), "prior": entry.prior}


def shallow(data: Nic | Op) -> dict[str, Any]:
    """The fields of *data*, without the slow deep copy of `dataclasses.asdict`."""
    return {name: getattr(data, name) for name in field_names(data)}


def decode(data: dict[str, Any]) -> Journal:
    """The journal that `encode` gave, and has been marked since.

    Raises OtherVersion; ValueError, KeyError or TypeError for anything else.
    """
    if data["version"] not in READS:
        raise OtherVersion if isinstance(data["version"], int) else ValueError
    nic = decode_nic(data["nic"])
    reason = data["reason"] if "reason" in data else data["frame"]  # what it was called before 0.1.0
    journal = Journal(
        nic=nic,
        ifindex=int(data["ifindex"]),
        phase=Phase[data["phase"].upper()],
        entries=tuple(decode_entry(entry) for entry in data["entries"]),
        pending=tuple(decode_entry(entry) for entry in data["pending"]),
        since=float(data["since"]),
        uptime=float(data.get("uptime", 0.0)),  # version 1 had none of these
        boot=str(data.get("boot", "")),
        cookie=int(data.get("cookie", 0)),
        by=str(data["by"]),
        reason=None if reason is None else str(reason),
        left=bool(data.get("left", False)),  # not in a journal of 0.1.0~
        devices=tuple((str(dev), int(index)) for dev, index in data.get("devices", {}).items()),
        namespace=int(data["namespace"]),
    )
    return marked(journal, Mark(data.get("mark", " ")))


def decode_entry(data: dict[str, Any]) -> Entry:
    """The entry that `encode_entry` gave. Raises OtherVersion for an op, or a part of one, that is not known here."""
    # The same few texts are in all ops of thousands of NICs: each is kept once.
    values: dict[str, Any] = {key: sys.intern(value) if type(value) is str else value for key, value in data.items()}
    prior = values.pop("prior")
    del values["op"]
    if "environment" in values:
        values["environment"] = tuple((str(key), value) for key, value in values["environment"])
    if "selectors" in values:  # of a rule, before 0.1.0
        made_by = dict(values.pop("selectors"))
        values["protocol"] = made_by.pop("protocol", RTPROT_STATIC)
        if made_by:
            raise ValueError("a rule of somebody else")
    kind = KINDS.get(data["op"])
    if kind is None or not values.keys() <= set(field_names(kind)):
        raise OtherVersion if isinstance(data["op"], str) else TypeError
    if not all(isinstance(value, PLAIN) for value in (*values.values(), prior)):
        raise TypeError
    return Entry(kind(**values), prior)
