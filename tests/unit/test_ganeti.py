"""Ganeti's own files: they describe a NIC, or say so clearly; and which NIC is on which tap."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core.errors import NicError
from kvmifup.core.model import Nic
from kvmifup.inputs import ganeti, trust
from kvmifup.runs import managed

from .samples import MAC, nets

OTHER, THIRD = "aa:00:00:35:ac:02", "aa:00:00:35:ac:03"
UUID = "0c1b7a0c-6d0f-4a57-8f7e-111111111111"
ROUTED_NIC = {"mac": MAC, "ip": "192.0.2.8", "nicparams": {"mode": "routed", "link": "100", "vlan": ""}, "uuid": "u0"}
BRIDGED_NIC = {"mac": OTHER, "ip": None, "nicparams": {"mode": "bridged", "link": "br0", "vlan": ".7"}, "uuid": UUID}
THIRD_NIC = BRIDGED_NIC | {"mac": THIRD, "uuid": "u2"}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ganeti, "DIRECTORY", tmp_path)
    write(tmp_path, "nic/web1/0", "tap0")
    write(tmp_path, f"nic/web1/{UUID}", "tap1\n")
    write(tmp_path, "nic/web1/1", "tap1")
    write(tmp_path, "nic/web2/0", "tap2")
    write(tmp_path, "pid/web1", "4711\n")
    runtime(tmp_path, [ROUTED_NIC, BRIDGED_NIC])
    return tmp_path


def write(base: Path, place: str, text: str) -> None:
    path = base / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)


def runtime(base: Path, nics: Any) -> None:
    write(base, "conf/web1.runtime", json.dumps(["kvm", nics, {}, []]))


# --- the files ------------------------------------------------------------------------------------------


def test_what_the_files_say(run_dir: Path) -> None:
    assert ganeti.guests() == ["web1", "web2"]
    assert ganeti.taps_of("web1") == {"0": "tap0", "1": "tap1", UUID: "tap1"}
    assert (ganeti.process_of("web1"), ganeti.process_of("web2")) == (4711, None)
    first, second = ganeti.described("web1")
    source = str(run_dir / "conf" / "web1.runtime")
    assert ganeti.nic_of("web1", first, "tap0", 3) == Nic(
        "tap0", MAC, "routed", "100", nets("192.0.2.8"), instance="web1", index=3, source=source
    )
    assert ganeti.nic_of("web1", second, "tap1", 1) == Nic(
        "tap1", OTHER, "bridged", "br0", (), ".7", instance="web1", index=1, source=source
    )


def test_without_ganeti(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ganeti, "DIRECTORY", run_dir / "missing")
    assert ganeti.guests() == []
    assert managed.nic_of_tap("tap0") is None
    assert managed.nics_of_instance("web1") == []
    assert list(managed.all_nics([])) == []


def test_no_runtime_file(run_dir: Path) -> None:
    with pytest.raises(NicError, match="cannot be read") as caught:
        ganeti.described("web2")
    assert caught.value.where == str(run_dir / "conf" / "web2.runtime")


@pytest.mark.parametrize("text", ["", "-1", "1 2", "²", "pid", "9" * 5000])
def test_a_pid_file_that_has_no_process(text: str, run_dir: Path) -> None:
    write(run_dir, "pid/web1", text)
    assert ganeti.process_of("web1") is None


def test_a_nic_that_is_wrong(run_dir: Path) -> None:
    with pytest.raises(NicError, match="loopback") as caught:
        ganeti.nic_of("web1", ROUTED_NIC | {"ip": "127.0.0.1"}, "tap0", 0)
    assert caught.value.where == str(run_dir / "conf" / "web1.runtime")


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[1, 2]", "[1, [5]]", '[1, {"0": {}}]', "[1, null]", pytest.param("[" * 5000, id="deep")]
)
def test_a_runtime_file_that_is_another_thing(text: str, run_dir: Path) -> None:
    write(run_dir, "conf/web1.runtime", text)
    with pytest.raises(NicError, match="does not describe"):
        ganeti.described("web1")


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.text(), max_size=2)


@given(
    st.dictionaries(st.sampled_from(["mac", "ip", "uuid", "nicparams"]), values),
    st.dictionaries(st.sampled_from(["mode", "link", "vlan"]), values),
)
def test_any_runtime_file_is_a_nic_or_an_error(nic: dict[str, Any], params: dict[str, Any]) -> None:
    described = {**ROUTED_NIC, "nicparams": {"mode": "routed", "link": "100", **params}, **nic}
    found = ganeti.matched([described], {"0": "tap0", "u0": "tap0"}, {"tap0": None})
    assert found == {"tap0": described}
    with suppress(NicError):
        assert isinstance(ganeti.nic_of("web1", found["tap0"], "tap0", 0), Nic)


# --- trust ----------------------------------------------------------------------------------------------

FILES = ("nic/web1/0", "pid/web1", "conf/web1.runtime")


def look(place: str) -> bool:
    """Whether the file at *place* is believed."""
    if place == "nic/web1/0":
        return "0" in ganeti.taps_of("web1")
    if place == "pid/web1":
        return ganeti.process_of("web1") is not None
    with suppress(NicError):
        return bool(ganeti.described("web1"))
    with pytest.raises(NicError, match="not to be trusted"):
        ganeti.described("web1")
    return False


@pytest.mark.parametrize("place", FILES)
def test_roots_group_may_write_to_ganetis_directories_and_not_to_files(place: str, run_dir: Path) -> None:
    directories = [one for one in (run_dir / place).parents if one.is_relative_to(run_dir)]
    for one in directories:
        one.chmod(0o775)
    assert look(place)
    (run_dir / place).chmod(0o660)
    assert not look(place)


@pytest.mark.parametrize("place", FILES)
@pytest.mark.parametrize("level", [0, -1])
def test_nobody_else_may(place: str, level: int, run_dir: Path) -> None:
    directory = [one for one in (run_dir / place).parents if one.is_relative_to(run_dir)][level]
    assert look(place)
    directory.chmod(0o777)
    assert not look(place)


@pytest.mark.parametrize("gid", [0, 1234])
def test_a_group_is_trusted_only_if_it_is_roots_and_asked_for(gid: int, tmp_path: Path) -> None:
    info = list((tmp_path / "x").parent.stat())
    info[0], info[4], info[5] = 0o40775, 0, gid
    directory = type(tmp_path.stat())(info)
    assert trust.flaw(directory) == "can be written to by others"
    assert (trust.flaw(directory, roots_group=True) == "") is (gid == 0)
    info[0] = 0o100664
    assert trust.flaw(type(tmp_path.stat())(info), roots_group=True) == "can be written to by others"


# --- which NIC is on which tap ------------------------------------------------------------------------------

NICS: list[dict[str, Any]] = [ROUTED_NIC, BRIDGED_NIC, THIRD_NIC]
ON = {"tap5": ROUTED_NIC, "tap6": BRIDGED_NIC, "tap7": THIRD_NIC}


@pytest.mark.parametrize(
    ("files", "macs"),
    [
        pytest.param({"0": "tap7", "1": "tap5", "2": "tap6"}, {"tap5": MAC, "tap6": OTHER, "tap7": THIRD}, id="by MAC"),
        pytest.param({"u0": "tap5", UUID: "tap6", "u2": "tap7"}, dict.fromkeys(ON), id="by UUID"),
        pytest.param({UUID: "tap6", "0": "tap5"}, {"tap5": MAC, "tap6": None, "tap7": THIRD}, id="by both"),
        pytest.param({"0": "tap6"}, {"tap5": MAC, "tap6": None, "tap7": THIRD}, id="the one that is left"),
        pytest.param({"u2": "tap5"}, {"tap5": MAC, "tap6": OTHER, "tap7": None}, id="a MAC counts more than a name"),
    ],
)
def test_a_nic_is_found_on_its_tap(files: dict[str, str], macs: dict[str, str | None]) -> None:
    assert ganeti.matched(NICS, files, macs) == ON


@pytest.mark.parametrize(
    ("nics", "files", "macs"),
    [
        pytest.param(NICS, {"0": "tap5", "1": "tap6"}, {"tap5": None, "tap6": None, "tap7": THIRD}, id="only numbers"),
        pytest.param([ROUTED_NIC], {"0": "tap5"}, {"tap5": OTHER}, id="another MAC"),
        pytest.param([ROUTED_NIC, {**BRIDGED_NIC, "mac": MAC}], {"0": "tap5"}, {"tap5": MAC}, id="two with one MAC"),
        pytest.param([ROUTED_NIC], {"0": "tap5"}, {"tap5": None, "tap6": None}, id="one NIC for two taps"),
        pytest.param([], {"0": "tap5"}, {"tap5": None}, id="none"),
    ],
)
def test_a_guess_is_no_answer(nics: list[Any], files: dict[str, str], macs: dict[str, str | None]) -> None:
    assert "tap5" not in ganeti.matched(nics, files, macs)


INFO = r"""nic-0.0: index=0,type=nic,model=virtio-net-pci,macaddr=AA:00:00:35:AC:01
 \ nic-0: index=0,type=tap,fd=12
loose: index=0,type=tap,fd=99
nic-1.0: index=0,type=nic,model=virtio-net-pci,macaddr=aa:00:00:35:ac:02
 \ nic-1: index=0,type=tap,fd=31
"""


def test_what_qemu_says_of_its_network() -> None:
    assert list(managed.pairs(INFO.replace("\n", "\r\n"))) == [(MAC, "12"), (OTHER, "31")]
    assert list(managed.pairs("")) == []
