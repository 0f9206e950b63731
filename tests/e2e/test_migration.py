"""A real guest, migrated live between two nodes, and what the network sees of it.

The judge is `ip -j`, `bridge -j` and the frames on the switch, never the product's own code; nothing is asserted about
how long things take. Needs root and the lab's tools; what is missing fails.
"""

from __future__ import annotations

import time

import pytest

from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC
from lab import observe
from lab.hooks import TAP
from lab.nodes import NODE_MAC, Mode

from .moves import CRAWL, Moved, names_guest, says, tap_forwards, wiring


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

        record = on.observer.wait("QEMU's RARP reaches the client", told, 60, target.must_run)
        assert all(
            f.port == "to-b" and f.at >= migrated.resumed - 0.1 for f in record.at_switch if f.seen.kind == "rarp"
        )
        assert observe.contested(record.probes) == ()

        on.hooks.run("kvm-ifdown", net.a)
        assert wiring(net.a) == bridged.before
        on.hooks.run("kvm-ifup-post", net.b)
        assert tap_forwards(net.b)
        on.source.quit()
        on.observer.wait_for_replies(time.monotonic(), 90, target.must_run)

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

        on.observer.wait("node b has announced the guest", told, 60, target.must_run)
        record = on.observer.wait_for_replies(time.monotonic(), 90, target.must_run)
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

        on.observer.wait("two nodes answer one ARP probe", two, 60, target.must_run)
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
        record = on.observer.wait_for_replies(time.monotonic(), 90, on.source.must_run)
        assert {node for probe in record.probes for node in probe.answered} <= {"a"}, "the target never answered"
