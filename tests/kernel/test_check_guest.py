"""`check` and `show` know when a NIC is wired as it is described, and the guest behind its tap is another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from harness import agents, guests, manager, nodes, oracle, tools, wire
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, TAP_MAC
from harness.hooks import call, check
from harness.namespaces import Namespace
from harness.nodes import Node
from tests.kernel.checking import BRIDGED, ROUTED, TABLE, found, netdev, qemu, text, unkept_tap
from tests.kernel.checking import wire as wired
from tests.kernel.staging import NICS


def shown() -> dict[str, Any]:
    """The one NIC, as `show --json` has it."""
    (one,) = json.loads(call("kvm-ifup", "show", "--json").out)
    nic: dict[str, Any] = one
    return nic


def let_go(node: Node) -> None:
    """The test no longer holds tap0, so that QEMU can."""
    node.taps[0].close()


# --- does it wait for a migration? -------------------------------------------------------------------------


@pytest.mark.parametrize("nic", [ROUTED, TABLE])
def test_incoming_that_was_left_in_the_file_is_found_out(node: Node, nic: str) -> None:
    wired(node, nic, "kvm-ifup-pre", incoming=True)
    let_go(node)
    with qemu(*netdev()):
        code, findings = found()
        assert code == 1
        assert "was not started with -incoming, so it runs here" in text(findings)
        assert "was not started with -incoming" in call("kvm-ifup", "show").out
        check(call("kvm-ifup-post", "tap0"), 0)
        assert found() == (0, [])


def test_a_qemu_that_waits_for_a_migration_is_right(node: Node) -> None:
    wired(node, ROUTED, "kvm-ifup-pre", incoming=True)
    let_go(node)
    with qemu(*netdev(), "-incoming", "unix:/run/migration"):
        assert found() == (0, [])
        assert shown()["problem"] is None


def test_a_bridged_nic_lacks_nothing_after_pre(node: Node) -> None:
    wired(node, BRIDGED, "kvm-ifup-pre", incoming=True)
    let_go(node)
    with qemu(*netdev()):
        assert found() == (0, [])


def test_a_guest_that_has_sent_frames_runs_here(uplinked: Node) -> None:
    with unkept_tap() as guest:
        manager.write_nic(mode="routed", ip=[GUEST_IP4], incoming=True)
        check(call("kvm-ifup-pre", "tap0"), 0)
        assert found() == (0, [])
        guest.write(guests.rarp())
        code, findings = found()
        assert code == 1
        assert "the guest has sent 1 frames, so it runs here" in text(findings)
        check(call("kvm-ifup-post", "tap0"), 0)
        assert found() == (0, [])


def test_an_armed_nic_needs_nobody_to_say_that(uplinked: Node) -> None:
    with agents.running() as agent:
        guests.incoming(uplinked, agent)
        let_go(uplinked)
        with qemu(*netdev()):
            assert found() == (0, [])


# --- whose MAC? -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nic", NICS)
def test_a_mac_that_is_not_the_one_on_the_command_line_is_found(node: Node, nic: str) -> None:
    wired(node, nic)
    let_go(node)
    with qemu(*netdev(mac=GUEST_MAC.upper())):
        assert found() == (0, [])
    with qemu(*netdev(mac=FOREIGN_MAC)):
        code, findings = found()
        assert code == 1
        assert f"the guest's MAC is {FOREIGN_MAC}, as the command line of its QEMU (process " in text(findings)
        assert FOREIGN_MAC in call("kvm-ifup", "show").out
    assert found() == (0, [])


@pytest.mark.parametrize("form", ["fd=", "-nic", "JSON"])
def test_every_way_to_name_a_tap_is_understood(node: Node, form: str) -> None:
    wired(node, BRIDGED)
    guest = node.taps[0].descriptor
    device = f"virtio-net-device,netdev=n,mac={FOREIGN_MAC}"
    options: dict[str, Sequence[str]] = {
        "fd=": ["-netdev", f"tap,id=n,fd={guest}", "-device", device],
        "JSON": ["-netdev", json.dumps({"type": "tap", "id": "n", "fd": str(guest)}), "-device", device],
        "-nic": ["-nic", f"tap,fd={guest},model=virtio-net-device,mac={FOREIGN_MAC}"],
    }
    with qemu(*options[form], pass_fds=[guest]):
        assert f"the guest's MAC is {FOREIGN_MAC}" in text(found()[1])


def test_who_poses_as_qemu_is_not_believed_against_the_real_one(node: Node) -> None:
    """A tap of that name in a namespace of one's own, and a process that is called QEMU: anybody can have them."""
    wired(node, BRIDGED)
    let_go(node)
    elsewhere = Namespace()
    with elsewhere:
        nodes.add_tap()
        theirs = wire.attach("tap0")
    forged = [f"tap,id=n,fd={theirs.descriptor}", "-device", f"virtio-net-device,netdev=n,mac={FOREIGN_MAC}"]
    with qemu(*netdev()), qemu("-netdev", *forged, pass_fds=[theirs.descriptor]):
        assert found() == (0, [])
    theirs.close()
    elsewhere.close()


