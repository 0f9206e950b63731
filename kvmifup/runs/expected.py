"""The guests that are to come to this node, as Ganeti's hooks have told. Whoever waits for them can look at any time.

One JSON file per guest, `expected/<instance>.json` below the run directory::

    {"version": 1, "uptime": 3600.5, "boot": "5b6b…", "nics": [{...}]}

`uptime` and `boot` say when it was told, as in a journal; `nics` are as there, each still without a tap.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kvmifup.core.model import Nic
from kvmifup.core.records import record
from kvmifup.inputs import places, trust
from kvmifup.node import procfs
from kvmifup.runs import clock
from kvmifup.runs.journal import OtherVersion, decode_nic, encode_nic

DIRECTORY = "expected"
VERSION = 1


@record
class Expected:
    """A guest that is to come; *uptime* and *boot* say when that was told."""

    instance: str
    nics: tuple[Nic, ...]
    uptime: float
    boot: str

    @property
    def age(self) -> float:
        """Seconds since it was told; without end if that was before the node was started."""
        return clock.uptime() - self.uptime if self.boot == procfs.boot() else math.inf

    @property
    def since(self) -> float:
        """When it was told, in seconds since 1970."""
        return time.time() - self.age


def told(instance: str, nics: Sequence[Nic]) -> Expected:
    """That is told now."""
    return Expected(instance, tuple(nics), clock.uptime(), procfs.boot())


def place(run_dir: Path, instance: str) -> Path:
    """Where the file about *instance* is."""
    return run_dir / DIRECTORY / f"{instance}.json"


def put(run_dir: Path, expected: Expected, patience: float = math.inf) -> None:
    """Write it down, instead of what was told of the same guest before. Raises NotReadyError, OSError.

    Whoever has not come for *patience* seconds is forgotten: without the agent nobody else does that.
    """
    places.made(run_dir, DIRECTORY)
    for one in found(run_dir):
        if one.age > patience:
            forget(run_dir, one)
    data = {
        "version": VERSION,
        "uptime": expected.uptime,
        "boot": expected.boot,
        "nics": [encode_nic(nic) for nic in expected.nics],
    }
    places.write(place(run_dir, expected.instance), json.dumps(data), 0o644)


def found(run_dir: Path) -> list[Expected]:
    """All that are written down. What makes no sense, or others could have written, is passed over. Raises OSError."""
    expected = (read(path, run_dir) for path in trust.listed(run_dir / DIRECTORY, ".json"))
    return [one for one in expected if one]


def read(path: Path, run_dir: Path) -> Expected | None:
    """The one in the file *path*; None if there is none. Raises OSError."""
    try:
        data = json.loads(trust.read(path, run_dir))
        nics = tuple(decode_nic(nic) for nic in data["nics"]) if data["version"] == VERSION else ()
        return Expected(path.name.removesuffix(".json"), nics, float(data["uptime"]), str(data["boot"]))
    except (trust.Untrusted, OtherVersion, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    except OSError as error:
        trust.need_answer(error)
        return None


def forget(run_dir: Path, expected: Expected) -> None:
    """It has come, or never will. What was told anew meanwhile stays. Raises OSError."""
    path = place(run_dir, expected.instance)
    if read(path, run_dir) == expected:
        with suppress(FileNotFoundError):
            path.unlink()
