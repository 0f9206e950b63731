"""A node of the tests' own: the test process in fresh namespaces, a client on its uplink, guests on its taps.

    client namespace                 this process's namespace: "the node"
        eth0 ───────── veth ──────────── eth0        tap0 ── a descriptor held by the test: the guest

`fresh_node` gives each test a network namespace, a /sys and a /run that nothing has been in.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness import hooks, namespaces
from harness.addresses import CLIENT_IP4, CLIENT_IP6, CLIENT_MAC, NODE_IP4, NODE_IP6, NODE_MAC
from harness.namespaces import Namespace
from harness.oracle import settle, sysctl
from harness.tools import ask, ip
from harness.wire import Tap, Wire, attach, packet_socket

TUN = "/dev/net/tun"


def scratch() -> Path:
    """An empty directory that ends with the test. (pytest's own belongs to whoever "root" was before.)"""
    place = Path("/run/scratch")
    place.mkdir()
    return place


def add_tap(name: str = "tap0") -> None:
    """A tap as a process manager makes it: down, with an address of the kernel's choosing (here: always the same)."""
    if not os.access(TUN, os.R_OK | os.W_OK):
        pytest.fail(f"{TUN} cannot be opened: unprivileged runs need a device node there that everybody may open")
    ip(f"tuntap add {name} mode tap")
    ip(f"link set {name} address 02:00:00:00:{name.encode()[-2]:02x}:{name.encode()[-1]:02x}")


def add_bridge(name: str = "br0", mtu: int = 1500, options: str = "") -> None:
    """A bridge that is up, with an address of its own."""
    ip(f"link add name {name} address 02:00:00:00:b0:{name.encode()[-1]:02x} type bridge {options}")
    ip(f"link set {name} mtu {mtu} up")


def add_port(bridge: str, mtu: int = 1500) -> str:
    """A port of *bridge* that leads somewhere: to a device that is up, and that nobody uses. Returns its name."""
    name = f"{bridge}-up"
    ip(f"link add name {name} mtu {mtu} type veth peer name {bridge}-far mtu {mtu}")
    ip(f"link set {bridge}-far up")
    ip(f"link set {name} master {bridge} up")
    settle(name)
    return name


@dataclass
class Node:
    """A fresh node, and what the test opened on it."""

    client: Namespace
    taps: list[Tap] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)

    def uplink(self, name: str = "eth0", *, addresses: bool = True, master: str | None = None) -> None:
        """An uplink to the client: addressed, forwarding, with the default routes; or a port of *master*."""
        ip(f"link add {name} address {NODE_MAC} type veth peer name eth0 address {CLIENT_MAC} netns {self.client.path}")
        with self.client:
            quieten()
            ip("link set lo up")
            ip("link set eth0 up")
            ip(f"addr add {CLIENT_IP4}/24 dev eth0")
            ip(f"addr add {CLIENT_IP6}/64 dev eth0")
        ip(f"link set {name} up")
        settle(name)
        if master:
            ip(f"link set {name} master {master}")
        elif addresses:
            ip(f"addr add {NODE_IP4}/24 dev {name}")
            ip(f"addr add {NODE_IP6}/64 dev {name}")
            ip(f"route add default via {CLIENT_IP4}")
            ip(f"-6 route add default via {CLIENT_IP6}")
            for family in (4, 6):
                sysctl(f"ipv{family}/conf/all/forwarding", 1)
                # So that a new tap does not forward by itself, and the hook has something to do.
                sysctl(f"ipv{family}/conf/default/forwarding", 0)
        certain(name)

    def guest(self, tap: str = "tap0") -> Tap:
        """A new tap with a guest behind it, whose frames the test reads and writes."""
        add_tap(tap)
        self.taps.append(attach(tap))
        return self.taps[-1]

    def listen(self, dev: str = "eth0") -> Wire:
        """What arrives at the client from now on."""
        with self.client:
            self.wires.append(Wire(packet_socket(dev), dev))
        return self.wires[-1]

    def fence(self, wire: Wire, dev: str = "eth0") -> list[bytes]:
        """Send a frame of a kind that nobody else sends from *dev*; returns what reached *wire* before it."""
        with packet_socket(dev) as sender:
            return wire.up_to_fence(sender)


def quieten() -> None:
    """No address is tentative, nobody solicits routers: what is on the wire is the test's or the hook's."""
    for which in ("all", "default"):
        for name in ("accept_dad", "dad_transmits", "router_solicitations"):
            sysctl(f"ipv6/conf/{which}/{name}", 0)


def certain(name: str) -> None:
    """Wait until no address of a device is tentative: soon after it is up, if nobody is asked (`quieten`)."""
    while any("tentative" in info for one in ask(f"addr show dev {name}") for info in one["addr_info"]):
        pass


@contextlib.contextmanager
def fresh_node() -> Iterator[Node]:
    """A network namespace, /sys and /run that nothing has been in; what the test left running ends with it."""
    namespaces.isolate()
    namespaces.unmount(Path("/sys"))
    namespaces.unmount(Path("/run"))
    namespaces.unshare(namespaces.CLONE_NEWNET)
    namespaces.mount("sysfs", "/sys", "sysfs")
    namespaces.mount("tmpfs", "/run", "tmpfs", data="mode=755")
    namespaces.guard()
    quieten()
    ip("link set lo up")
    node = Node(Namespace())
    try:
        yield node
    finally:
        hooks.reap()
        for tap in node.taps:
            tap.close()
        for wire in node.wires:
            wire.close()
        node.client.close()


def taps(names: Sequence[str]) -> None:
    """Several taps."""
    for name in names:
        add_tap(name)
