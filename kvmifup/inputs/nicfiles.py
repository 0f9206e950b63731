"""Read, write and remove NIC files, each with the symlink that leads to it from the name of its tap."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from kvmifup.core.errors import KvmIfupError, NicError
from kvmifup.core.model import Nic
from kvmifup.core.text import as_told, shown
from kvmifup.inputs import devices, places, toml, trust
from kvmifup.inputs.values import LADDER, assemble, instance_name, nearest, nic_index, yes_or_no


def place(run_dir: Path, instance: str, index: int) -> Path:
    """Where the NIC file is. Raises NicError for a name that cannot be a guest's."""
    return run_dir / "nic" / instance_name(instance) / f"{index}.toml"


def put(run_dir: Path, instance: str, index: int, text: str) -> Nic:
    """Check *text*, and install it as a NIC file with its symlink: whole or not at all.

    Raises NicError, OSError.
    """
    path = place(run_dir, instance, index)
    nic = checked(run_dir, instance, index, text)
    for other in (*of_the_same_tap(nic, path, run_dir), *of_the_same_address(nic, run_dir)):
        raise taken(nic, other)
    shortcut = run_dir / "tap" / nic.tap
    places.made(run_dir, "nic", path.parent.name)
    places.made(run_dir, "tap")
    replace(path, partial(create, text))
    forget_links(run_dir, path, keep=nic.tap)
    replace(shortcut, partial(os.symlink, target(path)))
    return nic


def checked(run_dir: Path, instance: str, index: int, text: str) -> Nic:
    """The NIC of *text*, if that can be its NIC file. Raises NicError."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise NicError("it is not UTF-8", hint="save it as UTF-8") from None
    if size > trust.MAX_BYTES:
        raise NicError(f"it is larger than {trust.MAX_BYTES} bytes")
    return parse_nic(text, instance=instance, index=index, source=str(place(run_dir, instance, index)))


def taken(nic: Nic, other: Nic) -> NicError:
    """The error that *nic* has what is *other*'s: its tap, or an address."""
    same = nic.tap if other.tap == nic.tap else "one of its addresses"
    hint = f"`kvm-ifup nic rm {other.instance} {other.index}`, if that NIC is no more"
    return NicError(f"{same} is that of {other.label} already, described in {other.source}", hint=hint)


def of_the_same_tap(nic: Nic, path: Path, run_dir: Path) -> Iterator[Nic]:
    """The NICs of other files than *path*, also other guests', that are on the tap of *nic*."""
    for other in every(run_dir):
        if other.path != str(path) and may_name(other.path, nic.tap):
            with suppress(NicError, PermissionError):  # what is wrong describes no NIC
                there = read_nic(Path(other.path), run_dir)
                if there.tap == nic.tap and (there.instance, there.index) != (nic.instance, nic.index):
                    yield there


FIRST = 1 << 14  # bytes of a NIC file that are looked at


def may_name(path: str, tap: str) -> bool:
    """Whether the NIC file *path* has to be read to know that it is not about *tap*.

    Thousands are not: so this takes four system calls, and believes nothing of what it finds.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = os.read(descriptor, FIRST)
        finally:
            os.close(descriptor)
    except OSError:
        return True
    return tap.encode("utf-8", "surrogateescape") in data or b"\\" in data or len(data) == FIRST


def of_the_same_address(nic: Nic, run_dir: Path) -> Iterator[Nic]:
    """The other routed NICs of the guest of *nic* that have one of its addresses."""
    for other in found(run_dir, nic.instance) if nic.mode == "routed" else ():
        if isinstance(other, NicError) or other.index == nic.index or other.mode != "routed":
            continue
        if not nic.prefixes.isdisjoint(other.ip):
            yield other


def remove(run_dir: Path, instance: str, index: int | None = None) -> list[Path]:
    """Remove one NIC file of *instance*, or all; returns those that were there.

    Raises NicError, also for one that another guest's NIC file is a symlink to, and OSError.
    """
    directory = run_dir / "nic" / instance_name(instance)
    paths = trust.listed(directory, ".toml") if index is None else [place(run_dir, instance, index)]
    doomed = {os.path.realpath(path): path for path in paths}
    for one in every(run_dir):
        if one.is_symlink() and Path(one.path) not in paths and (path := doomed.get(os.path.realpath(one.path))):
            other = Path(one.path)
            hint = f"`kvm-ifup nic rm {other.parent.name} {other.stem}` first"
            raise NicError(f"{other} leads to it", hint=hint, where=str(path))
    removed = []
    for path in paths:
        forget_links(run_dir, path)
        if path.exists() or path.is_symlink():
            path.unlink()
            removed.append(path)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    return removed


def found(run_dir: Path, instance: str | None = None) -> list[Nic | NicError]:
    """All NIC files, or those of *instance*: each as its NIC, or as the error if it is wrong.

    Raises NicError for a name that cannot be a guest's.
    """
    nics: list[Nic | NicError] = []
    for path in files(run_dir, instance):
        try:
            nics.append(read_nic(path, run_dir))
        except NicError as error:
            nics.append(error)
    return nics


def files(run_dir: Path, instance: str | None = None) -> list[Path]:
    """All NIC files, or those of *instance*. Raises NicError for a name that cannot be a guest's, OSError."""
    top = run_dir / "nic"
    guests = trust.listed(top) if instance is None else [top / instance_name(instance)]
    return [path for guest in guests for path in trust.listed(guest, ".toml")]


