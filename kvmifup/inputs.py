"""From arguments, environment and NIC files to a validated `Nic`; all that others wrote ends here."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import tomli

from kvmifup import trust
from kvmifup.errors import KvmIfupError, NicError, UsageError, as_told, shown
from kvmifup.model import LOCAL_TABLE, MODES, Config, Nic, Prefix

KEYS = ("tap", "mac", "mode", "link", "ip", "vlan", "incoming")
MAX_TABLE = 2**32 - 1
MAX_VLAN = 4094

# Ganeti names the tap of its own communication network so, and wires it itself.
GANETI_OWN = "gnt.com."

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
_VLAN = re.compile(r"(?P<access>\.[0-9]{1,4})?(?P<trunk>(:[0-9]{1,4})*)", re.ASCII)
_TABLE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_BYTES_SLIP = re.compile(r"b'(.+)'|b\"(.+)\"", re.ASCII)


# --- single values ------------------------------------------------------------------------------------


def device(name: str, what: str) -> str:
    """*name* if a network device can have it (`dev_valid_name`, net/core/dev.c). Raises NicError."""
    size = len(name.encode("utf-8", "surrogateescape"))
    if not 1 <= size <= 15:
        raise NicError(f"{what} {shown(name)} is not 1 to 15 bytes long")
    if name in (".", "..") or any(c in "/:" or c.isspace() or not c.isprintable() for c in name):
        raise NicError(f"{what} {shown(name)} is no name for a network device")
    return name


def tap_argument(text: str) -> str:
    """The tap in argv[1]: Ganeti 3.0 passes the text of a Python bytes object, b'tap0'."""
    slip = _BYTES_SLIP.fullmatch(text)
    return device((slip[1] or slip[2]) if slip else text, "tap")


def instance_name(name: str) -> str:
    """*name* if it is one path component. Raises NicError."""
    size = len(name.encode("utf-8", "surrogateescape"))
    if not 1 <= size <= 255 or name in (".", "..") or "/" in name or not name.isprintable():
        raise NicError(f"instance {shown(name)} is not a name for a directory")
    return name


def guest_mac(text: str) -> str:
    """*text* in lower case, if it is a unicast MAC. Raises NicError."""
    mac = text.lower()
    if not _MAC.fullmatch(mac):
        raise NicError(f"mac {shown(text)} is not six pairs of hex digits", hint='like "aa:00:00:35:ac:01"')
    if int(mac[:2], 16) & 1:
        raise NicError(f"mac {mac} is a multicast address")
    if mac == "00:00:00:00:00:00":
        raise NicError("mac is all zeros")
    return mac


def prefix(text: str) -> Prefix:
    """An address or prefix that can be behind a NIC. Raises NicError."""
    try:
        if "%" in text:  # a scope is a device of this node's, and no part of the guest's address
            raise ValueError
        exact = ipaddress.ip_interface(text)
    except ValueError:
        raise NicError(f"ip {shown(text)} is not an address or prefix") from None
    found = exact.network
    if exact.ip != found.network_address:
        raise NicError(f"ip {text} has host bits set", hint=f"{exact.ip} or {found}")
    for bad, why in _UNUSABLE[found.version]:
        if found.overlaps(bad):
            raise NicError(f"ip {text} {why}")
    return found


def _networks(*pairs: tuple[str, str]) -> tuple[tuple[Prefix, str], ...]:
    return tuple((ipaddress.ip_network(text), why) for text, why in pairs)


# Whatever overlaps one of these cannot be routed to a guest; the first also catches the default route.
_UNUSABLE = {
    4: _networks(
        ("0.0.0.0/8", "is the default route or the unspecified network"),
        ("127.0.0.0/8", "is loopback"),
        ("224.0.0.0/4", "is multicast"),
        ("255.255.255.255/32", "is the broadcast address"),
    ),
    6: _networks(
        ("::/128", "is the default route or the unspecified address"),
        ("::1/128", "is loopback"),
        ("::/96", "is IPv4-compatible, which no network carries"),
        ("::ffff:0:0/96", "is IPv4-mapped, which no network carries"),
        ("fe80::/10", "is link-local"),
        ("ff00::/8", "is multicast"),
    ),
}


def prefixes(texts: Sequence[str]) -> tuple[Prefix, ...]:
    """All of *texts*, each once. Raises NicError."""
    found: list[Prefix] = []
    for text in texts:
        one = prefix(text)
        if one in found:
            raise NicError(f"ip {text} is listed twice")
        found.append(one)
    return tuple(found)


def vlans(text: str) -> str:
    """*text* if it is Ganeti's notation: ".VID" access, ":VID:VID" trunk, ".VID:VID" hybrid."""
    match = _VLAN.fullmatch(text)
    if not text or not match:
        raise NicError(f"vlan {shown(text)} is not .VID, :VID:VID or .VID:VID")
    ids = [int(v) for v in re.split(r"[.:]", text)[1:]]
    if not all(1 <= v <= MAX_VLAN for v in ids):
        raise NicError(f"vlan {text}: a VLAN id is 1 to {MAX_VLAN}")
    if len(set(ids)) != len(ids):
        raise NicError(f"vlan {text} names a VLAN twice")
    return text


