"""What Ganeti itself has written about a tap, for a person at a shell.

`nic/<instance>/<n>` holds the bare name of a tap; `conf/<instance>.runtime` is JSON, a list whose second
item lists the NICs (Ganeti 3.0, lib/hypervisor/hv_kvm). Both are written when the guest runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvmifup.core.errors import NicError
from kvmifup.core.model import Nic
from kvmifup.inputs import trust
from kvmifup.inputs.values import assemble, instance_name

DIRECTORY = Path("/var/run/ganeti/kvm-hypervisor")


def nic_of_tap(tap: str) -> Nic | None:
    """The NIC that Ganeti has on *tap*; None if it has none. Raises NicError."""
    for guest in trust.listed(DIRECTORY / "nic"):
        for path in trust.listed(guest):
            if tap_in(path) == tap:
                return nic_of_file(path, tap)
    return None


def nics_of_instance(instance: str) -> list[Nic]:
    """All NICs that Ganeti has for *instance*, by tap. Raises NicError."""
    files = trust.listed(DIRECTORY / "nic" / instance_name(instance))
    # A NIC may have two files, one named by its place and one by its UUID.
    nics = {tap: nic_of_file(path, tap) for path in files if (tap := tap_in(path))}
    return [nics[tap] for tap in sorted(nics)]


def nic_of_file(path: Path, tap: str) -> Nic:
    """The NIC whose tap the file *path* names. Raises NicError."""
    runtime = DIRECTORY / "conf" / f"{path.parent.name}.runtime"
    try:
        described = json.loads(trust.read(runtime, DIRECTORY))[1]
        index = next(i for i, nic in enumerate(described) if path.name in (str(i), nic.get("uuid")))
        nic: dict[str, Any] = described[index]
        mode, link, vlan = (nic["nicparams"].get(key) for key in ("mode", "link", "vlan"))
        mac, ip = nic["mac"], nic.get("ip")
        if not all(isinstance(value, str) for value in (mac, mode, link or "", ip or "", vlan or "")):
            raise TypeError
    except trust.Untrusted as error:
        raise NicError(f"not to be trusted: {error}", where=str(runtime)) from None
    except OSError as error:
        trust.need_answer(error)
        raise NicError(f"cannot be read: {error.strerror}", where=str(runtime)) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration, RecursionError):
        raise NicError(f"does not describe the NIC of {path}", where=str(runtime)) from None
    try:
        return assemble(
            tap=tap,
            mac=mac,
            mode=mode,
            link=link or None,
            ip=[ip] if ip else [],
            vlan=vlan or None,
            incoming=False,
            instance=path.parent.name,
            index=index,
            source=str(runtime),
        )
    except NicError as error:
        error.at(str(runtime))
        raise


def tap_in(path: Path) -> str | None:
    """The text of a NIC file; None if it cannot be read, or others could have written it."""
    try:
        return trust.read(path, DIRECTORY).strip()
    except trust.Untrusted:
        return None
    except OSError as error:
        trust.need_answer(error)
        return None
