"""What a hook is asked to do, found and validated before the node is looked at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kvmifup.commands import names
from kvmifup.core.errors import KvmIfupError, NicError, UsageError
from kvmifup.core.model import Nic, Phase
from kvmifup.core.records import record
from kvmifup.inputs import devices, environment, ganeti, nicfiles, values
from kvmifup.runs import managed
from kvmifup.runs.store import Store

PHASES = {"kvm-ifup-pre": Phase.PRE, "kvm-ifup-post": Phase.POST, "kvm-ifdown": Phase.DOWN}


@record
class Request:
    """A phase, for one tap or for all NICs of a guest.

    *nics* are those to be wired; none for `Phase.DOWN`, where the journals know what to undo. *owner* is the guest
    that has the tap, as the caller says; None if it does not say.
    """

    phase: Phase
    tap: str | None
    instance: str | None
    owner: str | None
    nics: tuple[Nic, ...] = ()


def of_hook(
    program: str, tap: str | None, instance: str | None, run_dir: Path, environ: Mapping[str, str]
) -> Request | None:
    """What *program* is to do, for *tap* or all NICs of *instance*; None for a tap that is left alone.

    Raises UsageError, NicError, JournalError and NamespaceError: all that can be wrong with the input is found here.
    """
    if tap is not None and instance is not None:
        raise UsageError("TAP and --instance exclude each other", hint="give one of them")
    if instance is not None and environ.get("INTERFACE"):
        raise UsageError("--instance takes the NIC files, but the environment has INTERFACE", hint="unset INTERFACE")
    tap = None if tap is None else tap_named(tap, program, run_dir)
    if (tap or environ.get("INTERFACE", "")).startswith(environment.GANETI_OWN):
        return None
    environment.refuse_contradiction(program, tap, environ)
    if instance is not None:
        guest_named(instance, program, run_dir)
    else:
        tap = tap or environ.get("INTERFACE")
        if tap is None:
            raise UsageError("which tap?", hint="give TAP or --instance NAME, or set INTERFACE")
        tap = devices.own_name(values.device(tap, "tap"))
    owner = instance or (environ.get("INSTANCE") if environ.get("INTERFACE") else None)
    phase = PHASES[program]
    if phase is not Phase.DOWN:
        return Request(phase, tap, instance, owner, nics_of(program, tap, instance, run_dir, environ))
    if tap and not environ.get("INTERFACE") and not os.path.lexists(run_dir / "state" / f"{tap}.json"):
        refuse(names.as_tap(tap, program, run_dir))
    return Request(phase, tap, instance, owner)


def tap_named(argument: str, program: str, run_dir: Path) -> str:
    """The tap that *argument* names. Raises UsageError for something else of which we know what it is, NicError."""
    try:
        return values.tap_argument(argument)
    except NicError:
        refuse(names.as_tap(argument, program, run_dir))
        raise


def guest_named(instance: str, program: str, run_dir: Path) -> None:
    """Raise UsageError for something else of which we know what it is, NicError for what cannot be a guest's name."""
    try:
        values.instance_name(instance)
    except NicError:
        if "/" in instance:
            refuse(names.as_guest(instance, program, run_dir))
        raise


def refuse(error: KvmIfupError | None) -> None:
    """Raise *error*, if there is one."""
    if error:
        raise error


def nics_of(
    program: str, tap: str | None, instance: str | None, run_dir: Path, environ: Mapping[str, str]
) -> tuple[Nic, ...]:
    """The NIC on *tap*, or those of *instance*.

    Raises NicError when there is none, or something is wrong with it; UsageError if it is something else.
    """
    if tap is None:
        assert instance is not None  # `of_hook` sees to it
        nics = nicfiles.nics_of_instance(instance, run_dir) or managed.nics_of_instance(instance)
        if not nics:
            refuse(names.as_guest(instance, program, run_dir))
            hint = names.meant(instance, program, run_dir, tap=False) or names.misplaced(instance, run_dir)
            hint = hint or f"see {run_dir}/nic"
            raise NicError("there are no NIC files for it", hint=hint, where=instance)
        own = [replace(nic, tap=devices.own_name(nic.tap)) for nic in nics]
        taps = [one.tap for one in own]
        if twice := [one for one in taps if taps.count(one) > 1]:
            raise NicError(f"two of its NIC files name {twice[0]}, by different names of it", where=instance)
        return tuple(own)
    nic = nic_of(tap, run_dir, environ)
    if nic is None:
        refuse(names.as_tap(tap, program, run_dir))
        hint = names.meant(tap, program, run_dir, tap=True) or names.misplaced(tap, run_dir)
        describe = f"write {run_dir}/nic/INSTANCE/0.toml, or set INTERFACE, MODE, MAC and LINK"
        raise NicError("nothing describes this tap", hint=hint or describe, where=tap)
    return (nic,)


def nic_of(tap: str, run_dir: Path, environ: Mapping[str, str], *, needed: bool = True) -> Nic | None:
    """The NIC on *tap*, the device's own name: from the environment, its NIC file, the journal of an earlier
    phase, or Ganeti's files.

    If the NIC is not *needed*, an environment with the name of the tap and no more describes none.
    None when nothing describes it. Raises NicError, JournalError, NamespaceError.
    """
    if environ.get("INTERFACE") and (needed or environment.describes(environ)):
        nic: Nic | None = environment.from_environment(environ)
    else:
        nic = nicfiles.nic_of_tap(tap, run_dir, needed=needed)
    nic = nic or Store(run_dir).nic_of_live(tap) or managed.nic_of_tap(tap)
    return nic and (nic if nic.tap == tap else replace(nic, tap=tap))  # it may be described by another name of it


def names_tap(name: str, run_dir: Path, environ: Mapping[str, str]) -> bool:
    """Whether *name* is the name of a tap, and not of a guest with NIC files, ours or Ganeti's."""
    if environ.get("INTERFACE") == name or name in names.entries(names.DEVICES) or name in Store(run_dir).taps():
        return True
    try:
        values.device(name, "tap")
    except NicError:
        return False
    if (run_dir / "tap" / name).is_symlink():
        return True
    return not ((run_dir / "nic" / name).is_dir() or (ganeti.DIRECTORY / "nic" / name).is_dir())
