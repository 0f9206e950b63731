"""The administrator's settings: every key, every refusal, and the file that is installed."""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core.errors import ConfigError
from kvmifup.core.model import BridgedConfig, Config, ExtConfig, ExtNetwork, LinkConfig, RoutedConfig, TapConfig
from kvmifup.inputs import config, toml

from .conftest import ROOT
from .test_inputs import toml_values

INSTALLED = (ROOT / "etc" / "config.toml").read_text(encoding="utf-8")


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /etc/kvm-ifup."""
    monkeypatch.setattr(config, "DIRECTORY", tmp_path)
    (tmp_path / "conf.d").mkdir(mode=0o755)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o644)
    return path


def loaded(tmp_path: Path, text: str) -> Config:
    return config.load(write(tmp_path / "given.toml", text))


# --- the installed file -------------------------------------------------------------------------------


def test_the_installed_file_shows_the_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, INSTALLED) == Config()
    shown = loaded(tmp_path, re.sub(r"^#(?=\S)", "", INSTALLED, flags=re.MULTILINE))
    # Of these there is an example, because the default is that there are none.
    assert shown.routed.uplinks == ("eth0",)
    assert shown.ext.networks == (("NAME", ExtNetwork("routed", "100")),)
    of_link = LinkConfig(
        ("eth0",),
        filter="address",
        allow_mac=("00:00:5e:00:01:05",),
        rate=(("to_guest", "100mbit"), ("from_guest", "50mbit")),
        isolated=True,
        hairpin=False,
        learning=True,
        multicast_router=True,
    )
    assert shown.link == (("NAME", of_link),)
    # The kernel has these, or the bridge says.
    unlimited = (("to_guest", "off"), ("from_guest", "off"))
    port = BridgedConfig(isolated=False, hairpin=False, learning=True, multicast_router=True)
    assert shown.bridged == replace(port, filter="off", allow_mac=(), rate=unlimited)
    assert (shown.routed.rate, shown.openvswitch.rate) == (unlimited, unlimited)
    routed = replace(shown.routed, uplinks=Config().routed.uplinks, rate=None)
    assert routed.rp_filter == Config().routed.reverse_path  # that nobody has written it is not the same
    routed = replace(routed, rp_filter=None)
    shown = replace(shown, routed=routed, ext=replace(shown.ext, networks=()), link=(), bridged=BridgedConfig())
    shown = replace(shown, openvswitch=TapConfig())
    assert shown == Config()


def keys(settings: Any, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for field in fields(settings):
        value = getattr(settings, field.name)
        found |= keys(value, f"{field.name}.") if is_dataclass(value) else {prefix + field.name}
    return found


def test_the_installed_file_has_every_key() -> None:
    data = tomli.loads(re.sub(r"^#(?=\S)", "", INSTALLED, flags=re.MULTILINE))
    shown = {f"{name}.{key}" for name, table in data.items() if isinstance(table, dict) for key in table}
    shown |= {name for name, value in data.items() if not isinstance(value, dict)}
    assert shown - {"ext.NAME", "link.NAME"} == keys(Config()) - {"ext.networks", "link"}
    assert set(data["link"]["NAME"]) == keys(LinkConfig())


# --- values -------------------------------------------------------------------------------------------

EVERYTHING = """
lock_timeout = 3
[bridged]
forwarding_timeout = 1.5
isolated = true
hairpin = false
learning = false
multicast_router = true
filter = "mac"
allow_mac = ["00:00:5E:00:01:05"]
rate = { from_guest_burst = "65536", from_guest = "12.5mbps", to_guest = "off" }
[openvswitch]
rate = { to_guest = "1000kbit" }
[routed]
rate = { to_guest = "1gibit" }
uplinks = ["eth0", "bond0.7"]
rule_priority = 32765
rp_filter = "keep"
[ext]
timeout = 7
[ext.lan]
mode = "bridged"
link = "br0"
[ext.wan]
mode = "routed"
[link.br0]
uplinks = ["eth1"]
hairpin = true
[link."br.1"]
uplinks = []
[link.a-long-name-of-a-table]
rate = { to_guest = "8000" }
"""


def test_every_key_is_read(tmp_path: Path) -> None:
    assert loaded(tmp_path, EVERYTHING) == Config(
        lock_timeout=3.0,
        bridged=BridgedConfig(
            1.5,
            filter="mac",
            allow_mac=("00:00:5e:00:01:05",),
            rate=(("to_guest", "off"), ("from_guest", "100mbit"), ("from_guest_burst", "64kb")),
            isolated=True,
            hairpin=False,
            learning=False,
            multicast_router=True,
        ),
        openvswitch=TapConfig(rate=(("to_guest", "1mbit"),)),
        routed=RoutedConfig(("eth0", "bond0.7"), 32765, "keep", rate=(("to_guest", "1073741824bit"),)),
        ext=ExtConfig(7.0, (("lan", ExtNetwork("bridged", "br0")), ("wan", ExtNetwork("routed", None)))),
        link=(
            ("br0", LinkConfig(("eth1",), hairpin=True)),
            ("br.1", LinkConfig(())),
            ("a-long-name-of-a-table", LinkConfig(rate=(("to_guest", "8kbit"),))),
        ),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lock_timeout = 0", 0.0),
        ("lock_timeout = 3600", 3600.0),
        ("[routed]\nuplinks = []", ()),
        ("[routed]\nrule_priority = 1", 1),
    ],
)
def test_edges(text: str, value: object, tmp_path: Path) -> None:
    settings = loaded(tmp_path, text)
    assert value in (settings.lock_timeout, settings.routed.uplinks, settings.routed.rule_priority)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("lock_timeout = -1", "lock_timeout"),
        ("lock_timeout = 3601", "lock_timeout"),
        ("lock_timeout = nan", "lock_timeout"),
        ("lock_timeout = inf", "lock_timeout"),
        ("lock_timeout = true", "lock_timeout"),
        ('lock_timeout = "1"', "lock_timeout"),
        ("bridged = 1", "bridged must be a table"),
        ("[[bridged]]", "bridged must be a table"),
        ('[bridged]\nisolated = "on"', "bridged.isolated must be true or false"),
        ('[bridged]\nfilter = "adress"', "bridged.filter must be one of off, mac, address"),
        ("[link.br0]\nfilter = true", "link.br0.filter must be one of off, mac, address"),
        ('[routed]\nfilter = "mac"', "routed.filter"),
        ('[openvswitch]\nfilter = "mac"', "openvswitch.filter"),
        ('[bridged]\nallow_mac = "00:00:5e:00:01:05"', "bridged.allow_mac must be a list of strings"),
        ('[bridged]\nallow_mac = ["01:00:5e:00:01:05"]', "bridged.allow_mac 01:00:5e:00:01:05 is a multicast"),
        ('[routed]\nrate = "1mbit"', "routed.rate must be a table"),
        ("[link.br0]\nrate = { to_guest = 100 }", "link.br0.rate.to_guest must be a rate"),
        ('[openvswitch]\nrate = { to_gest = "1mbit" }', "openvswitch.rate.to_gest"),
        ("link = 1", "link must have a table for each link"),
        ("[link]\nbr0 = 1", "link must have a table for each link"),
        ("[link.br0]\nlearning = 0", "link.br0.learning must be true or false"),
        ("[link.br0]\nisolatd = true", "link.br0.isolatd"),
        ('[link."a/b"]', "a/b"),
        ('[bridged]\nforwarding_timeout = "5"', "bridged.forwarding_timeout"),
        ('[routed]\nuplinks = "eth0"', "routed.uplinks"),
        ("[routed]\nuplinks = [1]", "routed.uplinks"),
        ('[routed]\nuplinks = ["eth0", "eth0"]', "twice"),
        ('[routed]\nuplinks = ["a/b"]', "routed.uplinks"),
        ("[routed]\nrule_priority = 0", "routed.rule_priority"),
        ("[routed]\nrule_priority = 32766", "routed.rule_priority"),
        ("[routed]\nrule_priority = true", "routed.rule_priority"),
        ("[routed]\nrule_priority = 1.0", "routed.rule_priority"),
        ('[routed]\nrp_filter = "Strict"', "routed.rp_filter"),
        ("[routed]\nrp_filter = 1", "routed.rp_filter"),
        ("[routed]\nrp_filter = []", "routed.rp_filter"),
        ("[ext]\ntimeout = -1", "ext.timeout"),
        ("[ext]\nnetworks = 5", "ext.networks"),
        ("[ext]\nlan = 5", "ext.lan"),
        ("[ext.lan]", "ext.lan.mode"),
        ('[ext.lan]\nmode = "ext"\nlink = "a"', "ext.lan.mode"),
        ("[ext.lan]\nmode = []", "ext.lan.mode"),
        ('[ext.lan]\nmode = "bridged"', "ext.lan.link"),
        ('[ext.lan]\nmode = "bridged"\nlink = "a/b"', "ext.lan.link"),
        ('[ext.lan]\nmode = "routed"\nlink = "local"', "link local"),
        ('[ext.lan]\nmode = "bridged"\nlink = "br0"\nvlan = ".7"', "ext.lan.vlan"),
        ("link = 5", "link must have a table for each link"),
        ('[link]\nuplinks = ["eth0"]', "link must have a table for each link"),
        ('[link.br0]\nuplinks = "eth0"', "link.br0.uplinks"),
        ('[link.br0]\nuplinks = ["a/b"]', "link.br0.uplinks"),
        ('[link.br0]\nuplinks = ["eth0", "eth0"]', "twice"),
        ('[link."a/b"]\nuplinks = []', "link 'a/b'"),
        ("lock_timeout", "not TOML"),
        pytest.param("a = " + "[" * 5000, "not TOML", id="deep nesting"),
        pytest.param("lock_timeout = " + "1" * 5000, "not TOML", id="huge number"),
    ],
)
def test_refused(text: str, names: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(names)) as caught:
        loaded(tmp_path, text)
    assert caught.value.code == 78
    assert caught.value.where == str(tmp_path / "given.toml")


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("lock_timout = 1", "lock_timout", "lock_timeout"),
        ("[route]\nuplinks = []", "route", "routed"),
        ("[routed]\nuplink = []", "routed.uplink", "uplinks"),
        ("[bridged]\nqqqq = 1", "bridged.qqqq", "forwarding_timeout"),
        ("[link.br0]\nuplink = []", "link.br0.uplink", "uplinks"),
        ("[links.br0]\nuplinks = []", "links", "link"),
        ('uplinks = ["eth0"]', "uplinks", "it belongs below [routed]"),
        ("[routed]\nmend = false", "routed.mend", "it belongs below [agent]"),
        ("[agent]\nlock_timeout = 5", "agent.lock_timeout", "it belongs above all sections"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text: str, key: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{key}'")) as caught:
        loaded(tmp_path, text)
    assert near in caught.value.hint


@pytest.mark.parametrize("text", ["[routed]\nrp_filter = strict", "[routed]\nuplinks = [eth0]", "[agent]\nmend = no"])
def test_who_has_forgotten_quotes_is_reminded(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not TOML") as caught:
        loaded(tmp_path, text)
    assert "words need quotes" in caught.value.hint


def dotted_keys() -> st.SearchStrategy[str]:
    known = sorted(
        keys(Config()) - {"ext.networks"} | {"bridged", "routed", "ext", "ext.lan", "ext.lan.mode", "ext.lan.link"}
    )
    return st.sampled_from(known)


@given(st.dictionaries(dotted_keys(), toml_values, max_size=3))
def test_any_value_is_settings_or_an_error(tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in values.items())
    with suppress(ConfigError):
        assert isinstance(loaded(tmp_path_factory.getbasetemp(), text), Config)


# --- files --------------------------------------------------------------------------------------------


def test_no_file_is_needed(etc: Path) -> None:
    assert config.load(None) == Config()
    (etc / "conf.d").rmdir()
    assert config.load(None) == Config()


def test_later_files_win(etc: Path) -> None:
    write(
        etc / "config.toml", "lock_timeout = 1\n[routed]\nrule_priority = 5\n[ext.lan]\nmode = 'bridged'\nlink = 'br0'"
    )
    write(etc / "conf.d" / "20-b.toml", "lock_timeout = 3\n[ext.lan]\nmode = 'routed'")
    write(etc / "conf.d" / "10-a.toml", "lock_timeout = 2\n[bridged]\nforwarding_timeout = 9")
    write(etc / "conf.d" / "30-c.toml.disabled", "lock_timeout = 4")
    settings = config.load(None)
    assert (settings.lock_timeout, settings.routed.rule_priority, settings.bridged.forwarding_timeout) == (3.0, 5, 9.0)
    assert dict(settings.ext.networks) == {"lan": ExtNetwork("routed", None)}


def test_a_named_file_stands_alone(etc: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(etc / "config.toml", "lock_timeout = 1")
    assert config.load(write(tmp_path_factory.mktemp("own") / "mine.toml", "")) == Config()


@pytest.mark.parametrize("place", ["config.toml", "conf.d/10.toml"])
def test_a_file_that_others_can_write(place: str, etc: Path) -> None:
    write(etc / place, "").chmod(0o666)
    with pytest.raises(ConfigError, match="trusted") as caught:
        config.load(None)
    assert caught.value.code == 78
    assert caught.value.where == str(etc / place)
    assert caught.value.hint


def test_a_symlink_that_leads_out(etc: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (etc / "config.toml").symlink_to(write(tmp_path_factory.mktemp("out") / "x.toml", ""))
    with pytest.raises(ConfigError, match="leads out"):
        config.load(None)


def test_a_dangling_symlink_is_no_missing_file(etc: Path) -> None:
    (etc / "config.toml").symlink_to(etc / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(None)


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_a_named_file_must_be_there(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    if what == "directory":
        path.mkdir(mode=0o755)
    with pytest.raises(ConfigError):
        config.load(path)


# --- read again for every hook --------------------------------------------------------------------------


def test_a_changed_file_counts_at_once(etc: Path) -> None:
    """Also one of the same size, in the same moment; the agent lives for long."""
    for seconds in (3, 4, 3):
        write(etc / "config.toml", f"lock_timeout = {seconds}")
        assert config.load(None).lock_timeout == seconds
    (etc / "config.toml").chmod(0o666)
    with pytest.raises(ConfigError, match="written to by others"):
        config.load(None)
    (etc / "config.toml").unlink()
    assert config.load(None) == Config()


PIECES = (
    *(
        "\n",
        "[a]",
        "[b]",
        "[a-_1]",
        "[ a ]",
        "[a.b]",
        "[[a]]",
        "[é]",
        '["a"]',
        "[]",
        "[",
        "]",
        "# x",
        "#",
        "x = 1",
        "x",
    ),
    *(" ", "\t", "\r", "\r\n", "\0", "\x08", "\x0b", "\x0c", "\x1f", "\x7f", "\x85", "\xa0", "\u2028", "\ufeff"),
)


def test_what_sets_nothing_is_what_tomli_says_of_it() -> None:
    texts = ["".join(pieces) for pieces in itertools.product(PIECES, ("", *PIECES), ("", *PIECES))]
    for text in texts:
        found = toml.tables(text)
        if found is not None:
            assert tomli.loads(text) == found, text
    assert toml.tables("[a]\n#[b]\n [b] # x\n\n") == {"a": {}, "b": {}}
    assert toml.tables("[a]\n[a]") is None
    assert toml.tables(INSTALLED) == tomli.loads(INSTALLED)
