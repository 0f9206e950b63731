"""What kvmifup.node.netlink reads and writes, beside what `ip` says of the same node."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from harness import nodes, oracle, tools
from harness.addresses import NODE_IP4, NODE_IP6
from harness.nodes import Node
from kvmifup.core.errors import VanishedError
from kvmifup.core.ops import RTPROT_STATIC, LinkUp, Rule
from kvmifup.node import messages, netlink, nexthops, transport
from kvmifup.node.kernel import Kernel
from kvmifup.node.nfmessages import NETLINK_NETFILTER, NFPROTO_INET
from kvmifup.node.nfnetlink import Nftables
from kvmifup.node.routes import routes_to
from kvmifup.node.source_rules import rules_made
from kvmifup.node.transport import Transport

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
MAIN = 254


@pytest.fixture
def rt(uplinked: Node) -> Iterator[netlink.Netlink]:
    """A socket on a node with an uplink."""
    assert uplinked
    made = netlink.Netlink()
    yield made
    made.close()


def batch(lines: str, family: int = 4) -> None:
    """Many changes at once."""
    subprocess.run(["ip", f"-{family}", "-batch", "-"], input=lines, env=tools.CLEAN, text=True, check=True)


def test_links_are_as_ip_shows_them(rt: netlink.Netlink) -> None:
    nodes.add_bridge("br0", mtu=9000, options="stp_state 1 forward_delay 400")
    nodes.add_bridge("br1")
    nodes.taps(["tap0", "tap1"])
    tools.ip("link set tap0 master br1 addrgenmode none up")
    for name in ("lo", "eth0", "br0", "br1", "tap0", "tap1"):
        shown, link = oracle.link(name), rt.link(name)
        info = shown.get("linkinfo", {})
        assert (link.index, link.mtu) == (shown["ifindex"], shown["mtu"])
        assert link.address == shown["address"]
        assert bool(link.flags & 1) == ("UP" in shown["flags"])
        assert (link.kind, link.port_of) == (info.get("info_kind"), info.get("info_slave_kind"))
        assert link.master == (rt.link(shown["master"]).index if "master" in shown else None)
        assert link.addr_gen_mode == ("eui64", "none").index(shown["inet6_addr_gen_mode"])
        assert rt.index(name) == shown["ifindex"]
    assert (rt.link("br0").stp, rt.link("br0").forward_delay) == (True, 4.0)
    assert not rt.link("br1").stp
    assert rt.link("tap0").port_state == 0
    assert (rt.link("eth0").carrier, rt.link("tap0").carrier) == (True, False)


@pytest.mark.parametrize("name", ["nosuch", "x" * 15, "x" * 16, "x" * 4000])
def test_a_link_that_is_not_there(name: str, rt: netlink.Netlink) -> None:
    assert rt.index(name) is None
    with pytest.raises(messages.NetlinkError) as caught:
        rt.link(name)
    assert caught.value.errno in (errno.ENODEV, errno.ERANGE)


def test_a_large_table_is_read_whole(rt: netlink.Netlink) -> None:
    """It takes several datagrams."""
    nodes.add_tap()
    tools.ip("link set tap0 up")
    batch("".join(f"route add 198.18.{n >> 8}.{n & 255}/32 dev tap0\n" for n in range(1500)))
    batch("".join(f"route add 2001:db8:1::{n:x}/128 dev tap0\n" for n in range(1500)), 6)
    index = rt.link("tap0").index
    for version, host in ((4, "198.18.{}.{}/32"), (6, "2001:db8:1::{:x}/128")):
        routes = rt.routes(FAMILIES[version], MAIN)
        assert len(routes) >= 1500
        assert len(rt.routes(FAMILIES[version], MAIN, index)) >= 1500
        for n in (0, 700, 1499):
            text = host.format(n >> 8, n & 255) if version == 4 else host.format(n)
            (found,) = routes_to(ipaddress.ip_network(text), routes)
            assert (found.oif, found.type) == (index, 1)
        absent = ipaddress.ip_network("198.18.100.0/32" if version == 4 else "2001:db8:1::ffff/128")
        assert routes_to(absent, routes) == []


def test_a_prefix_of_another_length_is_another_route(rt: netlink.Netlink) -> None:
    nodes.add_tap()
    tools.ip("link set tap0 up")
    tools.ip("route add 198.51.100.0/24 dev tap0")
    routes = rt.routes(socket.AF_INET, MAIN)
    assert routes_to(ipaddress.ip_network("198.51.100.0/24"), routes)
    assert not routes_to(ipaddress.ip_network("198.51.100.0/25"), routes)
    assert not routes_to(ipaddress.ip_network("198.51.100.0/32"), routes)


def test_default_devices_with_several_next_hops(rt: netlink.Netlink) -> None:
    nodes.add_bridge("br0")
    tools.ip("addr add 203.0.113.1/24 dev br0")
    batch("route replace default nexthop via 192.0.2.1 nexthop via 203.0.113.2\nroute add blackhole default table 77\n")
    devices = [hop.index for hop in nexthops.hops(nexthops.defaults(rt.routes(socket.AF_INET, MAIN)), rt.transport)]
    assert devices == [rt.index("eth0"), rt.index("br0")]
    assert nexthops.defaults(rt.routes(socket.AF_INET, 77)) == []
    assert rt.routes(socket.AF_INET, 4242) == []
    assert rt.routes(socket.AF_INET6, 4242) == []


def test_what_an_address_is_here(rt: netlink.Netlink) -> None:
    assert rt.route_type(socket.AF_INET, NODE_IP4) == rt.route_type(socket.AF_INET6, NODE_IP6) == 2
    assert rt.route_type(socket.AF_INET, "192.0.2.255") == 3
    assert rt.route_type(socket.AF_INET, "198.18.0.1") == rt.route_type(socket.AF_INET6, "2001:db8:9::1") == 1


def test_rules_that_name_just_that_device(rt: netlink.Netlink) -> None:
    """Also one that is not there, and whose name is in others' names."""
    batch(
        "".join(f"rule add iif {name} lookup 100 pref {n + 500}\n" for n, name in enumerate(["tap1", "tap11", "xtap1"]))
    )
    batch(
        "".join(
            f"rule add iif other{n} lookup 100\nrule add to 198.18.{n >> 8}.{n & 255} lookup 100\n" for n in range(900)
        )
    )
    (found,) = rt.rules(socket.AF_INET, "tap1")
    assert messages.plain_rule(found) == (100, 500, 0), "the same as `ip rule` without a protocol"
    assert rt.rules(socket.AF_INET6, "tap1") == []
    rt.put_rule(socket.AF_INET6, "tap1", 4242, 77, 4)
    assert oracle.rules("tap1") == [(4, 500, "100"), (6, 77, "4242")]
    (found,) = rt.rules(socket.AF_INET6, "tap1")
    assert messages.plain_rule(found) == (4242, 77, 4)
    rt.delete_rule(socket.AF_INET6, "tap1", 4242, 77, 4, [found])
    assert oracle.rules("tap1") == [(4, 500, "100")]


