"""`kvm-ifup show`, `plan`, `nic` and `check --node`, and the line that a hook leaves in the system's log."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import agents, disturb, hooks, manager, namespaces, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC, TAP_MAC
from harness.hooks import call, call_in_child, check, hook
from harness.manager import RUN_DIR
from harness.nodes import Node
from harness.oracle import sysctl
from tests.kernel.staging import Scene, scenes
from tests.kernel.test_openvswitch import switch, vsctl  # noqa: F401 (a fixture)

HOOKS = {"pre": "kvm-ifup-pre", "post": "kvm-ifup-post", "down": "kvm-ifdown"}

# --- plan: the commands ------------------------------------------------------------------------------------


def commands(phase: str, name: str = "tap0") -> list[str]:
    """The commands that `kvm-ifup plan` prints."""
    result = call("kvm-ifup", "plan", phase, name)
    check(result, 0)
    found = hooks.printed(result.out)
    as_json = json.loads(call("kvm-ifup", "plan", phase, name, "--json").out)
    assert [shlex.split(line) for line in found] == [
        shlex.split(line.replace("\n", f"\n{' ' * 11}"))  # the text has them below their change
        for one in as_json
        for op in (*one["undone"], *one["ops"])
        if op["command"] is not None
        for line in op["command"].split("; ")
    ]
    # One for nft has a line for each thing that it does; one for Open vSwitch is one line.
    assert max(len(line) for line in result.out.splitlines() if " ovs-vsctl " not in line) < 250
    return found


LAST_ONES = (
    "nft list map bridge kvm-ifup guests | grep -q goto || "
    "nft 'delete table bridge kvm-ifup;delete table netdev kvm-ifup'",
    "nft list table inet kvm-ifup | grep -q elements || nft 'delete table inet kvm-ifup'",
)


def by_hand(lines: list[str]) -> None:
    """Type them: each is one command, with nothing for a shell to expand. (Some are for the last NIC of its kind.)"""
    for line in lines:
        if line not in LAST_ONES:
            assert not re.search(r"[;&|<>$`*?(){}\n]", re.sub("'[^']*'", "", line))
            tools.run(*shlex.split(line))
        else:
            tools.run("sh", "-c", line)


def state() -> snapshots.Snapshot:
    """All but what the kernel does by itself a moment later."""
    return snapshots.snapshot_of_kernel()


@pytest.mark.parametrize("scene", scenes(), ids=str)
@pytest.mark.parametrize("phase", ["pre", "post", "down"])
def test_the_printed_commands_make_what_the_hook_makes(scene: Scene, phase: str) -> None:
    made = []
    for hand in (False, True):
        with nodes.fresh_node() as node:
            node.uplink()
            scene.set_up()
            if phase == "down":
                check(call(scene.program, "tap0"), 0)
            before = snapshots.snapshot()
            if hand:
                lines = commands(phase)
                assert lines or scene.earlier == f"kvm-ifup-{phase}"
                assert snapshots.changes(before, snapshots.snapshot()) == []
                by_hand(lines)
            else:
                check(call(HOOKS[phase], "tap0"), 0)
            made.append(state())
    assert snapshots.changes(*made) == []


@pytest.mark.parametrize("nic", ["bridged", "routed"])
@pytest.mark.parametrize("phase", ["pre", "down"])
def test_the_printed_commands_take_the_node_the_hooks_way(nic: str, phase: str) -> None:
    """A tap that moves leaves its bridge before anything else: the MTU that it gets would become that bridge's."""
    scene = Scene(nic, "elsewhere")
    ways = []
    for hand in (False, True):
        way: list[list[str]] = []
        with nodes.fresh_node() as node:
            node.uplink()
            scene.set_up()
            if phase == "down":
                check(call("kvm-ifup-post", "tap0"), 0)
            before = state()

            def note(_number: int, _op: object, before: Any = before, way: list[list[str]] = way) -> None:
                way.append(snapshots.changes(before, state()))

            if hand:
                for line in commands(phase):
                    by_hand([line])
                    note(0, None)
            else:
                with disturb.disturbed(after=note):
                    check(call(HOOKS[phase], "tap0"), 0)
        ways.append([found for found, previous in zip(way, [[], *way], strict=False) if found != previous])
    steps = iter(ways[1])
    assert all(found in steps for found in ways[0])  # a command may do a part of what the hook writes at once
    assert ways[0][-1] == ways[1][-1]
    first = [line for line in ways[1][0] if line.startswith("-") and "br1" in line]
    assert first or phase == "down", "it leaves br1 first"


