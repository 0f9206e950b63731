"""From where a routed guest may send over IPv6, and who on an uplink may pose as a guest: by frames, at the far end."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest

from harness import disturb, hooks, manager, nodes, oracle, tools, wire
from harness.addresses import (
    CLIENT_IP4,
    CLIENT_IP6,
    CLIENT_MAC,
    GUEST_IP4,
    GUEST_IP6,
    GUEST_MAC,
    NODE_IP6,
    NODE_MAC,
    TAP_MAC,
)
from harness.hooks import call, check, hook
from harness.nodes import Node
from kvmifup.core.ops import Sources
from kvmifup.node.nfmessages import (
    NFPROTO_INET,
    NFT_MSG_NEWTABLE,
    NFT_TABLE_F_OWNER,
    NFTA_TABLE_FLAGS,
    WITHOUT_TABLE,
    big,
    create,
)
from kvmifup.node.nfnetlink import Nftables
from kvmifup.node.sources import SourceTable

BEHIND = "2001:db8:1::/64"  # a network behind the guest
INSIDE, OUTSIDE = "2001:db8:1::77", "2001:db8:1:1::77"
FORGED = ["2001:db8::66", CLIENT_IP6, NODE_IP6, OUTSIDE, "2001:db8:0:ffff::1", "2002:c000:201::1", "::ffff:192.0.2.1"]
NIC: dict[str, Any] = {"mode": "routed", "ip": [GUEST_IP4, GUEST_IP6, BEHIND]}
TABLE = ("inet", "kvm-ifup")


def packet(source: str, target: str = CLIENT_IP6, mark: str = "", how: str = "plain") -> bytes:
    """An IPv6 packet that carries *mark*, or its source: plain, a fragment, or behind an extension header."""
    said = (mark or source).encode()
    body = struct.pack("!HHHH", 9, 9, 8 + len(said), 0) + said
    kind = 17
    if how == "first fragment":
        kind, body = 44, struct.pack("!BBHI", 17, 0, 1, 7) + body + bytes(-len(body) % 8)
    elif how == "later fragment":
        kind, body = 44, struct.pack("!BBHI", 17, 0, 64 << 3, 7) + body
    elif how == "hop by hop":
        kind, body = 0, struct.pack("!BB6x", 17, 0)[:2] + b"\1\4\0\0\0\0" + body
    elif how == "destination options":
        kind, body = 60, struct.pack("!BB", 17, 0) + b"\1\4\0\0\0\0" + body
    head = struct.pack("!IHBB", 6 << 28, len(body), kind, 64)
    return head + ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(target).packed + body


HOWS = ["plain", "first fragment", "later fragment", "hop by hop", "destination options"]


def packet4(source: str, target: str, mark: str) -> bytes:
    """An IPv4 packet that carries *mark*."""
    body = struct.pack("!HHHH", 9, 9, 8 + len(mark), 0) + mark.encode()
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0, socket.inet_aton(source),
                       socket.inet_aton(target))  # fmt: skip
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + head[12:] + body


def from_guest(guest: wire.Tap, payload: bytes, kind: int = wire.ETH_P_IPV6) -> None:
    """Send *payload* out of the guest."""
    guest.send(wire.ethernet(TAP_MAC, GUEST_MAC, kind, payload))


def passed(guest: wire.Tap, client: wire.Wire, sent: Iterable[bytes], own: str = GUEST_IP6) -> list[bytes]:
    """Have the guest send packets; returns those that reach the client before one from its *own* address does."""
    for one in sent:
        from_guest(guest, one)
    from_guest(guest, packet(own, mark="the last"))
    frames = client.until(lambda frame: b"the last" in frame)
    return [frame[14:] for frame in frames if frame[12:14] == b"\x86\xdd" and not is_icmp(frame)][:-1]


def is_icmp(frame: bytes) -> bool:
    """Whether it is neighbour discovery, or a report about multicast."""
    return frame[20] == 58 or frame[20:21] + frame[54:55] == b"\x00\x3a"


def sources(packets: list[bytes]) -> list[str]:
    """The sources of *packets*."""
    return [str(ipaddress.IPv6Address(one[8:24])) for one in packets]


def met(node: Node) -> None:
    """Client and node know each other's MACs, so that nothing waits for an answer."""
    tools.ip(f"neigh replace {CLIENT_IP6} lladdr {CLIENT_MAC} nud permanent dev eth0")
    tools.ip(f"neigh replace {CLIENT_IP4} lladdr {CLIENT_MAC} nud permanent dev eth0")
    oracle.sysctl("ipv6/icmp/ratelimit", 0)
    del node


