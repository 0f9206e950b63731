"""What was dropped of guests' packets when the agent last looked: `kvm-ifup check` tells a rate by it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from kvmifup.inputs import places, trust
from kvmifup.inputs.trust import Untrusted
from kvmifup.node.drops import Counts

STALE = 60.0  # seconds: by then the agent would have looked again
MAX_BYTES = 1 << 22


def save(run_dir: Path, counts: Counts) -> None:
    """Write *counts* down, whole or not at all. Raises OSError.

    With the seconds since the node was booted (CLOCK_MONOTONIC): nobody sets that clock.
    """
    places.write(path(run_dir), json.dumps({"at": time.monotonic(), "counts": counts}), 0o600)


def noted(run_dir: Path) -> tuple[float, Counts] | None:
    """How many seconds ago the agent looked, and what it saw; None if it has not, or long ago."""
    try:
        found = json.loads(trust.read(path(run_dir), run_dir, MAX_BYTES))
        age = time.monotonic() - found["at"]
        counts = {
            str(tap): {str(why): int(n) for why, n in reasons.items()} for tap, reasons in found["counts"].items()
        }
        return (age, counts) if 0 <= age < STALE else None
    except (OSError, Untrusted, ValueError, TypeError, KeyError, AttributeError):
        return None


def path(run_dir: Path) -> Path:
    """The file."""
    return run_dir / "drops.json"