MORE = (
    "to 198.51.100.0/24", "suppress_prefixlength 3", "not", "tos 0x10", "fwmark 0x10/0xff", "ipproto tcp dport 80",
    "ipproto udp sport 1000-2000", "uidrange 0-99", "oif eth0", "suppress_ifgroup 7",
)  # fmt: skip


@pytest.mark.pyroute2
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("protocol", [0, 3, 4])
@pytest.mark.parametrize("family", [4, 6])
def test_a_rule_is_removed_and_those_that_say_more_stay(
    more: str, protocol: int, family: int, rt: netlink.Netlink
) -> None:
    """Asked to delete a rule, the kernel takes the first one with all that the request says, also if it says more."""
    words = f"-{family} rule {{}} iif tap1 pref 500 lookup 100 protocol {protocol}"
    other = words.format("add not") if more == "not" else f"{words.format('add')} {more}"
    tools.ip(other.replace("198.51.100.0/24", "2001:db8:1::/48") if family == 6 else other)
    kept = tools.ask(f"-{family} rule")
    rule = Rule(family, "tap1", 100, 500, protocol, True)
    kernel = Kernel()
    try:
        for _ in range(2):  # twice the same: it is one for us
            kernel.write(rule)
        assert len(tools.ask(f"-{family} rule")) == len(kept) + 2
        kernel.write(rule.turned(False))
        assert tools.ask(f"-{family} rule") == kept
        kernel.write(rule.turned(False))
        assert tools.ask(f"-{family} rule") == kept, "once more: there is nothing to remove"
    finally:
        kernel.close()


