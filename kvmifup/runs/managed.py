"""The NICs of guests that Ganeti runs here: what its files say, for the taps that their QEMUs hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from kvmifup.core.errors import KvmIfupError, NicError, NotReadyError
from kvmifup.core.model import Nic
from kvmifup.inputs import ganeti, trust
from kvmifup.inputs.environment import GANETI_OWN
from kvmifup.node import guests, qmp

# What QEMU says (`query-status`) of a guest that is not here: it runs elsewhere, has ended, or has never begun.
NOT_HERE = {"postmigrate", "finish-migrate", "inmigrate", "prelaunch", "shutdown"}


def still_here(tap: str, instance: str | None) -> str | None:
    """Why *tap* stays wired when Ganeti takes the NICs of *instance* down; None if it does not.

    Ganeti 3.2 does that right after it has pressed the guest's power button. Then the guest runs on until it has shut
    down, and with its QEMU goes the tap. A QEMU that does not answer may still run its guest: kvmd has the socket for
    as long as the guest runs, if Ganeti is told to watch for guests that shut down by themselves.
    """
    names = ganeti.guests()
    if instance not in names:
        return None
    qemus = guests.behind_taps()
    if owners([tap], qemus, names).get(tap) != instance and not is_hidden(tap, instance, qemus):
        return None
    try:
        status = qmp.ask(ganeti.socket_of(instance), "query-status")["status"]
    except (NotReadyError, trust.Untrusted, OSError, TypeError, KeyError) as error:
        return f"its QEMU is there, and does not say that the guest has gone ({error}): wired until the tap goes"
    return None if status in NOT_HERE else f"its guest still runs (QEMU says {status!r}): wired until the tap goes"


def is_hidden(tap: str, instance: str, qemus: Mapping[str, guests.Qemu]) -> bool:
    """Whether *instance* has a QEMU that may have *tap*, and whose taps we may not see."""
    pid = ganeti.process_of(instance)
    seen = {qemu.pid for qemu in qemus.values()}
    return pid is not None and tap not in qemus and pid not in seen and guests.runs_qemu(str(pid))


def nic_of_tap(tap: str) -> Nic | None:
    """The NIC of Ganeti's on *tap*; None if it has none. Raises NicError."""
    names = [] if tap.startswith(GANETI_OWN) else ganeti.guests()
    if not names:
        return None
    qemus = guests.behind_taps()
    instance = owners([tap], qemus, names).get(tap)
    return None if instance is None else nic_on(tap, instance, qemus)


def nics_of_instance(instance: str) -> list[Nic]:
    """All NICs that Ganeti has for *instance*, by tap. Raises NicError."""
    names = ganeti.guests()
    qemus = guests.behind_taps() if instance in names else {}
    return [
        nic_on(tap, instance, qemus) for tap, name in owners(sorted(qemus), qemus, names).items() if name == instance
    ]


def all_nics(known: Collection[str]) -> Iterator[tuple[str, Nic | KvmIfupError]]:
    """Each tap of a guest of Ganeti's that is not *known*, with its NIC, or why there is none. Raises OSError.

    A guest that still waits for a migration is left out: Ganeti describes it when it has come.
    """
    names = ganeti.guests()
    qemus = guests.behind_taps() if names else {}
    for tap, instance in owners(sorted(qemus.keys() - known), qemus, names).items():
        if ganeti.runtime_of(instance).exists():
            try:
                yield tap, nic_on(tap, instance, qemus)
            except NicError as error:
                yield tap, error


def owners(taps: Sequence[str], qemus: Mapping[str, guests.Qemu], names: Sequence[str]) -> dict[str, str]:
    """Which of the guests *names* has each of *taps*; without those that none has, or that are not for guests to use.

    Pid files say it. If they say nothing, or more than one thing, NIC files do. Both may be left over from a guest that
    is gone.
    """
    processes = {name: ganeti.process_of(name) for name in names} if taps else {}
    found = {}
    for tap in taps:
        if tap.startswith(GANETI_OWN) or tap not in qemus:
            continue
        sure = [name for name, process in processes.items() if process == qemus[tap].pid]
        if len(sure) != 1:
            likely = sure or [name for name in names if processes[name] is None]
            sure = [name for name in likely if tap in ganeti.taps_of(name).values()]
        if len(sure) == 1:
            found[tap] = sure[0]
    return found


def nic_on(tap: str, instance: str, qemus: Mapping[str, guests.Qemu]) -> Nic:
    """The NIC of *instance* on *tap*. Raises NicError."""
    nics, files = ganeti.described(instance), ganeti.taps_of(instance)
    macs = {one: qemu.mac for one, qemu in qemus.items() if qemu.pid == qemus[tap].pid}
    found = ganeti.matched(nics, files, macs)
    if tap not in found and macs[tap] is None:  # it was plugged in later
        found = ganeti.matched(nics, files, {**macs, **plugged(instance, qemus[tap].pid)})
    if tap not in found:
        raise NicError(
            f"does not describe the NIC on {tap}",
            hint=f"its MAC there is {macs[tap]}" if macs[tap] else "QEMU does not say which one it is",
            where=str(ganeti.runtime_of(instance)),
        )
    numbers = sorted(int(name) for name, one in files.items() if one == tap and name.isascii() and name.isdigit())
    return ganeti.nic_of(instance, found[tap], tap, numbers[0] if numbers else nics.index(found[tap]))


def plugged(instance: str, pid: int) -> dict[str, str]:
    """The MAC of the guest's NIC on each tap of its QEMU, as that says; nothing if it does not answer."""
    try:
        said = qmp.ask(ganeti.socket_of(instance), "human-monitor-command", **{"command-line": "info network"})
    except (NotReadyError, trust.Untrusted, FileNotFoundError):
        return {}
    numbers = dict(guests.taps_of(str(pid)))
    return {numbers[fd]: mac for mac, fd in pairs(str(said)) if fd in numbers}


def pairs(text: str) -> Iterator[tuple[str, str]]:
    r"""The MAC of each NIC and the descriptor of its tap, as `info network` tells them: one line each, "\" before the
    second.
    """
    mac = None
    for line in text.splitlines():
        if found := re.search(r"macaddr=([0-9a-f:]{17})", line, re.IGNORECASE):
            mac = found[1].lower()
        elif (found := re.search(r"type=tap,.*\bfd=(\d+)", line)) and line.lstrip().startswith("\\") and mac:
            yield mac, found[1]
