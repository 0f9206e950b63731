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
        return [one for behind in self._learnt.get(bridge, {}).values() for one in behind]

    def behind(self, bridge: str, port: str) -> list[Learnt]:
        """What *bridge* knows of MACs behind *port*."""
        return self._learnt.get(bridge, {}).get(port, [])

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
        return (bridge, port) in self._reported

    def filtered(self, bridge: str, family: int) -> bool | None:
        """Whether what *bridge* forwards of *family*, 4 or 6, goes through iptables, by the bridge's own setting."""
        options = self._options(bridge, "info_data")
        return (
            None if options is None else bool(options.get("nf_call_iptables" if family == 4 else "nf_call_ip6tables"))
        )

    def _options(self, name: str, part: str) -> dict[str, Any] | None:
        options: dict[str, Any] = self._links.get(name, {}).get("linkinfo", {}).get(part, {})
        return options or None

    @cached_property
    def _links(self) -> dict[str, dict[str, Any]]:
        return {str(one["ifname"]): one for one in asked("ip", "-j", "-d", "link", "show") or () if "ifname" in one}

    @cached_property
    def _groups(self) -> Rows | None:
        return asked("bridge", "-j", "-d", "-s", "mdb", "show")

    @cached_property
    def _reported(self) -> set[tuple[object, object]]:
        """Bridges and ports behind which somebody listens to IPv6 groups."""
        groups = (group for part in self._groups or () for group in part.get("mdb", ()))
        return {(group.get("dev"), group.get("port")) for group in groups if ":" in str(group.get("grp"))}

    @cached_property
    def _learnt(self) -> dict[str, dict[str, list[Learnt]]]:
        """By bridge and port."""
        found: dict[str, dict[str, list[Learnt]]] = {}
        for one in asked("bridge", "-j", "fdb", "show") or ():
            if "mac" in one and "ifname" in one and "master" in one:
                entry = Learnt(str(one["mac"]).lower(), str(one["ifname"]), one.get("state") == "permanent")
                found.setdefault(one["master"], {}).setdefault(entry.port, []).append(entry)
        return found


def asked(*argv: str) -> Rows | None:
    """What a program of iproute2 answers in JSON; None if it does not."""
    try:
        result = programs.run(argv, {}, TIMEOUT)
        found = json.loads(result.output or "[]") if result.code == 0 else None
    except (ProgramError, ValueError):
        return None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else None
