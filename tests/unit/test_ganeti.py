"""Ganeti's own files: they describe a NIC, or say so clearly."""

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
from kvmifup.inputs import ganeti

from .samples import MAC, nets

UUID = "0c1b7a0c-6d0f-4a57-8f7e-111111111111"
ROUTED_NIC = {"mac": MAC, "ip": "192.0.2.8", "nicparams": {"mode": "routed", "link": "100", "vlan": ""}, "uuid": "u0"}
BRIDGED_NIC = {"mac": MAC, "ip": None, "nicparams": {"mode": "bridged", "link": "br0", "vlan": ".7"}, "uuid": UUID}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ganeti, "DIRECTORY", tmp_path)
    write(tmp_path, "nic/web1/0", "tap0")
    write(tmp_path, f"nic/web1/{UUID}", "tap1\n")
    write(tmp_path, "nic/web1/1", "tap1")
    write(tmp_path, "nic/web2/0", "tap2")
    runtime(tmp_path, [ROUTED_NIC, BRIDGED_NIC])
    return tmp_path


def write(base: Path, place: str, text: str) -> None:
    path = base / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)


def runtime(base: Path, nics: Any) -> None:
    write(base, "conf/web1.runtime", json.dumps(["kvm", nics, {}, []]))


def test_by_tap(run_dir: Path) -> None:
    source = str(run_dir / "conf" / "web1.runtime")
    assert ganeti.nic_of_tap("tap0") == Nic(
        "tap0", MAC, "routed", "100", nets("192.0.2.8"), instance="web1", index=0, source=source
    )
    assert ganeti.nic_of_tap("tap1") == Nic(
        "tap1", MAC, "bridged", "br0", (), ".7", instance="web1", index=1, source=source
    )
    assert ganeti.nic_of_tap("tap9") is None


def test_by_instance(run_dir: Path) -> None:
    assert [(nic.tap, nic.index) for nic in ganeti.nics_of_instance("web1")] == [("tap0", 0), ("tap1", 1)]
    assert ganeti.nics_of_instance("web9") == []
    assert (run_dir / "nic").is_dir()


def test_without_ganeti(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ganeti, "DIRECTORY", run_dir / "missing")
    assert ganeti.nic_of_tap("tap0") is None
    assert ganeti.nics_of_instance("web1") == []


def test_no_runtime_file(run_dir: Path) -> None:
    with pytest.raises(NicError, match="cannot be read") as caught:
        ganeti.nic_of_tap("tap2")
    assert caught.value.where == str(run_dir / "conf" / "web2.runtime")


def test_not_trusted(run_dir: Path) -> None:
    (run_dir / "conf" / "web1.runtime").chmod(0o666)
    with pytest.raises(NicError, match="trusted"):
        ganeti.nic_of_tap("tap0")
    (run_dir / "nic" / "web1" / "0").chmod(0o666)
    assert ganeti.nic_of_tap("tap0") is None, "anybody may have written it"


def test_a_nic_that_is_wrong(run_dir: Path) -> None:
    runtime(run_dir, [ROUTED_NIC | {"ip": "127.0.0.1"}])
    with pytest.raises(NicError, match="loopback") as caught:
        ganeti.nic_of_tap("tap0")
    assert caught.value.where == str(run_dir / "conf" / "web1.runtime")


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", "[1, 2]", "[1, []]", "[1, [5]]", '[1, [{"uuid": "x"}]]', pytest.param("[" * 5000, id="deep")],
)
def test_a_runtime_file_that_is_another_thing(text: str, run_dir: Path) -> None:
    write(run_dir, "conf/web1.runtime", text)
    with pytest.raises(NicError, match="does not describe"):
        ganeti.nic_of_tap("tap0")


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.text(), max_size=2)


@given(
    st.dictionaries(st.sampled_from(["mac", "ip", "uuid", "nicparams"]), values),
    st.dictionaries(st.sampled_from(["mode", "link", "vlan"]), values),
)
def test_any_runtime_file_is_a_nic_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, nic: dict[str, Any], params: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp() / "ganeti"
        patch.setattr(ganeti, "DIRECTORY", base)
        write(base, "nic/web1/0", "tap0")
        runtime(base, [{**ROUTED_NIC, "nicparams": {"mode": "routed", "link": "100", **params}, **nic}])
        with suppress(NicError):
            assert isinstance(ganeti.nic_of_tap("tap0"), Nic)