def every(run_dir: Path) -> Iterator[os.DirEntry[str]]:
    """All NIC files, in the order of `files`. Raises OSError."""
    for guest in trust.entries(run_dir / "nic"):
        yield from trust.entries(guest.path, ".toml")


def forget_links(run_dir: Path, path: Path, keep: str | None = None) -> None:
    """Remove the symlinks that lead to *path*, except that of the tap *keep*. Raises OSError."""
    there = identity(path)
    for link in trust.entries(run_dir / "tap"):
        if link.name == keep or not link.is_symlink() or identity(link) != there:
            continue
        # Somebody else's may be written otherwise; and a symlink in the place of the file leads further.
        if target(path) == str(Path(link.path).readlink()) or os.path.realpath(link.path) == str(path):
            os.unlink(link.path)


def identity(one: Path | os.DirEntry[str]) -> tuple[int, int] | None:
    """Which file *one* is, or leads to; None if there is none."""
    try:
        found = one.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def target(path: Path) -> str:
    """Where the symlink of a tap leads to."""
    return f"../nic/{path.parent.name}/{path.name}"


def replace(path: Path, make: Callable[[Path], None]) -> None:
    """Replace *path* by what *make* makes; at every moment either the old or the new one is there, whole."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        make(new)
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def create(text: str, path: Path) -> None:
    """A new file that only root can read, on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


KEYS = ("tap", "mac", "mode", "link", "ip", "vlan", "iface_id", "incoming", *LADDER)


# --- NIC files ----------------------------------------------------------------------------------------


def parse_nic(text: str, *, instance: str | None, index: int | None, source: str) -> Nic:
    """The NIC that the TOML *text* describes. Raises NicError, naming the key."""
    try:
        data = toml.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise NicError(f"not TOML: {as_told(error)}", hint=written_right(text)) from None
    for key in data:
        if key not in KEYS:
            raise NicError(f"unknown key {shown(key)}", hint=nearest(key, KEYS))
    for key in ("tap", "mac", "mode"):
        if key not in data:
            raise NicError(f"{key} is missing")
    for key in ("tap", "mac", "mode", "link", "vlan", "iface_id"):
        if key in data and not isinstance(data[key], str):
            raise NicError(f"{key} must be a string", hint=f'like {key} = "{EXAMPLES[key]}"')
    ip = data.get("ip", [])
    if not isinstance(ip, list) or not all(isinstance(one, str) for one in ip):
        raise NicError("ip must be a list of strings", hint='like ip = ["192.0.2.8"]')
    return assemble(
        tap=data["tap"],
        mac=data["mac"],
        mode=data["mode"],
        link=data.get("link"),
        ip=ip,
        vlan=data.get("vlan") or None,
        iface_id=data.get("iface_id") or None,
        incoming=yes_or_no("incoming", data.get("incoming", False)),
        instance=instance,
        index=index,
        source=source,
        options={key: check(key, data[key]) for key, (_, check) in LADDER.items() if key in data},
    )


UNQUOTED = r"""\s*(\w+)\s*=\s*([^\s"'\[{#][^"'#]*)$"""  # a key, and what is no string