def test_what_nics_share_is_printed_once_and_loads_in_a_shell(uplinked: Node) -> None:
    """Whatever of it is typed, as it stands in the plan: it is one script."""
    nodes.add_bridge()
    nics: dict[str, dict[str, Any]] = {
        "tap0": {"mode": "bridged", "link": "br0", "ip": [GUEST_IP4], "filter": "address"},
        "tap1": {"mode": "bridged", "link": "br0", "filter": "mac"},
        "tap2": {"mode": "routed", "ip": ["192.0.2.9", "2001:db8::9"]},
        "tap3": {"mode": "routed", "ip": ["192.0.2.10", "2001:db8::a"]},
    }
    for number, (tap, nic) in enumerate(nics.items()):
        nodes.add_tap(tap)
        manager.write_nic(tap, "web1", number, mac=f"aa:00:00:35:ac:0{number}", **nic)
    said = call("kvm-ifup", "plan", "post", "web1").out
    for table in ("bridge", "netdev", "inet"):
        assert [line.strip() for line in said.splitlines()].count(f"add table {table} kvm-ifup") == 1
    script = "\n".join(line for line in said.splitlines() if line.startswith(" " * 11))
    tools.run("sh", "-ec", script)
    ran = call("kvm-ifup-post", "--instance", "web1", "--plan", "--json")
    assert {one[1] for one in ran.needed if "announce" not in one[1]} == set()


def test_the_commands_for_a_killed_run_begin_with_leaving_too(uplinked: Node) -> None:
    scene = Scene("bridged", "elsewhere")
    scene.set_up()
    with disturb.disturbed(after=disturb.kill(6)):
        assert call_in_child("kvm-ifup-pre", "tap0") == -signal.SIGKILL
    tools.ip("link set tap0 master br0")
    undone = commands("pre")
    assert undone[0] == "ip link set dev tap0 nomaster"
    by_hand(undone)
    assert oracle.link("tap0")["master"] == "br0"
    check(call("kvm-ifup-pre", "tap0"), 0)


@pytest.mark.parametrize("protocol", ["boot", "static", "0"])
def test_a_stale_rule_by_hand(uplinked: Node, protocol: str) -> None:
    Scene("routed, table").set_up()
    tools.ip(f"rule add iif tap0 lookup 300 priority 77 protocol {protocol}")
    by_hand(commands("post"))
    assert oracle.rules() == [(4, 10000, "100"), (6, 10000, "100")]


def test_open_vswitch_by_hand(switch: Node) -> None:  # noqa: F811
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".5:200:300")
    by_hand(commands("post"))
    assert vsctl("port-to-br", "tap0") == "ovs0"
    assert [vsctl("get", "Port", "tap0", column) for column in ("tag", "trunks")] == ["5", "[200, 300]"]
    # It is what the hook wants, too.
    assert [op for op in call("kvm-ifup-post", "tap0", "--plan", "--json").needed if "switch" in op[1]] == []
    vsctl("del-port", "tap0")
    check(call("kvm-ifup-post", "tap0"), 0)
    by_hand(commands("down"))
    assert vsctl("list-ports", "ovs0") == ""


def test_a_program_by_hand(node: Node) -> None:
    with namespaces.private_etc():
        program = Path("/etc/kvm-ifup/ext/site")
        program.parent.mkdir(parents=True, mode=0o755, exist_ok=True)
        program.write_text("#!/bin/sh\nenv >> /run/said\n")
        program.chmod(0o755)
        nodes.add_tap()
        manager.write_nic(mode="ext", link="site")
        check(call("kvm-ifup-post", "tap0"), 0)
        told = [
            line for line in Path("/run/said").read_text().splitlines() if not line.startswith(("PATH", "LC", "PWD"))
        ]
        Path("/run/said").unlink()
        (RUN_DIR / "state/tap0.json").unlink()
        by_hand(commands("post"))
        said = [line for line in Path("/run/said").read_text().splitlines() if not line.startswith(("PATH", "PWD"))]
        assert sorted(said) == sorted(line for line in told if not line.startswith(("SHLVL", "_=")))


