"""Guests that run when our packages are installed: Ganeti's own files tell of them, and they can be taken over."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ganeti.cluster import FIRST, INSTANCE, SECOND, Cluster, Instance, Node


def seen(node: Node) -> dict[str, tuple[str, str]]:
    """The MAC and the phase of the NIC on each tap, as `kvm-ifup show` has them."""
    return {one["tap"]: (one["mac"], one["phase"]) for one in json.loads(node.run("kvm-ifup", "show", "--json"))}


def test_a_guest_of_ganeti_alone_is_taken_over(bare: Node, packages: list[Path], mode: str) -> None:
    first, second = FIRST[mode], SECOND[mode]
    bare.ganeti("start", Instance((first, second)))
    bare.install(packages)
    tap0, tap1 = bare.taps()
    assert seen(bare) == {tap0: (first.mac, "none"), tap1: (second.mac, "none")}
    said = bare.run("sh", "-c", "kvm-ifup check || true")
    assert f"`kvm-ifup-post {tap1}` takes it over" in said
    assert bare.run("kvm-ifup-post", tap0) == ""
    assert bare.run("kvm-ifup-post", tap1) == ""
    bare.must_be_wired(first, second)
    assert seen(bare) == {tap0: (first.mac, "post"), tap1: (second.mac, "post")}


def test_nics_that_ganeti_numbers_in_two_ways(bare: Node, packages: list[Path], mode: str) -> None:
    """A NIC that was put before another one has its number: the other's file is gone, and the runtime file differs."""
    first, second = FIRST[mode], SECOND[mode]
    bare.ganeti("start", Instance((first,)))
    bare.ganeti("hot_add", Instance(()), nic=second.given)
    bare.install(packages)
    tap0, tap1 = bare.taps()
    assert bare.run("sh", "-c", f"cd /run/ganeti/kvm-hypervisor/nic/{INSTANCE} && grep -c . *") == "1\n"
    assert bare.run("cat", f"/run/ganeti/kvm-hypervisor/nic/{INSTANCE}/0") == tap1
    assert seen(bare) == {tap0: (first.mac, "none"), tap1: (second.mac, "none")}
    bare.run("kvm-ifup-post", "--instance", INSTANCE)
    bare.must_be_wired(first, second)


def test_ours_without_our_own_memory(two_nodes: Cluster) -> None:
    first, second = FIRST[two_nodes.mode], SECOND[two_nodes.mode]
    node = two_nodes.a
    node.ganeti("start", Instance((first, second)))
    node.run("rm", "-r", "/run/kvm-ifup/state")
    tap0, tap1 = node.taps()
    assert seen(node) == {tap0: (first.mac, "none"), tap1: (second.mac, "none")}
    for tap in (tap0, tap1):
        node.run("kvm-ifup-post", tap)
    assert seen(node) == {tap0: (first.mac, "post"), tap1: (second.mac, "post")}
    node.must_be_wired(first, second)
