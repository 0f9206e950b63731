"""What wiring a guest changes on a node, as `ip` and `bridge` tell it; and a guest that is about to move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.addresses import GUEST_IP4, GUEST_IP6
from lab import cases, guest, observe
from lab.cases import Stage
from lab.hooks import TAP, Hooks
from lab.nodes import Mode, Namespace, network

UPLINK_SYSCTLS = ("net/ipv4/neigh/eth0/proxy_delay", "net/ipv6/neigh/eth0/proxy_delay", "net/ipv6/conf/eth0/proxy_ndp")
# Slow enough that no migration can end before a test makes it fail.
CRAWL = 1024 * 1024


def wiring(node: Namespace) -> dict[str, Any]:
    """All on a node that wiring a guest changes, but for the tap itself; in the words of `ip -j` and `bridge -j`.

    Without the link-local and multicast routes: the kernel adds and takes those by itself.
    """
    routes = node.json("ip", "-j", "-4", "route", "show", "table", "all")
    routes += node.json("ip", "-j", "-6", "route", "show", "table", "all")
    return {
        "routes": [r for r in routes if not r["dst"].startswith(("fe80:", "ff00:", "multicast"))],
        "rules": node.json("ip", "-j", "-4", "rule") + node.json("ip", "-j", "-6", "rule"),
        "proxies": node.json("ip", "-j", "-4", "neigh", "show", "proxy")
        + node.json("ip", "-j", "-6", "neigh", "show", "proxy"),
        "permanent neighbours": node.json("ip", "-j", "neigh", "show", "nud", "permanent"),
        "bridge ports": [(p["ifname"], p["master"], p["state"]) for p in node.json("bridge", "-j", "link")],
        "uplink": [node.run("cat", f"/proc/sys/{name}") for name in UPLINK_SYSCTLS],
    }


def names_guest(node: Namespace) -> bool:
    """True when a route or a proxy entry on `node` names one of the guest's addresses."""
    found = wiring(node)
    return any(entry["dst"] in (GUEST_IP4, GUEST_IP6) for entry in found["routes"] + found["proxies"])


def tap_forwards(node: Namespace) -> bool:
    """True when the guest's tap is a port of br0 that forwards."""
    return (TAP, "br0", "forwarding") in wiring(node)["bridge ports"]


def says(record: observe.Record, kind: str, mac: str) -> bool:
    """True when the client got a frame of that kind about the guest from `mac`."""
    return any(f.seen.kind == kind and f.seen.mac == mac for f in record.at_client)


class Moved:
    """A guest that runs on node a, and what node a was like before it came."""

    def __init__(self, on: Stage, before: dict[str, Any]) -> None:
        self.on, self.before = on, before


def staged(mode: Mode, scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    with network(mode) as net:
        before = wiring(net.a)
        with cases.stage(net, scripts, image, print) as on:
            yield Moved(on, before)
