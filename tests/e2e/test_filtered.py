"""A real guest behind `filter = "address"` on both nodes: it finds its addresses by itself, and moves."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from harness import attacker, gateway, namespaces, wire
from harness.addresses import (
    GUEST_EUI64,
    GUEST_IP4,
    GUEST_IP6,
    GUEST_LINK_LOCAL,
    GUEST_MAC,
)
from lab import cases, guest
from lab.hooks import Hooks
from lab.nodes import Network, end, network

from .moves import Moved, says, tap_forwards, wiring


@contextlib.contextmanager
def giver(net: Network) -> Iterator[None]:
    """The client gives addresses away: by DHCP, and by announcing a prefix."""
    for node in (net.a, net.b):  # the nodes do not listen
        node.sysctl(net__ipv6__conf__br0__accept_ra=0, net__ipv6__conf__eth0__accept_ra=0)
    over = threading.Event()
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(gateway.LEASES)
        file.flush()
        net.client.run("touch", "/run/leases")
        dhcp = net.client.popen(["busybox", "udhcpd", "-f", file.name])
        with namespaces.inside(f"/proc/{net.client.pid}/ns/net"):
            sender = wire.packet_socket("eth0")

        def announce() -> None:
            while not over.wait(0.3):
                sender.send(gateway.announcement())

        router = threading.Thread(target=announce)
        router.start()
        try:
            yield
        finally:
            over.set()
            router.join()
            sender.close()
            end(dhcp)


@pytest.fixture
def filtered(scripts: Hooks, image: guest.Image) -> Iterator[tuple[Moved, attacker.FarEnd]]:
    """The guest on node a, and what the client has heard from the beginning."""
    with network("filtered") as net, giver(net):
        before = wiring(net.a)
        with namespaces.inside(f"/proc/{net.client.pid}/ns/net"):
            heard = attacker.FarEnd()
        with cases.stage(net, scripts, image, print) as on:
            yield Moved(on, before), heard
        heard.close()


def test_a_guest_takes_its_addresses_through_the_filter_and_moves(filtered: tuple[Moved, attacker.FarEnd]) -> None:
    """DHCP, SLAAC with EUI-64, DAD and pings in both families (or it would not have booted), QEMU's announcement."""
    moved, heard = filtered
    on, net = moved.on, moved.on.net
    fresh = wiring(net.b)
    assert "tap0" in net.a.run("nft", "list", "table", "bridge", "kvm-ifup")
    with on.target("kvm-ifup-pre", incoming=True) as target:
        assert tap_forwards(net.b)
        assert "tap0" in net.b.run("nft", "list", "table", "bridge", "kvm-ifup")
        on.source.wait_migrated(target, on.source.order_migration(target))
        on.observer.wait(
            "QEMU's RARP reaches the client", lambda seen: says(seen, "rarp", GUEST_MAC), 60, target.must_run
        )
        on.hooks.run("kvm-ifdown", net.a)
        on.hooks.run("kvm-ifup-post", net.b)
        on.source.quit()
        on.observer.wait_for_replies(time.monotonic(), 90, target.must_run)
        on.hooks.run("kvm-ifdown", net.b)
    assert wiring(net.a) == moved.before
    assert wiring(net.b) == fresh
    frames = [frame for frame in iter(lambda: heard.next(0), None) if frame[6:12] == wire.mac_bytes(GUEST_MAC)]
    assert [found for frame in frames if (found := attacker.harm(frame))] == []
    text = " ".join(kind(frame) for frame in frames)
    for address in (GUEST_IP6, GUEST_EUI64, GUEST_LINK_LOCAL):
        assert f"DAD of {address}" in text
    for words in ("DHCP from 0.0.0.0", "MLD from ::", "RARP", f"IPv4 from {GUEST_IP4}", f"IPv6 from {GUEST_EUI64}"):
        assert words in text


def kind(frame: bytes) -> str:
    """What a frame of the guest's is, in words."""
    if frame[12:14] == b"\x80\x35":
        return "RARP"
    if frame[12:14] == b"\x08\0":
        dhcp = frame[23] == 17 and frame[34:38] == struct.pack("!HH", 68, 67)
        return f"{'DHCP' if dhcp else 'IPv4'} from {ipaddress.IPv4Address(frame[26:30])}"
    if frame[12:14] != b"\x86\xdd":
        return ""
    source = ipaddress.IPv6Address(frame[22:38])
    if frame[20] == 58 and frame[54] == 135 and int(source) == 0:
        return f"DAD of {ipaddress.IPv6Address(frame[62:78])}"
    return f"{'MLD' if frame[20] == 0 else 'IPv6'} from {source}"