def routing_table(text: str) -> str:
    """*text* if it can name a routing table that is not the kernel's own. Raises NicError."""
    if not _TABLE_NAME.fullmatch(text):
        raise NicError(f"link {shown(text)} is not the name or number of a routing table")
    if text.isdigit() and not 1 <= int(text) <= MAX_TABLE:
        raise NicError(f"link {text}: a routing table is 1 to {MAX_TABLE}")
    if text in ("local", "unspec", "all") or (text.isdigit() and int(text) == LOCAL_TABLE):
        raise NicError(f"link {text} is the kernel's own routing table")
    return str(int(text)) if text.isdigit() else text


def program_name(text: str) -> str:
    """*text* if it can name a program in /etc/kvm-ifup/ext. Raises NicError."""
    if not _TABLE_NAME.fullmatch(text) or text in (".", ".."):
        raise NicError(f"link {shown(text)} is no name for a program")
    return text


LINKS: dict[str, Callable[[str], str]] = {
    "bridged": lambda text: device(text, "link"),
    "openvswitch": lambda text: device(text, "link"),
    "routed": routing_table,
    "ext": program_name,
}


def assemble(
    *,
    tap: str,
    mac: str,
    mode: str,
    link: str | None,
    ip: Sequence[str],
    vlan: str | None,
    incoming: bool,
    instance: str | None,
    index: int | None,
    source: str,
) -> Nic:
    """The Nic, once every value has been checked on its own and against the others. Raises NicError."""
    if mode not in MODES:
        raise NicError(f"mode {shown(mode)} is not one of {', '.join(MODES)}")
    if link is not None:
        link = LINKS[mode](link)
    elif mode != "routed":
        raise NicError(f"link is missing: a NIC in mode {mode} needs one")
    nic = Nic(
        tap=device(tap, "tap"),
        mac=guest_mac(mac),
        mode=mode,
        link=link,
        ip=prefixes(ip),
        vlan=None if vlan is None else vlans(vlan),
        incoming=incoming,
        instance=None if instance is None else instance_name(instance),
        index=index,
        source=source,
    )
    return consistent(nic)


def consistent(nic: Nic) -> Nic:
    """*nic*, if its values go together. Raises NicError."""
    if nic.mode == "routed":
        if not nic.ip:
            raise NicError("ip is missing: a routed NIC needs an address", hint='ip = ["192.0.2.8"]')
        if nic.vlan is not None:
            raise NicError("vlan means nothing on a routed NIC", hint="remove it")
    return nic


def as_wired(nic: Nic, config: Config) -> Nic:
    """*nic* in the mode that the configuration gives to its ext network, if it does. Raises NicError."""
    network = dict(config.ext.networks).get(nic.link or "") if nic.mode == "ext" else None
    if network is None:
        return nic
    try:
        return consistent(replace(nic, mode=network.mode, link=network.link))
    except NicError as error:
        error.at(nic.label)
        raise


# --- the environment ----------------------------------------------------------------------------------


def from_environment(environ: Mapping[str, str]) -> Nic:
    """The NIC that Ganeti's environment describes; INTERFACE must be set. Raises NicError."""
    missing = [name for name in ("INTERFACE", "MODE", "MAC") if not environ.get(name)]
    if missing:
        raise NicError(f"the environment has INTERFACE but lacks {' and '.join(missing)}").at("environment")
    index = environ.get("INTERFACE_INDEX") or None
    if index is not None and not re.fullmatch(r"[0-9]{1,4}", index, re.ASCII):
        raise NicError(f"INTERFACE_INDEX {shown(index)} is not a number").at("environment")
    mode = environ["MODE"]
    try:
        return assemble(
            tap=environ["INTERFACE"],
            mac=environ["MAC"],
            mode=mode,
            link=environ.get("LINK") or (environ.get("BRIDGE") if mode == "bridged" else None) or None,
            ip=[part for part in re.split(r"[,\s]+", environ.get("IP", "")) if part],
            vlan=environ.get("VLAN") or None,
            incoming=environ.get("MIGRATION_PHASE") == "pre",
            instance=environ.get("INSTANCE") or None,
            index=None if index is None else int(index),
            source="the environment",
        )
    except NicError as error:
        raise error.at(f"environment of {shown(environ['INTERFACE'])}") from None


