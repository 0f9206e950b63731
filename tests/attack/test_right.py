"""What a real system does to find its addresses passes a filter, all of it: DHCP, SLAAC with EUI-64, DAD, pings."""

from __future__ import annotations

import subprocess
from pathlib import Path

from harness import attacker, gateway, manager, nodes, oracle, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, GUEST_EUI64, GUEST_IP4, GUEST_IP6
from harness.agents import until
from harness.attacker import FarEnd, far_end
from harness.hooks import call, check
from harness.nodes import Node

LEASED = """#!/bin/sh
[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
"""


def certain_addresses() -> set[str]:
    """Addresses of eth0 that can be used."""
    found = [info for one in tools.ask("addr show dev eth0") for info in one["addr_info"]]
    return {str(one["local"]) for one in found if not one.get("tentative") and not one.get("dadfailed")}


def test_a_system_finds_its_addresses_and_not_one_of_its_frames_is_dropped(node: Node) -> None:
    oracle.sysctl("ipv6/conf/default/disable_ipv6", 1)  # the node says nothing of its own
    nodes.add_bridge(options="mcast_snooping 0")
    node.uplink(master="br0")
    guest = node.guest()
    manager.write_nic(mode="bridged", link="br0", filter="address", ip=[GUEST_IP4, GUEST_IP6, GUEST_EUI64])
    check(call("kvm-ifup-post", "tap0"), 0)
    sent, seen = FarEnd("tap0"), far_end(node)
    Path("/run/leases.conf").write_text(gateway.LEASES)
    Path("/run/leases").touch()
    script = Path("/run/leased")
    script.write_text(LEASED)
    script.chmod(0o755)
    with node.client:
        server = subprocess.Popen(["busybox", "udhcpd", "-f", "/run/leases.conf"], stderr=subprocess.DEVNULL)
        router = wire.packet_socket("eth0")
    try:
        with attacker.attacker(guest, fresh=True) as place, place:
            tools.ip(f"addr add {GUEST_IP6}/64 dev eth0")
            tools.run("busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-t", "40", "-T", "1", "-s", str(script))

            def complete() -> bool:
                router.send(gateway.announcement())
                return certain_addresses() >= {GUEST_IP4, GUEST_IP6, GUEST_EUI64}

            until(complete)
            for address in (CLIENT_IP4, CLIENT_IP6):
                tools.run("ping", "-q", "-c", "1", "-W", "5", address)
    finally:
        server.kill()
        server.wait()
        router.close()
    came = set(iter(lambda: seen.next(0.1), None))
    all_sent = list(iter(lambda: sent.next(0), None))
    assert len(all_sent) > 10
    assert [frame.hex() for frame in all_sent if frame not in came] == []
    sent.close()
    seen.close()