def wired(node: Node, **nic: Any) -> tuple[wire.Tap, wire.Wire]:
    """A guest on tap0 that runs here, and what the client hears."""
    met(node)
    guest = node.guest()
    manager.write_nic(**{**NIC, **nic})
    check(call("kvm-ifup-post", "tap0"), 0)
    return guest, node.listen()


def elements(name: str) -> list[Any]:
    """What is in a set or map of our table, as nft shows it; nothing if there is no table."""
    found = json.loads(tools.run("nft", "-j", "list", "ruleset"))["nftables"]
    for one in found:
        for kind in ("set", "map"):
            if kind in one and (one[kind]["family"], one[kind]["table"], one[kind]["name"]) == (*TABLE, name):
                return list(one[kind].get("elem", []))
    return []


def has_table() -> bool:
    """Whether our table is there."""
    return " ".join(("table", *TABLE)) in tools.run("nft", "list", "tables").splitlines()


def dropped(name: str = "tap0") -> int:
    """How many packets were dropped for *name*."""
    found = [one["elem"] for one in elements("dropped_address") if one["elem"]["val"] == name]
    return int(found[0]["counter"]["packets"]) if found else 0


def wrong(*words: str) -> None:
    """`kvm-ifup check` finds something wrong, and says *words*."""
    result = call("kvm-ifup", "check")
    assert result.code == 1
    assert all(word in result.out for word in words), result.out


# --- strict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [None, "100"])
def test_a_guest_sends_from_its_own_addresses_and_prefixes_and_no_others(uplinked: Node, link: str | None) -> None:
    guest, client = wired(uplinked, link=link)
    if link:
        tools.ip(f"-6 route add default via {CLIENT_IP6} table 100")
    right = [packet(source, how=how) for how in HOWS for source in (GUEST_IP6, INSIDE, "2001:db8:1::")]
    wrong = [packet(source, how=how) for how in HOWS for source in FORGED]
    assert passed(guest, client, [*wrong, *right, *wrong]) == [one[:7] + b"\x3f" + one[8:] for one in right]
    assert dropped() == 2 * len(wrong)


def test_without_the_rules_the_forged_ones_would_pass(uplinked: Node) -> None:
    """Or the tests here would prove nothing."""
    guest, client = wired(uplinked)
    tools.run("nft", "flush", "ruleset")
    assert sources(passed(guest, client, map(packet, FORGED))) == [*FORGED[:-1], "::ffff:c000:201"]


def test_the_node_itself_is_not_reached_from_a_forged_address(uplinked: Node) -> None:
    guest, client = wired(uplinked)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as heard:
        heard.bind(("::", 9))
        heard.setblocking(False)
        passed(guest, client, [with_sum(packet(source, NODE_IP6)) for source in (*FORGED, GUEST_IP6)])
        assert heard.recvfrom(100)[1][0] == GUEST_IP6
        with pytest.raises(BlockingIOError):
            heard.recvfrom(100)


def with_sum(found: bytes) -> bytes:
    """A plain packet with the checksum that a socket wants."""
    body = found[40:]
    pseudo = found[8:40] + struct.pack("!II", len(body), 17) + body + bytes(len(body) % 2)
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return found[:46] + struct.pack("!H", ~total & 0xFFFF) + body[8:]


def test_a_guest_with_ipv4_alone_sends_no_ipv6(uplinked: Node) -> None:
    met(uplinked)
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    oracle.sysctl("ipv6/conf/tap0/forwarding", 1)
    client = uplinked.listen()
    for one in (*FORGED, GUEST_IP6):
        from_guest(guest, packet(one))
    from_guest(guest, packet4(GUEST_IP4, CLIENT_IP4, "the last"), wire.ETH_P_IP)
    frames = client.until(lambda frame: b"the last" in frame)
    assert [frame for frame in frames if frame[12:14] == b"\x86\xdd" and frame[20] == 17] == []
    assert dropped() >= len(FORGED)


