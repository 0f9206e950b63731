"""Debian's Ganeti 3.0 starts and moves a bridged guest with VLANs: QEMUs, Ganeti's code, our packages' files."""

from __future__ import annotations

from pathlib import Path

from harness.addresses import GUEST_MAC
from tests.ganeti.cluster import Instance, Nic, Node, cluster
from tests.vm.test_vlans import ACCESS, Vlans, flags_of, tagged

FILES = Path("/opt/ganeti")
# A guest that does nothing: QEMU's own firmware would look for something to boot, on two emulated processors at once.
HALT = Path("/opt/halt.bin")
START, SIZE = 0xFFF0, 0x10000  # where a processor begins, and the least that QEMU takes
# Bridges keep VLANs apart, Ganeti calls us, and somebody else's guest on tap9 needs VLAN 200.
READY = """
ip link set br0 type bridge vlan_filtering 1
mkdir -p /etc/kvm-ifup
printf '[link.br0]\\nuplinks = ["eth0"]\\n' >/etc/kvm-ifup/config.toml
mkdir -p /etc/ganeti/hooks/instance-migrate-post.d
ln -s /usr/lib/kvm-ifup/ganeti/kvm-vif-bridge /etc/ganeti/kvm-vif-bridge
ln -s /usr/lib/kvm-ifup/ganeti/hook /etc/ganeti/hooks/instance-migrate-post.d/50-kvm-ifup
ip tuntap add tap9 mode tap
INTERFACE=tap9 MODE=bridged LINK=br0 MAC=aa:00:00:00:00:09 VLAN=.200 INSTANCE=web9 kvm-ifup-post
"""
ALONE = {1: ACCESS, **tagged(200)}


def vlans(node: Node) -> dict[str, Vlans]:
    """Those of all ports of a node, as `bridge` has them."""
    return {port["ifname"]: flags_of(port["vlans"]) for port in node.json("bridge", "-j", "vlan", "show")}


def test_ganeti_moves_a_guest_with_vlans_and_its_vlans_with_it() -> None:
    nic = Nic(GUEST_MAC, "bridged", "br0", vlan=".100:200:300-302")
    HALT.write_bytes(bytes(START) + b"\xfa\xf4\xeb\xfd" + bytes(SIZE - START - 4))  # cli; hlt; jmp
    instance = Instance((nic,), firmware=HALT)
    asked = {100: ACCESS, **tagged(200, 300, 301, 302)}
    uplink = {1: ACCESS, **tagged(*asked)}
    with cluster("bridged", [], files=FILES) as found:
        a, b = found.nodes
        for node in (a, b):
            node.run("sh", "-ec", READY)
            assert vlans(node)["eth0"] == ALONE

        a.ganeti("start", instance)
        assert vlans(a)["tap0"] == asked
        assert vlans(a)["eth0"] == uplink
        assert vlans(b)["eth0"] == ALONE

        info = a.ganeti("migration_info", instance)
        b.ganeti("accept", instance, info=info, target=b.address)
        assert vlans(b)["tap0"] == asked  # before the guest is there
        assert vlans(b)["eth0"] == uplink
        assert b.ports()["tap0"] == ("br0", "forwarding")

        found.migrate(instance, a, b, info)
        a.ganeti("finalize_source", instance, success=True)
        b.ganeti("finalize_target", instance, info=info, success=True)
        assert a.taps() == ["tap9"]
        a.hooks("instance-migrate", instance)
        assert vlans(a)["eth0"] == ALONE
        assert vlans(a)["tap9"] == {200: ACCESS}
        assert vlans(b)["tap0"] == asked
        assert vlans(b)["eth0"] == uplink
