"""All that a node has that a hook could change, in lines that can be compared.

It comes from `ip`, `bridge`, `nft`, /proc/sys and the files below /run, never from kvmifup or pyroute2.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from harness import tools
from harness.manager import RUN_DIR
from harness.oracle import SYSCTL

# What differs from one look to the next whatever anybody does, or cannot be put back by anyone.
VOLATILE = frozenset(
    {
        # A tap that the test deletes and makes again gets another index; no two devices share a name.
        "ifindex", "link_index", "if_index",
        # A tap has no queue discipline until it is up for the first time, and keeps it from then on.
        "qdisc", "txqlen",
        # A bridge's clocks, and what they lead to.
        "hello_timer", "tcn_timer", "topology_change_timer", "gc_timer", "topology_change", "topology_change_detected",
        "message_age_timer", "forward_delay_timer", "hold_timer",
        # Addresses that it has learnt; a newer `ip` counts them.
        "fdb_n_learned",
    }
)  # fmt: skip
# A bridge has a carrier exactly while it has a live port, except that one which never had a port does not say so.
BRIDGE_CARRIER = frozenset({"NO-CARRIER", "LOWER_UP"})
Snapshot = Counter[str]


def _lines(kind: str, value: Any, path: str = "") -> Iterator[str]:
    """*value* flattened, one line per leaf: a difference then names what differs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in VOLATILE:
                yield from _lines(kind, inner, f"{path}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _lines(kind, inner, path)
    else:
        yield f"{kind}{path}={value}"


def _links(found: list[dict[str, Any]]) -> Iterator[str]:
    for link in found:
        if link.get("linkinfo", {}).get("info_kind") == "bridge":
            link["flags"] = [flag for flag in link["flags"] if flag not in BRIDGE_CARRIER]
            # And it takes its segmentation limits over from its first port, for good.
            for name in ("operstate", "tso_max_size", "tso_max_segs", "gso_max_size", "gso_max_segs"):
                link.pop(name, None)
        yield from _lines("link", link, f"/{link['ifname']}")


def _sysctls() -> Iterator[str]:
    for place in (f"{SYSCTL}/ipv{family}/{group}" for family in (4, 6) for group in ("conf", "neigh")):
        for dev in os.listdir(place):
            for name in os.listdir(f"{place}/{dev}"):
                try:
                    descriptor = os.open(f"{place}/{dev}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        yield f"{place}/{dev}/{name}:{os.read(descriptor, 4096).decode().strip()}"
                    finally:
                        os.close(descriptor)
                except OSError:
                    # One that nobody has set cannot be read; and one that only root may write cannot either.
                    assert name in ("stable_secret", "retrans_time", "base_reachable_time"), f"{place}/{dev}/{name}"


def _files() -> Iterator[str]:
    for path in sorted(RUN_DIR.rglob("*")):
        # Lock files stay: removing one that another run has just opened would give both the lock. And the agent's
        # counts go on.
        if path.name in ("metrics.prom", "metrics.new", "drops.json"):
            continue
        if path.is_symlink():
            yield f"{path} -> {path.readlink()}"
        elif path.is_file() and path.parent.name != "lock":
            # When a phase was reached, and by whom, differs between two ways to the same.
            content = re.sub(rb'"(since|uptime|by|frame)": [^,]*, ?', b"", path.read_bytes())
            yield f"{path}: {content!r}"


# One process answers several: it costs more than what it says.
BATCHES = {
    "ip -j -d -batch -": ("link", "addr", "neigh", "neigh show proxy"),
    "ip -4 -j -d -batch -": ("route show table all", "rule"),
    "ip -6 -j -d -batch -": ("route show table all", "rule"),
    "bridge -j -batch -": ("link",),
}


def _nftables(found: list[dict[str, Any]]) -> Iterator[str]:
    """Tables, chains, sets and their elements, rules in their order; without handles, and what is counted."""
    rules: Counter[tuple[str, str]] = Counter()
    for one in found:
        ((kind, what),) = one.items()
        if kind == "metainfo":
            continue
        if what["family"] == "bridge" and "made" in (what.get("chain"), what.get("name")):
            continue  # a note about the other chains of that table, which says no more than they do
        place = [what.get("table", ""), what.get("chain", ""), what.get("name", "")]
        if kind == "rule":
            rules[what["table"], what["chain"]] += 1
            place.append(str(rules[what["table"], what["chain"]]))
        for element in what.pop("elem", ()):
            key = element.get("elem", {}).get("val", element) if isinstance(element, dict) else element
            yield f"nft element {'/'.join(place)} {json.dumps(key)}"
        rest = {name: value for name, value in what.items() if name != "handle"}
        yield f"nft {kind} {'/'.join(place)} {json.dumps(rest, sort_keys=True)}"


def _answers() -> Iterator[list[dict[str, Any]]]:
    script = "".join(f"{program} <<.\n" + "\n".join(lines) + "\n.\n" for program, lines in BATCHES.items())
    for line in tools.run("sh", "-ec", f"{script}nft -j list ruleset").splitlines():
        found = json.loads(line)
        yield [one for one in (found["nftables"] if isinstance(found, dict) else found) if one]


def snapshot() -> Snapshot:
    """All that the node has that a hook could change."""
    return snapshot_of_kernel() + Counter(_files())


def snapshot_of_kernel() -> Snapshot:
    """The same without files: what `ip`, `bridge`, `nft` and /proc/sys tell."""
    links, addresses, neighs, proxied, routes4, rules4, routes6, rules6, ports, ruleset = _answers()
    found = Counter([*_links(links), *_sysctls(), *_nftables(ruleset)])
    for port in ports:
        found.update(_lines("port", port, f"/{port['ifname']}"))
    for address in addresses:
        for info in address["addr_info"]:
            info.pop("tentative", None)  # for a moment, even where nothing is asked before an address is used
            found[f"addr {address['ifname']} {json.dumps(info, sort_keys=True)}"] += 1
    # The others come and go with traffic, and nobody could put them back.
    permanent = [one for one in neighs if "PERMANENT" in one["state"]]
    tables = {
        "neigh": permanent, "proxy": proxied, "route4": routes4, "rule4": rules4, "route6": routes6, "rule6": rules6,
    }  # fmt: skip
    for what, many in tables.items():
        found.update(f"{what} {json.dumps(one, sort_keys=True)}" for one in many)
    return found


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What differs, one line each; empty when nothing does."""
    return [f"- {line}" for line in sorted(before - after)] + [f"+ {line}" for line in sorted(after - before)]
