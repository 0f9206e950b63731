"""A real guest, migrated live between two nodes, and what the network sees of it.

The judge is `ip -j`, `bridge -j` and the frames on the switch, never the product's own code; nothing is asserted about
how long things take. Needs root and the lab's tools; what is missing fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cases, guest, hooks, observe
from lab.cases import Stage
from lab.hooks import TAP, Hooks
from lab.nodes import GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_MAC, Mode, Namespace, network

REPOSITORY = Path(__file__).resolve().parents[2]
UPLINK_SYSCTLS = ("net/ipv4/neigh/eth0/proxy_delay", "net/ipv6/neigh/eth0/proxy_delay", "net/ipv6/conf/eth0/proxy_ndp")
# Slow enough that no migration can end before a test makes it fail.
CRAWL = 1024 * 1024


@pytest.fixture(scope="module")
def image() -> guest.Image:
    return guest.build(print)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Hooks:
    python = Path(os.environ.get("KVM_IFUP_PYTHON", "/usr/bin/python3"))
    return hooks.hooks(REPOSITORY / "scripts", python, tmp_path_factory.mktemp("scripts"))


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


@pytest.fixture
def bridged(scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    yield from staged("bridged", scripts, image)


@pytest.fixture
def routed(scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    yield from staged("routed", scripts, image)


def test_bridged_guest_moves_with_phases(bridged: Moved) -> None:
    on, net = bridged.on, bridged.on.net
    fresh = wiring(net.b)
    assert tap_forwards(net.a)
    with on.target("kvm-ifup-pre", incoming=True) as target:
        assert tap_forwards(net.b), "pre must leave the tap ready for the guest's first frame"
        on.observer.probe(True)
        migrated = on.source.wait_migrated(target, on.source.order_migration(target))
        on.observer.probe(False)

        def told(record: observe.Record) -> bool:
            return says(record, "rarp", GUEST_MAC)

        record = on.observer.wait("QEMU's RARP reaches the client", told, 10, target.must_run)
        assert all(
            f.port == "to-b" and f.at >= migrated.resumed - 0.1 for f in record.at_switch if f.seen.kind == "rarp"
        )
        assert observe.contested(record.probes) == ()

        on.hooks.run("kvm-ifdown", net.a)
        assert wiring(net.a) == bridged.before
        on.hooks.run("kvm-ifup-post", net.b)
        assert tap_forwards(net.b)
        on.source.quit()
        on.observer.wait_for_replies(time.monotonic(), 30, target.must_run)

        on.hooks.run("kvm-ifdown", net.b)
        assert wiring(net.b) == fresh


def test_routed_guest_moves_with_phases(routed: Moved) -> None:
    on, net = routed.on, routed.on.net
    fresh = wiring(net.b)
    assert names_guest(net.a)
    on.observer.probe(True)
    with on.target("kvm-ifup-pre", incoming=True) as target:
        assert not names_guest(net.b), "pre must install neither route nor proxy entry"
        on.source.wait_migrated(target, on.source.order_migration(target))
        assert not names_guest(net.b), "the guest's arrival alone must install neither route nor proxy entry"
        before_post = on.observer.record()
        assert not says(before_post, "garp", NODE_MAC["b"]), "pre must announce nothing"
        assert not says(before_post, "unsolicited-na", NODE_MAC["b"]), "pre must announce nothing"

        on.hooks.run("kvm-ifdown", net.a)
        assert wiring(net.a) == routed.before
        on.hooks.run("kvm-ifup-post", net.b)
        found = wiring(net.b)
        for address in (GUEST_IP4, GUEST_IP6):
            assert [r["dev"] for r in found["routes"] if r["dst"] == address] == [TAP]
            assert [p["dev"] for p in found["proxies"] if p["dst"] == address] == ["eth0"]
        on.source.quit()

        def told(record: observe.Record) -> bool:
            return says(record, "garp", NODE_MAC["b"]) and says(record, "unsolicited-na", NODE_MAC["b"])

        on.observer.wait("node b has announced the guest", told, 10, target.must_run)
        record = on.observer.wait_for_replies(time.monotonic(), 30, target.must_run)
        answered_by = {node for probe in record.probes for node in probe.answered}
        assert answered_by == {"a", "b"}, "both nodes have their turn"
        assert observe.contested(record.probes) == (), "but never both at the same moment"

        on.hooks.run("kvm-ifdown", net.b)
        assert wiring(net.b) == fresh


def test_routed_guest_wired_at_the_start_is_answered_for_by_two_nodes(routed: Moved) -> None:
    """What the phases are there to prevent; also the proof that the lab would see it."""
    on = routed.on
    on.observer.probe(True)
    with on.target("kvm-ifup-post", incoming=False) as target:
        on.source.order_migration(target, CRAWL)

        def two(record: observe.Record) -> bool:
            return bool(observe.contested(record.probes))

        on.observer.wait("two nodes answer one ARP probe", two, 20, target.must_run)
        assert on.source.status() == "running", "they do so while the guest is still on node a"


@pytest.mark.parametrize(
    ("mode", "ending"), [("bridged", "killed"), ("routed", "killed"), ("routed", "cancelled"), ("bridged", "cancelled")]
)
def test_failed_migration_leaves_the_target_clean(mode: Mode, ending: str, request: pytest.FixtureRequest) -> None:
    moved: Moved = request.getfixturevalue(mode)
    on, net = moved.on, moved.on.net
    fresh = wiring(net.b)
    on.observer.probe(mode == "routed")
    with on.target("kvm-ifup-pre", incoming=True) as target:
        on.source.order_migration(target, CRAWL)
        on.source.wait_event("MIGRATION", status="active")
        if ending == "killed":
            target.kill()
            on.source.wait_event("MIGRATION", status="failed")
        else:
            on.source.command("migrate_cancel")
            on.source.wait_event("MIGRATION", status="cancelled")
            target.kill()
        on.hooks.run("kvm-ifdown", net.b)
        assert wiring(net.b) == fresh
        assert on.source.status() == "running"
        record = on.observer.wait_for_replies(time.monotonic(), 30, on.source.must_run)
        assert {node for probe in record.probes for node in probe.answered} <= {"a"}, "the target never answered"
