"""`kvm-ifup nic`: check, write, list and remove NIC files."""

from __future__ import annotations

from typing import TextIO

from kvmifup.commands import names
from kvmifup.commands.call import Call
from kvmifup.core.errors import NicError, UsageError, raise_all
from kvmifup.core.model import Nic
from kvmifup.core.text import printable, shown
from kvmifup.inputs import nicfiles, trust
from kvmifup.tell import render

HEADINGS = ["INSTANCE", "NIC", "TAP", "MODE", "LINK", "ADDRESSES", "INCOMING"]
ELASTIC = {"INSTANCE": 16, "LINK": 6, "ADDRESSES": 9}  # columns that give way on a narrow terminal, and how far


def run(call: Call) -> int:
    """Run the verb that is asked for; returns 0. Raises KvmIfupError, OSError, or a group."""
    {"put": put, "list": list_nics, "rm": remove}[call.options.verb](call)
    return 0


def put(call: Call) -> None:
    """`kvm-ifup nic put`."""
    options = call.options
    assert options.instance is not None  # the command line takes both
    assert options.index is not None
    nicfiles.place(call.run_dir, options.instance, options.index)
    text = text_of(options.file, call.stdin)
    try:
        nic = nicfiles.checked(call.run_dir, options.instance, options.index, text)
        kind = names.kind_of_device(nic.tap)
        if kind not in (None, "a tap"):
            raise NicError(f"tap {nic.tap} is {kind}", hint="a tap is made by QEMU, for its ifname=")
        nic = nicfiles.put(call.run_dir, options.instance, options.index, text)
    except NicError as error:
        raise error.at("standard input" if options.file == "-" else options.file) from None
    if options.json:
        call.say_json([render.described(nic)])
    if options.verbose:
        call.add([f"{nic.label}: {nic.source}"])


def text_of(file: str, stdin: TextIO | None) -> str:
    """The text of *file*, "-" for *stdin*. Raises UsageError, NicError."""
    if stdin is None and not file.startswith("/"):
        raise UsageError(f"{shown(file)} cannot be read from here", hint="give a file with its whole path")
    try:
        if file == "-":
            assert stdin is not None
            return stdin.read(trust.MAX_BYTES + 1)
        with open(file, encoding="utf-8") as opened:
            return opened.read(trust.MAX_BYTES + 1)
    except UnicodeDecodeError as error:
        raise NicError(f"it is not UTF-8 at byte {error.start}", where=file) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{shown(file)} cannot be read: {reason}", hint="FILE is a NIC file, or - for stdin") from None


def list_nics(call: Call) -> None:
    """`kvm-ifup nic list`: those that are right are listed, and each that is wrong is an error."""
    instance = call.options.instance
    found = nicfiles.found(call.run_dir, instance)
    if instance and not found:
        raise NicError("there are no NIC files for it", hint="`kvm-ifup nic list` lists all", where=instance)
    nics = [one for one in found if isinstance(one, Nic)]
    wrong = [one for one in found if isinstance(one, NicError)]
    if call.options.json:
        if not wrong:  # else the failures are the one JSON value on stdout
            call.say_json([render.described(nic) for nic in nics])
    else:
        table = render.table([HEADINGS, *map(cells, nics)], call.columns, ELASTIC)
        call.say(render.GAP.join(row).rstrip() for row in table)
    raise_all(wrong)


def cells(nic: Nic) -> list[str]:
    """One line of the table."""
    addresses = " ".join(map(render.short, nic.ip)) or "-"
    incoming = "yes" if nic.incoming else "no"
    return [nic.instance or "", str(nic.index), nic.tap, nic.mode, nic.link or "-", addresses, incoming]


def remove(call: Call) -> None:
    """`kvm-ifup nic rm`."""
    instance, index = call.options.instance, call.options.index
    assert instance is not None  # the command line takes it
    removed = nicfiles.remove(call.run_dir, instance, index)
    if call.options.json:
        call.say_json([{"instance": instance, "file": str(path)} for path in removed])
    if call.options.verbose:
        call.add(f"removed {path}" for path in removed)
    if not removed and (call.options.verbose or call.err.isatty()):  # perhaps it is misspelt
        which = instance if index is None else f"{instance} {index}"
        there = ", ".join(path.stem for path in nicfiles.files(call.run_dir, instance))
        why = f"it has {there}" if there else names.unknown_guest(instance, call.run_dir)
        call.add([f"{call.program}: {printable(which)}: nothing to remove ({why})"])