@pytest.mark.parametrize("own", ["fe80::a8ff:ff:fe35:ac01", "fe80::1234:5678:9abc:def0", "::"])
def test_neighbour_discovery_works_from_any_link_local_address_and_from_none(uplinked: Node, own: str) -> None:
    """Guests make stable or temporary link-local addresses; and ask whether an address is free before it is theirs."""
    guest, client = wired(uplinked)
    gateway = "fe80::fc00:ff:fe35:ac01"
    if own == "::":  # without the sender's MAC (RFC 4861, 4.3)
        body = struct.pack("!BBHI", 135, 0, 0, 0) + ipaddress.IPv6Address(gateway).packed
        guest.send(wire.icmp6("33:33:ff:35:ac:01", GUEST_MAC, own, "ff02::1:ff35:ac01", body))
    else:
        guest.send(wire.solicitation(GUEST_MAC, own, gateway))
    found = wire.advertisement(guest.until(lambda frame: wire.advertisement(frame) is not None)[-1])
    assert found
    assert found.target == gateway
    assert passed(guest, client, []) == []


def test_what_a_route_by_hand_leads_to_the_guest_may_send_as_with_ipv4(uplinked: Node) -> None:
    guest, client = wired(uplinked)
    assert passed(guest, client, [packet(OUTSIDE)]) == []
    tools.ip("-6 route add 2001:db8:1:1::/64 dev tap0")
    assert sources(passed(guest, client, [packet(OUTSIDE)])) == [OUTSIDE]
    tools.ip("-6 route replace 2001:db8:1:1::/64 dev eth0")  # back out of another device
    assert passed(guest, client, [packet(OUTSIDE)]) == []


# --- loose, off, keep ----------------------------------------------------------------------------------------------


def test_loose_is_any_source_to_which_there_is_a_route(uplinked: Node) -> None:
    met(uplinked)
    guest = uplinked.guest()
    manager.write_nic(**NIC)
    loose = manager.configuration(routed={"rp_filter": "loose", "uplinks": ["eth0"]})
    check(call("kvm-ifup-post", "tap0", loose), 0)
    client = uplinked.listen()
    tried = [GUEST_IP6, INSIDE, "2001:db8::66", OUTSIDE, NODE_IP6]
    # The node's own address is nobody else's, as with IPv4.
    assert sources(passed(guest, client, map(packet, tried))) == tried[:4]
    tools.ip("-6 route del default")
    assert sources(passed(guest, client, map(packet, tried))) == tried[:3]
    tools.ip("-6 route add unreachable 2001:db8::66")
    assert sources(passed(guest, client, map(packet, tried))) == tried[:2]


@pytest.mark.parametrize("setting", ["off", "keep"])
def test_off_and_keep_judge_nothing(uplinked: Node, setting: str) -> None:
    guest, client = wired(uplinked)
    check(call("kvm-ifup-post", "tap0", manager.configuration(routed={"rp_filter": setting})), 0)
    assert elements("sources") == elements("addresses") == elements("prefixes") == elements("dropped_address") == []
    assert sources(passed(guest, client, map(packet, FORGED[:5]))) == FORGED[:5]
    check(call("kvm-ifup-post", "tap0", manager.configuration(routed={"rp_filter": "strict"})), 0)
    assert passed(guest, client, map(packet, FORGED)) == []


# --- when ----------------------------------------------------------------------------------------------------------


def test_it_is_in_force_with_pre_already_on_a_node_where_the_guest_does_not_run(uplinked: Node) -> None:
    met(uplinked)
    guest = uplinked.guest()
    manager.write_nic(**NIC, incoming=True)
    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert len(elements("sources")) == 1
    client = uplinked.listen()
    assert passed(guest, client, map(packet, FORGED)) == []
    assert oracle.routes("tap0") == set()


def test_changed_addresses_take_effect_and_one_that_stays_is_never_dropped(uplinked: Node) -> None:
    guest, client = wired(uplinked)
    addresses = [f"2001:db8:9::{number:x}" for number in range(1, 9)]
    sent = []
    for number, address in enumerate(addresses):
        manager.write_nic(**{**NIC, "ip": [GUEST_IP6, address]})
        sent += [packet(GUEST_IP6, mark=f"stays {number} {turn}") for turn in range(4)]
        for one in sent[-4:-1]:
            from_guest(guest, one)
        check(call("kvm-ifup-post", "tap0"), 0)
        from_guest(guest, sent[-1])
    found = passed(guest, client, map(packet, [*addresses, INSIDE]))
    assert [one[48:] for one in found[:-1]] == [one[48:] for one in sent]
    assert sources(found[-1:]) == addresses[-1:]
    assert len(elements("addresses")) == 2
    assert elements("prefixes") == []


