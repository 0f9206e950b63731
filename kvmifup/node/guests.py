"""Who is behind the taps: the QEMU processes that hold them open, and what their command lines say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from kvmifup.core.records import record
from kvmifup.node.messages import Link
from kvmifup.node.procfs import IFF_PERSIST, read_file, sysfs_of

TUN = "/dev/net/tun"


@record
class Qemu:
    """A QEMU that holds a tap open.

    *incoming*: it was started to wait for a migration. *mac* is what its command line gives to the guest's NIC on this
    tap, None if that does not say: the NIC may have been plugged in later.
    """

    pid: int
    incoming: bool
    mac: str | None


def behind_taps() -> dict[str, Qemu]:
    """The QEMU behind each tap of this network namespace, as far as there is one that we may look at.

    None where several say that they are: anybody can call a process QEMU, and hold another namespace's tap of the name.
    """
    found: dict[str, list[Qemu]] = {}
    ours = namespace("self")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for tap, qemu in behind_taps_of(pid, ours).items():
            found.setdefault(tap, []).append(qemu)
    return {tap: several[0] for tap, several in found.items() if len(several) == 1}


def behind_taps_of(pid: str, ours: str | None = None) -> dict[str, Qemu]:
    """The process *pid* behind each of its taps; none if it is no QEMU of *ours*, this network namespace."""
    argv = command_line(pid)
    if not argv or not is_qemu(argv[0]) or namespace(pid) != (ours or namespace("self")):
        return {}
    held: dict[str, set[str]] = {}
    for number, tap in taps_of(pid):
        held.setdefault(tap, set()).add(number)
    incoming = any(word.lstrip("-") == "incoming" and word.startswith("-") for word in argv)
    return {tap: Qemu(int(pid), incoming, mac_in(argv, tap, numbers)) for tap, numbers in held.items()}


def runs_qemu(pid: str) -> bool:
    """Whether the process *pid* is a QEMU, in whatever network namespace."""
    argv = command_line(pid)
    return bool(argv) and is_qemu(argv[0])


def sign_of(tap: str, link: Link, qemu: Qemu | None) -> str:
    """How it is known that the guest on *tap* runs here by now, though it is described as incoming; "" if it is not.

    It cannot send before it runs. *link* is the tap's, *qemu* who is behind it.
    """
    if qemu and not qemu.incoming:
        return f"its QEMU (process {qemu.pid}) was not started with -incoming"
    frames = frames_from(tap, link)
    return f"the guest has sent {frames} frames" if frames else ""


def frames_from(tap: str, link: Link) -> int:
    """How many frames have come in on *tap*, whose device *link* is, since its process has made it.

    None of a tap that stays without its process: an earlier one's frames count there as well; nor if nobody knows.
    """
    sysfs = sysfs_of(tap, link)
    flags = sysfs and read_file(f"{sysfs}/tun_flags")
    if not flags or int(flags, 16) & IFF_PERSIST:
        return 0
    return int(read_file(f"{sysfs}/statistics/rx_packets") or 0)


def is_qemu(program: str) -> bool:
    """Whether a process that calls itself *program* is QEMU: qemu-system-x86_64, qemu-kvm, or Debian's kvm."""
    name = Path(program).name
    return name.startswith("qemu") or name == "kvm"


def namespace(pid: str) -> str:
    """The network namespace of a process; "" if it is gone or not ours to see."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def command_line(pid: str) -> list[str]:
    """The words of a process's command line; none if it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read()).split("\0")[:-1]
    except OSError:
        return []


def taps_of(pid: str) -> Iterator[tuple[str, str]]:
    """The descriptors of a process that are a tap's, by their number, and the tap's name."""
    with suppress(OSError):  # gone by now, or not ours to see
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if str(Path(f"/proc/{pid}/fd/{number}").readlink()) == TUN:
                    for line in (read_file(f"/proc/{pid}/fdinfo/{number}") or "").splitlines():
                        key, _, value = line.partition(":")
                        if key == "iff" and value.strip():
                            yield number, value.strip()


# --- QEMU's options ---------------------------------------------------------------------------------------


def mac_in(argv: Sequence[str], tap: str, numbers: set[str]) -> str | None:
    """The MAC of the guest's NIC on *tap*, which is open as the descriptors *numbers*; None if *argv* does not say."""
    given = list(options(argv))
    backends = {
        values.get("id")
        for name, values in given
        if name == "netdev" and (values.get("ifname") == tap or numbers & descriptors(values))
    }
    for name, values in given:
        whole = name == "nic" and (values.get("ifname") == tap or numbers & descriptors(values))
        if (whole or (name == "device" and values.get("netdev") in backends - {None})) and "mac" in values:
            return values["mac"].lower()
    return None


def descriptors(values: dict[str, str]) -> set[str]:
    """The descriptors that `fd=` and `fds=` name."""
    return {number for key in ("fd", "fds") for number in values.get(key, "").split(":") if number}


def options(argv: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The options of *argv* that are about NICs: name, and what they say."""
    for word, value in pairwise(argv):
        name = word.lstrip("-")
        if word.startswith("-") and name in ("netdev", "device", "nic"):
            yield name, parsed(value)


def parsed(text: str) -> dict[str, str]:
    """What the value of an option says: in JSON, or as key=value,key=value."""
    if text.startswith("{"):
        try:
            return {str(key): str(value) for key, value in json.loads(text).items()}
        except (ValueError, AttributeError):
            return {}
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)
