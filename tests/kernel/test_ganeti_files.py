"""Guests that Ganeti has started without us: what its own files and their QEMUs say is enough to wire and show them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from harness import nodes, oracle, tools
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_MAC, TAP_MAC
from harness.hooks import call, check
from harness.nodes import Node
from tests.kernel.checking import netdev
from tests.kernel.ganeti_guests import DIRECTORY, GUEST, OTHER_MAC, bridged, routed, started, talk, write


def shown() -> dict[str, Any]:
    """What `show` has, by tap."""
    return {one["tap"]: one for one in json.loads(call("kvm-ifup", "show", "--json").out)}


def two(first: str = GUEST_MAC, second: str = OTHER_MAC) -> list[str]:
    """QEMU's options for NICs on tap0 and tap1."""
    return [*netdev("tap0", first), *(word.replace("net0", "net1") for word in netdev("tap1", second))]


# --- a guest from before ------------------------------------------------------------------------------------


def test_a_guest_from_before_is_shown_checked_and_taken_over(uplinked: Node) -> None:
    nodes.add_tap()
    with started([routed()], {"0": "tap0"}, *netdev()):
        one = shown()["tap0"]
        assert (one["instance"], one["mode"], one["ip"], one["phase"]) == (GUEST, "routed", [GUEST_IP4], "none")
        result = call("kvm-ifup", "check")
        assert result.code == 1
        assert "kvm-ifup has not wired tap0" in result.out
        assert "`kvm-ifup-post tap0` takes it over" in result.out
        check(call("kvm-ifup-post", "tap0"), 0)
        assert oracle.link("tap0")["address"] == TAP_MAC
        assert tools.ask(f"route show {GUEST_IP4}")[0]["dev"] == "tap0"
        assert call("kvm-ifup", "check").code == 0
        check(call("kvm-ifdown", "tap0"), 0)
        assert tools.ask(f"route show {GUEST_IP4}") == []


def test_all_nics_of_such_a_guest(uplinked: Node) -> None:
    nodes.add_bridge()
    nodes.taps(["tap0", "tap1"])
    with started([routed(), bridged()], {"0": "tap0", "1": "tap1"}, *two(), tap="tap1"):
        check(call("kvm-ifup-post", "--instance", GUEST), 0)
        assert oracle.link("tap1")["master"] == "br0"
        assert tools.ask(f"route show {GUEST_IP4}")[0]["dev"] == "tap0"


@pytest.mark.parametrize("how", ["other-writable", "another group", "file"])
def test_what_others_could_have_written_describes_nothing(uplinked: Node, how: str) -> None:
    nodes.add_tap()
    with started([routed()], {"0": "tap0"}, *netdev()):
        if how == "file":
            (DIRECTORY / f"conf/{GUEST}.runtime").chmod(0o660)
        elif how == "other-writable":
            (DIRECTORY / "conf").chmod(0o777)
        else:
            os.chown(DIRECTORY, 0, 1234)
        assert call("kvm-ifup-post", "tap0").code == 65
        assert oracle.link("tap0")["address"] != TAP_MAC


# --- by MAC and UUID, never by number -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files", [{"0": "tap1", "1": "tap0"}, {"0": "tap0", "1": "tap1"}, {"5": "tap0"}, {"1": "tap0"}]
)
def test_the_number_of_a_nic_file_tells_nothing(uplinked: Node, files: dict[str, str]) -> None:
    nodes.add_bridge()
    nodes.taps(["tap0", "tap1"])
    with started([bridged(), routed()], files, *two(), tap="tap1"):
        found = shown()
        assert [(tap, found[tap]["mac"], found[tap]["mode"]) for tap in sorted(found)] == [
            ("tap0", GUEST_MAC, "routed"),
            ("tap1", OTHER_MAC, "bridged"),
        ]


@pytest.mark.parametrize("how", ["NIC file", "pid file", "no pid file"])
def test_what_a_dead_guest_has_left_tells_nothing(uplinked: Node, how: str) -> None:
    nodes.add_tap()
    write("nic/another.example.com/0", "tap0" if how == "NIC file" else "tap9")
    with started([routed()], {"0": "tap0"}, *netdev()):
        pid = DIRECTORY / "pid" / GUEST
        if how == "pid file":  # with the number that this guest's QEMU has by now
            write("pid/another.example.com", pid.read_text())
        elif how == "no pid file":
            pid.unlink()
        assert shown()["tap0"]["instance"] == GUEST


def plug_in(path: Path, descriptor: int, name: str, mac: str) -> None:
    """Plug a NIC into a running QEMU as Ganeti does: its tap is a descriptor."""
    device = {"driver": "virtio-net-pci", "netdev": name, "mac": mac}
    backend = {"type": "tap", "id": name, "fd": name}
    with talk(path) as ask:
        ask("getfd", {"fdname": name}, descriptor)
        ask("netdev_add", backend)
        ask("device_add", device)


@pytest.mark.parametrize("busy", [False, True])
def test_nics_that_were_plugged_in_later(uplinked: Node, busy: bool) -> None:
    """Nothing but QEMU itself knows which of them is on which tap; their files have changed places."""
    nodes.add_bridge()
    taps = [uplinked.guest("tap0"), uplinked.guest("tap1")]
    nodes.add_tap("tap2")
    machine = ["-machine", "pc", *(word.replace("net-device", "net-pci") for word in netdev("tap2", FOREIGN_MAC))]
    nics = [bridged(), routed(), {**bridged(), "mac": FOREIGN_MAC, "uuid": "2"}]
    with started(nics, {"0": "tap1", "1": "tap0", "2": "tap2"}, *machine, tap="tap2") as path:
        for tap, name, mac in zip(taps, ("n0", "n1"), (GUEST_MAC, OTHER_MAC), strict=True):
            plug_in(path, tap.descriptor, name, mac)
        with socket.socket(socket.AF_UNIX) as other:
            if busy:
                other.connect(str(path))
                other.recv(1)
            found = shown()
            hook = call("kvm-ifup-post", "tap0")
    if busy:
        assert "QEMU does not say which one it is" in hook.err
        assert hook.code == 65
        assert found["tap2"]["mac"] == FOREIGN_MAC
    else:
        assert [found[tap]["mac"] for tap in sorted(found)] == [GUEST_MAC, OTHER_MAC, FOREIGN_MAC]
        check(hook, 0)
