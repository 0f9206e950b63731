"""Who else has announced guests' addresses lately, as the agent has heard it: for `kvm-ifup check`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from kvmifup.core.records import record
from kvmifup.inputs import places, trust
from kvmifup.inputs.trust import Untrusted

RECENT = 600.0  # seconds
MAX_BYTES = 1 << 20


@record
class Rival:
    """*mac* on *uplink* has announced *address* so many *times*, the *first* and the *last* time when.

    That is in seconds since the node was booted (CLOCK_MONOTONIC): nobody sets that clock, and /run is as old.
    """

    address: str
    uplink: str
    mac: str
    first: float
    last: float
    times: int


def save(run_dir: Path, rivals: Iterable[Rival]) -> None:
    """Write *rivals* down, whole or not at all. Raises OSError."""
    places.write(path(run_dir), json.dumps([asdict(rival) for rival in rivals]), 0o600)


def recent(run_dir: Path) -> list[Rival]:
    """Those of the last minutes; none if nobody has written any, or what is there is not to be trusted."""
    try:
        found = json.loads(trust.read(path(run_dir), run_dir, MAX_BYTES))
        rivals = [Rival(**one) for one in found]
        now = time.monotonic()
        return [rival for rival in rivals if 0 <= now - rival.last < RECENT]
    except (OSError, Untrusted, ValueError, TypeError):
        return []


def path(run_dir: Path) -> Path:
    """The file."""
    return run_dir / "rivals.json"
