"""What docs/bridged.md and docs/routed.md tell people to type, typed as printed, with a guest, a node and a router.

Above each block that is to be typed a comment says where: `<!-- on: guest -->`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.docs.machine import ROOT, Machine, cable, machine
from tests.docs.screens import hold
from tests.docs.test_examples import until, uplink

TYPED = re.compile(r"^<!-- on: ([^\n]+) -->\n```sh\n(.*?)^```$", re.M | re.S)
MAC = "aa:00:00:35:ac:01"
GATEWAY = "fe80::fc00:ff:fe35:ac01"

# Plays QEMU: what the guest sends on the cable "guest" comes out of the tap, and the other way round. 4 is
# PACKET_OUTGOING, 0x400454ca TUNSETIFF, 0x1002 IFF_TAP | IFF_NO_PI. It forks, and its child stays.
RELAY = """
import fcntl, os, select, socket, struct, sys
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))
cable = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
cable.bind(("guest", 0))
if os.fork():
    os._exit(0)
while True:
    for ready in select.select([tap, cable], [], [])[0]:
        try:
            if ready is tap:
                cable.send(os.read(tap, 65536))
            else:
                frame, sender = cable.recvfrom(65536)
                if sender[2] != 4:
                    os.write(tap, frame)
        except OSError:
            pass
"""


class Site:
    """A router, a node, and a guest behind the node's tap0, which nobody has wired yet."""

    def __init__(self, stack: ExitStack) -> None:
        self.node, self.router, self.guest = (stack.enter_context(machine()) for _ in range(3))
        uplink(self.node, self.router)
        cable(self.node, self.guest, "guest")
        self.guest.run(f"ip link set guest down; ip link set guest name eth0 address {MAC} up")

    def start(self) -> None:
        """QEMU starts, and calls script=."""
        self.node.run(f"/usr/bin/python3 -I -c '{RELAY}' tap0 >/dev/null 2>&1; kvm-ifup-pre tap0")

    def machine(self, name: str) -> Machine:
        """The one that the page calls so."""
        found: Machine = getattr(self, name)
        return found


def typed(page: str, *places: str) -> list[tuple[str, str]]:
    """The blocks of a page for these places, as (place, text), in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [(place, block) for place, block in TYPED.findall(text) if place in places]


@pytest.fixture
def site() -> Iterator[Site]:
    """A site that ends with the test."""
    with ExitStack() as stack:
        yield Site(stack)


@pytest.mark.parametrize(("page", "places"), [
    ("routed.md", {"node", "node with a table", "guest", "router"}),
    ("bridged.md", {"node", "node with STP", "node after networking was restarted"}),
    ("filters.md", {"node"}),
])  # fmt: skip
def test_every_block_that_is_to_be_typed_says_where(page: str, places: set[str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text.count("```sh\n") == len(TYPED.findall(text))
    assert {place for place, _ in TYPED.findall(text)} == places


# --- routed ---------------------------------------------------------------------------------------------


def follow_routed(site: Site) -> list[str]:
    """All that the page says, in its order; QEMU starts behind the NIC's file. What the node printed."""
    printed = []
    for place, block in typed("routed.md", "node", "guest", "router"):
        done = site.machine(place).run(block)
        printed += [done.stdout] if place == "node" else []
        if "nic put" in block:
            site.start()
    return printed


def settled(guest: Machine) -> None:
    """Wait until the kernel has made sure that nobody else has the guest's IPv6 addresses."""
    guest.run("while ip -6 addr show tentative | grep -q inet6; do sleep 0.1; done")


def pings(machine: Machine, *addresses: str) -> None:
    """Each of them answers."""
    for address in addresses:
        machine.run(f"ping -qc1 -W5 {address}")


