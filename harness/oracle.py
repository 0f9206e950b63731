"""What is true on a node, by `ip`, `bridge` and /proc: never by kvmifup or pyroute2."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from harness.tools import ask

SYSCTL = Path("/proc/sys/net")


def sysctl(path: str, value: object | None = None) -> str:
    """The value of net/*path*; sets it first when there is one to set."""
    if value is not None:
        (SYSCTL / path).write_text(str(value))
    return (SYSCTL / path).read_text().strip()


def link(name: str) -> dict[str, Any]:
    """One device as `ip -d link` shows it."""
    (found,) = ask(f"-d link show dev {name}")
    return found


def settle(name: str) -> None:
    """Wait until a device that is up has noticed that its other end is."""
    while link(name)["operstate"] != "UP":
        pass


def routes(dev: str, table: str | None = None) -> set[str]:
    """Destinations of the unicast routes out of *dev* that somebody put there; in one table, or in any."""
    named = {"254": "main"}.get(table or "", table)
    return {
        route["dst"]
        for family in (4, 6)
        for route in ask(f"-{family} route show table all dev {dev}")
        if route.get("protocol") != "kernel" and named in (None, route.get("table", "main"))
    }


def proxies(dev: str | None = None) -> set[str]:
    """The addresses that the node answers for."""
    return {one["dst"] for one in ask("neigh show proxy") if dev in (None, one["dev"])}


def packet_sockets(dev: str) -> list[int]:
    """How many bytes wait in each packet socket that is bound to *dev*."""
    index = str(socket.if_nametoindex(dev))
    fields = [line.split() for line in Path("/proc/self/net/packet").read_text().splitlines()[1:]]
    return [int(one[6]) for one in fields if one[4] == index]


def rules(iif: str = "tap0") -> list[tuple[int, int, str]]:
    """(family, priority, table) of the policy rules that name *iif*."""
    return [
        (family, rule["priority"], rule.get("table", ""))
        for family in (4, 6)
        for rule in ask(f"-{family} rule")
        if rule.get("iif") == iif
    ]


def neighbours(dev: str = "tap0") -> dict[str, str]:
    """The permanent neighbour entries on *dev*."""
    return {one["dst"]: one["lladdr"] for one in ask(f"neigh show dev {dev}") if "PERMANENT" in one["state"]}
