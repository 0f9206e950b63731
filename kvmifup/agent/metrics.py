"""What the agent counts, in the text format that Prometheus and its node exporter read."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kvmifup.inputs import places

Labels = tuple[tuple[str, str], ...]

# name -> type and what it is, in the order in which they are written
FAMILIES = {
    "kvm_ifup_runs_total": ("counter", "Runs of hooks through the agent, by command and exit code."),
    "kvm_ifup_run_seconds": ("summary", "How long they took."),
    "kvm_ifup_rollbacks_total": ("counter", "Runs that failed after they had changed something, which was put back."),
    "kvm_ifup_arrivals_total": ("counter", "Guests that arrived and were wired by the agent, by their first frame."),
    "kvm_ifup_arrival_seconds": ("summary", "From a guest's first frame until it was wired and announced."),
    "kvm_ifup_arrival_failures_total": ("counter", "Attempts to wire a guest that had arrived, which failed."),
    "kvm_ifup_withdrawals_total": ("counter", "Guests that were found to have left and were withdrawn."),
    "kvm_ifup_rival_announcements_total": (
        "counter",
        "Announcements by others of addresses whose guest runs here, by uplink.",
    ),
    "kvm_ifup_defences_total": ("counter", "Addresses that were announced again because somebody else did, by uplink."),
    "kvm_ifup_mends_total": ("counter", "Times that what a NIC had lost on the node was put back."),
    "kvm_ifup_mend_failures_total": ("counter", "Attempts to put it back that failed."),
    "kvm_ifup_leftovers_total": ("counter", "Leftovers of dead NICs and killed runs that were undone."),
    "kvm_ifup_dropped_packets_total": ("counter", "Packets of guests that our rules have dropped, by NIC and reason."),
    "kvm_ifup_nics": ("gauge", "NICs that have a journal, by the phase that they have reached."),
    "kvm_ifup_armed": ("gauge", "NICs whose guest is waited for."),
}


class Metrics:
    """Counters that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, Labels], float]] = {name: defaultdict(float) for name in FAMILIES}
        self._changed = True  # since it was written

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count *amount* of *name*."""
        with self._lock:
            self._values[name]["", tuple(labels.items())] += amount
            self._changed = True

    def took(self, name: str, seconds: float, **labels: str) -> None:
        """One more that took *seconds*."""
        with self._lock:
            self._values[name]["_sum", tuple(labels.items())] += seconds
            self._values[name]["_count", tuple(labels.items())] += 1
            self._changed = True

    def set(self, name: str, values: Mapping[Labels, float]) -> None:
        """What *name* is now: the value for each set of labels, and for no other."""
        now = {("", labels): value for labels, value in values.items()}
        with self._lock:
            self._changed |= self._values[name] != now
            self._values[name] = now

    def text(self) -> str:
        """All of it."""
        lines = []
        with self._lock:
            for name, (kind, meaning) in FAMILIES.items():
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
                for (suffix, labels), value in self._values[name].items():
                    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels)
                    lines.append(
                        f"{name}{suffix}{{{inside}}} {value:.10g}" if inside else f"{name}{suffix} {value:.10g}"
                    )
        return "".join(f"{line}\n" for line in lines)

    def write(self, path: Path) -> None:
        """Put all of it into *path*, which is never there by halves. Raises OSError.

        Where nothing has changed, the file only gets the time of now, by which the exporter tells that we are alive.
        """
        with self._lock:
            changed, self._changed = self._changed, False
        if not changed:
            with suppress(FileNotFoundError):
                os.utime(path, follow_symlinks=False)
                return
        try:
            places.write(path, self.text(), 0o644)  # the exporter is not root
        except OSError:
            self._changed = True
            raise


def escaped(text: str) -> str:
    """A label's value between its quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