def test_frames_from_another_mac_are_seen_on_a_bridge(node: Node) -> None:
    wired(node, BRIDGED)
    node.taps[0].send(wire.arp_request(FOREIGN_MAC, GUEST_IP4, GUEST_IP4))
    code, findings = found()
    assert code == 1
    assert f"the guest's MAC is {FOREIGN_MAC}, as what comes in on tap0 shows" in text(findings)
    # A guest may have further ones.
    node.taps[0].send(wire.arp_request(GUEST_MAC, GUEST_IP4, GUEST_IP4))
    assert found() == (0, [])


@pytest.mark.parametrize("mac", ["00:00:00:00:00:00", "03:00:00:00:00:0b", "ff:ff:ff:ff:ff:ff"])
def test_what_can_be_no_machines_mac_is_not_the_guests(node: Node, mac: str) -> None:
    """A guest can tell the node that, and its neighbour cache believes it."""
    wired(node, ROUTED)
    (gateway,) = (
        one["local"]
        for info in tools.ask("-6 addr show dev tap0")
        for one in info["addr_info"]
        if one["scope"] == "link"
    )
    node.taps[0].send(wire.solicitation(mac, "fe80::b", gateway)[:6] + wire.mac_bytes(FOREIGN_MAC)
                      + wire.solicitation(mac, "fe80::b", gateway)[12:])  # fmt: skip
    agents.until(lambda: mac in str(tools.ask("-6 neigh show dev tap0")))
    assert found() == (0, [])


def test_frames_from_another_mac_are_seen_on_a_routed_tap(node: Node) -> None:
    wired(node, ROUTED)
    gateway = next(
        one["local"]
        for info in tools.ask("-6 addr show dev tap0")
        for one in info["addr_info"]
        if one["scope"] == "link"
    )
    node.taps[0].send(wire.solicitation(FOREIGN_MAC, "fe80::b", gateway))
    agents.until(lambda: "fe80::b" in str(tools.ask("-6 neigh show dev tap0")))
    code, findings = found()
    assert code == 1
    assert f"the guest's MAC is {FOREIGN_MAC}" in text(findings)
    assert oracle.link("tap0")["address"] == TAP_MAC


# --- a tap that nobody has wired, and a guest that has left ----------------------------------------------------


@pytest.mark.parametrize("nic", NICS)
def test_a_tap_that_nothing_has_wired_is_shown(uplinked: Node, nic: str) -> None:
    nodes.add_bridge()
    manager.write_nic(**NICS[nic])
    assert call("kvm-ifup", "show").out.count("\n") == 2
    nodes.add_tap()
    line = "tap0 is there, but nothing has wired it"
    assert line in call("kvm-ifup", "show").out
    code, findings = found()
    assert code == 1
    assert line in text(findings)
    assert findings[0]["mend"] == "`kvm-ifup-pre tap0`"


def test_a_guest_that_has_left_is_not_shown_as_expected(uplinked: Node) -> None:
    with agents.running() as agent:
        guest = guests.arrived(uplinked, agent, ip=[GUEST_IP4, GUEST_IP6])
        client = uplinked.listen()
        assert shown()["phase"] == "post"
        client.send(guests.garp())
        agents.until(lambda: agents.phase() == "pre")
        assert shown()["phase"] == "left"
        assert " left " in call("kvm-ifup", "show").out
        assert found() == (0, [])
        agent.armed(times=2)
        guest.send(guests.rarp())
        agents.until(lambda: agents.phase() == "post")
        assert shown()["phase"] == "post"


def test_a_guest_that_comes_back_to_its_old_tap_is_expected(uplinked: Node) -> None:
    with agents.running() as agent:
        guests.arrived(uplinked, agent, ip=[GUEST_IP4])
        uplinked.listen().send(guests.garp())
        agents.until(lambda: agents.phase() == "pre")
        check(call("kvm-ifup-pre", "tap0"), 0)
        assert shown()["phase"] == "armed"
