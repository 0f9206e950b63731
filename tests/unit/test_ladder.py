"""Who can say what of filters, limits and ports: NIC file, tags, link, mode; and what a wrong word leads to."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup import phases
from kvmifup.commands.objects import nic_object
from kvmifup.core import rates
from kvmifup.core.errors import NicError, NotReadyError
from kvmifup.core.model import BridgedConfig, Config, ExtConfig, ExtNetwork, LinkConfig, Nic, Phase, TapConfig
from kvmifup.core.ops import Program
from kvmifup.diagnosis import causes
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import State
from kvmifup.inputs import coming, environment, ganeti, values
from kvmifup.runs import journal

from .samples import BRIDGED, EXT, FACTS_BRIDGED, FACTS_EXT, MAC, OVS
from .test_inputs import ENVIRONMENT, nic_toml, parsed

ON_BRIDGE = ENVIRONMENT | {"MODE": "bridged", "LINK": "br0", "IP": ""}
VRRP = "00:00:5e:00:01:05"


# --- rates and sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("100mbit", "100mbit"),
        ("100Mbit", "100mbit"),
        ("100000kbit", "100mbit"),
        ("1.5mbit", "1500kbit"),
        ("12.5mbps", "100mbit"),
        ("12.5MBps", "100mbit"),
        ("1kibps", "8192bit"),
        ("1mibit", "1048576bit"),
        ("1000000", "1mbit"),
        ("0.032tbit", "32gbit"),
        ("8001bit", "8kbit"),  # the kernel counts whole bytes
        ("off", "off"),
    ],
)
def test_rates_are_those_of_tc(text: str, written: str) -> None:
    assert values.rate("rate.to_guest", text) == written
    assert values.rate("rate.to_guest", written) == written


@pytest.mark.parametrize(
    "text",
    ["", "mbit", "100 mbit", "-1mbit", "1e6", "100mb", "100mbits", "7999", "33gbit", "1tbit", "١mbit", "50%", "Off"],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(NicError, match=r"rate\.to_guest must be a rate from 8kbit to 32gbit, or off"):
        values.rate("rate.to_guest", text)


@pytest.mark.parametrize(
    ("text", "written"),
    [("2000", "2000b"), ("64k", "64kb"), ("64KB", "64kb"), ("0.5mb", "512kb"), ("8mbit", "1mb"), ("65536b", "64kb")],
)
def test_sizes_are_those_of_tc(text: str, written: str) -> None:
    assert values.burst("x", text) == written


@pytest.mark.parametrize("text", ["1999", "257mb", "64kib", "10ms", "off", "1tb", "64bit", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(NicError, match="x must be a size from 2000b to 256mb"):
        values.burst("x", text)


@given(st.integers(rates.LEAST_RATE // 8, rates.MOST_RATE // 8), st.integers(rates.LEAST_BURST, rates.MOST_BURST))
def test_what_is_written_is_read_again(rate: int, size: int) -> None:
    assert rates.rate(rates.rate_text(8 * rate)) == 8 * rate
    assert rates.size(rates.size_text(size)) == size


# --- NIC files ------------------------------------------------------------------------------------------


def test_all_keys_in_a_nic_file() -> None:
    limits = '{ from_guest = "50mbit", to_guest = "100mbit", to_guest_burst = "1mb" }'
    nic = parsed(nic_toml(filter='"address"', allow_mac=f'["{VRRP.upper()}"]', rate=limits))
    limited = (("to_guest", "100mbit"), ("from_guest", "50mbit"), ("to_guest_burst", "1mb"))
    assert (nic.filter, nic.allow_mac, nic.rate) == ("address", (VRRP,), limited)
    assert parsed(nic_toml(allow_mac="[]")).allow_mac == ()
    assert journal.decode_nic(json.loads(json.dumps(journal.encode_nic(nic)))) == nic
    told = nic_object(Known("tap0", nic), "none", State(None))
    assert (told["filter"], told["allow_mac"], told["rate"]) == ("address", (VRRP,), dict(limited))
    plain = parsed(nic_toml())
    assert causes.described_otherwise(nic, plain)[-1] == (
        "rate none -> to_guest 100mbit, from_guest 50mbit, to_guest_burst 1mb"
    )


def test_a_journal_from_before_these_keys_is_read() -> None:
    data = journal.encode_nic(BRIDGED)
    for key in ("filter", "allow_mac", "rate"):
        del data[key]
    assert journal.decode_nic(data) == BRIDGED


MISTAKES = {
    "an unknown filter": ({"filter": '"ip"'}, "filter must be one of off, mac, address"),
    "a filter that is no word": ({"filter": "true"}, "filter must be one of"),
    "a word for a list": ({"allow_mac": f'"{VRRP}"'}, "allow_mac must be a list"),
    "a number in the list": ({"allow_mac": "[1]"}, "allow_mac must be a list"),
    "no MAC": ({"allow_mac": '["00:00:5e:00:01"]'}, "allow_mac '00:00:5e:00:01' is not six pairs"),
    "multicast": ({"allow_mac": '["33:33:00:00:00:12"]'}, "allow_mac 33:33:00:00:00:12 is a multicast"),
    "nothing but zeros": ({"allow_mac": '["00:00:00:00:00:00"]'}, "allow_mac is all zeros"),
    "a tap's MAC": ({"allow_mac": '["fe:00:00:35:ac:01"]'}, "allow_mac fe:00:00:35:ac:01 begins with fe:"),
    "a MAC twice": ({"allow_mac": f'["{VRRP}", "{VRRP.upper()}"]'}, "is listed twice"),
    "too many": (
        {"allow_mac": str([f"02:00:00:00:{n // 256:02x}:{n % 256:02x}" for n in range(257)])},
        "allow_mac has 257 MACs, more than 256",
    ),
    "a rate alone": ({"rate": '"1mbit"'}, "rate must be a table"),
    "an empty table": ({"rate": "{}"}, "rate must be a table that is not empty"),
    "a misspelt direction": ({"rate": '{ to_gest = "1mbit" }'}, "unknown key 'rate.to_gest'"),
    "a number": ({"rate": "{ to_guest = 1000000 }"}, "rate.to_guest must be a rate"),
    "a rate in words": ({"rate": '{ from_guest = "fast" }'}, "rate.from_guest must be a rate"),
    "a burst without a rate": (
        {"rate": '{ to_guest = "1mbit", from_guest_burst = "1mb" }'},
        "needs a rate in rate.from",
    ),
    "a burst that takes too long": (
        {"rate": '{ to_guest = "8kbit", to_guest_burst = "1mb" }'},
        "at 8kbit it would last longer than 200 s",
    ),
    "a burst of nothing": ({"rate": '{ to_guest = "off", to_guest_burst = "1mb" }'}, "needs a rate in rate.to_guest"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_nic_file_is_refused(mistake: str) -> None:
    keys, why = MISTAKES[mistake]
    with pytest.raises(NicError, match=why.replace("'", ".")) as caught:
        parsed(nic_toml(**keys))
    assert caught.value.code == 65


@pytest.mark.parametrize(
    ("mode", "key", "value"),
    [
        ("routed", "filter", '"mac"'),
        ("routed", "filter", '"off"'),
        ("routed", "allow_mac", "[]"),
        ("openvswitch", "allow_mac", "[]"),
        ("openvswitch", "isolated", "false"),
    ],
)
def test_a_key_that_means_nothing_in_the_mode_is_refused(mode: str, key: str, value: str) -> None:
    with pytest.raises(NicError, match=f"{key} means nothing on a NIC in mode {mode}"):
        parsed(nic_toml(mode=f'"{mode}"', link='"100"', ip='["192.0.2.8"]', **{key: value}))


# --- tags -----------------------------------------------------------------------------------------------


def of_tags(guest: str = "", network: str = "", **environ: str) -> Nic:
    return environment.from_environment(ON_BRIDGE | {"TAGS": guest, "NETWORK_TAGS": network} | environ)


def test_all_keys_as_tags() -> None:
    nic = of_tags(
        "web kvm-ifup:filter:address kvm-ifup:rate:to_guest_burst:1mb kvm-ifup:rate:to_guest:100mbit",
        f"kvm-ifup:allow_mac:{VRRP} kvm-ifup:allow_mac:00:00:5e:00:02:05 kvm-ifup:hairpin:true",
    )
    assert (nic.filter, nic.hairpin, nic.allow_mac) == ("address", True, (VRRP, "00:00:5e:00:02:05"))
    assert nic.rate == (("to_guest", "100mbit"), ("to_guest_burst", "1mb"))


@pytest.mark.parametrize("tag", ["kvm-ifup:filter=mac", "kvm-ifup:rate=to_guest=1mbit", "kvm-ifup:isolated=true"])
def test_a_tag_with_an_equals_sign_is_the_same(tag: str) -> None:
    """Ganeti allows none, but others may write the environment."""
    assert of_tags(tag) == of_tags(tag.replace("=", ":")) != of_tags()


def test_the_guests_tag_comes_before_the_networks() -> None:
    network = "kvm-ifup:filter:address kvm-ifup:rate:to_guest:1mbit kvm-ifup:rate:to_guest_burst:1mb "
    network += f"kvm-ifup:rate:from_guest:2mbit kvm-ifup:allow_mac:{VRRP}"
    nic = of_tags("kvm-ifup:filter:off kvm-ifup:rate:to_guest:3mbit kvm-ifup:allow_mac:02:00:00:00:00:01", network)
    assert (nic.filter, nic.allow_mac) == ("off", ("02:00:00:00:00:01",))
    # Each direction for itself, and the burst with its rate.
    assert nic.rate == (("to_guest", "3mbit"), ("from_guest", "2mbit"))


WRONG_TAGS = {
    "filter:adress": "filter must be one of",
    "filter": "filter must be one of",
    "filter:": "filter must be one of",
    "filtre:mac": "did you mean filter",
    "filter:mac kvm-ifup:filter:address": "filter is both",
    "isolated:yes": "isolated must be true or false",
    "isolated:true kvm-ifup:isolated:false": "isolated is both",
    "allow_mac:01:00:5e:00:01:05": "multicast",
    "allow_mac:00:00:5e:00:01:05 kvm-ifup:allow_mac:00:00:5E:00:01:05": "listed twice",
    "rate:100mbit": "unknown key",
    "rate:to_guest": "must be a rate",
    "rate:to_guest:fast": "must be a rate",
    "rate:to_guest:1mbit kvm-ifup:rate:to_guest:2mbit": "to_guest is both",
    "rate:to_guest_burst:1mb": "needs a rate",
    "": "unknown tag",
}


@pytest.mark.parametrize("mode", ["bridged", "routed", "openvswitch"])
@pytest.mark.parametrize("tag", WRONG_TAGS)
@pytest.mark.parametrize("of", ["TAGS", "NETWORK_TAGS"])
def test_a_wrong_tag_is_refused_and_named_in_every_mode(of: str, tag: str, mode: str) -> None:
    with pytest.raises(NicError) as caught:
        of_tags(MODE=mode, LINK="100", **{of: f"a kvm-ifup:{tag} b"})
    error = caught.value
    assert error.code == 65
    assert f"kvm-ifup:{tag}".split()[0] in str(error)
    assert WRONG_TAGS[tag] in f"{error} {error.hint}"


def test_a_tag_that_means_nothing_in_the_mode_does_nothing() -> None:
    tags = f"kvm-ifup:isolated:true kvm-ifup:filter:mac kvm-ifup:allow_mac:{VRRP} kvm-ifup:rate:to_guest:1mbit"
    routed = of_tags(tags, MODE="routed", LINK="100")
    assert (routed.isolated, routed.filter, routed.allow_mac) == (None, None, None)
    assert routed.rate == (("to_guest", "1mbit"),)
    # What cannot be done must not be left out: the guest would be open.
    assert of_tags(tags, MODE="openvswitch", LINK="ovs0").filter == "mac"


def test_an_ext_nic_keeps_what_the_mode_that_it_gets_can_use() -> None:
    tags = "kvm-ifup:isolated:true kvm-ifup:filter:mac kvm-ifup:rate:to_guest:1mbit"
    nic = of_tags(tags, MODE="ext", LINK="lan", IP="192.0.2.8")

    def wired(mode: str, link: str) -> Nic:
        return values.as_wired(nic, Config(ext=ExtConfig(networks=(("lan", ExtNetwork(mode, link)),))))

    assert (wired("bridged", "br0").isolated, wired("bridged", "br0").filter) == (True, "mac")
    assert (wired("routed", "100").isolated, wired("routed", "100").filter) == (None, None)
    assert (wired("openvswitch", "ovs0").isolated, wired("openvswitch", "ovs0").filter) == (None, "mac")
    assert wired("routed", "100").rate == (("to_guest", "1mbit"),)


def test_tags_come_from_hooks_and_from_the_runtime_file_as_well() -> None:
    of_nic = {
        "GANETI_INSTANCE_NIC0_" + key: value for key, value in (("MAC", MAC), ("MODE", "bridged"), ("LINK", "br0"))
    }
    hook = {"GANETI_INSTANCE_NAME": "web1", "GANETI_INSTANCE_NIC_COUNT": "1", **of_nic}
    hook |= {
        "GANETI_INSTANCE_TAGS": "kvm-ifup:filter:mac",
        "GANETI_INSTANCE_NIC0_NETWORK_TAGS": "kvm-ifup:hairpin:true",
    }
    (nic,) = coming.from_hook(hook)
    assert (nic.filter, nic.hairpin) == ("mac", True)
    written: dict[str, Any] = {"mac": MAC, "ip": None, "nicparams": {"mode": "bridged", "link": "br0"}}
    written |= {"network": "u", "netinfo": {"tags": ["x", "kvm-ifup:rate:to_guest:1mbit", "kvm-ifup:filter:mac"]}}
    found = ganeti.nic_of("web1", written, "tap0", 0)
    assert (found.filter, found.rate) == ("mac", (("to_guest", "1mbit"),))


# --- who comes first ------------------------------------------------------------------------------------

CONFIG = Config(
    bridged=BridgedConfig(filter="mac", allow_mac=("02:00:00:00:00:02",), rate=(("to_guest", "1mbit"),)),
    openvswitch=TapConfig(rate=(("to_guest", "7mbit"),)),
    link=(
        ("br0", LinkConfig(filter="address", rate=(("from_guest", "2mbit"), ("from_guest_burst", "1mb")))),
        ("br1", LinkConfig(filter="off", allow_mac=())),
    ),
)


def counts(nic: Nic) -> tuple[Any, ...]:
    return tuple(phases.said(key, *phases.ladder(nic, CONFIG)) for key in ("filter", "allow_mac"))


def test_the_first_who_says_anything_counts() -> None:
    assert counts(BRIDGED) == ("address", ("02:00:00:00:00:02",))
    assert counts(replace(BRIDGED, link="br1")) == ("off", ())
    assert counts(replace(BRIDGED, link="br2")) == ("mac", ("02:00:00:00:00:02",))
    assert counts(replace(BRIDGED, filter="off", allow_mac=(VRRP,))) == ("off", (VRRP,))


def test_macs_that_are_allowed_for_nothing_are_remarked() -> None:
    nic = replace(BRIDGED, allow_mac=(VRRP,))
    (said,) = phases.remarks(Phase.POST, nic, Config(), FACTS_BRIDGED)
    assert "allow_mac" in said
    config = Config(bridged=BridgedConfig(filter="mac"))
    assert phases.remarks(Phase.POST, nic, config, FACTS_BRIDGED) == ()
    assert phases.remarks(Phase.POST, BRIDGED, Config(bridged=BridgedConfig(allow_mac=(VRRP,))), FACTS_BRIDGED) == ()


def test_an_ext_program_hears_what_is_said() -> None:
    nic = replace(EXT, isolated=False, filter="mac", rate=(("to_guest", "off"),))
    config = Config(link=((EXT.link or "", LinkConfig(allow_mac=(VRRP, MAC), rate=(("from_guest", "2mbit"),))),))
    pre, *_ = [op for op in phases.plan(Phase.POST, nic, config, FACTS_EXT) if isinstance(op, Program)]
    told = {name: value for name, value in pre.environment if name.startswith("KVM_IFUP_")}
    assert told == {
        "KVM_IFUP_ISOLATED": "false",
        "KVM_IFUP_FILTER": "mac",
        "KVM_IFUP_ALLOW_MAC": f"{VRRP} {MAC}",
        "KVM_IFUP_RATE_TO_GUEST": "off",
        "KVM_IFUP_RATE_FROM_GUEST": "2mbit",
    }


@pytest.mark.parametrize(
    ("nic", "config"),
    [
        (replace(OVS, filter="address"), Config()),
        (replace(OVS, filter="mac"), Config()),
        (OVS, Config(link=((OVS.link or "", LinkConfig(filter="mac")),))),
    ],
)
def test_a_filter_on_open_vswitch_is_refused(nic: Nic, config: Config) -> None:
    with pytest.raises(NotReadyError, match=r"filter = .*cannot be done on an Open vSwitch bridge"):
        phases.plan(Phase.PRE, nic, config, FACTS_BRIDGED)
    assert phases.plan(Phase.PRE, replace(nic, filter="off"), config, FACTS_BRIDGED)


@given(st.text(max_size=12) | st.text("kvm-ifup:=rate_to_guest:1mb allow_filter", max_size=40))
def test_any_tag_is_taken_or_refused(text: str) -> None:
    with suppress(NicError):
        of_tags(f"kvm-ifup:{text}")
