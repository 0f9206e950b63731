"""Ganeti 3.2 calls `down` at the power button: a guest that still runs keeps its network until its own end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import agents, manager, nodes, oracle, tools
from harness.addresses import FOREIGN_MAC, GUEST_IP4, TAP_MAC
from harness.hooks import call, check, hook
from harness.nodes import Node
from kvmifup.node import qmp
from tests.kernel.checking import netdev
from tests.kernel.ganeti_guests import bridged, routed, started, talk, write
from tests.kernel.test_shell import log, logged

MODES = {"routed": {"MODE": "routed", "IP": GUEST_IP4}, "bridged": {"MODE": "bridged", "LINK": "br0"}}


def ganeti(action: str, mode: str = "routed", **more: str) -> dict[str, str]:
    """The environment of 3.2's scripts."""
    return manager.ganeti("tap0", ACTION=action, **MODES[mode], **more)


def up(mode: str = "routed") -> None:
    """What Ganeti 3.2 calls when it starts a guest."""
    check(call("kvm-ifup-post", environ=ganeti("up", mode)), 0)


def down(mode: str = "routed") -> None:
    """What it calls when it has pressed the power button, and again later."""
    check(call("kvm-ifdown", environ=ganeti("down", mode)), 0)


def is_wired(mode: str = "routed") -> bool:
    """Whether the guest on tap0 has its network."""
    if not any(link["ifname"] == "tap0" for link in tools.ask("link")):
        return bool(tools.ask(f"neigh show proxy {GUEST_IP4} dev eth0"))
    link = oracle.link("tap0")
    assert (link["address"] == TAP_MAC) is ("UP" in link["flags"])
    if mode == "bridged":
        return link.get("master") == "br0"
    proxied = bool(tools.ask(f"neigh show proxy {GUEST_IP4} dev eth0"))
    assert bool(tools.ask(f"route show {GUEST_IP4}")) is proxied
    return proxied


@contextmanager
def running(node: Node, mode: str = "routed", *argv: str, resume: bool = True) -> Iterator[Path]:
    """A guest that Ganeti has started; its tap goes with its QEMU."""
    if mode == "bridged":
        nodes.add_bridge()
    nic = routed() if mode == "routed" else {**bridged(), "mac": routed()["mac"]}
    with started([nic], {"0": "tap0"}, *netdev(), *argv) as path:
        if resume:
            with talk(path) as ask:
                ask("cont")
        up(mode)
        assert is_wired(mode)
        yield path


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_that_shuts_down_keeps_its_network_until_its_end(uplinked: Node, mode: str) -> None:
    with agents.running():
        with running(uplinked, mode) as path, log() as lines:
            with talk(path) as ask:
                ask("system_powerdown")  # this guest takes no notice
            for _ in range(2):
                down(mode)
                assert is_wired(mode)
            assert sum("its guest still runs (QEMU says 'running')" in line for line in logged(lines)) == 2
        agents.until(lambda: not agents.STATE.joinpath("tap0.json").exists())
        assert not is_wired(mode)
        down(mode)


def test_without_an_agent_the_next_hook_clears_up(uplinked: Node) -> None:
    with running(uplinked):
        down()
    assert tools.ask(f"neigh show proxy {GUEST_IP4} dev eth0")
    check(call("kvm-ifup", "gc"), 0)
    assert not is_wired()


def test_a_reboot_does_not_cut_the_guest_off_either(uplinked: Node) -> None:
    with running(uplinked):
        down()
        assert is_wired()
    with running(uplinked):
        assert is_wired()


@pytest.mark.parametrize("how", ["busy", "gone", "not root's", "deaf"])
def test_a_qemu_that_cannot_be_asked_may_still_run_its_guest(
    uplinked: Node, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "PATIENCE", 0.2)
    with running(uplinked) as path, socket.socket(socket.AF_UNIX) as other, log() as lines:
        if how == "busy":
            other.connect(str(path))
            other.recv(1)
        elif how == "not root's":
            path.chmod(0o777)
        else:
            path.unlink()
            if how == "deaf":
                other.bind(str(path))
                path.chmod(0o700)
                other.listen()
        down()
        assert is_wired()
        assert any("does not say that the guest has gone" in line for line in logged(lines))
    check(call("kvm-ifup", "gc"), 0)
    assert not is_wired()


def test_a_qemu_whose_taps_cannot_be_seen_is_asked_all_the_same(uplinked: Node) -> None:
    """Without CAP_SYS_PTRACE nobody sees which descriptors another process has."""
    within = ["setpriv", "--bounding-set=-sys_ptrace"]
    with running(uplinked) as path:
        check(hook("kvm-ifdown", environ=ganeti("down"), within=within), 0)
        assert is_wired()
        with talk(path) as ask:
            ask("migrate", {"uri": "exec:cat >/dev/null"})
            agents.until(lambda: ask("query-status")["status"] == "postmigrate")
        check(hook("kvm-ifdown", environ=ganeti("down"), within=within), 0)
        assert not is_wired()


def test_a_paused_guest_may_go_on(uplinked: Node) -> None:
    with running(uplinked) as path:
        with talk(path) as ask:
            ask("stop")
        down()
        assert is_wired()


def test_a_guest_that_has_moved_away_is_taken_down(uplinked: Node) -> None:
    with running(uplinked) as path:
        with talk(path) as ask:
            ask("migrate", {"uri": "exec:cat >/dev/null"})
            agents.until(lambda: ask("query-status")["status"] == "postmigrate")
        down()
        assert not is_wired()


@pytest.mark.parametrize("argv", [[], ["-incoming", "unix:/run/migration"]], ids=["never began", "never came"])
def test_a_guest_that_was_never_here_is_taken_down(uplinked: Node, argv: list[str]) -> None:
    with running(uplinked, "routed", *argv, resume=False):
        down()
        assert not is_wired()


@pytest.mark.parametrize("who", ["a person", "another manager", "for another guest"])
def test_only_ganeti_has_to_wait(uplinked: Node, who: str) -> None:
    with running(uplinked):
        if who == "a person":
            check(call("kvm-ifdown", "tap0"), 0)
        elif who == "another manager":
            tools.run("rm", "-r", "/run/ganeti")
            down()
        else:
            write("nic/web2.example.com/0", "tap0")
            check(call("kvm-ifdown", environ=ganeti("down", INSTANCE="web2.example.com")), 0)
        assert is_wired() is (who == "for another guest")


def test_a_tap_that_another_guest_has_by_now_is_left_alone(uplinked: Node) -> None:
    with running(uplinked):
        pass
    with started([routed()], {"0": "tap0"}, *netdev(mac=FOREIGN_MAC)):
        nodes.add_bridge()
        environ = manager.ganeti("tap0", MODE="bridged", LINK="br0", INSTANCE="web2.example.com", MAC=FOREIGN_MAC)
        check(call("kvm-ifup-post", environ=environ), 0)
        down()
        assert oracle.link("tap0")["master"] == "br0"
