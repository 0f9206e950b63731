"""The NICs of a guest that Ganeti is to move to this node, as the environment of its hooks has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvmifup.core.errors import NicError, UsageError
from kvmifup.core.model import NOT_YET, Nic
from kvmifup.inputs.environment import from_environment

COMMUNICATION = "ganeti:communication:"  # the name of a NIC that Ganeti wires itself begins with this
NAMES = {"UUID": "INTERFACE_UUID", "NAME": "INTERFACE_NAME"}  # what scripts for a NIC call it otherwise than hooks


def from_hook(environ: Mapping[str, str]) -> tuple[Nic, ...]:
    """The NICs of the guest that is to move, as Ganeti's hooks get them before that. None of them has a tap yet.

    They are what the configuration says, which may be newer than the guest. Raises UsageError, NicError.
    """
    instance, count = environ.get("GANETI_INSTANCE_NAME"), environ.get("GANETI_INSTANCE_NIC_COUNT", "")
    if not instance or not re.fullmatch(r"[0-9]{1,4}", count, re.ASCII):
        raise UsageError(
            "the environment describes no guest", hint="this is for Ganeti's hooks: instance-migrate-pre.d"
        )
    live = environ.get("GANETI_HOOKS_PATH") == "instance-migrate"
    nics = []
    for index in range(int(count)):
        given = of_nic(environ, f"GANETI_INSTANCE_NIC{index}_")
        if given.get("INTERFACE_NAME", "").startswith(COMMUNICATION):
            continue
        given |= {"INTERFACE": NOT_YET, "INTERFACE_INDEX": str(index), "INSTANCE": instance}
        given |= {"TAGS": environ.get("GANETI_INSTANCE_TAGS", ""), "MIGRATION_PHASE": "pre" if live else ""}
        try:
            nics.append(from_environment(given))
        except NicError as error:
            error.where = f"{instance}/{index}"
            raise
    return tuple(nics)


def of_nic(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """What begins with *prefix*, by the names that scripts for a NIC get."""
    found = ((name.removeprefix(prefix), value) for name, value in environ.items() if name.startswith(prefix))
    return {NAMES.get(name, name): value for name, value in found}
