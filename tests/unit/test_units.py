"""systemd's units make the same directory and socket as the code does."""

from __future__ import annotations

import configparser

from kvmifup import client
from kvmifup.commands.options import RUN_DIR
from kvmifup.inputs import places

from .conftest import ROOT


def unit(name: str) -> configparser.ConfigParser:
    """A unit of ours."""
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(ROOT / "integration" / "systemd" / name)
    return found


def test_the_run_directory_has_the_mode_that_the_code_gives_it() -> None:
    service = unit("kvm-ifupd.service")["Service"]
    assert f"/run/{service['RuntimeDirectory']}" == str(RUN_DIR)
    assert int(service["RuntimeDirectoryMode"], 8) == places.FOR_ALL
    assert int(unit("kvm-ifupd.socket")["Socket"]["DirectoryMode"], 8) == places.FOR_ALL


def test_the_socket_is_where_scripts_look_and_roots_alone() -> None:
    socket = unit("kvm-ifupd.socket")["Socket"]
    assert socket["ListenStream"] == client.SOCKET
    assert int(socket["SocketMode"], 8) == 0o600


def test_a_directory_that_is_not_roots_alone_ends_the_starts() -> None:
    assert "69" in unit("kvm-ifupd.service")["Service"]["RestartPreventExitStatus"].split()