def refuse_contradiction(command: str, tap: str | None, environ: Mapping[str, str]) -> None:
    """Raise UsageError when the environment says something else than the command line."""
    interface = environ.get("INTERFACE")
    if not interface:
        return
    if tap is not None and tap != interface:
        raise UsageError(
            f"the tap is {shown(tap)} on the command line but INTERFACE={shown(interface)}",
            hint="leave out TAP, or unset INTERFACE",
        )
    phase, action = environ.get("MIGRATION_PHASE", ""), environ.get("ACTION", "")
    contradicting = {"kvm-ifup-pre": "post", "kvm-ifup-post": "pre"}
    if phase not in ("", "pre", "post"):
        raise UsageError(f"MIGRATION_PHASE={shown(phase)} is neither pre nor post", hint="or unset it")
    if action not in ("", "up", "down"):
        raise UsageError(f"ACTION={shown(action)} is neither up nor down", hint="or unset it")
    if phase and contradicting.get(command) == phase:
        raise UsageError(f"{command} was called with MIGRATION_PHASE={phase}", hint=f"call kvm-ifup-{phase}")
    if action and action != ("down" if command == "kvm-ifdown" else "up"):
        wanted = "kvm-ifdown" if action == "down" else "kvm-ifup-pre or kvm-ifup-post"
        raise UsageError(f"{command} was called with ACTION={action}", hint=f"call {wanted}")


# --- NIC files ----------------------------------------------------------------------------------------


def parse_nic(text: str, *, instance: str | None, index: int | None, source: str) -> Nic:
    """The NIC that the TOML *text* describes. Raises NicError, naming the key."""
    try:
        data = tomli.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise NicError(f"not TOML: {as_told(error)}") from None
    for key in data:
        if key not in KEYS:
            raise NicError(f"unknown key {shown(key)}", hint=nearest(key, KEYS))
    for key in ("tap", "mac", "mode"):
        if key not in data:
            raise NicError(f"{key} is missing")
    for key in ("tap", "mac", "mode", "link", "vlan"):
        if key in data and not isinstance(data[key], str):
            raise NicError(f"{key} must be a string", hint=f'like {key} = "{EXAMPLES[key]}"')
    ip = data.get("ip", [])
    if not isinstance(ip, list) or not all(isinstance(one, str) for one in ip):
        raise NicError("ip must be a list of strings", hint='like ip = ["192.0.2.8"]')
    incoming = data.get("incoming", False)
    if not isinstance(incoming, bool):
        raise NicError("incoming must be true or false")
    return assemble(
        tap=data["tap"],
        mac=data["mac"],
        mode=data["mode"],
        link=data.get("link"),
        ip=ip,
        vlan=data.get("vlan") or None,
        incoming=incoming,
        instance=instance,
        index=index,
        source=source,
    )


EXAMPLES = {"tap": "tap0", "mac": "aa:00:00:35:ac:01", "mode": "routed", "link": "100", "vlan": ".100"}


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint that names the known word most like *word*."""
    from difflib import get_close_matches  # only ever needed to report a mistake

    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"


def read_nic(path: Path, run_dir: Path) -> Nic:
    """The NIC in the file *path*, nic/<instance>/<index>.toml below *run_dir*. Raises NicError."""
    try:
        text = trust.read(path, run_dir)
        real = trust.check(path, run_dir)
        if not real.stem.isdigit() or not real.stem.isascii() or len(real.stem) > 4 or real.suffix != ".toml":
            raise NicError("the file is not named <index>.toml, like 0.toml")
        return parse_nic(text, instance=instance_name(real.parent.name), index=int(real.stem), source=str(path))
    except NicError as error:
        raise error.at(str(path)) from None
    except trust.Untrusted as error:
        raise NicError(
            f"not to be trusted: {error}", hint="root must own it, and nobody else may write to it", where=str(path)
        ) from None
    except PermissionError:
        raise
    except OSError as error:
        raise NicError(f"cannot be read: {error.strerror}", where=str(path)) from None


def nic_of_tap(tap: str, run_dir: Path, *, needed: bool = True) -> Nic | None:
    """The NIC file of *tap*: through the symlink tap/<tap>, else the one file that names it.

    None when nothing names it. Raises NicError for a file that is wrong, not to be trusted, or not alone;
    if the NIC is *needed*, also for a wrong one that may be meant.
    """
    link = run_dir / "tap" / tap
    if leads_somewhere(link):
        nic = read_nic(link, run_dir)
        if nic.tap != tap:
            raise NicError(f"it leads to a NIC file for {nic.tap}", hint="write it anew", where=str(link))
        return nic
    found: list[Nic] = []
    broken: list[KvmIfupError] = []
    for path in sorted((run_dir / "nic").glob("*/*.toml")):
        try:
            nic = read_nic(path, run_dir)
        except NicError as error:
            broken.append(error)
            continue
        if nic.tap == tap:
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


def leads_somewhere(link: Path) -> bool:
    """Whether there is something at *link*, if only a loop; a link to what has been removed is none."""
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
    """All NICs that *instance* has files for, by tap. Raises NicError for any that is wrong."""
    files = sorted((run_dir / "nic" / instance_name(instance)).glob("*.toml"))
    nics = [read_nic(path, run_dir) for path in files]
    taps = [nic.tap for nic in nics]
    addresses = [str(one) for nic in nics if nic.mode == "routed" for one in nic.ip]
    for name in (*taps, *addresses):
        if taps.count(name) > 1 or addresses.count(name) > 1:
            raise NicError(f"two of its NIC files name {name}", where=instance)
    return sorted(nics, key=lambda nic: nic.tap)
