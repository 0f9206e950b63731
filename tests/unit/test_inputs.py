"""Whatever others wrote gives a valid Nic or a NicError."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmifup.core import vlans
from kvmifup.core.errors import KvmIfupError, NicError, UsageError
from kvmifup.core.model import Config, ExtConfig, ExtNetwork, Nic
from kvmifup.inputs import config, devices, environment, ganeti, nicfiles, tables, values
from kvmifup.node import procfs, sockets

from .samples import BRIDGED, EXT, MAC, ROUTED, nets

NIC_FILE = """
tap      = "tap0"
mac      = "AA:00:00:35:AC:01"
mode     = "routed"
link     = "100"
ip       = ["192.0.2.8", "2001:db8::8", "198.51.100.0/29"]
incoming = true
"""
ENVIRONMENT = {"INTERFACE": "tap0", "MODE": "routed", "MAC": MAC, "IP": "192.0.2.8", "LINK": "100"}


def parsed(text: str) -> Nic:
    return nicfiles.parse_nic(text, instance="web1", index=0, source="a test")


def nic_toml(**values: str) -> str:
    """A NIC file with *values*, as TOML, in the place of those of a plain bridged NIC; "" for leaving one out."""
    plain = {"tap": '"tap0"', "mac": f'"{MAC}"', "mode": '"bridged"', "link": '"br0"'}
    return "".join(f"{key} = {value}\n" for key, value in (plain | values).items() if value)


# --- addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("192.0.2.8", "192.0.2.8/32"),
        ("2001:db8::8", "2001:db8::8/128"),
        ("2001:DB8:0::8", "2001:db8::8/128"),
        ("198.51.100.0/29", "198.51.100.0/29"),
        ("2001:db8:1::/64", "2001:db8:1::/64"),
        ("2000::/3", "2000::/3"),
        ("1.0.0.0/8", "1.0.0.0/8"),
        ("223.255.255.255", "223.255.255.255/32"),
        ("255.255.255.254", "255.255.255.254/32"),
    ],
)
def test_good_addresses(text: str, same: str) -> None:
    assert str(values.prefix(text)) == same
    assert values.prefix(text) == values.prefix(same)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0.0.0.0/0", "default route"),
        ("::/0", "default route"),
        ("0.0.0.0/1", "default route"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("127.0.0.1", "loopback"),
        ("127.1.2.0/24", "loopback"),
        ("126.0.0.0/7", "loopback"),
        ("::1", "loopback"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("fe80::1", "link-local"),
        ("192.0.2.9/29", "host bits"),
        ("2001:db8::1/64", "host bits"),
        ("10.0.0.1/8", "host bits"),
        ("", "not an address"),
        ("web1", "not an address"),
        ("192.0.2.8/33", "not an address"),
        ("192.0.2.08", "not an address"),
        ("192.0.2", "not an address"),
        (" 192.0.2.8", "not an address"),
        ("192.0.2.8\n", "not an address"),
        ("default", "not an address"),
        ("192.0.2.8 192.0.2.9", "not an address"),
        ("2001:db8::1%eth0", None),
        ("2001:db8::/64%eth0", None),
    ],
)
def test_refused_addresses(text: str, why: str | None) -> None:
    with pytest.raises(NicError, match=why) as caught:
        values.prefix(text)
    assert caught.value.code == 65


def test_the_hint_for_host_bits_offers_both_meanings() -> None:
    with pytest.raises(NicError) as caught:
        values.prefix("192.0.2.9/29")
    assert "192.0.2.9" in caught.value.hint
    assert "192.0.2.8/29" in caught.value.hint


@pytest.mark.parametrize(
    "texts", [["192.0.2.8", "192.0.2.8"], ["192.0.2.8", "192.0.2.8/32"], ["2001:db8::8", "2001:0db8::8/128"]]
)
def test_an_address_listed_twice(texts: list[str]) -> None:
    with pytest.raises(NicError, match="twice"):
        values.prefixes(texts)


def test_an_address_inside_a_listed_prefix_is_fine() -> None:
    assert values.prefixes(["192.0.2.8/29", "192.0.2.9"]) == nets("192.0.2.8/29", "192.0.2.9")


# --- other values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t", "tap0", "tap0.100", "a" * 15, "é" * 7, "-v", "..."])
def test_good_taps(name: str) -> None:
    assert values.device(name, "tap") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a" * 16,
        "é" * 8,
        "a/b",
        "a b",
        "a\tb",
        "a\n",
        "a\0",
        "\u00a0",
        "a:1",
        "\udcff",
        "\x1b[2J",
        "tap%d",
    ],
)
def test_refused_taps(name: str) -> None:
    with pytest.raises(NicError, match="tap"):
        values.device(name, "tap")


@pytest.mark.parametrize("text", ["tap0", "b'tap0'", 'b"tap0"'])
def test_the_text_of_a_bytes_object_is_its_content(text: str) -> None:
    assert values.tap_argument(text) == "tap0"


@pytest.mark.parametrize("text", ["b''", "b'a/b'", "b'" + "a" * 16 + "'"])
def test_bytes_that_are_no_tap(text: str) -> None:
    if text == "b''":
        assert values.tap_argument(text) == text  # a device can have this name
    else:
        with pytest.raises(NicError):
            values.tap_argument(text)


@pytest.mark.parametrize("name", ["web1", "web1.example.com", "..web", "é", "a b", "a" * 255])
def test_good_instances(name: str) -> None:
    assert values.instance_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/x", "a\nb", "a\0", "a" * 256])
def test_refused_instances(name: str) -> None:
    with pytest.raises(NicError, match="instance"):
        values.instance_name(name)


@pytest.mark.parametrize("text", [MAC, MAC.upper(), "02:ff:ff:ff:ff:ff"])
def test_good_macs(text: str) -> None:
    assert values.guest_mac(text) == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "aa:00:00:35:ac",
        f"{MAC}:00",
        "aa-00-00-35-ac-01",
        "ab:00:00:35:ac:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        f"{MAC}\n",
        "ga:00:00:35:ac:01",
        "\u0661a:00:00:35:ac:01",
        "fe:00:00:35:ac:01",
        "FE:54:00:00:00:01",
    ],
)
def test_refused_macs(text: str) -> None:
    with pytest.raises(NicError, match="mac"):
        values.guest_mac(text)


def test_the_taps_own_mac() -> None:
    assert ROUTED.tap_mac == "fe:00:00:35:ac:01"


@pytest.mark.parametrize(
    "text",
    [
        ".100",
        ":200:300",
        ".100:200:300",
        ".1",
        ".4094",
        ":7",
        ".0100",
        ":100-199",
        ":1-4094",
        ".1:100",
        ".100:200:300-399:500-500",
    ],
)
def test_good_vlans(text: str) -> None:
    assert values.vlans(text) == text


@pytest.mark.parametrize("text", ["100", "1", "4094", "0100"])
def test_a_vlan_without_a_sign_is_untagged(text: str) -> None:
    assert values.vlans(text) == f".{text}"


@pytest.mark.parametrize(
    ("text", "equal"),
    [
        (".0100", ".100"),
        (":300:200", ":200:300"),
        (":102:100:101", ":100-102"),
        (":100-101:102-199", ":100-199"),
        (".5:7-7:9", ".5:7:9"),
        ("~5!7:9.3", ".3:9~5!7"),
    ],
)
def test_equal_sets_of_vlans_are_written_in_one_way(text: str, equal: str) -> None:
    assert vlans.canonical(text) == vlans.canonical(equal) == equal


@given(
    st.dictionaries(st.integers(1, 4094), st.sampled_from(sorted(vlans.SIGNS)), max_size=40),
)
def test_a_set_of_vlans_comes_back_from_its_text(flags: dict[int, int]) -> None:
    text = vlans.text_of(flags)
    assert vlans.flags_of(text) == flags
    assert vlans.ids(text) == flags.keys()


@pytest.mark.parametrize(
    "text",
    [
        ".100:100",
        ":7:7",
        ".100:0100",
        ".\u0661",
        "",
        ".",
        ":",
        "0",
        "4095",
        "10000",
        "100:200",
        "100-199",
        ".100-199",
        ":199-100",
        ":0-5",
        ":4000-4095",
        ":1-2-3",
        ":100-",
        ":-100",
        ":100-199:150",
        ".150:100-199",
        ".0",
        ".4095",
        ".9999",
        ".10000",
        ".100.200",
        ":200:",
        ":200.100",
        ".a",
        ".1,2",
        ".100\n",
    ],
)
def test_refused_vlans(text: str) -> None:
    with pytest.raises(NicError, match="vlan"):
        values.vlans(text)


@pytest.mark.parametrize(
    ("text", "table"),
    [("100", "100"), ("0100", "100"), ("4294967295", "4294967295"), ("main", "main"), ("a-b.c_1", "a-b.c_1")],
)
def test_good_tables(text: str, table: str) -> None:
    assert values.routing_table(text) == table


@pytest.mark.parametrize(
    "text", ["", "0", "4294967296", "255", "0255", "local", "unspec", "all", "a b", "a/b", "é", "a" * 65, "100\n"]
)
def test_refused_tables(text: str) -> None:
    with pytest.raises(NicError, match="link"):
        values.routing_table(text)


@pytest.mark.parametrize("text", ["", ".", "..", "../sh", "/bin/sh", "a b", "a\n", "\udcff"])
def test_refused_programs(text: str) -> None:
    with pytest.raises(NicError, match="link"):
        values.program_name(text)


@pytest.mark.parametrize(
    "check",
    [
        lambda text: values.device(text, "tap"),
        values.tap_argument,
        values.instance_name,
        values.guest_mac,
        values.prefix,
        values.vlans,
        values.routing_table,
        values.program_name,
    ],
    ids=["device", "tap", "instance", "mac", "prefix", "vlan", "table", "program"],
)
@given(text=st.text(max_size=20) | st.text("\udc80\udcff.:/0127fe\n\0", max_size=20))
def test_any_text_is_accepted_or_refused(check: object, text: str) -> None:
    assert callable(check)
    try:
        result = check(text)
    except NicError:
        return
    assert str(result).isprintable()


# --- NIC files: the text ------------------------------------------------------------------------------


def test_the_example_of_the_design() -> None:
    assert parsed(NIC_FILE) == Nic(
        tap="tap0",
        mac=MAC,
        mode="routed",
        link="100",
        ip=nets("192.0.2.8", "2001:db8::8", "198.51.100.0/29"),
        incoming=True,
        instance="web1",
        index=0,
        source="a test",
    )


def test_what_may_be_left_out() -> None:
    assert parsed(nic_toml()) == replace(BRIDGED, instance="web1", source="a test")
    assert parsed(nic_toml(mode='"routed"', link="", ip='["192.0.2.8"]')).link is None
    assert parsed(nic_toml(vlan='""')).vlan is None
    assert parsed(nic_toml(vlan='".7"')).vlan == ".7"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"tap": ""}, "tap is missing"),
        ({"mac": ""}, "mac is missing"),
        ({"mac": '"fe:00:00:35:ac:01"'}, "the tap's own"),
        ({"mode": ""}, "mode is missing"),
        ({"link": ""}, "link is missing"),
        ({"mode": '"routed"'}, "ip is missing"),
        ({"mode": '"routed"', "ip": '["192.0.2.8"]', "vlan": '".7"'}, "vlan"),
        ({"mode": '"bridge"'}, "mode 'bridge'"),
        ({"mode": '"Bridged"'}, "mode"),
        ({"link": '"a/b"'}, "link"),
        ({"link": "100"}, "link must be a string"),
        ({"tap": "0"}, "tap must be a string"),
        ({"mac": "[]"}, "mac must be a string"),
        ({"vlan": "100"}, "vlan must be a string"),
        ({"ip": '"192.0.2.8"'}, "ip must be a list"),
        ({"ip": "[1]"}, "ip must be a list"),
        ({"incoming": '"true"'}, "incoming must be"),
        ({"incoming": "1"}, "incoming must be"),
        ({"tap": '"tap0"\ntap = "tap1"'}, "not TOML"),
        ({"tap": "tap0"}, "not TOML"),
        pytest.param({"tap": "[" * 5000}, "not TOML", id="deep nesting"),
        pytest.param({"incoming": "1" * 5000}, "not TOML", id="huge number"),
    ],
)
def test_refused_nic_files(values: dict[str, str], why: str) -> None:
    with pytest.raises(NicError, match=why) as caught:
        parsed(nic_toml(**values))
    assert caught.value.code == 65


@pytest.mark.parametrize(("key", "near"), [("ips", "ip"), ("vlans", "vlan"), ("Tap", "tap"), ("zzzzzz", "tap, mac")])
def test_an_unknown_key_is_named_with_the_nearest_known_one(key: str, near: str) -> None:
    with pytest.raises(NicError, match=key) as caught:
        parsed(nic_toml(**{key: '"x"'}))
    assert near in caught.value.hint


@given(st.text() | st.text("[]{}=\"'\n.#,0123456789eE+-:TZ_ atpmcodelink", max_size=60))
@example("\0")
@example("a = 1979-02-30")
def test_any_text_is_a_nic_or_an_error(text: str) -> None:
    with pytest.raises(NicError):  # no random text is a whole NIC
        parsed(text)


scalars = st.one_of(
    st.booleans().map(lambda b: str(b).lower()),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["1979-05-27", "07:32:00", "inf", "-nan", "{}", "[]", '"tap0"', '"routed"', f'"{MAC}"', '"192.0.2.8"']
    ),
    st.text("abc.:/0123", max_size=6).map(lambda text: f'"{text}"'),
)
toml_values = scalars | st.lists(scalars, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")


@given(st.dictionaries(st.sampled_from(nicfiles.KEYS), toml_values))
def test_any_toml_value_gives_a_nic_or_an_error(values: dict[str, str]) -> None:
    try:
        nic = parsed(nic_toml(**values))
    except NicError:
        return
    assert isinstance(nic, Nic)
    assert isinstance(nic.incoming, bool)


# --- the environment ----------------------------------------------------------------------------------


def test_ganetis_environment() -> None:
    nic = environment.from_environment(
        ENVIRONMENT
        | {"INSTANCE": "web1.example.com", "INTERFACE_INDEX": "2", "VLAN": "", "TAGS": "a b", "MIGRATION_PHASE": "pre"}
        | {"INTERFACE_UUID": "x", "NETWORK_SUBNET": "192.0.2.0/24", "ACTION": "up"}
    )
    assert nic == replace(ROUTED, link="100", incoming=True, index=2, source="the environment")


@pytest.mark.parametrize(
    "text",
    [
        "192.0.2.8,192.0.2.9",
        "192.0.2.8 192.0.2.9",
        "192.0.2.8, 192.0.2.9",
        " 192.0.2.8\t192.0.2.9,",
        "192.0.2.8,,192.0.2.9",
    ],
)
def test_several_addresses(text: str) -> None:
    assert environment.from_environment(ENVIRONMENT | {"IP": text}).ip == nets("192.0.2.8", "192.0.2.9")


@pytest.mark.parametrize(
    ("mode", "given", "understood"),
    [
        ("bridged", "100", ".100"),
        ("bridged", "100:200", ".100:200"),
        ("openvswitch", ".100", ".100"),
        ("openvswitch", ":100:200", ":100:200"),
        ("openvswitch", "", None),
        ("routed", "100", None),
        ("routed", "anything", None),
    ],
)
def test_vlans_as_ganeti_writes_them(mode: str, given: str, understood: str | None) -> None:
    """A routed NIC has what its group or cluster gives to all NICs, and Ganeti's own script does not look at it."""
    nic = environment.from_environment(ENVIRONMENT | {"MODE": mode, "LINK": "100", "VLAN": given})
    assert nic.vlan == understood


