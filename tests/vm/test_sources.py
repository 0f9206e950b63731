"""From where a routed guest may send over IPv6, with Debian's own kernel."""

from __future__ import annotations

import struct

from harness import manager, tools, wire
from harness.addresses import CLIENT_IP6, CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, TAP_MAC
from harness.hooks import call, check
from harness.nodes import Node

FORGED, INSIDE = "2001:db8::66", "2001:db8:1::77"


def echo(source: str, mark: bytes) -> bytes:
    """An echo request of the guest's to the client."""
    return wire.icmp6(TAP_MAC, GUEST_MAC, source, CLIENT_IP6, struct.pack("!BBHHH", 128, 0, 0, 1, 1) + mark)


def test_debians_kernel_takes_the_rules_judges_by_them_and_tells_them_again(node: Node) -> None:
    node.uplink()
    tools.ip(f"neigh replace {CLIENT_IP6} lladdr {CLIENT_MAC} nud permanent dev eth0")
    guest = node.guest()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6, "2001:db8:1::/64"])
    config = manager.configuration(routed={"rp_filter": "strict", "guard_uplinks": True})
    for ip in ([GUEST_IP6, INSIDE], [GUEST_IP4, GUEST_IP6, "2001:db8:1::/64"]):
        manager.write_nic(mode="routed", ip=ip)
        check(call("kvm-ifup-post", "tap0", config), 0)
        assert call("kvm-ifup-post", "tap0", "--json", config).needed == []
    client = node.listen()
    for source in (FORGED, INSIDE, FORGED):
        guest.send(echo(source, source.encode()))
    guest.send(echo(GUEST_IP6, b"the last"))
    heard = client.until(lambda frame: b"the last" in frame)
    assert any(INSIDE.encode() in frame for frame in heard)
    assert not any(FORGED.encode() in frame for frame in heard)
    assert call("kvm-ifup", "show", "--json").out.count('"address": 2') == 1
    check(call("kvm-ifdown", "tap0", config), 0)
    assert "tap0" not in tools.run("nft", "list", "ruleset")