def test_an_answer_that_nobody_fetched_is_not_taken_for_the_next_one(rt: netlink.Netlink) -> None:
    rt.transport.send(
        messages.RTM_GETRULE, messages.NLM_F_DUMP, messages.FIB_RULE_HDR.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0)
    )
    assert rt.link("lo").index == 1
    rt.transport.send(
        messages.RTM_GETROUTE, 0, messages.RTMSG.pack(2, 32, 0, 0, 0, 0, 0, 0, 0) + messages.attribute(1, bytes(4))
    )
    assert [messages.text(messages.attributes(one, 28).get(3)) for one in rt.rules(socket.AF_INET, "none")] == []
    assert rt.link("eth0").kind == "veth"


def test_every_thread_has_its_own(uplinked: Node) -> None:
    """As the agent's threads do."""
    assert uplinked
    names = [f"tap{n}" for n in range(16)]
    nodes.taps(names)
    wrong: list[Any] = []

    def work(name: str) -> None:
        kernel = Kernel()
        try:
            for up in (True, False) * 10:
                kernel.write(LinkUp(name, up))
                if kernel.read(LinkUp(name, up)) is not up:
                    wrong.append((name, up))
        except Exception as error:
            wrong.append(error)
        finally:
            kernel.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- what the kernel module remembers -------------------------------------------------------------------------


def test_what_others_change_is_seen_after_refresh_and_after_any_write_to_a_link(uplinked: Node) -> None:
    assert uplinked
    nodes.add_tap()
    kernel = Kernel()
    try:
        assert kernel.read(LinkUp("tap0", True)) is False
        tools.ip("link set tap0 up")
        kernel.refresh()
        assert kernel.read(LinkUp("tap0", True)) is True
        rule = Rule(4, "tap0", 100, 10000, RTPROT_STATIC, True)
        assert kernel.read(rule) is False
        kernel.write(rule)
        assert kernel.read(rule) is True
        kernel.write(rule.turned(False))
        assert kernel.read(rule) is False
    finally:
        kernel.close()


def test_a_name_that_became_another_device_is_noticed_whatever_is_remembered(uplinked: Node) -> None:
    assert uplinked
    nodes.add_tap()
    kernel = Kernel()
    try:
        kernel.read(LinkUp("tap0", True))
        tools.ip("link del tap0")
        with pytest.raises(VanishedError):
            kernel.write(LinkUp("tap0", True))
        tools.ip("link add name pad type bridge")
        nodes.add_tap()
        with pytest.raises(VanishedError, match="another device"):
            kernel.write(LinkUp("tap0", True))
    finally:
        kernel.close()
    assert "UP" not in oracle.link("tap0")["flags"]


def test_garbage_is_nothing(rt: netlink.Netlink) -> None:
    assert messages.attributes(b"") == messages.attributes(b"\x01\x00") == messages.attributes(bytes(64)) == {}
    assert messages.attributes(struct.pack("=HH4s", 4000, 1, b"abcd")) == {1: b"abcd"}
    with pytest.raises(messages.NetlinkError) as caught:
        rt.transport.ask(messages.RTM_GETLINK, 0, b"short")
    assert caught.value.errno == errno.EINVAL


# --- sockets that are kept -----------------------------------------------------------------------------------------


@pytest.fixture
def keeping(uplinked: Node) -> Iterator[None]:
    """As in the agent."""
    assert uplinked
    end = transport.keep()
    yield
    end()


def identity(one: Transport) -> int:
    """What tells its socket from all others."""
    return os.fstat(one.socket.fileno()).st_ino