def test_the_routed_page_makes_a_guest_that_is_reached(site: Site) -> None:
    *_, address, verdict = follow_routed(site)
    assert verdict.endswith(": right\n")
    assert f"inet6 {GATEWAY}/64" in address
    settled(site.guest)
    pings(site.guest, "192.0.2.1", "2001:db8::1")
    # The prefix goes by way of the guest's own address.
    pings(site.router, "192.0.2.8", "2001:db8::8", "198.51.100.1")
    # Any other source is dropped.
    site.guest.run("ip addr add 192.0.2.99/32 dev lo")
    assert site.guest.attempt("ping -qc1 -W1 -I 192.0.2.99 192.0.2.1").returncode == 1


def test_an_address_of_another_network_is_asked_for_on_the_segment(site: Site) -> None:
    for place, block in typed("routed.md", "node", "guest", "router"):
        site.machine(place).run(block.replace('"2001:db8::8"', '"2001:db8::8", "203.0.113.8"'))
        if "nic put" in block:
            site.start()
    site.guest.run("ip addr add 203.0.113.8/32 dev lo")
    pings(site.router, "203.0.113.8")


@pytest.mark.parametrize("gateway", ["192.0.2.1", "169.254.0.1", "203.0.113.77"])
def test_any_ipv4_address_is_right_as_the_gateway(gateway: str, site: Site) -> None:
    follow_routed(site)
    site.guest.run(f"ip route replace default via {gateway} dev eth0 onlink; ip neigh flush dev eth0")
    pings(site.guest, "192.0.2.1")
    (neighbour,) = site.guest.ask(f"ip -j neigh show {gateway}")
    assert neighbour["lladdr"] == "fe:00:00:35:ac:01"


def test_the_gateway_is_the_one_that_the_page_computes_on_every_node(site: Site) -> None:
    first = [0xFE ^ 2, *bytes.fromhex(MAC.replace(":", ""))[1:]]
    eui64 = bytes([*first[:3], 0xFF, 0xFE, *first[3:]])
    assert str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + eui64)) == GATEWAY
    follow_routed(site)
    with machine() as other, machine() as router:
        uplink(other, router)
        for place, block in typed("routed.md", "node")[:2]:
            assert place == "node"
            other.run(block)
        hold(other, "tap0")
        other.run("echo incoming = true >> /run/kvm-ifup/nic/web1/0.toml; kvm-ifup-pre tap0")
        for node in (site.node, other):
            (tap,) = node.ask("ip -j -6 addr show dev tap0 scope link")
            assert [one["local"] for one in tap["addr_info"] if one["scope"] == "link"] == [GATEWAY]


def test_a_table_for_guests(site: Site) -> None:
    ((_, table),) = typed("routed.md", "node with a table")
    text = (ROOT / "docs/routed.md").read_text(encoding="utf-8")
    # The same commands as in the file that survives a reboot.
    assert re.findall(r"^ {4}up (ip .*)$", text, re.M) == re.findall(r"^ip .*$", table, re.M)
    site.node.run(table)
    for place, block in typed("routed.md", "node", "guest"):
        block = block.replace('mode = "routed"', 'mode = "routed"\nlink = "guests"')
        done = site.machine(place).run(block)
        if "nic put" in block:
            site.start()
    assert done.stdout.endswith(": right\n")
    assert site.node.rules("tap0") == ["100", "100"] or site.node.rules("tap0") == ["guests", "guests"]
    settled(site.guest)
    pings(site.router, "192.0.2.8", "2001:db8::8")
    pings(site.guest, "192.0.2.1", "2001:db8::1")
    # Without the rule for the uplink the node does not answer, and check says so.
    site.node.run("ip rule del iif eth0 lookup guests")
    assert site.node.attempt("kvm-ifup check web1").returncode == 1


def test_without_forwarding_a_routed_guest_is_refused(site: Site) -> None:
    (_, nic) = typed("routed.md", "node")[1]
    site.node.run(nic)
    hold(site.node, "tap0")
    done = site.node.attempt("kvm-ifup-pre tap0")
    assert done.returncode == 69
    assert "forwarding" in done.stderr


# --- bridged --------------------------------------------------------------------------------------------