def test_a_guest_and_a_tap(node: Node) -> None:
    nodes.add_bridge()
    nodes.taps(["tap0", "tap1"])
    manager.write_nic("tap0", mode="bridged", link="br0")
    manager.write_nic("tap1", index=1, mode="bridged", link="br0")
    assert call("kvm-ifup", "plan", "post", "web1.example.com").out.count("bridged, post") == 2
    assert call("kvm-ifup", "plan", "post", "tap1").out.count("bridged, post") == 1
    check(call("kvm-ifup", "plan", "post", "nobody"), 65, "nobody")
    assert call("kvm-ifup", "plan", "down", "nobody").code == 0


# --- show ---------------------------------------------------------------------------------------------------


def shown(*argv: str) -> list[dict[str, Any]]:
    """What `kvm-ifup show --json` says."""
    result = call("kvm-ifup", "show", "--json", *argv)
    check(result, 0)
    found: list[dict[str, Any]] = json.loads(result.out)
    return found


def test_show(uplinked: Node) -> None:
    nodes.add_bridge()
    nodes.taps(["tap0", "tap1", "tap2"])
    manager.write_nic("tap0", mode="bridged", link="br0")
    manager.write_nic("tap1", "db1", mode="routed", link="100", ip=[GUEST_IP4, GUEST_IP6], incoming=True)
    manager.write_nic("tap2", "web1.example.com", 1, mode="bridged", link="br0")
    assert [(one["tap"], one["phase"], one["wired"]) for one in shown()] == [
        ("tap1", "none", None), ("tap0", "none", None), ("tap2", "none", None),
    ]  # fmt: skip
    begun = time.time()
    check(call("kvm-ifup-pre", "tap1"), 0)
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link set tap0 nomaster")
    (pre, post, none) = shown()
    assert (pre["phase"], pre["wired"], pre["ip"], pre["by"]) == ("pre", True, [GUEST_IP4, GUEST_IP6], "hook")
    assert begun <= pre["since"] <= time.time()
    assert (post["phase"], post["wired"], none["wired"]) == ("post", False, None)
    assert [(op["op"], op["now"], op["want"]) for op in post["missing"]] == [
        ("link-master", None, "br0"),
        ("port-option", None, 2),
        ("port-forwarding", "not a port", "forwarding"),
    ]
    assert [one["tap"] for one in shown("web1.example.com")] == ["tap0", "tap2"]
    assert [one["tap"] for one in shown("tap1")] == ["tap1"]
    tools.ip("link del tap0")
    assert "gone" in shown("tap0")[0]["problem"]["cause"]
    check(call("kvm-ifup", "show", "nobody"), 65, "nobody")


def test_armed(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], incoming=True)
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert shown()[0]["phase"] == "pre"
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(RUN_DIR / "agent.sock"))
        agent.listen()
        assert shown()[0]["phase"] == "armed"
        assert shown(manager.configuration(agent={"arrival_timeout": 0}))[0]["phase"] == "pre"
        check(call("kvm-ifup-post", "tap0"), 0)
        assert shown()[0]["phase"] == "post"


def test_show_changes_nothing_and_asks_once(uplinked: Node) -> None:
    """However many NICs there are, the same number of dumps. (An element of a set is found by its key.)"""
    from kvmifup.node.messages import NLM_F_DUMP
    from kvmifup.node.nfmessages import NFT_MSG_GETSETELEM
    from kvmifup.node.nfnetlink import kind
    from kvmifup.node.transport import Transport

    elements = kind(NFT_MSG_GETSETELEM)

    asked: list[int] = []
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        send = Transport.send

        def counting(self: Transport, what: int, flags: int, body: bytes) -> int:
            if what != elements or flags & NLM_F_DUMP:
                asked.append(what)
            return send(self, what, flags, body)

        patch.setattr(Transport, "send", counting)
        for number in range(1, 5):
            tap = f"tap{number}"
            nodes.add_tap(tap)
            manager.write_nic(tap, f"web{number}", mode="routed", link="100", ip=[f"192.0.2.{20 + number}"])
            check(call("kvm-ifup-post", tap), 0)
            before = snapshots.snapshot()
            asked.clear()
            assert [one["wired"] for one in shown()] == [True] * number
            assert snapshots.changes(before, snapshots.snapshot()) == []
            counts.append(list(asked))
    # With one NIC the devices fit into one part of a dump; a dump in parts is asked for until two agree.
    assert counts[1] == counts[2] == counts[3]


# --- nic ----------------------------------------------------------------------------------------------------

TOML = f'tap = "tap0"\nmac = "{GUEST_MAC}"\nmode = "bridged"\nlink = "br0"\n'