@pytest.mark.parametrize(
    ("subnet", "ips"),
    [
        ("2001:db8:1::/64", ["2001:db8:1:0:a800:ff:fe35:ac01"]),
        ("2001:db8:1::/56", []),
        ("2001:db8:1::/96", []),
        (None, []),
    ],
)
@pytest.mark.parametrize("mode", ["routed", "ext", "ext as routed"])
def test_a_routed_nic_without_an_address(mode: str, subnet: str | None, ips: list[str]) -> None:
    network = {"NETWORK_SUBNET6": subnet} if subnet else {}
    nic = environment.from_environment(
        ENVIRONMENT | {"MODE": mode.split()[0], "LINK": "dmz", "IP": "", "VLAN": "100", **network}
    )
    if mode == "ext as routed":
        networks = ExtConfig(networks=(("dmz", ExtNetwork("routed", None)),))
        nic = values.as_wired(replace(nic, mode="ext"), Config(ext=networks))
        assert nic.vlan is None
    assert nic.ip == (() if mode == "ext" else nets(*ips))


def test_an_address_is_not_added_to_one_that_is_given() -> None:
    nic = environment.from_environment(ENVIRONMENT | {"IP": "192.0.2.8", "NETWORK_SUBNET6": "2001:db8::/64"})
    assert nic.ip == nets("192.0.2.8")