def asked(one: Transport) -> Transport:
    """The same, after a question and its answer."""
    body = messages.IFINFOMSG.pack(0, 0, 0, 0, 0) + messages.attribute(messages.IFLA_IFNAME, b"lo\0")
    assert one.ask(messages.RTM_GETLINK, 0, body)
    return one


def test_a_socket_is_left_to_who_needs_one_next(keeping: None) -> None:
    first, second = asked(Transport()), asked(Transport())
    known = [identity(first), identity(second)]
    for one in (first, second, second):  # nobody gets it twice
        one.close()
    taken = [asked(Transport()) for _ in range(3)]
    assert sorted(map(identity, taken[:2])) == sorted(known)
    assert identity(taken[2]) not in known
    assert identity(Transport(NETLINK_NETFILTER)) not in known
    assert identity(Transport(fresh=True)) not in map(identity, taken)


def test_a_socket_goes_on_after_what_was_refused(keeping: None) -> None:
    one = Transport()
    with pytest.raises(messages.NetlinkError):
        one.ask(messages.RTM_GETLINK, 0, messages.IFINFOMSG.pack(0, 0, 12345, 0, 0))
    with pytest.raises(messages.NetlinkError):
        one.dump(messages.RTM_GETROUTE, b"?")
    known = identity(one)
    one.close()
    assert identity(asked(Transport())) == known


@pytest.mark.parametrize("what", [messages.NLM_F_DUMP, messages.NLM_F_ACK])
def test_a_socket_that_has_more_to_receive_is_closed(what: int, keeping: None) -> None:
    one = asked(Transport())
    one.send(messages.RTM_GETLINK, what, messages.IFINFOMSG.pack(0, 0, 0, 0, 0))
    one.close()
    assert one.socket.fileno() == -1


def test_after_a_transaction_a_socket_is_kept_if_it_was_done(keeping: None) -> None:
    table = Nftables(NFPROTO_INET, "kept")
    with pytest.raises(messages.NetlinkError):
        table.change([*rules_made(), *list(rules_made())[-1:], (255, 0, b"")])
    refused = identity(table._transport)
    table.close()
    table.change(list(rules_made()))
    done = identity(table._transport)
    assert done != refused
    table.close()
    assert table.itself() is not None
    assert identity(table._transport) == done


def test_a_large_table_is_read_again_by_a_socket_that_has_never_read(
    keeping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then the parts end elsewhere, and what one has left out is in the other."""
    nodes.add_tap()
    tools.ip("link set tap0 up")
    batch("".join(f"route add 198.18.{n >> 8}.{n & 255}/32 dev tap0\n" for n in range(1500)))
    asked(Transport()).close()
    spare = asked(Transport())
    asked(Transport()).close()
    sizes: list[list[int]] = []
    once = Transport.parts

    def dumped(one: Transport, kind: int, body: bytes) -> Iterator[bytes]:
        sizes.append([])
        for part in once(one, kind, body):
            sizes[-1].append(len(part))
            yield part

    monkeypatch.setattr(Transport, "parts", dumped)
    rt = netlink.Netlink()
    assert len(rt.routes(socket.AF_INET, MAIN)) >= 1500
    assert len(sizes) == 2
    assert sizes[0] != sizes[1]
    rt.close()
    spare.close()


def test_a_socket_from_before_is_not_kept_for_who_comes_later(uplinked: Node) -> None:
    """Meanwhile the process may have gone to another network namespace."""
    end = transport.keep()
    early = asked(Transport())
    end()
    end = transport.keep()
    early.close()
    assert early.socket.fileno() == -1
    later = asked(Transport())
    later.close()
    assert later.socket.fileno() >= 0
    end()


def test_what_is_kept_is_closed_in_the_end(uplinked: Node) -> None:
    end = transport.keep()
    many = [asked(Transport()) for _ in range(transport.Spare.MOST + 5)]
    for one in many:
        one.close()
    assert [one.socket.fileno() < 0 for one in many] == [False] * transport.Spare.MOST + [True] * 5
    end()
    assert {one.socket.fileno() for one in many} == {-1}
    late = asked(Transport())
    late.close()
    assert late.socket.fileno() == -1