def written_right(text: str) -> str:
    """A hint that writes the first line of *text* that lacks quotes as it has to be; empty if there is none."""
    found = (re.fullmatch(UNQUOTED, line.rstrip()) for line in text.splitlines())
    for key, value in (one.groups() for one in found if one):
        if key in EXAMPLES:
            return f'write {key} = "{value.strip("“”„‘’ ")}"'
        if key == "incoming" and value not in ("true", "false"):
            return "write incoming = true, or incoming = false"
    return 'write ip = ["192.0.2.8"]' if re.search(r"^\s*ip\s*=\s*(\[\s*)?[^\s\[\"']", text, re.MULTILINE) else ""


EXAMPLES = {
    "tap": "tap0",
    "mac": "aa:00:00:35:ac:01",
    "mode": "routed",
    "link": "100",
    "vlan": ".100",
    "iface_id": "web1-0",
}


def read_nic(path: Path, run_dir: Path) -> Nic:
    """The NIC in the file *path*, nic/<instance>/<index>.toml below *run_dir*. Raises NicError."""
    try:
        text = trust.read(path, run_dir)
        real = trust.check(path, run_dir)
        index = nic_index(
            real.stem if real.suffix == ".toml" else real.name, "the file is not named <index>.toml, like 0.toml:"
        )
        return parse_nic(text, instance=instance_name(real.parent.name), index=index, source=str(path))
    except NicError as error:
        raise error.at(str(path)) from None
    except trust.Untrusted as error:
        raise NicError(f"not to be trusted: {error}", hint=error.mend, where=str(path)) from None
    except PermissionError:
        raise
    except OSError as error:
        trust.need_answer(error)
        raise NicError(f"cannot be read: {error.strerror}", where=str(path)) from None


def nic_of_tap(tap: str, run_dir: Path, *, needed: bool = True) -> Nic | None:
    """The NIC file of *tap*: through the symlink tap/<tap>, else the one file that names it.

    None when nothing names it. Raises NicError for a file that is wrong or not to be trusted, and when several
    name the tap. If the NIC is *needed* and no file names the tap, also for any wrong file: it may be that one.
    """
    link = run_dir / "tap" / tap
    if leads_somewhere(link):
        try:
            nic = read_nic(link, run_dir)
        except NicError as error:
            if error.where == str(link) and link.is_symlink():  # the file itself is what has to be corrected
                error.where = os.path.normpath(link.parent / link.readlink())
            raise
        if not means(nic, tap):
            raise NicError(f"it leads to a NIC file for {nic.tap}", hint="write it anew", where=str(link))
        return nic
    found: list[Nic] = []
    broken: list[KvmIfupError] = []
    for path in files(run_dir):
        try:
            nic = read_nic(path, run_dir)
        except NicError as error:
            broken.append(error)
            continue
        if means(nic, tap):
            found.append(nic)
    if len(found) > 1:
        raise NicError(
            f"{len(found)} NIC files name it: {', '.join(nic.source for nic in found)}",
            hint=f"remove the old one, or point {link} at the right one",
            where=tap,
        )
    if needed and not found and broken:
        # Any of these may have been meant: saying only "nothing describes it" would hide the cause.
        raise broken[0]
    return found[0] if found else None


def means(nic: Nic, tap: str) -> bool:
    """Whether *nic* is on the device *tap*, by whatever name of it."""
    return nic.tap == tap or devices.own_name(nic.tap) == tap


def leads_somewhere(link: Path) -> bool:
    """Whether *link* leads to something, even to itself; False when what it led to has been removed."""
    try:
        link.stat()
    except FileNotFoundError:
        return False
    except PermissionError:
        raise
    except OSError:
        return True
    return True


def nics_of_instance(instance: str, run_dir: Path) -> list[Nic]:
    """All NICs that *instance* has files for, by tap.

    Raises NicError for any that is wrong, also one whose tap another guest's file describes: unless the tap's symlink
    says whose it is.
    """
    nics = [read_nic(path, run_dir) for path in files(run_dir, instance)]
    taps = Counter(nic.tap for nic in nics)
    addresses = Counter(one for nic in nics if nic.mode == "routed" for one in nic.ip)
    for name, number in (*taps.items(), *addresses.items()):
        if number > 1:
            raise NicError(f"two of its NIC files name {name}", where=instance)
    for nic in nics:
        link = run_dir / "tap" / nic.tap
        if os.path.realpath(link) != os.path.realpath(nic.source):
            for other in of_the_same_tap(nic, Path(nic.source), run_dir):
                raise taken(nic, other).at(nic.label)
    return sorted(nics, key=lambda nic: nic.tap)
