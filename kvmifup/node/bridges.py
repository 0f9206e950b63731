"""What bridges have learnt and how they treat multicast: read with iproute2, for commands that only look."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from kvmifup.core.errors import ProgramError
from kvmifup.core.records import record
from kvmifup.node import programs

TIMEOUT = 5.0  # seconds
ALWAYS = 2  # of a port's multicast_router: MDB_RTR_TYPE_PERM, linux/if_bridge.h
Rows = list[dict[str, Any]]


@record
class Learnt:
    """An entry of a bridge's table of MACs: *mac* is behind *port*. *own*: it is the node's, not a neighbour's."""

    mac: str
    port: str
    own: bool


class Bridges:
    """All bridges, as `ip` and `bridge` describe them when they are first asked for. What they do not say is None."""

    def learnt(self, bridge: str) -> list[Learnt]:
        """What *bridge* knows of MACs."""
        return [
            Learnt(str(one["mac"]).lower(), str(one["ifname"]), one.get("state") == "permanent")
            for one in self._macs or ()
            if one.get("master") == bridge and "mac" in one and "ifname" in one
        ]

    def querier(self, bridge: str) -> bool | None:
        """Whether *bridge* snoops multicast and somebody asks who listens: itself, or a neighbour of a port."""
        options = self._options(bridge, "info_data")
        if options is None:
            return None
        if not options.get("mcast_snooping"):
            return False
        return bool(options.get("mcast_querier")) or any(
            router.get("type") == "temp"  # a port becomes that when it hears a question (br_multicast_query_received)
            for part in self._groups or ()
            for router in (part.get("router") or {}).get(bridge, ())
        )

    def always_router(self, port: str) -> bool | None:
        """Whether the bridge of *port* sends all multicast to it."""
        options = self._options(port, "info_slave_data")
        return None if options is None else options.get("multicast_router") == ALWAYS

    def reported(self, bridge: str, port: str) -> bool:
        """Whether who is behind *port* has told *bridge* what IPv6 groups it listens to."""
        groups = (group for part in self._groups or () for group in part.get("mdb", ()))
        return any(
            group.get("dev") == bridge and group.get("port") == port and ":" in str(group.get("grp"))
            for group in groups
        )

    def filtered(self, bridge: str, family: int) -> bool | None:
        """Whether what *bridge* forwards of *family*, 4 or 6, goes through iptables, by the bridge's own setting."""
        options = self._options(bridge, "info_data")
        return (
            None if options is None else bool(options.get("nf_call_iptables" if family == 4 else "nf_call_ip6tables"))
        )

    def _options(self, name: str, part: str) -> dict[str, Any] | None:
        if self._links is None:
            return None
        found = next((one for one in self._links if one.get("ifname") == name), {})
        options: dict[str, Any] = found.get("linkinfo", {}).get(part, {})
        return options or None

    @cached_property
    def _links(self) -> Rows | None:
        return asked("ip", "-j", "-d", "link", "show")

    @cached_property
    def _groups(self) -> Rows | None:
        return asked("bridge", "-j", "-d", "-s", "mdb", "show")

    @cached_property
    def _macs(self) -> Rows | None:
        return asked("bridge", "-j", "fdb", "show")


def asked(*argv: str) -> Rows | None:
    """What a program of iproute2 answers in JSON; None if it does not."""
    try:
        result = programs.run(argv, {}, TIMEOUT)
        found = json.loads(result.output or "[]") if result.code == 0 else None
    except (ProgramError, ValueError):
        return None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else None
