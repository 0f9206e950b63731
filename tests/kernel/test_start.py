"""What a hook loads that no agent runs: its guest waits for each module."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import hooks, manager, namespaces, nodes, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.nodes import Node

# All that comes from Python itself, with what that loads in its turn. A module that is not here costs each hook up to
# some milliseconds (`python3 -X importtime`): so a new one is loaded where it is needed, or is worth it.
PYTHON = {
    *("dataclasses", "ast", "copy", "copyreg", "dis", "importlib", "inspect", "keyword", "linecache", "opcode", "org"),
    *("token", "tokenize"),
    *("re", "enum", "functools", "collections", "operator", "reprlib", "types", "warnings", "weakref", "itertools"),
    *("typing", "contextlib", "json", "ipaddress", "signal", "threading", "errno", "fcntl", "gc", "math"),
    *("pathlib", "fnmatch", "ntpath", "nt", "urllib", "glob", "grp"),
    *("socket", "selectors", "select", "array", "struct"),
}
TOML = {"tomli", "datetime", "string"}
FILTERS = {"ctypes", "nftables", "zlib"}
PROGRAMS = {"subprocess", "locale", "msvcrt"}
SETTINGS = Path("/etc/kvm-ifup")
NEVER = ("kvmifup.commands.arguments", "kvmifup.diagnosis", "kvmifup.agent", "kvmifup.node.overview")


@pytest.fixture
def ready(uplinked: Node) -> Iterator[Node]:
    """A node with an uplink, a bridge and a tap, and no settings, also where the package has brought some."""
    nodes.add_bridge()
    nodes.add_tap()
    with namespaces.private_etc():
        shutil.rmtree(SETTINGS, ignore_errors=True)
        yield uplinked


def extra(program: str, environ: dict[str, str]) -> set[str]:
    """What it loads beyond what each hook does."""
    found = hooks.loaded(program, "tap0", environ=environ)
    assert "kvmifup.commands.hooks" in found
    assert not [name for name in found if name.startswith(NEVER)]
    return {name for name in found - PYTHON if not name.startswith(("_", "kvmifup")) and not name.endswith("__mypyc")}


@pytest.mark.parametrize(
    ("mode", "environ"),
    [
        ("bridged", {"LINK": "br0"}),
        ("routed", {"IP": f"{GUEST_IP4},{GUEST_IP6}"}),
    ],
)
def test_what_a_hook_loads_is_a_closed_list(ready: Node, mode: str, environ: dict[str, str]) -> None:
    for program in ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"):
        assert extra(program, manager.ganeti(MODE=mode, **environ)) == set()


def test_a_nic_file_takes_what_reads_toml_and_no_more(ready: Node) -> None:
    manager.write_nic(mode="bridged", link="br0")
    found = extra("kvm-ifup-post", {})
    assert "tomli" in found
    assert found <= TOML
    assert extra("kvm-ifdown", {}) == set()  # the journal says all


@pytest.mark.parametrize("more", ["", "lock_timeout = 5"])
def test_settings_take_what_reads_toml_if_they_set_anything(ready: Node, more: str) -> None:
    SETTINGS.mkdir(exist_ok=True)
    installed = (tools.ROOT / "etc/config.toml").read_text(encoding="utf-8")
    (SETTINGS / "config.toml").write_text(f"{more}\n{installed}")
    for program in ("kvm-ifup-post", "kvm-ifdown"):
        found = extra(program, manager.ganeti(MODE="bridged", LINK="br0"))
        assert ("tomli" in found) == bool(more)
        assert found <= (TOML if more else set())


def test_a_program_of_the_administrator_takes_what_runs_it(ready: Node) -> None:
    program = SETTINGS / "ext/blue"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert extra("kvm-ifup-post", manager.ganeti(MODE="ext", LINK="blue")) <= PROGRAMS


def test_a_filter_takes_libnftables_and_no_more(ready: Node) -> None:
    told = manager.ganeti(MODE="bridged", LINK="br0", IP=GUEST_IP4, TAGS="kvm-ifup:filter:address")
    found = extra("kvm-ifup-post", told)
    assert "ctypes" in found
    assert found <= FILTERS