def test_what_else_ganeti_says_is_for_programs() -> None:
    further = {"TAGS": "a b", "INTERFACE_NAME": "uplink", "INTERFACE_UUID": "u", "NETWORK_NAME": "n", "PATH": "/bin"}
    ext = environment.from_environment(ENVIRONMENT | {"MODE": "ext", "LINK": "site", **further})
    assert dict(ext.given) == {name: value for name, value in further.items() if name != "PATH"}
    assert environment.from_environment(ENVIRONMENT | further).given == ()


@pytest.mark.parametrize(("phase", "incoming"), [("pre", True), ("post", False), ("", False)])
def test_incoming(phase: str, incoming: bool) -> None:
    assert environment.from_environment(ENVIRONMENT | {"MIGRATION_PHASE": phase}).incoming is incoming


def test_where_the_link_comes_from() -> None:
    bridged = {"INTERFACE": "tap0", "MODE": "bridged", "MAC": MAC}
    assert environment.from_environment(bridged | {"BRIDGE": "br0"}).link == "br0"
    assert environment.from_environment(bridged | {"LINK": "br1", "BRIDGE": "br0"}).link == "br1"
    assert environment.from_environment(bridged | {"LINK": "", "BRIDGE": "br0"}).link == "br0"
    assert environment.from_environment(ENVIRONMENT | {"LINK": "", "BRIDGE": "br0"}).link is None


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"MODE": ""}, "MODE"),
        ({"MAC": ""}, "MAC"),
        ({"MAC": "", "MODE": ""}, "MODE and MAC"),
        ({"MAC": "FE:00:00:35:ac:01"}, "the tap's own"),
        ({"IP": "192.0.2.8 192.0.2.8"}, "twice"),
        ({"VLAN": "5000", "MODE": "bridged", "LINK": "br0"}, "vlan"),
        ({"IP": "", "NETWORK_SUBNET6": "2001:db8::1/64"}, "host bits"),
        ({"MODE": "bridged", "LINK": ""}, "link is missing"),
        ({"INTERFACE_INDEX": "-1"}, "INTERFACE_INDEX"),
        ({"INTERFACE_INDEX": "12345"}, "INTERFACE_INDEX"),
        *(({"INTERFACE_INDEX": index}, "INTERFACE_INDEX") for index in ("\u0661", "+1", " 1", "1_0", "01")),
        ({"INTERFACE": "b'tap0' "}, "tap"),
        ({"INSTANCE": "../x"}, "instance"),
    ],
)
def test_refused_environments(changes: dict[str, str], names: str) -> None:
    with pytest.raises(NicError, match=names) as caught:
        environment.from_environment(ENVIRONMENT | changes)
    assert caught.value.code == 65
    assert caught.value.where


