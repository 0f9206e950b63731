"""Check single values, and make a validated `Nic` of them: nothing unchecked goes further."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvmifup.core import rates
from kvmifup.core.errors import NicError
from kvmifup.core.model import LOCAL_TABLE, MODES, Config, Nic, Prefix, eui64
from kvmifup.core.ops import PORT_OPTIONS
from kvmifup.core.text import shown
from kvmifup.core.vlans import MAX_VLAN, parts

MAX_TABLE = 2**32 - 1
MAX_INDEX = 9999
MAX_MACS = 256
FILTERS = ("off", "mac", "address")

_MAC = r"[0-9a-f]{2}(:[0-9a-f]{2}){5}"
_INDEX = r"0|[1-9][0-9]{0,3}"
_VLAN = r"(\.[0-9]{1,4})?(:[0-9]{1,4}(-[0-9]{1,4})?)*"
_VID = r"[0-9]{1,4}"
_TABLE_NAME = r"[A-Za-z0-9_.-]{1,64}"
_INTERFACE_ID = r"[A-Za-z0-9._:/@-]{1,255}"
_BYTES_SLIP = r"b'(.+)'|b\"(.+)\""


# --- single values ------------------------------------------------------------------------------------


def device(name: str, what: str) -> str:
    """*name* if a network device can have it (`dev_valid_name`, net/core/dev.c). Raises NicError."""
    size = len(name.encode("utf-8", "surrogateescape"))
    if not 1 <= size <= 15:
        raise NicError(f"{what} {shown(name)} is not 1 to 15 bytes long")
    if name in (".", "..") or any(c in "/:" or c.isspace() or not c.isprintable() for c in name):
        raise NicError(f"{what} {shown(name)} is no name for a network device")
    if "%" in name:  # a pattern; the kernel puts a number into it (`dev_alloc_name`)
        raise NicError(f"{what} {shown(name)} is a pattern, not a name", hint="give the name itself, like tap0")
    return name


def tap_argument(text: str) -> str:
    """The tap in argv[1]: Ganeti 3.0 passes the text of a Python bytes object, b'tap0'."""
    slip = re.fullmatch(_BYTES_SLIP, text)
    return device((slip[1] or slip[2]) if slip else text, "tap")


def instance_name(name: str) -> str:
    """*name* if it is one path component. Raises NicError."""
    size = len(name.encode("utf-8", "surrogateescape"))
    if not 1 <= size <= 255 or name in (".", "..") or "/" in name or not name.isprintable():
        raise NicError(f"instance {shown(name)} is not a name for a directory")
    return name


def nic_index(text: str, what: str = "index") -> int:
    """The number of a guest's NIC, written in the one way that there is. Raises NicError."""
    if not re.fullmatch(_INDEX, text):
        raise NicError(f"{what} {shown(text)} is not a number from 0 to {MAX_INDEX}")
    return int(text)


def guest_mac(text: str, what: str = "mac") -> str:
    """*text* in lower case, if it is a unicast MAC, and not the one that the guest's tap gets. Raises NicError."""
    mac = text.lower()
    if not re.fullmatch(_MAC, mac):
        raise NicError(f"{what} {shown(text)} is not six pairs of hex digits", hint='like "aa:00:00:35:ac:01"')
    if int(mac[:2], 16) & 1:
        raise NicError(f"{what} {mac} is a multicast address")
    if mac == "00:00:00:00:00:00":
        raise NicError(f"{what} is all zeros")
    if mac.startswith("fe:"):  # a bridge keeps what is for a port's own MAC
        raise NicError(
            f"{what} {mac} begins with fe:, so it would be the tap's own MAC as well",
            hint=f"give the guest another one, such as 52{mac[2:]}",
        )
    return mac


def prefix(text: str) -> Prefix:
    """An address or prefix that can be behind a NIC. Raises NicError."""
    try:
        if "%" in text:  # a scope is a device of this node, not a part of the guest's address
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


# A prefix that overlaps one of these cannot be routed to a guest. The first also catches the default route.
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
    found: dict[Prefix, None] = {}
    for text in texts:
        one = prefix(text)
        if one in found:
            raise NicError(f"ip {text} is listed twice")
        found[one] = None
    return tuple(found)


def autoconfigured(subnet: str | None, mac: str) -> list[str]:
    """The address that a guest with this *mac* gives itself in *subnet* (RFC 4862), if it can: in an IPv6 /64.

    Raises NicError.
    """
    found = prefix(subnet) if subnet else None
    if found is None or (found.version, found.prefixlen) != (6, 64):
        return []
    return [eui64(found.network_address.packed[:8], guest_mac(mac))]


