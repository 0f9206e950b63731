"""The NIC that Ganeti's environment describes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvmifup.core.errors import NicError, UsageError
from kvmifup.core.model import Nic
from kvmifup.core.text import shown
from kvmifup.inputs.values import assemble, nic_index

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
            ip=[part for part in re.split(r"[,\s]+", environ.get("IP", "")) if part],
            vlan=environ.get("VLAN") or None,
            incoming=environ.get("MIGRATION_PHASE") == "pre",
            instance=environ.get("INSTANCE") or None,
            index=nic_index(index, "INTERFACE_INDEX") if index else None,
            source="the environment",
        )
    except NicError as error:
        raise error.at(f"environment of {shown(environ['INTERFACE'])}") from None


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