variables = st.sampled_from(
    [
        "INTERFACE",
        "MODE",
        "LINK",
        "MAC",
        "IP",
        "VLAN",
        "INSTANCE",
        "INTERFACE_INDEX",
        "ACTION",
        "MIGRATION_PHASE",
        "BRIDGE",
    ]
)
contents = st.text(max_size=12) | st.sampled_from(
    ["bridged", "routed", "ext", "up", "down", "pre", "post", "100", "br0", "\udcff", "192.0.2.8", ".7", "b'tap0'"]
)


@given(st.dictionaries(variables, contents))
def test_any_environment_is_a_nic_or_an_error(changes: dict[str, str]) -> None:
    try:
        nic = environment.from_environment(ENVIRONMENT | changes)
    except NicError:
        return
    assert nic.tap == changes.get("INTERFACE", "tap0")


# --- contradictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "tap", "environ"),
    [
        ("kvm-ifup-post", None, {"MIGRATION_PHASE": "pre"}),
        ("kvm-ifup-pre", None, {"MIGRATION_PHASE": "post"}),
        ("kvm-ifup-pre", None, {"ACTION": "down"}),
        ("kvm-ifup-post", None, {"ACTION": "down"}),
        ("kvm-ifdown", None, {"ACTION": "up"}),
        ("kvm-ifup-pre", "tap1", {}),
        ("kvm-ifup-pre", None, {"MIGRATION_PHASE": "mid"}),
        ("kvm-ifup-pre", None, {"ACTION": "sideways"}),
    ],
)
def test_contradictions(command: str, tap: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        environment.refuse_contradiction(command, tap, ENVIRONMENT | environ)
    assert caught.value.code == 64


@pytest.mark.parametrize(
    ("command", "tap", "environ"),
    [
        ("kvm-ifup-post", "tap0", ENVIRONMENT | {"MIGRATION_PHASE": "post", "ACTION": "up"}),
        ("kvm-ifup-pre", "tap0", ENVIRONMENT | {"MIGRATION_PHASE": "pre"}),
        ("kvm-ifup-pre", None, ENVIRONMENT),
        ("kvm-ifdown", "tap0", ENVIRONMENT | {"ACTION": "down"}),
        ("kvm-ifdown", "tap0", ENVIRONMENT | {"MIGRATION_PHASE": "pre"}),
        # Without INTERFACE the rest of the environment is somebody else's.
        ("kvm-ifup-post", "tap1", {"MIGRATION_PHASE": "pre", "ACTION": "down"}),
    ],
)
def test_no_contradiction(command: str, tap: str | None, environ: Mapping[str, str]) -> None:
    environment.refuse_contradiction(command, tap, environ)


# --- NIC files: the places ----------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path


def put(run_dir: Path, place: str, text: str, *, link: bool = False) -> Path:
    """A NIC file, and the symlink that leads from the tap to it."""
    path = run_dir / "nic" / place
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    path.write_text(text)
    path.chmod(0o644)
    if link:
        tap = run_dir / "tap" / parsed(text).tap
        tap.parent.mkdir(exist_ok=True)
        tap.symlink_to(f"../nic/{place}")
    return path


@pytest.mark.parametrize("link", [True, False])
def test_the_file_of_a_tap(link: bool, run_dir: Path) -> None:
    put(run_dir, "web2/0.toml", nic_toml(tap='"tap2"'))
    path = put(run_dir, "web1.example.com/3.toml", nic_toml(), link=link)
    nic = nicfiles.nic_of_tap("tap0", run_dir)
    assert nic == replace(BRIDGED, index=3, source=str(run_dir / "tap" / "tap0") if link else str(path))
    assert nicfiles.nic_of_tap("tap9", run_dir) is None


def test_no_files_at_all(run_dir: Path) -> None:
    assert nicfiles.nic_of_tap("tap0", run_dir / "missing") is None
    assert nicfiles.nics_of_instance("web1", run_dir / "missing") == []


def test_two_files_name_one_tap(run_dir: Path) -> None:
    put(run_dir, "old/0.toml", nic_toml())
    put(run_dir, "new/0.toml", nic_toml())
    with pytest.raises(NicError, match="2 NIC files"):
        nicfiles.nic_of_tap("tap0", run_dir)
    (run_dir / "tap").mkdir()
    (run_dir / "tap" / "tap0").symlink_to("../nic/new/0.toml")
    nic = nicfiles.nic_of_tap("tap0", run_dir)
    assert nic is not None
    assert nic.instance == "new"


def test_a_symlink_to_the_wrong_file(run_dir: Path) -> None:
    put(run_dir, "web1/0.toml", nic_toml(), link=True)
    put(run_dir, "web1/0.toml", nic_toml(tap='"tap1"'))
    with pytest.raises(NicError, match="tap1"):
        nicfiles.nic_of_tap("tap0", run_dir)


def test_a_symlink_out_of_the_run_directory(run_dir: Path) -> None:
    outside = put(run_dir, "web1/0.toml", nic_toml())
    inner = run_dir / "inner"
    (inner / "tap").mkdir(parents=True)
    (inner / "tap" / "tap0").symlink_to(outside)
    with pytest.raises(NicError, match="trusted") as caught:
        nicfiles.nic_of_tap("tap0", inner)
    assert caught.value.code == 65


def test_another_instances_broken_file_counts_only_if_it_may_be_meant(run_dir: Path) -> None:
    broken = put(run_dir, "web2/0.toml", "tap = ")
    put(run_dir, "web1/0.toml", nic_toml())
    assert nicfiles.nic_of_tap("tap0", run_dir) is not None
    with pytest.raises(NicError, match="not TOML") as caught:
        nicfiles.nic_of_tap("tap7", run_dir)
    assert caught.value.where == str(broken)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_can_write(mode: int, run_dir: Path) -> None:
    put(run_dir, "web1/0.toml", nic_toml()).chmod(mode)
    with pytest.raises(NicError, match="trusted") as caught:
        nicfiles.nic_of_tap("tap0", run_dir)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["x.toml", "-1.toml", "12345.toml", "\u0661.toml"])