def vlans(text: str) -> str:
    """*text* if it is Ganeti's notation, also with ranges: ".VID" access, ":VID:VID-VID" trunk, ".VID:VID" hybrid.

    As for Ganeti, "VID" is ".VID". Raises NicError.
    """
    notation = f".{text}" if re.fullmatch(_VID, text) else text
    if not notation or not re.fullmatch(_VLAN, notation):
        raise NicError(f"vlan {shown(text)} is not .VID, :VID:VID, :VID-VID or .VID:VID")
    vids: set[int] = set()
    for _, first, last in parts(notation):
        if not 1 <= first <= last <= MAX_VLAN:
            raise NicError(f"vlan {text}: a VLAN id is 1 to {MAX_VLAN}, and a range begins with the lower one")
        if not vids.isdisjoint(range(first, last + 1)):
            raise NicError(f"vlan {text} names a VLAN twice")
        vids.update(range(first, last + 1))
    return notation


def interface_id(text: str) -> str:
    """*text* if it can name a NIC to OVN: a word. Raises NicError."""
    if not re.fullmatch(_INTERFACE_ID, text):
        raise NicError(f"iface_id {shown(text)} is not a word of 1 to 255 letters, digits and ._:/@-")
    return text


def routing_table(text: str) -> str:
    """*text* if it can name a routing table that is not the kernel's own. Raises NicError."""
    if not re.fullmatch(_TABLE_NAME, text):
        raise NicError(f"link {shown(text)} is not the name or number of a routing table")
    if text.isdigit() and not 1 <= int(text) <= MAX_TABLE:
        raise NicError(f"link {text}: a routing table is 1 to {MAX_TABLE}")
    if text in ("local", "unspec", "all") or (text.isdigit() and int(text) == LOCAL_TABLE):
        raise NicError(f"link {text} is the kernel's own routing table")
    return str(int(text)) if text.isdigit() else text


def program_name(text: str) -> str:
    """*text* if it can name a program in /etc/kvm-ifup/ext. Raises NicError."""
    if not re.fullmatch(_TABLE_NAME, text) or text in (".", ".."):
        raise NicError(f"link {shown(text)} is no name for a program")
    return text


# --- the ladder ---------------------------------------------------------------------------------------
#
# What a NIC file, a tag of the guest, one of its network, [link.NAME] and the section of the mode can say, in this
# order: the first that says anything counts. Here is what each key can be, and in which modes it means anything.


def yes_or_no(key: str, value: object) -> bool:
    """True or false. Raises NicError."""
    if not isinstance(value, bool):
        raise NicError(f"{key} must be true or false", hint=f"like {key.rpartition('.')[2]} = true")
    return value


def filtering(key: str, value: object) -> str:
    """What of the guest's frames is looked at. Raises NicError."""
    if not isinstance(value, str) or value not in FILTERS:
        raise NicError(f"{key} must be one of {', '.join(FILTERS)}", hint='like filter = "address"')
    return value