def test_the_bridged_page_makes_a_guest_that_is_reached(site: Site) -> None:
    for number, (_, block) in enumerate(typed("bridged.md", "node")):
        if number == 0:
            site.node.run("ip addr flush dev eth0; mkdir -p /etc/udev/rules.d")  # there is no udev here
        site.node.run(block)
        if "nic put" in block:
            site.start()
    site.guest.run("ip addr add 192.0.2.8/24 dev eth0")
    assert site.node.ports()["tap0"] == "forwarding"
    pings(site.guest, "192.0.2.1")
    # The MTU has grown under the guest.
    found = site.node.attempt("kvm-ifup check web1")
    assert (found.returncode, "MTU: 1500 -> 9000" in found.stdout) == (1, True)
    # Networking is restarted: the bridge is another one. First there is no agent, then there is one.
    restart = f"ip link del br0\n{typed('bridged.md', 'node')[0][1]}"
    site.node.run(restart)
    assert "tap0" not in site.node.ports()
    ((_, repair),) = typed("bridged.md", "node after networking was restarted")
    site.node.run(repair)
    pings(site.guest, "192.0.2.1")
    site.node.run("kvm-ifupd >/run/kvm-ifupd.log 2>&1 & until grep -q ready /run/kvm-ifupd.log; do sleep 0.1; done")
    site.node.run(restart)
    until(site.node, "bridge link show dev tap0 | grep -q forwarding")
    pings(site.guest, "192.0.2.1")


@pytest.mark.parametrize(("fast", "code"), [(True, 0), (False, 69)])
def test_stp_is_fast_enough_or_an_arriving_guest_is_refused(fast: bool, code: int, site: Site) -> None:
    ((_, stp),) = typed("bridged.md", "node with STP")
    _, nic = typed("bridged.md", "node")[1]
    site.node.run(typed("bridged.md", "node")[0][1])
    site.node.run(stp if fast else "ip link set br0 type bridge stp_state 1 forward_delay 1500")
    site.node.run(nic)
    hold(site.node, "tap0")
    site.node.run("echo incoming = true >> /run/kvm-ifup/nic/web1/0.toml")
    assert site.node.attempt("kvm-ifup-pre tap0").returncode == code


def test_a_vlan_on_a_linux_bridge_is_refused(site: Site) -> None:
    site.node.run(typed("bridged.md", "node")[0][1])
    _, nic = typed("bridged.md", "node")[1]
    site.node.run(nic.replace("\nEND", '\nvlan = ".100"\nEND'))
    hold(site.node, "tap0")
    assert site.node.attempt("kvm-ifup-pre tap0").returncode == 69


# --- filters --------------------------------------------------------------------------------------------


def test_the_filters_page_closes_a_guest_and_opens_what_it_says(site: Site) -> None:
    site.node.run(typed("bridged.md", "node")[0][1])
    (_, closed), (_, opened) = typed("filters.md", "node")
    site.node.run(closed)
    site.start()

    def reaches(source: str, dev: str = "eth0") -> bool:
        """Whether the guest reaches the router from *source*, which is on its *dev*."""
        site.guest.run(f"ip addr replace {source}/24 dev {dev}")
        found = site.guest.attempt(f"ping -qc1 -W1 -I {source} 192.0.2.1").returncode == 0
        site.guest.run(f"ip addr del {source}/24 dev {dev}; ip neigh flush dev {dev}")
        return found

    assert reaches("192.0.2.8")
    assert not reaches("192.0.2.50")
    for name, mac in (("virtual", "02:00:00:00:00:07"), ("other", "02:00:00:00:00:08")):
        site.guest.run(f"ip link add link eth0 name {name} address {mac} type macvlan")
        site.guest.run(f"ip link set {name} up")
    assert not reaches("192.0.2.8", "virtual")
    site.node.run(opened)
    assert reaches("192.0.2.8")
    assert reaches("192.0.2.50")
    assert reaches("192.0.2.51", "virtual")
    assert not reaches("192.0.2.52", "other")
    assert not reaches("192.0.2.65")
    site.node.run("nft list set bridge kvm-ifup dropped_mac | grep -q 'packets [1-9]'")