def test_a_file_is_named_by_its_index(name: str, run_dir: Path) -> None:
    put(run_dir, f"web1/{name}", nic_toml())
    with pytest.raises(NicError, match="index"):
        nicfiles.nic_of_tap("tap0", run_dir)


def test_all_nics_of_an_instance(run_dir: Path) -> None:
    put(run_dir, "web1/1.toml", nic_toml(tap='"tap0"'))
    put(run_dir, "web1/0.toml", nic_toml(tap='"tap1"'))
    put(run_dir, "web2/0.toml", nic_toml(tap='"tap2"'))
    assert [(nic.tap, nic.index) for nic in nicfiles.nics_of_instance("web1", run_dir)] == [("tap0", 1), ("tap1", 0)]


@pytest.mark.parametrize(
    "second", [{"tap": '"tap0"'}, {"tap": '"tap1"', "mode": '"routed"', "link": "", "ip": '["192.0.2.9", "192.0.2.8"]'}]
)
def test_nics_of_one_instance_share_nothing(second: dict[str, str], run_dir: Path) -> None:
    put(run_dir, "web1/0.toml", nic_toml(mode='"routed"', link="", ip='["192.0.2.8"]'))
    put(run_dir, "web1/1.toml", nic_toml(**second))
    with pytest.raises(NicError, match="two of its NIC files name") as caught:
        nicfiles.nics_of_instance("web1", run_dir)
    assert caught.value.where == "web1"


