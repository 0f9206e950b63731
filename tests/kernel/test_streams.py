"""Standard streams that are full, closed, or read by nobody: they change nothing about how a command ends."""

from __future__ import annotations

import subprocess

import pytest

from harness import agents, hooks, manager, nodes, oracle, tools
from harness.addresses import GUEST_IP4
from harness.agents import STATE
from harness.hooks import check, hook
from harness.nodes import Node

pytestmark = pytest.mark.userns  # what is opened, and as whom

WAYS = {
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "both full": ">/dev/full 2>&1",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "nobody reads": "| true",
}
COMMANDS = [
    (["kvm-ifup-post", "tap0", "-v", "--json"], 0),
    (["kvm-ifup-post", "tap7"], 65),
    (["kvm-ifup-pre", "--nonsense"], 64),
    (["kvm-ifup-pre", "--plan", "tap0"], 0),
    (["kvm-ifdown", "tap0", "-v"], 0),
    (["kvm-ifup", "show", "--json"], 0),
    (["kvm-ifup", "plan", "post", "tap0"], 0),
    (["kvm-ifup", "check", "tap7"], 65),
    (["kvm-ifup", "gc", "-v"], 0),
    (["kvm-ifup", "nic", "list"], 0),
    (["kvm-ifup", "nic", "put", "web1", "0", "/nonexistent"], 64),
    (["kvm-ifup", "--version"], 0),
    (["kvm-ifup", "--help"], 0),
    (["kvm-ifupd", "--version"], 0),
    (["kvm-ifupd", "--nonsense"], 64),
]


def in_shell(argv: list[str], way: str) -> int:
    """The exit code of a command whose streams are redirected like that."""
    line = f'"$@" {way}' if "|" not in way else f'{{ "$@"; echo $? >/run/code; }} {way}; exit $(cat /run/code)'
    shell = ["bash", "-c", f"set -o pipefail; {line}", "bash", *hooks.command(*argv)]
    done = subprocess.run(shell, env=tools.CLEAN, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_stream_that_takes_nothing_does_not_change_the_exit_code(uplinked: Node, way: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    for argv, code in COMMANDS:
        assert in_shell(argv, way) == code, argv
    assert oracle.routes("tap0") == set()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_through_the_agent_it_does_not_either(uplinked: Node, way: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    with agents.running():
        for argv, code in (*COMMANDS[:2], *COMMANDS[4:7]):
            assert in_shell(argv, way) == code, argv


def test_no_file_gets_the_output_that_a_closed_stream_would_have_got(uplinked: Node) -> None:
    """A descriptor below 3 that is free goes to the next file that is opened: a journal, a lock."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    assert in_shell(["kvm-ifup-post", "tap0", "-vv", "--json"], "<&- >&- 2>&-") == 0
    assert "tap0: routed" not in (STATE / "tap0.json").read_text()
    assert b"tap0" not in (manager.RUN_DIR / "lock" / "uplink").read_bytes()
    check(hook("kvm-ifdown", "tap0"), 0)


@pytest.mark.parametrize("agent", [False, True])
def test_output_that_is_lost_is_said(uplinked: Node, agent: bool) -> None:
    def shown() -> str:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                hooks.command("kvm-ifup", "show"), env=tools.CLEAN, stdin=subprocess.DEVNULL, stdout=full,
                stderr=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
        return done.stderr

    if agent:
        with agents.running():
            assert shown() == "kvm-ifup: stdout: No space left on device\n"
    else:
        assert shown() == "kvm-ifup: stdout: No space left on device\n"


def test_a_locale_that_lacks_a_character_changes_nothing(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(instance="gästin", mode="routed", ip=[GUEST_IP4])
    found = hook("kvm-ifup", "show", environ={"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"})
    assert (found.code, found.err) == (0, "")


# --- what the fuzzer found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, {"INSTANCE": "web1.example.com"}, {"TAGS": "", "VLAN": ""}])
@pytest.mark.parametrize("wired", [False, True])
def test_kvm_ifdown_needs_no_more_than_the_name(uplinked: Node, environ: dict[str, str], wired: bool) -> None:
    nodes.add_tap()
    if wired:
        manager.write_nic(mode="routed", ip=[GUEST_IP4])
        check(hook("kvm-ifup-post", "tap0"), 0)
        check(hook("kvm-ifup", "nic", "rm", "web1.example.com"), 0)
        assert oracle.routes("tap0") == {GUEST_IP4}
    check(hook("kvm-ifdown", environ={"INTERFACE": "tap0", **environ}), 0)
    assert oracle.routes("tap0") == set()


def test_kvm_ifdown_by_name_takes_what_a_nic_file_says(uplinked: Node) -> None:
    """Another script has wired it, and the environment says no more than which tap."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    tools.ip("link set tap0 up")
    tools.ip(f"route add {GUEST_IP4} dev tap0")
    check(hook("kvm-ifdown", environ={"INTERFACE": "tap0"}), 0)
    assert oracle.routes("tap0") == set()


def test_half_a_description_is_still_an_error_and_so_is_none_for_a_start(uplinked: Node) -> None:
    nodes.add_tap()
    check(hook("kvm-ifdown", environ={"INTERFACE": "tap0", "MODE": "routed"}), 65, "MAC")
    check(hook("kvm-ifup-post", environ={"INTERFACE": "tap0"}), 65, "MODE and MAC")
