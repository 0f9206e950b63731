"""NICs and nodes to test with; every address is from a documentation range."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvmifup.core.model import Bridge, Config, Nic, NodeFacts, Prefix, RoutedConfig, Tap, Trunk, Uplink

MAC = "aa:00:00:35:ac:01"
NAMESPACE = Path(__file__)  # stands in for the network namespace
HERE = NAMESPACE.stat().st_ino


def nets(*texts: str) -> tuple[Prefix, ...]:
    """Addresses and prefixes, as `Nic.ip` has them."""
    return tuple(ipaddress.ip_network(text) for text in texts)


BRIDGED = Nic("tap0", MAC, "bridged", "br0", instance="web1.example.com", index=0, source="a test")
ROUTED = replace(BRIDGED, mode="routed", link=None, ip=nets("192.0.2.8"))
ROUTED_6 = replace(ROUTED, ip=nets("2001:db8::8"))
OVS = replace(BRIDGED, mode="openvswitch", link="ovs0", vlan=".5:300:200")
EXT = replace(BRIDGED, mode="ext", link="site", ip=nets("192.0.2.8", "198.51.100.0/29"))
DUAL = replace(ROUTED, ip=nets("192.0.2.8", "2001:db8::8"))

TAP = Tap(7, is_tap=True)
BRIDGE = Bridge(is_bridge=True, up=True, mac="02:00:00:00:00:01", mtu=9000, stp=False, forward_delay=15.0, adopts=False)
ETH0_4 = Uplink("eth0", 4, present=True, up=True, arp=True)
ETH0_6 = Uplink("eth0", 6, present=True, up=True, arp=True, source="fe80::1")
ETH1_4 = replace(ETH0_4, name="eth1")
ETH1_6 = replace(ETH0_6, name="eth1", source="fe80::2")

FILTERING = replace(BRIDGE, filters=True, new_port=".1", trunks=(Trunk("eth0"), Trunk("bond0")))
FACTS_BRIDGED = NodeFacts(TAP, bridge=BRIDGE)
FACTS_EXT = NodeFacts(TAP, program="/etc/kvm-ifup/ext/site")
FACTS_ROUTED = NodeFacts(TAP, uplinks=(ETH0_4, ETH0_6))
CONFIG = Config()
UPLINK_ETH0 = Config(lock_timeout=0.0, routed=RoutedConfig(uplinks=("eth0",)))


def into(said: list[str]) -> Callable[[str, int, str], bool]:
    """A log that only remembers what it was told."""

    def say(line: str, severity: int, kind: str) -> bool:
        said.append(line)
        return True

    return say