def test_one_wrong_file_spoils_the_instance(run_dir: Path) -> None:
    put(run_dir, "web1/0.toml", nic_toml())
    broken = put(run_dir, "web1/1.toml", "")
    with pytest.raises(NicError) as caught:
        nicfiles.nics_of_instance("web1", run_dir)
    assert caught.value.where == str(broken)


def test_a_fifo_is_no_nic_file_and_nobody_waits_for_it(run_dir: Path) -> None:
    path = put(run_dir, "web1/0.toml", "")
    path.unlink()
    os.mkfifo(path, 0o644)
    with pytest.raises(NicError, match="regular"):
        nicfiles.nic_of_tap("tap0", run_dir)


# --- NIC files: whose tap it is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        nic_toml(tap='"tap7"'),
        nic_toml(tap="'tap7'"),
        nic_toml(tap='"t\\u0061p7"'),
        "# nothing\n" * 4000 + nic_toml(tap='"tap7"'),
        nic_toml(ip="[]", tap='"tap7"').replace("\n", "\r\n"),
    ],
    ids=["plain", "literal", "escaped", "far behind", "another system's"],
)
@pytest.mark.parametrize("symlink", [False, True])
def test_put_finds_the_tap_in_whatever_file_describes_it(text: str, symlink: bool, run_dir: Path) -> None:
    path = put(run_dir, "web1/0.toml", text)
    if symlink:
        put(run_dir, "web9/3.toml", text)
        path.unlink()
        path.symlink_to("../web9/3.toml")
    with pytest.raises(NicError, match=r"tap7 is that of web\d/\d \(tap7\) already"):
        nicfiles.put(run_dir, "web2", 0, nic_toml(tap='"tap7"'))
    assert not (run_dir / "nic/web2").exists()