def macs(key: str, value: object) -> tuple[str, ...]:
    """MACs that a guest may use, each once. Raises NicError."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise NicError(f"{key} must be a list of strings", hint='like allow_mac = ["00:00:5e:00:01:05"]')
    found = tuple(guest_mac(one, key) for one in value)
    if len(found) > MAX_MACS:
        raise NicError(f"{key} has {len(found)} MACs, more than {MAX_MACS}")
    for number, one in enumerate(found):
        if one in found[:number]:
            raise NicError(f"{key} {one} is listed twice")
    return found


def limits(key: str, value: object) -> rates.Limits:
    """Limits of either direction, each in the one way to write it. Raises NicError."""
    if not isinstance(value, dict) or not value:
        raise NicError(f"{key} must be a table that is not empty", hint='like rate = { to_guest = "100mbit" }')
    found = {}
    for name, text in value.items():
        if name not in rates.KEYS:
            raise NicError(f"unknown key {shown(f'{key}.{name}')}", hint=nearest(name, rates.KEYS))
        found[name] = burst(f"{key}.{name}", text) if name.endswith(rates.BURST) else rate(f"{key}.{name}", text)
    for direction in rates.DIRECTIONS:
        name = direction + rates.BURST
        if name in found and found.get(direction, rates.OFF) == rates.OFF:
            raise NicError(f"{key}.{name} needs a rate in {key}.{direction}")
        if name in found and rates.size(found[name]) * 8 > rates.rate(found[direction]) * rates.LONGEST_BURST:
            raise NicError(f"{key}.{name}: at {found[direction]} it would last longer than {rates.LONGEST_BURST} s")
    return rates.first_said(tuple(found.items()))


def rate(key: str, value: Any) -> str:
    """A rate as tc(8) takes it, or "off". Raises NicError."""
    least, most = map(rates.rate_text, (rates.LEAST_RATE, rates.MOST_RATE))
    try:
        return rates.OFF if value == rates.OFF else rates.rate_text(rates.rate(value))
    except (ValueError, TypeError):
        hint = f'like {key.rpartition(".")[2]} = "100mbit"'
        raise NicError(f"{key} must be a rate from {least} to {most}, or off", hint=hint) from None


def burst(key: str, value: Any) -> str:
    """A size as tc(8) takes it. Raises NicError."""
    least, most = map(rates.size_text, (rates.LEAST_BURST, rates.MOST_BURST))
    try:
        return rates.size_text(rates.size(value))
    except (ValueError, TypeError):
        hint = f'like {key.rpartition(".")[2]} = "100kb"'
        raise NicError(f"{key} must be a size from {least} to {most}", hint=hint) from None


Check = Callable[[str, Any], Any]  # takes the name for messages, and a value as TOML has it
ON_A_BRIDGE = ("bridged", "ext")  # ext: the configuration, or a program, makes another mode of it
LADDER: dict[str, tuple[tuple[str, ...], Check]] = {
    "filter": ((*ON_A_BRIDGE, "openvswitch"), filtering),  # Open vSwitch: refused, and not left open
    "allow_mac": (ON_A_BRIDGE, macs),
    "rate": (MODES, limits),
    **dict.fromkeys(PORT_OPTIONS, (ON_A_BRIDGE, yes_or_no)),
}


def said_of(nic: Nic | None) -> dict[str, Any]:
    """What *nic* itself says of the keys of the ladder, as TOML has it; None for nothing."""
    found = {key: getattr(nic, key, None) for key in LADDER}
    return found | {"rate": None if found["rate"] is None else dict(found["rate"])}


# --- NICs ---------------------------------------------------------------------------------------------

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
    given: tuple[tuple[str, str], ...] = (),
    options: Mapping[str, Any],
    iface_id: str | None = None,
) -> Nic:
    """The Nic, once every value has been checked on its own and against the others. Raises NicError.

    *options* are the keys of the ladder that are said, checked already.
    """
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
        given=given,
        **options,
        iface_id=None if iface_id is None else interface_id(iface_id),
    )
    return consistent(nic)


def consistent(nic: Nic) -> Nic:
    """*nic*, if its values go together. Raises NicError."""
    if nic.mode == "routed":
        if not nic.ip and not nic.by_ganeti:
            raise NicError("ip is missing: a routed NIC needs an address", hint='ip = ["192.0.2.8"]')
        if nic.vlan is not None:
            raise NicError("vlan means nothing on a routed NIC", hint="remove it")
    for key, (modes, _) in LADDER.items():
        if nic.mode not in modes and getattr(nic, key) is not None:
            raise NicError(f"{key} means nothing on a NIC in mode {nic.mode}", hint="remove it")
    if nic.iface_id is not None and nic.mode not in ("openvswitch", "ext"):
        raise NicError(f"iface_id means nothing on a {nic.mode} NIC", hint="remove it")
    return nic


def as_wired(nic: Nic, config: Config) -> Nic:
    """*nic* with the mode and link that the configuration gives to its ext network, if any. Raises NicError."""
    network = dict(config.ext.networks).get(nic.link or "") if nic.mode == "ext" else None
    if network is None:
        return nic
    try:
        nic = replace(nic, mode=network.mode, link=network.link)
        if nic.by_ganeti:
            # A guest's tags are those of all its NICs: some mean nothing on this one.
            unsaid: dict[str, Any] = {key: None for key, (modes, _) in LADDER.items() if nic.mode not in modes}
            nic = replace(nic, **unsaid)
        if nic.mode == "routed" and nic.by_ganeti:
            own = autoconfigured(dict(nic.given).get("NETWORK_SUBNET6"), nic.mac)
            nic = replace(nic, vlan=None, ip=nic.ip or prefixes(own))
        return consistent(nic)
    except NicError as error:
        error.at(nic.label)
        raise


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint that names the known word most like *word*."""
    from difflib import get_close_matches  # only needed to report a mistake

    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"


def misspelt(name: str, known: Iterable[str]) -> str:
    """A hint that names that one of the names *known* which *name* most likely is; empty if there is none."""
    guess = most_like(name, known)
    return f"did you mean {guess}?" if guess else ""


def most_like(name: str, known: Iterable[str]) -> str:
    """That one of the names *known* which *name* most likely is; empty if there is none.

    tap7 is no misspelt tap1: the numbers must be the same.
    """
    from difflib import get_close_matches  # only needed to report a mistake

    alike = sorted(one for one in known if one != name and re.sub(r"\D", "", one) == re.sub(r"\D", "", name))
    return next(iter(get_close_matches(name, alike, n=1)), "")