def test_many_addresses_and_prefixes_inside_others(uplinked: Node) -> None:
    many = [f"2001:db8:7::{number:x}" for number in range(1, 600)]
    nested = ["2001:db8:8::/48", "2001:db8:8:1::/64", "2001:db8:8:1::1", "2001:db8:9::/48"]
    guest, client = wired(uplinked, ip=[GUEST_IP6, *many, *nested])
    assert len(elements("addresses")) == 600
    assert len(elements("prefixes")) == 2
    right = [many[0], many[-1], "2001:db8:8:1::1", "2001:db8:8:2::1", "2001:db8:9:ffff::"]
    assert sources(passed(guest, client, map(packet, [*right, "2001:db8:7::258", "2001:db8:a::"]))) == right
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert elements("addresses") == elements("prefixes") == elements("sources") == []


@pytest.mark.parametrize("how", ["down", "bridged", "off"])
def test_sources_whose_journal_is_lost_meet_no_other_guest(uplinked: Node, how: str) -> None:
    wired(uplinked)
    (manager.RUN_DIR / "state/tap0.json").unlink()
    tools.ip("link del tap0")
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(**({"mode": "bridged", "link": "br0"} if how != "off" else NIC))
    config = manager.configuration(routed={"rp_filter": "off"})
    assert len(elements("sources")) == 1
    check(call("kvm-ifdown" if how == "down" else "kvm-ifup-post", "tap0", config), 0)
    assert not has_table()


def test_it_goes_with_the_nic_also_after_a_crash(uplinked: Node) -> None:
    wired(uplinked)
    tools.ip("link del tap0")
    assert len(elements("sources")) == 1
    check(call("kvm-ifup", "gc"), 0)
    assert not has_table()


# --- the table goes with the last one --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["strict", "loose"])
def test_the_table_goes_with_the_last_nic_and_not_before(uplinked: Node, how: str) -> None:
    config = manager.configuration(routed={"rp_filter": how, "guard_uplinks": True})
    for number in range(2):
        uplinked.guest(f"tap{number}")
        addresses = [f"192.0.2.{number + 8}", f"2001:db8::{number + 8}"]
        manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=addresses, mac=f"aa:00:00:35:ac:0{number}")
        check(call("kvm-ifup-post", f"tap{number}", config), 0)
    check(call("kvm-ifdown", "tap0", config), 0)
    assert [len(elements(name)) for name in ("sources", "addresses", "guests4", "guests6")] == [1, 1, 1, 1]
    check(call("kvm-ifdown", "tap1", config), 0)
    assert not has_table()