def make_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "make",
    [
        make_fifo,
        Path.mkdir,
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_bytes(b'\xff tap = "tap7"'),
        lambda path: path.write_text('# not the tap: tap7\ntap = "tap8"\n'),
    ],
    ids=["a FIFO", "a directory", "itself", "a device", "no text", "only named"],
)
def test_put_does_not_stop_at_what_describes_no_nic(make: Callable[[Path], object], run_dir: Path) -> None:
    put(run_dir, "web1/0.toml", nic_toml())
    make(run_dir / "nic/web1/1.toml")
    nicfiles.put(run_dir, "web2", 0, nic_toml(tap='"tap7"'))
    assert (run_dir / "tap/tap7").resolve() == run_dir / "nic/web2/0.toml"


def test_put_and_rm_read_no_file_that_does_not_name_the_tap(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        put(run_dir, f"web{number}/0.toml", nic_toml(tap=f'"vnet{number}"'), link=True)
    read: list[Path] = []
    real = nicfiles.read_nic

    def reading(path: Path, top: Path) -> Nic:
        read.append(path)
        return real(path, top)

    monkeypatch.setattr(nicfiles, "read_nic", reading)
    nicfiles.put(run_dir, "web7", 1, nic_toml(tap='"tap7"'))
    nicfiles.remove(run_dir, "web7", 1)
    assert read == []
    assert len(list((run_dir / "tap").iterdir())) == 50
    with pytest.raises(NicError, match="vnet3 is that of web3/0 "):
        nicfiles.put(run_dir, "new", 0, nic_toml(tap='"vnet3"'))
    assert {path.parent.name for path in read} == {"web3", *(f"web{number}" for number in range(30, 40))}


def test_a_put_that_cannot_look_refuses(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors nobody knows whose tap it is."""
    put(run_dir, "web1/0.toml", nic_toml(tap='"tap7"'))

    def refuse(*_args: object, **_more: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Too many"):
        nicfiles.put(run_dir, "web2", 0, nic_toml(tap='"tap7"'))
    assert not (run_dir / "nic/web2").exists()


# --- ext networks -------------------------------------------------------------------------------------


def with_network(mode: str, link: str | None) -> Config:
    return Config(ext=ExtConfig(networks=(("site", ExtNetwork(mode, link)), ("other", ExtNetwork("bridged", "br9")))))


def test_an_ext_network_is_wired_as_configured() -> None:
    assert values.as_wired(EXT, with_network("bridged", "br0")) == replace(EXT, mode="bridged", link="br0")
    assert values.as_wired(EXT, with_network("routed", None)) == replace(EXT, mode="routed", link=None)


def test_other_nics_are_wired_as_they_are() -> None:
    assert values.as_wired(EXT, Config()) == EXT
    bridged = replace(BRIDGED, link="site")
    assert values.as_wired(bridged, with_network("routed", None)) == bridged


@pytest.mark.parametrize("nic", [replace(EXT, ip=()), replace(EXT, vlan=".7")])
def test_a_nic_that_does_not_fit_its_ext_network(nic: Nic) -> None:
    with pytest.raises(KvmIfupError) as caught:
        values.as_wired(nic, with_network("routed", None))
    assert caught.value.code == 65
    assert caught.value.where == nic.label


# --- looks that fail --------------------------------------------------------------------------------------

FAILED = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO]


@pytest.mark.parametrize("number", FAILED)
def test_a_file_that_cannot_be_read_now_is_neither_wrong_nor_missing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NIC file, the configuration, the names of tables, Ganeti's files: none of them says anything now."""
    file = tmp_path / "nic" / "web1" / "0.toml"
    file.parent.mkdir(parents=True)
    file.write_text('tap = "tap0"\n')
    file.chmod(0o600)
    (tmp_path / "rt_tables").write_text("100 guests\n")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ganeti, "DIRECTORY", tmp_path)
    for name in ("os.open", "io.open", "builtins.open"):
        monkeypatch.setattr(name, fail)
    looks: list[Callable[[], object]] = [
        lambda: nicfiles.read_nic(file, tmp_path),
        lambda: config.merged(Config(), file, tmp_path),
        lambda: tables.number("guests", (str(tmp_path),)),
        lambda: ganeti.word_in(file),
        lambda: procfs.sysctl("net/ipv4/ip_forward"),
    ]
    for look in looks:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            look()


@pytest.mark.parametrize("number", FAILED)
def test_a_device_that_nobody_can_be_asked_about_is_not_gone(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("kvmifup.inputs.devices.socket.socket", fail)
    looks: list[Callable[[], object]] = [
        lambda: devices.index_of("lo"),
        lambda: devices.name_of(1),
        lambda: devices.own_name("lo"),
    ]
    for look in looks:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            look()
    assert sockets.is_device("lo", 1)


def test_the_names_of_devices() -> None:
    assert (devices.index_of("lo"), devices.name_of(1), devices.own_name("lo")) == (1, "lo", "lo")
    assert (devices.index_of("nosuch"), devices.name_of(1 << 30), devices.own_name("nosuch")) == (None, None, "nosuch")
    assert devices.index_of("n" * 16) is None
