"""What a person types by mistake: it is said what it is, nothing is invented, and nothing fails in silence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import agents, hooks, manager, nodes, snapshots, tools
from harness.addresses import GUEST_MAC
from harness.hooks import call, check
from harness.manager import RUN_DIR
from harness.nodes import Node

HOOKS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown")
LONG = "web1.example.com"  # longer than a device's name can be


@pytest.fixture
def inhabited(uplinked: Node) -> Node:
    """web1 is wired on tap0, db1 only described on tap1, and there is a tap7 that nothing describes."""
    nodes.add_bridge()
    for tap in ("tap0", "tap1", "tap7"):
        nodes.add_tap(tap)
    manager.write_nic("tap0", "web1", mode="bridged", link="br0")
    manager.write_nic("tap1", "db1", mode="bridged", link="br0")
    manager.write_nic("tap2", LONG, mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    return uplinked


# --- a name of something else --------------------------------------------------------------------------------

OF_A_HOOK: Sequence[tuple[str, Sequence[str]]] = (
    ("web1", ["web1", "is a guest, not a tap", "PROGRAM --instance web1"]),
    ("db1", ["is a guest, not a tap"]),
    (LONG, ["is a guest, not a tap", f"--instance {LONG}"]),
    ("br0", ["br0 is a bridge, not a guest's tap", "kvm-ifup show"]),
    ("eth0", ["eth0 is another network device, not a guest's tap"]),
    ("/run/kvm-ifup/nic/web1/0.toml", ["is a NIC file, not a tap", "`PROGRAM tap0`"]),
    ("nic/web1/0.toml", ["is a NIC file", "`PROGRAM tap0`"]),
    ("web1/9.toml", ["is a path, not a tap"]),
    ("--instance=tap0", ["tap0 is a tap, not a guest", "`PROGRAM tap0`"]),
    ("--instance=tap7", ["tap7 is a tap, not a guest"]),
    ("--instance=br0", ["br0 is a bridge, not a guest"]),
    ("--instance=eth0", ["eth0 is another network device, not a guest"]),
)


@pytest.mark.parametrize("program", HOOKS)
@pytest.mark.parametrize(("argument", "words"), OF_A_HOOK)
def test_a_name_of_something_else_is_told_apart(
    inhabited: Node, program: str, argument: str, words: Sequence[str]
) -> None:
    before = snapshots.snapshot()
    files = sorted(RUN_DIR.rglob("*"))
    check(call(program, argument), 64, *(word.replace("PROGRAM", program) for word in words))
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert {path.name for path in set(RUN_DIR.rglob("*")) - set(files)} <= {"lock", "state"}


@pytest.mark.parametrize("phase", ["pre", "post", "down"])
@pytest.mark.parametrize(("name", "words"), [("br0", ["is a bridge"]), ("eth0", ["another network device"])])
def test_plan_tells_them_apart_too(inhabited: Node, phase: str, name: str, words: Sequence[str]) -> None:
    check(call("kvm-ifup", "plan", phase, name), 64, *words)
    check(call("kvm-ifup", "plan", phase, "web1"), 0)


def test_a_guest_of_which_only_the_journal_is_left(inhabited: Node) -> None:
    check(call("kvm-ifup", "nic", "rm", "web1"), 0)
    for program in HOOKS:
        check(call(program, "web1"), 64, "is a guest, not a tap")
    check(call("kvm-ifdown", "--instance", "web1"), 0)


def test_a_device_that_has_a_guests_name_is_the_tap(inhabited: Node) -> None:
    nodes.add_tap("web1")
    manager.write_nic("web1", "other", mode="bridged", link="br0")
    check(call("kvm-ifup-post", "web1"), 0)
    check(call("kvm-ifdown", "web1"), 0)


# --- a name that is misspelt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("program", HOOKS[:2])
@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["tpa0"], "did you mean tap0?"),
        (["--instance", "wbe1"], "did you mean web1?"),
        (["--instance", "web1.exmaple.com"], f"did you mean {LONG}?"),
        (["tap9"], "nothing describes this tap"),  # another number is another tap
        (["tap7"], "nothing describes this tap"),
    ],
)
def test_a_misspelt_name_is_guessed(inhabited: Node, program: str, argv: list[str], word: str) -> None:
    result = call(program, *argv)
    check(result, 65, word)
    assert ("did you mean" in result.err) == ("did you mean" in word)


@pytest.mark.parametrize("verb", ["show", "check"])
def test_looking_for_a_misspelt_name(inhabited: Node, verb: str) -> None:
    check(call("kvm-ifup", verb, "tpa0"), 65, "did you mean tap0?")
    check(call("kvm-ifup", verb, "bd1"), 65, "did you mean db1?")
    check(call("kvm-ifup", verb, "nobody"), 65, "`kvm-ifup show` lists all")


# --- kvm-ifdown of what nobody knows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["tap9"], "no journal and no NIC file is about it"),
        (["tpa0"], "did you mean tap0?"),
        (["--instance", "wbe1"], "did you mean web1?"),
        (["tap7"], "nobody knows it"),
    ],
)
def test_ifdown_of_what_nobody_knows_succeeds_and_says_so_if_asked(inhabited: Node, argv: list[str], word: str) -> None:
    check(call("kvm-ifdown", *argv), 0)
    told = call("kvm-ifdown", "-v", *argv)
    assert (told.code, word in told.err) == (0, True), told.err
    assert told.err.startswith(f"kvm-ifdown: {argv[-1]}: nothing to undo")


def test_ifdown_tells_a_person_at_a_terminal_unasked(inhabited: Node) -> None:
    ours, theirs = os.openpty()
    with agents.running():
        process = hooks.start("kvm-ifdown", "tpa0", stderr=theirs)
    assert process.wait(tools.PATIENCE) == 0
    assert "did you mean tap0?" in os.read(ours, 1000).decode()
    os.close(ours)
    os.close(theirs)


def test_ifdown_once_more_is_no_mistake(inhabited: Node) -> None:
    check(call("kvm-ifdown", "tap0"), 0)
    manager_forgot = call("kvm-ifup", "nic", "rm", "web1")
    check(manager_forgot, 0)
    again = call("kvm-ifdown", "-v", "tap0")
    assert (again.code, "nobody knows" in again.err) == (0, False)


# --- kvm-ifup ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tap0", ["'tap0' is no subcommand", "kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"]),
        ("web1", ["no subcommand", "kvm-ifup-post"]),
        ("post tap0", ["'post' is no subcommand", "`kvm-ifup-post TAP`"]),
        ("pre tap0", ["`kvm-ifup-pre TAP`"]),
        ("down tap0", ["`kvm-ifdown TAP`"]),
        ("sohw", ["did you mean show?"]),
        ("plan tap0 post", ["'tap0' is no phase", "plan pre|post|down INSTANCE|TAP"]),
        ("nic lits", ["did you mean list?"]),
        ("nic add web1 0 -", ["'add' is not known here", "put, list, rm"]),
        ("check --nodes", ["--nodes"]),
    ],
)
def test_kvm_ifup_says_what_may_have_been_meant(node: Node, line: str, words: Sequence[str]) -> None:
    check(call("kvm-ifup", *line.split()), 64, *words)


@pytest.mark.parametrize(
    "line", ["show", "check", "check --node", "gc", "gc --plan", "plan down tap0", "nic list", "watch"]
)
def test_a_run_directory_that_is_not_there_is_a_mistake_and_is_not_made(node: Node, line: str) -> None:
    check(call("kvm-ifup", *line.split(), "--run-dir", "/run/elsewhere"), 64, "there is no run directory")
    assert not Path("/run/elsewhere").exists()


@pytest.mark.parametrize("program", HOOKS)
@pytest.mark.parametrize("argv", [["tap0"], ["--instance", "web1"], ["--plan", "tap0"]])
def test_a_hook_that_has_nothing_to_do_makes_no_run_directory(node: Node, program: str, argv: list[str]) -> None:
    result = call(program, *argv, "--run-dir", "/run/elsewhere")
    assert result.code == (0 if program == "kvm-ifdown" else 65)
    assert not Path("/run/elsewhere").exists()
    call(program, *argv)
    assert not RUN_DIR.exists()


@pytest.mark.parametrize("line", ["show", "check", "gc", "plan down tap0", "nic list"])
def test_the_usual_run_directory_is_not_made_by_looking(node: Node, line: str) -> None:
    check(call("kvm-ifup", *line.split()), 0)
    assert not RUN_DIR.exists()


# --- NIC files -----------------------------------------------------------------------------------------------


def put(instance: str, index: int, tap: str) -> hooks.Result:
    """A bridged NIC."""
    file = Path("/run/given.toml")
    file.write_text(f'tap = "{tap}"\nmac = "{GUEST_MAC}"\nmode = "bridged"\nlink = "br0"\n')
    return call("kvm-ifup", "nic", "put", instance, str(index), str(file))


def described(tap: str) -> str:
    """The NIC file to which the symlink of *tap* leads."""
    return str((RUN_DIR / "tap" / tap).resolve())


@pytest.mark.parametrize(("instance", "index"), [("web2", 0), ("web1", 1)])
@pytest.mark.parametrize("found", ["by its symlink", "without one", "with an escape"])
def test_put_takes_no_tap_away(node: Node, instance: str, index: int, found: str) -> None:
    check(put("web1", 0, "tap0"), 0)
    file = RUN_DIR / "nic/web1/0.toml"
    if found != "by its symlink":
        (RUN_DIR / "tap/tap0").unlink()
    if found == "with an escape":
        file.write_text(file.read_text().replace('"tap0"', '"\\u0074ap0"'))
    check(put(instance, index, "tap0"), 65, f"tap0 is that of web1/0 (tap0) already, described in {file}", "rm web1 0")
    assert file.exists()
    assert not (RUN_DIR / f"nic/{instance}/{index}.toml").exists()
    check(call("kvm-ifup", "nic", "rm", "web1", "0"), 0)
    check(put(instance, index, "tap0"), 0)
    assert described("tap0").endswith(f"/{instance}/{index}.toml")


def test_put_of_the_same_nic_again_and_of_another_tap(node: Node) -> None:
    for tap in ("tap0", "tap0", "tap1", "tap0"):
        check(put("web1", 0, tap), 0)
    check(put("web2", 0, "tap1"), 0)
    check(put("web1", 0, "tap1"), 65, "is that of web2/0 (tap1) already")
    assert described("tap0").endswith("/web1/0.toml")


def test_a_wrong_file_of_another_guest_does_not_stop_put(node: Node) -> None:
    manager.write_nic("tap0", "web1", mode="nonsense")
    check(put("web2", 0, "tap0"), 0)


def test_rm_refuses_what_another_guests_file_leads_to(node: Node) -> None:
    check(put("web1", 0, "tap0"), 0)
    other = RUN_DIR / "nic/web2/0.toml"
    other.parent.mkdir()
    other.symlink_to("../web1/0.toml")
    for argv in (["web1"], ["web1", "0"]):
        check(call("kvm-ifup", "nic", "rm", *argv), 65, f"{other} leads to it", "nic rm web2 0")
    assert (RUN_DIR / "nic/web1/0.toml").exists()
    check(call("kvm-ifup", "nic", "rm", "web2", "0"), 0)
    assert described("tap0").endswith("/web1/0.toml")
    check(call("kvm-ifup", "nic", "rm", "web1"), 0)


@pytest.mark.parametrize("to", ["/run/kvm-ifup/nic/web1/0.toml", "../tap/../nic/web1/0.toml"])
def test_rm_leaves_no_symlink_that_leads_nowhere(node: Node, to: str) -> None:
    check(put("web1", 0, "tap0"), 0)
    (RUN_DIR / "tap/tap5").symlink_to(to)
    check(call("kvm-ifup", "nic", "rm", "web1", "0"), 0)
    assert list((RUN_DIR / "tap").iterdir()) == []