def test_the_next_guest_that_is_alone_asks_the_kernel_nothing_once_more(
    uplinked: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it takes the rules: a transaction that is only tried takes as long as all else of a hook."""
    wired(uplinked)
    check(call("kvm-ifdown", "tap0"), 0)
    tried: list[bool] = []
    really = Nftables.change

    def change(self: Nftables, *args: Any, **more: Any) -> None:
        tried.append(more.get("really", True))
        really(self, *args, **more)

    monkeypatch.setattr(Nftables, "change", change)
    check(call("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert set(tried) == {True}
    assert len(tried) == 3  # the table with the guest; without the guest; no table


OWN = f"strict {GUEST_IP6}"
NEEDS = [
    lambda table: table.write("tap1", "strict"),
    lambda table: table.write("tap1", "loose 2001:db8:1::/64"),
    *(
        partial(SourceTable.write_guard, dev="eth0", prefix=prefix, want=True)
        for prefix in ("192.0.2.9/32", "192.0.2.64/28", "2001:db8::9/128", "2001:db8:1::/64")
    ),
    lambda _: tools.run("nft", "add", "chain", *TABLE, "mine"),
]


@pytest.mark.parametrize("needs", NEEDS)
def test_a_table_that_somebody_needs_stays(node: Node, needs: Callable[[SourceTable], object]) -> None:
    table = SourceTable()
    table.write("tap0", OWN)
    needs(table)
    table.write("tap0", None)
    assert has_table()


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("moment", ["generation", "elements", "change"])
def test_who_comes_while_the_last_one_goes_is_not_removed(
    node: Node, needs: Callable[[SourceTable], object], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of the looks at what is left, or right before the table would go."""
    table, other = SourceTable(), SourceTable()
    table.write("tap0", OWN)
    really = getattr(Nftables, moment)
    come: list[int] = []

    def somebody_comes(self: Nftables, *args: Any, **more: Any) -> Any:
        if not come and (moment != "change" or args == ([WITHOUT_TABLE],)):
            come.append(1)
            needs(other)
        return really(self, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Nftables, "uses", lambda *_: 0)  # what it says may be true of a moment only
        patched.setattr(Nftables, moment, somebody_comes)
        table.write("tap0", None)
    assert come
    assert has_table()
    table.write("tap0", OWN)
    assert table.read("tap0") == OWN


def test_nics_that_come_and_go_at_once_never_lose_what_they_have(node: Node) -> None:
    wrong: list[object] = []

    def come_and_go(number: int) -> None:
        try:
            table = SourceTable()
            for turn in range(150):
                for want in (f"strict 2001:db8::{number + 1}", None):
                    table.write(f"tap{number}", want)
                    if table.read(f"tap{number}") != want:
                        wrong.append((number, turn, want))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not has_table()


def test_the_next_guest_on_a_tap_cannot_pose_as_the_last_one(uplinked: Node) -> None:
    wired(uplinked)
    tools.ip("link del tap0")
    guest = uplinked.guest()
    manager.write_nic("tap0", "web2", mode="routed", ip=["2001:db8::9"])
    check(call("kvm-ifup-post", "tap0"), 0)
    client = uplinked.listen()
    assert passed(guest, client, [packet(GUEST_IP6), packet(INSIDE)], own="2001:db8::9") == []


def test_rules_that_were_saved_and_loaded_anew_are_as_good_as_ours(uplinked: Node) -> None:
    """nftables.service does so; and nft understands what was written without it."""
    wired(uplinked)
    saved = tools.run("nft", "list", "table", *TABLE)
    file = nodes.scratch() / "saved.nft"
    file.write_text(saved)
    tools.run("nft", "flush", "ruleset")
    wrong("tap0 IPv6 sources")
    tools.run("nft", "-f", str(file))
    assert tools.run("nft", "list", "table", *TABLE) == saved
    assert call("kvm-ifup-post", "tap0", "--json").needed == []


@pytest.mark.parametrize(
    "disturbance",
    [
        "flush ruleset", "delete table inet kvm-ifup", "flush table inet kvm-ifup", "flush chain inet kvm-ifup own",
        "add table inet kvm-ifup { flags dormant; }", "insert rule inet kvm-ifup prerouting accept",
        "delete element inet kvm-ifup sources { tap0 }", "flush set inet kvm-ifup prefixes",
        "flush set inet kvm-ifup addresses",
    ],
)  # fmt: skip
def test_what_others_do_to_the_table_is_seen_and_put_right(uplinked: Node, disturbance: str) -> None:
    guest, client = wired(uplinked)
    before = tools.run("nft", "list", "table", *TABLE)
    tools.run("nft", *disturbance.split())
    wrong("tap0 IPv6 sources")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert tools.run("nft", "list", "table", *TABLE).split("chain", 1)[1] == before.split("chain", 1)[1]
    assert sources(passed(guest, client, map(packet, [*FORGED, INSIDE]))) == [INSIDE]
    check(call("kvm-ifup", "check"), 0)


FREED = "delete element inet kvm-ifup sources { tap0 }"


@pytest.mark.parametrize(
    "damage", ["flush ruleset", FREED, f"{FREED}; add element inet kvm-ifup sources {{ tap0 : accept }}"]
)
def test_a_failure_after_damaged_sources_were_mended_is_undone(uplinked: Node, damage: str) -> None:
    tap, client = wired(uplinked)
    tools.run("nft", damage)
    tools.ip("link set tap0 down")
    with disturb.disturbed(before=disturb.refuse(3)) as written:
        failed = call("kvm-ifup-post", "tap0")
    assert any(isinstance(op, Sources) for op in written[:2])
    check(failed, 71)
    assert "could not put back" not in failed.err
    assert "UP" not in oracle.link("tap0")["flags"]
    check(call("kvm-ifup-post", "tap0"), 0)
    assert not set(FORGED) & set(sources(passed(tap, client, map(packet, FORGED))))


@pytest.mark.parametrize("rp_filter", ["strict", "loose"])
def test_what_plan_prints_for_nft_is_what_the_hook_writes(uplinked: Node, rp_filter: str) -> None:
    uplinked.guest()
    manager.write_nic(**NIC)
    config = manager.configuration(routed={"rp_filter": rp_filter, "guard_uplinks": True})
    for line in hooks.printed(call("kvm-ifup", "plan", "post", "tap0", config).out):
        if line.startswith("nft "):
            tools.run(*shlex.split(line))
    by_hand = tools.run("nft", "list", "table", *TABLE)
    (planned,) = json.loads(call("kvm-ifup", "plan", "post", "tap0", "--json", config).out)
    assert {op["needed"] for op in planned["ops"] if op["op"] in ("sources", "uplink-guard")} == {False}
    tools.run("nft", "flush", "ruleset")
    check(call("kvm-ifup-post", "tap0", config), 0)
    assert tools.run("nft", "list", "table", *TABLE) == by_hand


# --- where it cannot be done -----------------------------------------------------------------------------------------


@pytest.fixture
def others(uplinked: Node) -> Iterator[None]:
    """A table of our name that belongs to another program while it runs (NFT_TABLE_F_OWNER)."""
    assert uplinked.client
    owner = Nftables(NFPROTO_INET, TABLE[1])
    owner.change([create(NFT_MSG_NEWTABLE, big(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER))])
    yield
    owner.close()


@pytest.mark.usefixtures("others")
def test_a_node_that_cannot_judge_sources_still_wires_and_says_so(uplinked: Node) -> None:
    guest, client = wired(uplinked)
    assert "belongs to another program" in call("kvm-ifup-post", "tap0", "-v").err
    assert sources(passed(guest, client, [packet(INSIDE)])) == [INSIDE]
    result = call("kvm-ifup", "check")
    assert "the guest can send from any IPv6 address" in result.out
    assert result.code == 0


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("settings", [{"rp_filter": "strict"}, {"rp_filter": "loose"}, {"guard_uplinks": True}])
def test_who_has_asked_for_it_is_refused_and_the_tap_stays_down(uplinked: Node, settings: dict[str, Any]) -> None:
    uplinked.guest()
    manager.write_nic(**NIC)
    config = manager.configuration(routed=settings)
    check(call("kvm-ifup-post", "tap0", config), 69, "belongs to another program")
    assert "UP" not in oracle.link("tap0")["flags"]


# --- uplinks -------------------------------------------------------------------------------------------------------


def arrives(node: Node, tap: wire.Tap) -> set[str]:
    """Which packets from the client, that say to be from the guest or from others, reach another guest."""
    tried = {GUEST_IP4: 4, GUEST_IP6: 6, INSIDE: 6, "192.0.2.66": 4, OUTSIDE: 6}
    with node.client, wire.packet_socket("eth0") as sender:
        for source, family in tried.items():
            target = "192.0.2.9" if family == 4 else "2001:db8::9"
            body = packet4(source, target, f"<{source}>") if family == 4 else packet(source, target, f"<{source}>")
            kind = wire.ETH_P_IP if family == 4 else wire.ETH_P_IPV6
            sender.send(wire.ethernet(NODE_MAC, CLIENT_MAC, kind, body))
        sender.send(wire.ethernet(NODE_MAC, CLIENT_MAC, wire.ETH_P_IPV6, packet(CLIENT_IP6, "2001:db8::9", "the last")))
    frames = tap.until(lambda frame: b"the last" in frame)
    return {source for source in tried if any(f"<{source}>".encode() in frame for frame in frames)}


def test_nobody_on_an_uplink_poses_as_a_guest_that_runs_here_if_so_configured(uplinked: Node) -> None:
    other = uplinked.guest("tap1")
    manager.write_nic("tap1", "web2", mode="routed", ip=["192.0.2.9", "2001:db8::9"], mac="aa:00:00:35:ac:02")
    uplinked.guest()
    manager.write_nic(**NIC, incoming=True)
    guarded = manager.configuration(routed={"guard_uplinks": True})
    check(call("kvm-ifup-post", "tap1", guarded), 0)
    oracle.sysctl("ipv4/conf/eth0/rp_filter", 0)
    oracle.sysctl("ipv4/conf/all/rp_filter", 0)
    everybody = {GUEST_IP4, GUEST_IP6, INSIDE, "192.0.2.66", OUTSIDE}
    check(call("kvm-ifup-pre", "tap0", guarded), 0)
    assert arrives(uplinked, other) == everybody  # the guest still runs elsewhere, and that is where it sends from
    check(call("kvm-ifup-post", "tap0", guarded), 0)
    assert arrives(uplinked, other) == {"192.0.2.66", OUTSIDE}
    check(call("kvm-ifup-post", "tap0"), 0)  # not configured any more
    assert arrives(uplinked, other) == everybody
    check(call("kvm-ifup-post", "tap0", guarded), 0)
    check(call("kvm-ifdown", "tap0", guarded), 0)
    assert arrives(uplinked, other) == everybody