def file(text: str) -> str:
    """The path of a file with *text*."""
    path = Path("/run/given.toml")
    path.write_text(text, "utf-8", "surrogateescape")
    return str(path)


def test_nic_put_list_and_rm(node: Node) -> None:
    os.umask(0o022)
    check(call("kvm-ifup", "nic", "put", "web1", "0", file(TOML)), 0)
    installed = RUN_DIR / "nic/web1/0.toml"
    assert installed.read_text() == TOML
    assert stat.S_IMODE(installed.stat().st_mode) == 0o600
    assert (RUN_DIR / "tap/tap0").resolve() == installed
    nodes.add_bridge()
    nodes.add_tap()
    check(hook("kvm-ifup-post", "tap0"), 0)
    # Another tap: the old link goes.
    check(call("kvm-ifup", "nic", "put", "web1", "0", file(TOML.replace("tap0", "tap7"))), 0)
    assert [path.name for path in (RUN_DIR / "tap").iterdir()] == ["tap7"]
    check(call("kvm-ifup", "nic", "put", "web1", "1", file(TOML)), 0)
    listed = json.loads(call("kvm-ifup", "nic", "list", "--json").out)
    assert [(nic["instance"], nic["index"], nic["tap"], nic["ip"]) for nic in listed] == [
        ("web1", 0, "tap7", []), ("web1", 1, "tap0", []),
    ]  # fmt: skip
    check(call("kvm-ifup", "nic", "rm", "web1", "0"), 0)
    assert [path.name for path in (RUN_DIR / "tap").iterdir()] == ["tap0"]
    check(call("kvm-ifup", "nic", "rm", "web1"), 0)
    assert list((RUN_DIR / "nic").iterdir()) == list((RUN_DIR / "tap").iterdir()) == []
    check(call("kvm-ifup", "nic", "rm", "web1"), 0)


def test_nic_put_and_rm_say_as_json_what_they_have_done(node: Node) -> None:
    def said(*argv: str) -> list[dict[str, object]]:
        ran = call("kvm-ifup", "nic", *argv, "--json")
        check(ran, 0)
        found: list[dict[str, object]] = json.loads(ran.out)
        return found

    put = [*said("put", "web1", "0", file(TOML)), *said("put", "web1", "1", file(TOML.replace("tap0", "tap1")))]
    assert [(nic["instance"], nic["index"], nic["tap"]) for nic in put] == [("web1", 0, "tap0"), ("web1", 1, "tap1")]
    assert put == said("list")
    assert said("rm", "web1", "0") == [{"instance": "web1", "file": f"{RUN_DIR}/nic/web1/0.toml"}]
    assert said("rm", "web1", "0") == []
    (RUN_DIR / "nic/web1/2.toml").write_text("nonsense")
    assert said("rm", "web1") == [{"instance": "web1", "file": f"{RUN_DIR}/nic/web1/{index}.toml"} for index in (1, 2)]


def test_nic_put_from_standard_input(node: Node) -> None:
    process = hooks.start("kvm-ifup", "nic", "put", "web1", "0", "-")
    process.stdin = None
    check(hooks.finish(process), 65, "standard input", "is missing")  # there is nothing in it
    script = shlex.join(hooks.command("kvm-ifup", "nic", "put", "web1", "0", "-", "-v"))
    tools.run("sh", "-c", f"printf %s {shlex.quote(TOML)} | {script}")
    assert (RUN_DIR / "nic/web1/0.toml").read_text() == TOML


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["put", "web1", "0", "/nonexistent"], 64, ["cannot be read"]),
        (["put", "web1", "0", "-"], 64, ["whole path"]),
        (["put", "web1", "0", "relative.toml"], 64, ["whole path"]),
        (["put", "web1", "x", "/run/given.toml"], 64, ["INDEX 'x' is not a number"]),
        (["put", "web1", "10000", "/run/given.toml"], 64, ["10000"]),
        (["put", "../x", "0", "/run/given.toml"], 65, ["directory"]),
        (["put", "web1"], 64, ["required"]),
        (["list", "../x"], 65, ["directory"]),
        (["list", "web9"], 65, ["web9: there are no NIC files", "kvm-ifup nic list"]),
        (["rm", "..", "1"], 65, ["directory"]),
        ([], 64, ["VERB"]),
    ],
)
def test_nic_refuses(node: Node, argv: list[str], code: int, words: list[str]) -> None:
    file(TOML)
    check(call("kvm-ifup", "nic", *argv), code, *words)
    assert not RUN_DIR.exists() or not list(RUN_DIR.rglob("*.toml"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (TOML.replace("bridged", "brigded"), "brigded"),
        (TOML + "colour = 1\n", "colour"),
        (TOML.replace(GUEST_MAC, TAP_MAC), "begins with fe:"),
        ("\udcff", "UTF-8"),
        ("x" * (1 << 20) + "x", "larger"),
        ("", "is missing"),
    ],
)
def test_nic_put_refuses_a_wrong_file_and_keeps_the_old_one(node: Node, text: str, word: str) -> None:
    check(call("kvm-ifup", "nic", "put", "web1", "0", file(TOML)), 0)
    check(call("kvm-ifup", "nic", "put", "web1", "0", file(text)), 65, "/run/given.toml", word)
    assert (RUN_DIR / "nic/web1/0.toml").read_text() == TOML
    check(call("kvm-ifup", "nic", "put", "web1", "1", file(TOML)), 65, "tap0 is that of web1/0")


