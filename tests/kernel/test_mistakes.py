"""What a person types by mistake: it is said what it is, nothing is invented, and nothing fails in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import agents, hooks, manager, nodes, snapshots, tools
from harness.addresses import GUEST_MAC
from harness.hooks import call, check
from harness.manager import RUN_DIR
from harness.nodes import Node

HOOKS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown")
OTHER_MAC = "aa:00:00:35:ac:77"
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
    ("web1/9.toml", ["is a path, not a tap", "give the name of a tap"]),
    ("web1/0", ["'web1/0' is a NIC, not a tap", "`PROGRAM tap0`"]),  # as messages name it
    ("web1/0 (tap0)", ["is a NIC, not a tap", "`PROGRAM tap0`"]),
    ("./tap0", ["is a path, not a tap", "`PROGRAM tap0`"]),
    ("/sys/class/net/tap7", ["is a path, not a tap", "`PROGRAM tap7`"]),
    ("--instance=web1/0", ["is a NIC, not a guest", "`PROGRAM tap0`"]),
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
        (["wbe1"], "did you mean `PROGRAM --instance web1`?"),
        (["web1.toml"], "did you mean `PROGRAM --instance web1`?"),
        (["--instance", "tpa0"], "did you mean `PROGRAM tap0`?"),
        (["tap9"], "nothing describes this tap"),  # another number is another tap
        (["tap7"], "nothing describes this tap"),
    ],
)
def test_a_misspelt_name_is_guessed(inhabited: Node, program: str, argv: list[str], word: str) -> None:
    result = call(program, *argv)
    check(result, 65, word.replace("PROGRAM", program))
    assert ("did you mean" in result.err) == ("did you mean" in word)


@pytest.mark.parametrize("verb", ["show", "check"])
@pytest.mark.parametrize("name", ["tap0", "web1", "web1/0", "web1/0 (tap0)"])
def test_show_and_check_take_a_nic_as_they_name_it(inhabited: Node, verb: str, name: str) -> None:
    (one,) = listed(verb, name)
    assert (one["instance"], one["tap"]) == ("web1", "tap0")


def listed(verb: str, *names: str) -> list[dict[str, Any]]:
    """The NICs that show or check tells of."""
    found: Any = json.loads(call("kvm-ifup", verb, "--json", *names).out)
    nics: list[dict[str, Any]] = found if verb == "show" else found["nics"]
    return nics


@pytest.mark.parametrize("place", ["db2.toml", "db2/0", "db2/0.tml"])
def test_a_nic_file_where_nobody_looks_for_it_is_found_for_the_hint(inhabited: Node, place: str) -> None:
    program = "kvm-ifup-pre"
    file = RUN_DIR / "nic" / place
    file.parent.mkdir(exist_ok=True)
    file.write_text((RUN_DIR / "nic/web1/0.toml").read_text().replace("tap0", "tap7").replace(GUEST_MAC, OTHER_MAC))
    check(call(program, "tap7"), 65, f"{file} is no NIC file: move it to {RUN_DIR}/nic/INSTANCE/0.toml")
    check(call(program, "tap6"), 65, "nothing describes this tap", f"write {RUN_DIR}/nic")
    if place == "db2.toml":
        check(call(program, "--instance", "db2"), 65, f"{file} is no NIC file")
    (RUN_DIR / "nic/db2").mkdir(exist_ok=True)
    file.rename(RUN_DIR / "nic/db2/0.toml")
    check(call(program, "tap7"), 0)


@pytest.mark.parametrize("verb", ["show", "check"])
def test_looking_for_a_misspelt_name(inhabited: Node, verb: str) -> None:
    check(call("kvm-ifup", verb, "tpa0"), 65, "did you mean tap0?")
    check(call("kvm-ifup", verb, "bd1"), 65, "did you mean db1?")
    check(call("kvm-ifup", verb, "nobody"), 65, "`kvm-ifup show` lists all")


# --- kvm-ifdown of what nobody knows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("kvm-ifdown --plan tap9", "no journal and no NIC file is about it"),
        ("kvm-ifdown --plan --instance wbe1", "did you mean web1?"),
        ("kvm-ifup plan down tpa0", "did you mean tap0?"),
        ("kvm-ifup plan down wbe1", "did you mean web1?"),
    ],
)
def test_a_plan_for_what_nobody_knows_says_so(inhabited: Node, line: str, word: str) -> None:
    result = call(*line.split())
    assert (result.code, "nobody knows it" in result.err, word in result.err) == (0, True, True), result.err


@pytest.mark.parametrize(
    ("phase", "hook"), [("pre", "kvm-ifup-pre"), ("post", "kvm-ifup-post"), ("down", "kvm-ifdown")]
)
def test_who_asks_for_a_plan_is_not_told_to_do_it(inhabited: Node, phase: str, hook: str) -> None:
    result = call("kvm-ifup", "plan", phase, "web1/0")
    check(result, 64, "is a NIC", f"`kvm-ifup plan {phase} tap0`")
    assert hook not in result.err


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
    assert told.err.startswith(f"kvm-ifdown: {argv[-1]}: nobody knows it, so nothing is undone")


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


def test_gc_that_has_nothing_to_do_says_so_if_asked(inhabited: Node) -> None:
    result = call("kvm-ifup", "gc", "-v")
    assert (result.code, result.err.splitlines()[-1]) == (0, "nothing to do")


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
        ("check --nodes", ["no option '--nodes'", "did you mean --node?"]),
        ("--jsno show", ["no option '--jsno'", "did you mean --json?"]),
        ("show --all", ["no option '--all'", "kvm-ifup show --help"]),
        ("nic list web1 web2", ["'web2' is one argument too many", "kvm-ifup nic list --help"]),
        ("plan", ["pre|post|down, INSTANCE|TAP", "kvm-ifup plan --help"]),
    ],
)
def test_kvm_ifup_says_what_may_have_been_meant(node: Node, line: str, words: Sequence[str]) -> None:
    check(call("kvm-ifup", *line.split()), 64, *words)


@pytest.mark.parametrize(
    ("line", "code"),
    [("plan post -- --", 65), ("nic put -- -- 0 -- --", 64), ("watch --trace=--", 69)],
)
def test_two_dashes_are_a_name_like_any_other(node: Node, line: str, code: int) -> None:
    check(call("kvm-ifup", *line.split()), code)


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
    assert call("kvm-ifup", *line.split()).code == 0
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


@pytest.mark.parametrize("fault", ["of a key", "of its mode"])
def test_a_wrong_file_is_named_itself_and_not_the_symlink_to_it(node: Node, fault: str) -> None:
    check(put("web1", 0, "tap0"), 0)
    file = RUN_DIR / "nic/web1/0.toml"
    if fault == "of a key":
        file.write_text(file.read_text() + "vln = 1\n")
    else:
        file.chmod(0o666)
    for program in HOOKS:
        check(call(program, "tap0"), 65, f"{program}: {file}: ")
    check(call("kvm-ifup", "plan", "post", "tap0"), 65, f"kvm-ifup: {file}: ")


@pytest.mark.parametrize("how", ["its own symlink", "no symlink", "another's symlink"])
def test_a_tap_that_two_files_describe_is_wired_only_if_its_symlink_says_whose(node: Node, how: str) -> None:
    nodes.add_bridge()
    nodes.add_tap("tap0")
    check(put("web1", 0, "tap0"), 0)
    check(call("kvm-ifup-pre", "tap0"), 0)
    copied = RUN_DIR / "nic/web2/0.toml"
    copied.parent.mkdir()
    copied.write_text((RUN_DIR / "nic/web1/0.toml").read_text().replace(GUEST_MAC, OTHER_MAC))
    if how != "another's symlink":
        (RUN_DIR / "tap/tap0").unlink()
    if how == "its own symlink":
        (RUN_DIR / "tap/tap0").symlink_to("../nic/web2/0.toml")
        check(call("kvm-ifup-pre", "--instance", "web2"), 0)
        return
    before = snapshots.snapshot()
    said = f"tap0 is that of web1/0 (tap0) already, described in {RUN_DIR}/nic/web1/0.toml"
    check(call("kvm-ifup-pre", "--instance", "web2"), 65, said, "`kvm-ifup nic rm web1 0`")
    check(call("kvm-ifup", "plan", "post", "web2"), 65, said)
    assert snapshots.changes(before, snapshots.snapshot()) == []
    check(call("kvm-ifup", "nic", "rm", "web1", "0"), 0)
    check(call("kvm-ifup-pre", "--instance", "web2"), 0)


@pytest.mark.parametrize("wired", [True, False])
def test_show_and_check_have_every_file_of_a_tap(node: Node, wired: bool) -> None:
    nodes.add_bridge()
    nodes.add_tap("tap0")
    check(put("web1", 0, "tap0"), 0)
    if wired:
        check(call("kvm-ifup-pre", "tap0"), 0)
    copied = RUN_DIR / "nic/web2/0.toml"
    copied.parent.mkdir()
    copied.write_text((RUN_DIR / "nic/web1/0.toml").read_text().replace(GUEST_MAC, OTHER_MAC))
    for verb in ("show", "check"):
        first, second = listed(verb)
        assert (first["instance"], first["phase"]) == ("web1", "post" if wired else "none")
        assert (second["instance"], second["wired"], second["phase"]) == ("web2", False, "none")
        assert second["problem"]["cause"].startswith("tap0 is that of web1/0 (tap0) already, described in ")
        assert [one["instance"] for one in listed(verb, "web2")] == ["web2"]
    if wired:
        return
    (RUN_DIR / "tap/tap0").unlink()  # nobody says any more whose it is
    assert [one["problem"]["cause"][:22] for one in listed("show")] == [
        "tap0 is that of web2/0",
        "tap0 is that of web1/0",
    ]


def test_a_file_for_a_tap_that_is_wired_for_somebody_else(node: Node) -> None:
    nodes.add_bridge()
    nodes.add_tap("tap0")
    check(put("web1", 0, "tap0"), 0)
    manager.write_nic("tap0", "web2", mac=OTHER_MAC, mode="bridged", link="br0")
    check(call("kvm-ifup-pre", "tap0"), 0)
    check(call("kvm-ifup", "nic", "rm", "web2"), 0)
    check(put("web1", 0, "tap0"), 0)
    one, other = listed("show")
    assert (one["instance"], one["wired"], other["instance"], other["wired"]) == ("web1", None, "web2", True)
    assert one["problem"]["cause"] == "tap0 is wired for another NIC, web2/0 (tap0)"
    assert [finding["why"] for finding in listed("check", "web1")[0]["findings"]] == [""]
    check(call("kvm-ifdown", "tap0"), 0)  # what it says mends it
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert [(one["instance"], one["wired"]) for one in listed("show")] == [("web1", True)]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("mode = bridged", 'write mode = "bridged"'),
        ("mac = aa:00:00:35:ac:01", 'write mac = "aa:00:00:35:ac:01"'),
        ("link = “br0”", 'write link = "br0"'),
        ("ip = 192.0.2.8", 'write ip = ["192.0.2.8"]'),
        ("incoming = yes", "write incoming = true, or incoming = false"),
        ('incoming = "true"', "like incoming = true"),
    ],
)
def test_a_line_without_its_quotes_is_written_right_by_the_hint(node: Node, line: str, hint: str) -> None:
    right = {"tap": '"tap0"', "mac": f'"{GUEST_MAC}"', "mode": '"bridged"', "link": '"br0"', "incoming": "true"}
    key = line.partition(" ")[0]
    lines = [f"{one} = {value}" for one, value in right.items() if one != key]
    file = Path("/run/given.toml")
    file.write_text("\n".join([*lines, line, ""]))
    check(call("kvm-ifup", "nic", "put", "web1", "0", str(file)), 65, f"({hint})")
    mended = hint.removeprefix("write ").removeprefix("like ").partition(",")[0]
    file.write_text("\n".join([*lines, mended, ""]))
    check(call("kvm-ifup", "nic", "put", "web1", "0", str(file)), 0)


@pytest.mark.parametrize(
    ("tap", "word"),
    [("br0", "tap br0 is a bridge"), ("eth0", "tap eth0 is another network device"), ("tap%d", "is a pattern")],
)
def test_put_refuses_what_can_be_no_tap(uplinked: Node, tap: str, word: str) -> None:
    nodes.add_bridge()
    check(put("web1", 0, tap), 65, word)
    assert not (RUN_DIR / "nic/web1/0.toml").exists()
    if "%" not in tap:  # somebody has written it by hand
        manager.write_nic(tap, "web1", mode="bridged", link="br0")
        (one,) = listed("check")
        assert [(f["what"], f["why"]) for f in one["findings"]] == [(f"{tap} is there, but is not a tap", "")]


def test_put_refuses_what_no_hook_could_read(node: Node) -> None:
    file = b'tap = "tap0"\nmac = "aa:00:00:35:ac:01"\nmode = "bridged"\nlink = "br0" # \xe4\n'
    Path("/run/given.toml").write_bytes(file)
    with Path("/run/given.toml").open("rb") as given:
        process = hooks.start("kvm-ifup", "nic", "put", "web1", "0", "-", stdin=given)
        assert process.wait(tools.PATIENCE) == 65
    check(call("kvm-ifup", "nic", "put", "web1", "0", "/run/given.toml"), 65, "it is not UTF-8")
    assert not (RUN_DIR / "nic/web1/0.toml").exists()


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["wbe1"], "did you mean web1?"),
        (["tap0"], "tap0 is a tap, not a guest"),
        (["web1", "7"], "it has 0"),
        (["nobody"], "no NIC file is about it"),
    ],
)
def test_rm_of_what_is_not_there_succeeds_and_says_so_if_asked(inhabited: Node, argv: list[str], word: str) -> None:
    check(call("kvm-ifup", "nic", "rm", *argv), 0)
    told = call("kvm-ifup", "nic", "rm", "-v", *argv)
    assert (told.code, "nothing to remove" in told.err, word in told.err) == (0, True, True), told.err


@pytest.mark.parametrize(
    ("mode", "link", "word"),
    [
        ("routed", "br0", "link of a routed NIC is a routing table's number"),
        ("routed", "eth0", "link of a routed NIC is a routing table's number"),
        ("bridged", "100", "link of a bridged NIC is a Linux bridge"),
        ("bridged", "eth0", "link of a bridged NIC is a Linux bridge"),
    ],
)
def test_a_link_of_another_kind_is_said_to_be_that(uplinked: Node, mode: str, link: str, word: str) -> None:
    nodes.add_bridge()
    nodes.add_tap("tap0")
    manager.write_nic("tap0", "web1", mode=mode, link=link, ip=["192.0.2.8"])
    check(call("kvm-ifup-pre", "tap0"), 69, word)


# --- files that are not to be trusted -------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["chmod 666 FILE", "chown 1000 FILE", "chmod 777 DIRECTORY", "chown 1000 DIRECTORY"])
def test_who_wrote_a_file_that_is_not_trusted_is_asked_before_it_is(inhabited: Node, fault: str) -> None:
    file = RUN_DIR / "nic/db1/0.toml"
    wrong = file if "FILE" in fault else file.parent
    tools.run(*fault.replace("FILE", str(file)).replace("DIRECTORY", str(file.parent)).split())
    result = call("kvm-ifup-pre", "tap1")
    check(result, 65, "see what others have put there", f"`chown root {wrong}; chmod go-w {wrong}`")
    tools.run("sh", "-c", result.err.partition("`")[2].partition("`")[0])
    check(call("kvm-ifup-pre", "tap1"), 0)


@pytest.mark.parametrize(("made", "hint"), [("symlink", "no symlink to it"), ("directory", "put one there")])
def test_no_owner_is_blamed_for_a_file_that_is_not_trusted_for_another_reason(
    inhabited: Node, made: str, hint: str
) -> None:
    file = RUN_DIR / "nic/db1/0.toml"
    file.rename("/run/elsewhere.toml")
    file.symlink_to("/run/elsewhere.toml") if made == "symlink" else file.mkdir()
    result = call("kvm-ifup-pre", "tap1")
    check(result, 65, hint)
    assert "chown" not in result.err
    told = call("kvm-ifup", "check", "--node").out
    assert "chown" not in told
    assert made == "directory" or hint in told  # an empty directory is no file


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
