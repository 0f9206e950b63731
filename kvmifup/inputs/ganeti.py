"""What Ganeti itself has written about a guest that runs.

`conf/<instance>.runtime` is JSON, a list whose second item lists the NICs, in the order in which they were plugged in
(lib/hypervisor/hv_kvm). `nic/<instance>/<n>` holds the bare name of a tap, for the NIC that was the n-th one in the
configuration then. So the two numbers need not be the same. `pid/<instance>` has the process, `ctrl` its sockets.

These directories belong to root and its group, and the group may write to them (RUN_DIRS_MODE, 0775). Nowhere else is
that good enough, and never for a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmifup.core.errors import NicError
from kvmifup.core.model import RUNTIME, Nic
from kvmifup.inputs import environment, tags, trust
from kvmifup.inputs.values import assemble, instance_name

DIRECTORY = Path("/var/run/ganeti/kvm-hypervisor")
# A network in the runtime file (Network.HooksDict, lib/objects.py), and its names in the environment.
NETWORK = {
    **{key: key.upper() for key in ("name", "uuid", "gateway", "gateway6", "mac_prefix")},
    **{"network": "SUBNET", "network6": "SUBNET6"},
}
Described = dict[str, Any]  # a NIC, as the runtime file has it


# --- the files ------------------------------------------------------------------------------------------


def guests() -> list[str]:
    """The guests with NIC files, sorted. Raises OSError."""
    return [path.name for path in trust.listed(DIRECTORY / "nic")]


def taps_of(instance: str) -> dict[str, str]:
    """The tap in each NIC file of *instance*, by the file's name; without what others could have written."""
    files = trust.listed(DIRECTORY / "nic" / instance_name(instance))
    return {path.name: tap for path in files if (tap := word_in(path))}


def pids() -> Path:
    """Where the pid files of guests are."""
    return DIRECTORY / "pid"


def process_of(instance: str) -> int | None:
    """The process that runs *instance*; None if its pid file does not say."""
    word = word_in(pids() / instance_name(instance)) or ""
    return int(word) if word.isascii() and word.isdigit() and len(word) < 10 else None


def word_in(path: Path) -> str | None:
    """The text of a small file; None if it cannot be read, or others could have written it."""
    try:
        return trust.read(path, DIRECTORY, roots_group=True).strip()
    except trust.Untrusted:
        return None
    except OSError as error:
        trust.need_answer(error)
        return None


def socket_of(instance: str) -> Path:
    """The QMP socket of *instance* that is Ganeti's kvmd's, and free without that. Raises Untrusted and OSError."""
    return trust.check(DIRECTORY / "ctrl" / f"{instance_name(instance)}.kvmd", DIRECTORY, roots_group=True)


def runtime_of(instance: str) -> Path:
    """The file that describes the NICs of *instance*."""
    return DIRECTORY / "conf" / f"{instance_name(instance)}{RUNTIME}"


def described(instance: str) -> list[Described]:
    """The NICs of *instance*, as the runtime file has them. Raises NicError."""
    runtime = runtime_of(instance)
    try:
        nics = json.loads(trust.read(runtime, DIRECTORY, roots_group=True))[1]
        if not isinstance(nics, list) or not all(isinstance(nic, dict) for nic in nics):
            raise TypeError
    except trust.Untrusted as error:
        raise NicError(f"not to be trusted: {error}", hint=error.mend, where=str(runtime)) from None
    except OSError as error:
        trust.need_answer(error)
        raise NicError(f"cannot be read: {error.strerror}", where=str(runtime)) from None
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise NicError("does not describe the guest's NICs", where=str(runtime)) from None
    return nics


# --- which NIC is on which tap ----------------------------------------------------------------------------


def matched(
    nics: Sequence[Described], files: Mapping[str, str], macs: Mapping[str, str | None]
) -> dict[str, Described]:
    """Which of *nics* is on which tap, as far as that is certain; *macs* has all taps of the guest's QEMU.

    By the MAC that QEMU gives to the guest on that tap, if it is known, else by the UUID that is the name of a NIC
    file. If one tap and one NIC are left in the end, they belong together. The number of a NIC file tells nothing.
    """
    found: dict[str, Described] = {}
    for tap, mac in macs.items():
        same = [nic for nic in nics if mac is not None and str(nic.get("mac")).lower() == mac]
        if len(same) == 1:
            found[tap] = same[0]
    uuids = {nic["uuid"]: nic for nic in nics if isinstance(nic.get("uuid"), str)}
    unknown = [tap for tap, mac in macs.items() if mac is None]
    for name, tap in files.items():
        if tap in unknown and name in uuids and uuids[name] not in found.values():
            found[tap] = uuids[name]
    taps = [tap for tap in unknown if tap not in found]
    left = [nic for nic in nics if nic not in found.values()]
    if len(taps) == len(left) == 1:
        found[taps[0]] = left[0]
    return found


def nic_of(instance: str, nic: Described, tap: str, number: int) -> Nic:
    """The NIC that *nic* describes, on *tap*; *number* is what Ganeti calls it. Raises NicError."""
    runtime = str(runtime_of(instance))
    try:
        mode, link, vlan = (nic["nicparams"].get(key) for key in ("mode", "link", "vlan"))
        mac, ip = nic["mac"], nic.get("ip")
        further = further_of(nic)
        if not all(
            isinstance(value, str) for value in (mac, mode, link or "", ip or "", vlan or "", *further.values())
        ):
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        raise NicError(f"does not describe the NIC on {tap}", where=runtime) from None
    try:
        return assemble(
            tap=tap,
            mac=mac,
            mode=mode,
            link=link or None,
            ip=environment.addresses(mode, mac, ip or "", further.get("NETWORK_SUBNET6")),
            vlan=environment.vlan(mode, vlan),
            incoming=False,
            instance=instance,
            index=number,
            source=runtime,
            given=environment.given(mode, further),
            options=tags.options(mode, further.get("NETWORK_TAGS", "").split()),  # the guest's are not in it
        )
    except NicError as error:
        error.at(runtime)
        raise


def further_of(nic: Described) -> dict[str, Any]:
    """What else *nic* says, by the names that Ganeti has for it in the environment of scripts."""
    network = nic.get("netinfo") if nic.get("network") else None
    names = {"uuid": "INTERFACE_UUID", "name": "INTERFACE_NAME"}
    found = {name: nic.get(key) for key, name in names.items()}
    for key, name in NETWORK.items():
        found[f"NETWORK_{name}"] = network.get(key) if network else None
    if network:
        found["NETWORK_TAGS"] = " ".join(sorted(network.get("tags") or ()))
    return {name: value for name, value in found.items() if value}
