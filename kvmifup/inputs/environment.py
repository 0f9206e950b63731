"""The NIC that Ganeti's environment describes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvmifup.core.errors import NicError, UsageError
from kvmifup.core.model import ENVIRONMENT, Nic
from kvmifup.core.text import shown
from kvmifup.inputs import tags
from kvmifup.inputs.values import assemble, autoconfigured, nic_index

# The taps of Ganeti's own communication network begin with this; Ganeti wires them itself.
GANETI_OWN = "gnt.com."


# --- the environment ----------------------------------------------------------------------------------


def from_environment(environ: Mapping[str, str]) -> Nic:
    """The NIC that Ganeti's environment describes; INTERFACE must be set. Raises NicError."""
    missing = [name for name in ("INTERFACE", "MODE", "MAC") if not environ.get(name)]
    if missing:
        raise NicError(f"the environment has INTERFACE but lacks {' and '.join(missing)}").at("environment")
    index = environ.get("INTERFACE_INDEX")
    mode = environ["MODE"]
    try:
        return assemble(
            tap=environ["INTERFACE"],
            mac=environ["MAC"],
            mode=mode,
            link=environ.get("LINK") or (environ.get("BRIDGE") if mode == "bridged" else None) or None,
            ip=addresses(mode, environ["MAC"], environ.get("IP", ""), environ.get("NETWORK_SUBNET6")),
            vlan=vlan(mode, environ.get("VLAN")),
            incoming=environ.get("MIGRATION_PHASE") == "pre",
            instance=environ.get("INSTANCE") or None,
            index=nic_index(index, "INTERFACE_INDEX") if index else None,
            source=ENVIRONMENT,
            given=given(mode, environ),
            options=tags.options(mode, environ.get("TAGS", "").split(), environ.get("NETWORK_TAGS", "").split()),
        )
    except NicError as error:
        raise error.at(f"environment of {shown(environ['INTERFACE'])}") from None


# --- what Ganeti means ----------------------------------------------------------------------------------

# What scripts for a NIC get besides the NIC itself; some of it only if it is set.
FURTHER = ("INTERFACE_UUID", "INTERFACE_NAME", "TAGS")
NETWORK = "NETWORK_"


def addresses(mode: str, mac: str, ip: str, subnet6: str | None) -> list[str]:
    """The addresses of a NIC. Raises NicError.

    A routed one without any in a network with IPv6 has the one that it gives itself there.
    """
    found = [part for part in re.split(r"[,\s]+", ip) if part]
    return autoconfigured(subnet6, mac) if mode == "routed" and not found else found


def vlan(mode: str, text: str | None) -> str | None:
    """The VLANs of a NIC: the first one is untagged if nothing is before it. A routed NIC only inherits some."""
    if not text or mode == "routed":
        return None
    return f".{text}" if text[0].isdigit() else text


def given(mode: str, values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What else *values* say of an ext NIC, for the administrator's program."""
    if mode != "ext":
        return ()
    return tuple((name, values[name]) for name in sorted(values) if name in FURTHER or name.startswith(NETWORK))


def describes(environ: Mapping[str, str]) -> bool:
    """Whether *environ* has more of a NIC than the name of its tap and its guest."""
    return any(environ.get(name) for name in ("MODE", "MAC", "LINK", "IP"))


def refuse_contradiction(command: str, tap: str | None, environ: Mapping[str, str]) -> None:
    """Raise UsageError when the environment contradicts the command line."""
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