def test_nic_list_names_a_wrong_file(node: Node) -> None:
    manager.write_nic(mode="bridged", link="br0")
    manager.write_nic("tap1", "a", mode="nonsense")
    result = call("kvm-ifup", "nic", "list")
    assert result.code == 65
    assert "web1.example.com" in result.out
    assert "nonsense" in result.err


# --- check --node -------------------------------------------------------------------------------------------


def readiness() -> tuple[int, str]:
    """Exit code and output of `kvm-ifup check --node`."""
    result = call("kvm-ifup", "check", "--node")
    assert result.err == ""
    as_json = json.loads(call("kvm-ifup", "check", "--node", "--json").out)
    assert as_json["ready"] == (result.code == 0)
    wrong = [one for one in as_json["findings"] if one["wrong"]]
    assert all(one["why"] and one["mend"] for one in wrong)
    assert bool(wrong) == (result.code == 1)
    return result.code, result.out


def test_an_uplink_that_is_not_there_is_named_before_there_is_a_routed_guest(node: Node) -> None:
    with agents.configured(routed={"uplinks": ["eth9"]}):
        code, said = readiness()
    assert code == 1
    assert "there is no uplink eth9" in said


@pytest.mark.parametrize("fault", ["it is not there", "it is down"])
def test_what_is_true_of_an_uplink_for_both_families_is_said_once(uplinked: Node, fault: str) -> None:
    manager.write_nic("tap1", "db1", mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    tools.ip("link add eth1 type veth peer name eth1-far")
    uplink, what = (
        ("eth9", "there is no uplink eth9") if fault == "it is not there" else ("eth1", "uplink eth1 is down")
    )
    with agents.configured(routed={"uplinks": [uplink]}):
        code, said = readiness()
    assert (code, said.count(what)) == (1, 1)


def test_a_node_that_is_ready_and_what_keeps_it_from_it(uplinked: Node) -> None:
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    manager.write_nic("tap1", "db1", mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    code, said = readiness()
    assert code == 1
    assert "the agent is not there" in said
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(RUN_DIR / "agent.sock"))
        agent.listen(50)
        code, said = readiness()
        assert code == 0
        assert said.startswith("node: ready\n")
        assert "Python 3." in said
        for plant, words, mend in (
            ("ip link set br0 down", "br0 is down", "ip link set br0 up"),
            ("ip link set br0 type bridge stp_state 1", "br0 runs STP: a port forwards after 30 s", None),
            ("sysctl -qw net.ipv4.conf.eth0.forwarding=0", "IPv4 forwarding is off on uplink eth0", None),
            ("sysctl -qw net.ipv6.conf.all.forwarding=0", "IPv6 forwarding is off on uplink eth0", None),
            (f"chmod o+w {RUN_DIR}/nic/db1/0.toml", "others", f"chmod go-w {RUN_DIR}/nic/db1/0.toml"),
            ("ip route del default", "no IPv4 uplink", "ip route add default via 192.0.2.1"),
            ("ip link del br0", "there is no bridge br0", "ip link add br0 up type bridge"),
        ):
            tools.run(*plant.split())
            code, said = readiness()
            assert code == 1
            assert words in said
            found = re.search(r"mend: `(.*?)`", said)
            tools.run("sh", "-c", mend or (found[1] if found else "false"))
            assert readiness()[0] == 0, plant


def test_bridged_guests_need_no_agent(node: Node) -> None:
    nodes.add_bridge()
    manager.write_nic(mode="bridged", link="br0")
    code, said = readiness()
    assert code == 0
    assert "the agent is not there" in said


def test_a_delay_that_keeps_askers_waiting(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    assert "proxy_delay" not in readiness()[1]  # post sets it
    check(call("kvm-ifup-post", "tap0"), 0)
    assert "proxy_delay" not in readiness()[1]
    sysctl("ipv4/neigh/eth0/proxy_delay", 80)
    assert "IPv4 proxy_delay on eth0 is 80" in readiness()[1]
    assert "up to 0.8 s" in readiness()[1]


# --- the log, and -vv ---------------------------------------------------------------------------------------


@contextmanager
def log() -> Iterator[socket.socket]:
    """The system's log."""
    from kvmifup.tell import syslog

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader, pytest.MonkeyPatch.context() as patch:
        reader.bind("/run/log")
        reader.setblocking(False)
        patch.setattr(syslog, "SOCKET", "/run/log")
        yield reader


def logged(reader: socket.socket) -> list[str]:
    """The lines since the last look."""
    lines = []
    while True:
        try:
            lines.append(reader.recv(4096).decode())
        except BlockingIOError:
            return lines


PREFIX = r"<%d>[A-Z][a-z][a-z] [ 123]\d \d\d:\d\d:\d\d %s\[\d+\]: %s"


@pytest.mark.parametrize("gone", [(4,), (6,), (4, 6)])
def test_a_warning_in_the_log_for_each_family_without_an_uplink(uplinked: Node, gone: tuple[int, ...]) -> None:
    for family in gone:
        tools.ip(f"-{family} route del default")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    with log() as reader:
        check(call("kvm-ifup-post", "tap0"), 0)
        _, *warnings = logged(reader)
        assert len(warnings) == len(gone)
        for family, line in zip(gone, warnings, strict=True):
            said = re.escape(f"web1.example.com/0 (tap0): no IPv{family} uplink found: nothing there answers")
            assert re.match(PREFIX % (28, "kvm-ifup-post", said), line)
        meant = manager.configuration(routed={"uplinks": []})
        check(call("kvm-ifup-post", "tap0", meant), 0)
        assert len(logged(reader)) == 1


def test_a_line_in_the_log_for_every_phase(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    label = re.escape("web1.example.com/0 (tap0): routed, ")
    with log() as reader:
        check(call("kvm-ifup-post", "tap0"), 0)
        (line,) = logged(reader)
        assert re.fullmatch(PREFIX % (30, "kvm-ifup-post", rf"{label}post: \d\d ops, \d+ ms, by hook"), line)
        check(call("kvm-ifup-post", "tap0"), 0)
        assert "post: 0 ops" in logged(reader)[0]
        for quiet in (("kvm-ifup-post", "tap0", "--plan"), ("kvm-ifup", "show"), ("kvm-ifup", "check", "--repair")):
            call(*quiet)
            assert logged(reader) == []
        tools.ip(f"route del {GUEST_IP4} dev tap0")
        call("kvm-ifup", "check", "--repair")
        (line,) = logged(reader)
        assert "kvm-ifup[" in line
        assert "post: 2 ops" in line  # with the announcement
        sysctl("ipv4/conf/eth0/forwarding", 0)
        check(call("kvm-ifup-pre", "tap0"), 69)
        (line,) = logged(reader)
        assert line.startswith("<27>")
        for word in (
            "kvm-ifup-pre[",
            "web1.example.com/0 (tap0): code 69: ",
            "forwarding is off",
            "(`sysctl -w ",
            "by hook",
        ):
            assert word in line
        check(call("kvm-ifdown", "tap0"), 0)
        assert "routed, down: " in logged(reader)[0]


def test_no_log_and_a_log_that_is_stuck_hold_up_nothing(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    with log() as reader:
        for _ in range(400):  # nobody reads
            assert call("kvm-ifup-post", "--config", "/nonexistent", "tap0").code == 78
        assert logged(reader)
        reader.close()
        check(call("kvm-ifup-post", "tap0"), 0)


def test_twice_verbose_tells_how_long_each_op_took(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    ops = call("kvm-ifup-post", "tap0", "--plan", "--json").outcomes[0]["ops"]
    for _ in range(2):
        heading, *lines = call("kvm-ifup-post", "tap0", "-vv").err.splitlines()
        assert heading.endswith(" changed")
        assert len(lines) == len(ops)
        assert all(re.match(r" +\d+\.\d\d ms  ", line) for line in lines)
    assert all("right" in line or "announce" in line for line in lines)
