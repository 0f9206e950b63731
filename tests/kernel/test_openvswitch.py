"""Open vSwitch NICs, on a real switch: its own ovsdb-server and ovs-vswitchd, with the userspace datapath."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import agents, disturb, hooks, manager, namespaces, nodes, tools
from harness.addresses import GUEST_MAC, TAP_MAC
from harness.hooks import check, hook
from harness.nodes import Node
from harness.oracle import link
from harness.snapshots import changes, snapshot
from harness.tools import CLEAN
from kvmifup.node import ovs, programs
from tests.kernel.test_start import PROGRAMS, TOML, extra

pytestmark = pytest.mark.userns  # the switch's database runs as another root

SWITCH = Path("/run/openvswitch")
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"


def vsctl(*arguments: str) -> str:
    """The answer of ovs-vsctl."""
    return tools.run("ovs-vsctl", "--timeout=60", *arguments).strip()


def database(*arguments: str) -> None:
    """Start a daemon of the switch in the foreground of nobody; it ends with the test, by its pid file."""
    # Not `tools.run`: the daemons keep what they were given open.
    subprocess.run(
        arguments,
        env={**CLEAN, "OVS_LOGDIR": str(SWITCH), "OVS_DBDIR": str(SWITCH)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=tools.PATIENCE,
    )


@pytest.fixture
def switch(node: Node) -> Iterator[Node]:
    """A node with the Open vSwitch bridge ovs0, MTU 1400."""
    SWITCH.mkdir()
    database("ovsdb-tool", "create", str(SWITCH / "conf.db"), SCHEMA)
    database("ovsdb-server", str(SWITCH / "conf.db"), f"--remote=punix:{SWITCH}/db.sock", "--pidfile", "--detach")
    vsctl("--no-wait", "init")
    database("ovs-vswitchd", "--pidfile", "--detach")
    vsctl("add-br", "ovs0", "--", "set", "bridge", "ovs0", "datapath_type=netdev")
    # Requested, because a switch that was asked for no MTU changes it with its ports.
    vsctl("set", "Interface", "ovs0", "mtu_request=1400")
    tools.ip("link set ovs0 up")
    nodes.add_tap()
    yield node
    for file in SWITCH.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):  # a test has ended it, and its file is still there
            os.kill(int(file.read_text()), 15)


def port(name: str = "tap0") -> tuple[str, str, str, str]:
    """Bridge, tag, trunks and mode of a port."""
    return (
        vsctl("port-to-br", name),
        *(vsctl("get", "Port", name, column) for column in ("tag", "trunks", "vlan_mode")),
    )  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("vlan", "expected"),
    [
        (None, ("ovs0", "[]", "[]", "[]")),
        (".100", ("ovs0", "100", "[]", "access")),
        (":300:200", ("ovs0", "[]", "[200, 300]", "trunk")),
        (".100:200:300", ("ovs0", "100", "[200, 300]", "native-untagged")),
        ("100", ("ovs0", "100", "[]", "access")),
        (":100-102:7", ("ovs0", "[]", "[7, 100, 101, 102]", "trunk")),
        (":1-4094", ("ovs0", "[]", f"[{', '.join(map(str, range(1, 4095)))}]", "trunk")),
    ],
    ids=["none", "access", "trunk", "hybrid", "number", "range", "all"],
)
@pytest.mark.parametrize("incoming", [True, False])
def test_pre_makes_the_tap_a_port_with_its_vlans(
    switch: Node, vlan: str | None, expected: tuple[str, ...], incoming: bool
) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=vlan, incoming=incoming)
    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert port() == expected
    tap = link("tap0")
    assert (tap["address"], tap["mtu"], tap["inet6_addr_gen_mode"]) == (TAP_MAC, 1400, "none")
    assert "UP" in tap["flags"]
    assert link("ovs0")["mtu"] == 1400


def test_a_port_takes_what_runs_programs_and_no_more(switch: Node) -> None:
    told = manager.ganeti(MODE="openvswitch", LINK="ovs0", VLAN=".100")
    allowed = PROGRAMS | TOML  # where the package is installed, there are settings to be read
    assert extra("kvm-ifup-post", told) <= allowed
    assert extra("kvm-ifdown", told) <= allowed


@pytest.mark.parametrize("vlan", [".100:300:200", "100", ":200:199:100-150", ":1-4094"])
def test_the_second_run_writes_nothing(switch: Node, vlan: str) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=vlan)
    check(hook("kvm-ifup-post", "tap0"), 0)
    uuid = vsctl("get", "Port", "tap0", "_uuid")
    again = hook("kvm-ifup-post", "tap0", "--json")
    assert (again.code, again.needed) == (0, [])
    assert vsctl("get", "Port", "tap0", "_uuid") == uuid


def test_a_port_that_a_dead_guest_left_is_replaced_and_not_put_back(switch: Node) -> None:
    vsctl("add-br", "ovs1", "--", "set", "bridge", "ovs1", "datapath_type=netdev")
    vsctl("add-port", "ovs1", "tap0", "tag=7")
    manager.write_nic(mode="openvswitch", link="ovs0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert port() == ("ovs0", "[]", "[]", "[]")
    check(hook("kvm-ifdown", "tap0"), 0)
    assert "tap0" not in vsctl("list-ports", "ovs0") + vsctl("list-ports", "ovs1")


def test_a_changed_vlan_is_set_by_the_next_run(switch: Node) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100")
    check(hook("kvm-ifup-post", "tap0"), 0)
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".200")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert port() == ("ovs0", "200", "[]", "access")


def told(name: str = "tap0") -> dict[str, str]:
    """What the database says of whose a port is."""
    found = json.loads(vsctl("--format=json", "--columns=external_ids", "list", "Interface", name))
    config = json.loads(vsctl("--format=json", "--columns=other_config", "list", "Port", name))
    return dict(found["data"][0][0][1]) | dict(config["data"][0][0][1])


OURS = {"attached-mac": GUEST_MAC, "kvm-ifup-instance": "web1.example.com", "transient": "true"}


def test_the_database_says_whose_a_port_is(switch: Node) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100", iface_id="web1-0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert told() == OURS | {"iface-id": "web1-0"}
    again = hook("kvm-ifup-post", "tap0", "--json")
    assert (again.code, again.needed) == (0, [])
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert told() == OURS


def test_what_others_have_set_on_a_port_stays_when_its_vlan_changes(switch: Node) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100")
    check(hook("kvm-ifup-post", "tap0"), 0)
    vsctl("set", "Interface", "tap0", "external_ids:vm-id=theirs", "external_ids:iface-id=theirs")
    vsctl("set", "Port", "tap0", "external_ids:theirs=too")
    before = [vsctl("get", table, "tap0", "_uuid") for table in ("Port", "Interface")]
    number = vsctl("get", "Interface", "tap0", "ofport")
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=":200-202")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert port() == ("ovs0", "[]", "[200, 201, 202]", "trunk")
    assert told() == OURS | {"vm-id": "theirs", "iface-id": "theirs"}
    assert vsctl("get", "Port", "tap0", "external_ids:theirs") == "too"
    assert [vsctl("get", table, "tap0", "_uuid") for table in ("Port", "Interface")] == before
    assert vsctl("get", "Interface", "tap0", "ofport") == number


@pytest.mark.parametrize("whose", ["another guest's", "the same guest's"])
def test_a_port_that_was_there_is_taken_over_only_from_the_same_guest(switch: Node, whose: str) -> None:
    mac = GUEST_MAC if whose == "the same guest's" else "aa:00:00:35:ac:77"
    vsctl("add-port", "ovs0", "tap0", "tag=7", "--", "set", "Interface", "tap0", f'external_ids:attached-mac="{mac}"',
          "external_ids:iface-id=theirs", "external_ids:vm-id=theirs")  # fmt: skip
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100")
    check(hook("kvm-ifup-post", "tap0"), 0)
    theirs = {"iface-id": "theirs", "vm-id": "theirs"} if whose == "the same guest's" else {}
    assert told() == OURS | theirs
    assert port() == ("ovs0", "100", "[]", "access")


def test_the_port_of_a_vanished_tap_is_removed_by_gc(switch: Node) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    assert vsctl("list-ports", "ovs0") == "tap0"
    check(hook("kvm-ifup", "gc"), 0)
    assert vsctl("list-ports", "ovs0") == ""


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("when", ["before", "after"])
def test_failing_at_any_op_leaves_node_and_switch_unchanged(switch: Node, number: int, when: str) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100")
    before = snapshot()
    disturbance = disturb.refuse(number)
    with disturb.disturbed(**{when: disturbance}) as written:
        check(hooks.call("kvm-ifup-post", "tap0"), 71, f"injected at write {number}")
    assert len(written) >= number
    assert changes(before, snapshot()) == []
    assert vsctl("list-ports", "ovs0") == ""


def test_a_bridge_that_the_switch_does_not_have_is_refused(switch: Node) -> None:
    nodes.add_bridge("br0")
    for name in ("br0", "ovs9"):
        manager.write_nic(mode="openvswitch", link=name)
        before = snapshot()
        check(hook("kvm-ifup-pre", "tap0"), 69, f"no such Open vSwitch bridge: {name}")
        assert changes(before, snapshot()) == []


def test_a_switch_that_does_not_run_is_refused(node: Node) -> None:
    nodes.add_tap()
    nodes.add_bridge("br0")
    manager.write_nic(mode="openvswitch", link="br0")
    check(hook("kvm-ifup-pre", "tap0"), 69, "Open vSwitch", "db.sock")


# --- what the switch really does --------------------------------------------------------------------------------


def daemon(name: str) -> int:
    """The process of a daemon of the switch."""
    return int((SWITCH / f"{name}.pid").read_text())


@contextlib.contextmanager
def stopped(name: str) -> Iterator[None]:
    """A daemon of the switch that does not answer."""
    os.kill(daemon(name), signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon(name), signal.SIGCONT)


def kill(name: str) -> None:
    """A daemon of the switch dies, and leaves its files."""
    pid = daemon(name)
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def ports() -> set[str]:
    """All ports in the switch's database."""
    return {name for bridge in vsctl("list-br").split() for name in vsctl("list-ports", bridge).split()}


def test_a_port_that_the_switch_could_not_take_is_71_and_undone(switch: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """ovs-vsctl ends with 0 then. Here it is asked for a kind of port that the switch does not know."""
    manager.write_nic(mode="openvswitch", link="ovs0")
    make = ovs.transaction
    wrong = ("--", "set", "Interface", "tap0", "type=nonsense")
    monkeypatch.setattr(ovs, "transaction", lambda *port: (*make(*port), *(wrong if port[1] else ())))
    before = snapshot()
    check(hooks.call("kvm-ifup-post", "tap0"), 71, "Open vSwitch has not taken tap0")
    assert changes(before, snapshot()) == []
    assert ports() == set()


@pytest.mark.parametrize("break_it", ["type=nonsense", "ofport_request=1 type=nonsense"])
def test_a_port_that_the_switch_has_lost_is_not_right_and_put_back(switch: Node, break_it: str) -> None:
    manager.write_nic(mode="openvswitch", link="ovs0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    vsctl("set", "Interface", "tap0", *break_it.split())
    assert seen()["tap0"][0] is False
    assert hooks.call("kvm-ifup", "check").code == 1
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert seen()["tap0"] == (True, [])


def test_a_change_that_was_made_though_ovs_vsctl_was_stopped_is_undone(
    switch: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ovs, "TIMEOUT", 1)
    manager.write_nic(mode="openvswitch", link="ovs0")
    before = snapshot()
    with stopped("ovs-vswitchd"):
        check(hooks.call("kvm-ifup-post", "tap0"), 71, "ovs-vsctl failed")
    assert ports() == set()
    assert changes(before, snapshot()) == []


@pytest.mark.parametrize("dead", ["ovs-vswitchd", "ovsdb-server"])
def test_a_dead_switch_is_neither_ready_nor_right(switch: Node, dead: str) -> None:
    nodes.add_tap("tap1")
    manager.write_nic("tap0", "web1", mode="openvswitch", link="ovs0")
    manager.write_nic("tap1", "web2", mode="openvswitch", link="ovs0", incoming=True)
    check(hook("kvm-ifup-post", "tap0"), 0)
    kill(dead)
    if dead == "ovs-vswitchd":
        # The bridge is a device of the process; of the kernel's datapath it stays.
        tools.ip("link show dev ovs0") if "ovs0" in tools.run("ip", "link") else nodes.add_bridge("ovs0")
    check(hook("kvm-ifup-pre", "tap1"), 69, "systemctl start openvswitch-switch")
    result = hooks.call("kvm-ifup", "show", "--json")
    assert not any(one["wired"] for one in json.loads(result.out))
    assert hooks.call("kvm-ifup", "check").code == 1
    if dead == "ovs-vswitchd":
        check(hook("kvm-ifdown", "tap0"), 0)
        assert "tap0" not in tools.run("ovs-vsctl", "--no-wait", "--timeout=60", "list-ports", "ovs0").split()


def test_a_port_that_was_already_there_goes_with_the_guest(switch: Node) -> None:
    """A crash had left it, and the journal with it."""
    vsctl("add-port", "ovs0", "tap0")
    manager.write_nic(mode="openvswitch", link="ovs0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    check(hook("kvm-ifdown", "tap0"), 0)
    assert ports() == set()


@pytest.mark.parametrize("made", ["before the tap", "after it"])
@pytest.mark.parametrize("nic", ["bridged", "routed", "ext"])
def test_a_stale_port_is_removed_in_each_mode_and_put_back_by_a_rollback(switch: Node, nic: str, made: str) -> None:
    """Or the guest is on both networks."""
    if made == "before the tap":
        tools.ip("link del tap0")
    vsctl("--no-wait", "add-port", "ovs0", "tap0", "tag=7")
    if made == "before the tap":
        nodes.add_tap()
    nodes.add_bridge("br0")
    with namespaces.private_etc():
        program = Path("/etc/kvm-ifup/ext/site")
        program.parent.mkdir(parents=True, mode=0o755, exist_ok=True)
        # As an administrator may do it: the port is the program's own.
        program.write_text("#!/bin/sh\n[ $KVM_IFUP_PHASE != pre ] || ovs-vsctl add-port ovs0 tap0 tag=9\n")
        program.chmod(0o755)
        more: dict[str, Any] = {"bridged": {"link": "br0"}, "routed": {"ip": ["192.0.2.8"]}, "ext": {"link": "site"}}[
            nic
        ]  # type: ignore[assignment]
        manager.write_nic(mode=nic, **more)
        if nic != "ext":
            with disturb.disturbed(after=disturb.refuse(3)):
                check(hooks.call("kvm-ifup-post", "tap0"), 71, "injected")
            assert port()[:2] == ("ovs0", "7")
        for _ in range(2):
            check(hook("kvm-ifup-post", "tap0"), 0)
            assert ports() == ({"tap0"} if nic == "ext" else set())
            if nic == "ext":
                assert port()[1] == "9", "the program's own stays"
        if nic != "ext":
            check(hook("kvm-ifdown", "tap0"), 0)
            assert ports() == set(), "it is not put back"


def test_a_tap_on_a_linux_bridge_leaves_it_when_it_becomes_a_port_of_the_switch(switch: Node) -> None:
    nodes.add_bridge("br0")
    tools.ip("link set tap0 master br0")
    manager.write_nic(mode="openvswitch", link="ovs0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert link("tap0").get("master") != "br0"
    check(hook("kvm-ifdown", "tap0"), 0)
    assert link("tap0")["master"] == "br0"


def test_a_nic_that_moves_from_the_switch_to_a_bridge_is_on_one_network(switch: Node) -> None:
    nodes.add_bridge("br0")
    manager.write_nic(mode="openvswitch", link="ovs0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    manager.write_nic(mode="bridged", link="br0")
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert ports() == set()
    assert link("tap0")["master"] == "br0"


def test_without_a_switch_no_program_is_started_for_a_bridged_nic(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: str) -> programs.Result:
        pytest.fail(f"ovs-vsctl {arguments}")

    monkeypatch.setattr(ovs, "vsctl", never)
    nodes.add_bridge("br0")
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    check(hooks.call("kvm-ifup-post", "tap0"), 0)
    check(hooks.call("kvm-ifdown", "tap0"), 0)


@pytest.mark.parametrize(("name", "vlan"), [("vlan300", None), ("ovs0", ".300")])
def test_a_fake_bridge_is_a_vlan_of_another_and_the_second_run_writes_nothing(
    switch: Node, name: str, vlan: str | None
) -> None:
    vsctl("add-br", "vlan300", "ovs0", "300")
    manager.write_nic(mode="openvswitch", link=name, vlan=vlan)
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert vsctl("port-to-br", "tap0") == "vlan300"
    assert vsctl("get", "Port", "tap0", "tag") == "300"
    uuid = vsctl("get", "Port", "tap0", "_uuid")
    assert hook("kvm-ifup-post", "tap0", "--json").needed == []
    assert vsctl("get", "Port", "tap0", "_uuid") == uuid
    assert seen()["tap0"] == (True, [])
    check(hook("kvm-ifdown", "tap0"), 0)
    assert "tap0" not in ports()


def test_a_vlan_in_a_fake_bridge_is_refused(switch: Node) -> None:
    vsctl("add-br", "vlan300", "ovs0", "300")
    manager.write_nic(mode="openvswitch", link="vlan300", vlan=".100")
    check(hook("kvm-ifup-pre", "tap0"), 69, "vlan300 is itself a VLAN: ovs0 .300")


# --- kvm-ifup show and check ----------------------------------------------------------------------------------


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the switch is asked by runs in this process."""
    asked: list[tuple[str, ...]] = []
    ask = ovs.vsctl

    def count(*arguments: str) -> programs.Result:
        asked.append(arguments)
        return ask(*arguments)

    monkeypatch.setattr(ovs, "vsctl", count)
    return asked


WHOSE = f"attached-mac={GUEST_MAC} kvm-ifup-instance=web1 transient=true"
VLANS = {"tap0": None, "tap1": ".100", "tap2": ":300:200", "tap3": ".100:200:300"}


@pytest.fixture
def four(switch: Node) -> Node:
    """A guest with four NICs on the switch."""
    nodes.taps([tap for tap in VLANS if tap != "tap0"])
    for index, (tap, vlan) in enumerate(VLANS.items()):
        manager.write_nic(tap, "web1", index, mode="openvswitch", link="ovs0", vlan=vlan)
    check(hook("kvm-ifup-post", "--instance", "web1"), 0)
    return switch


def seen() -> dict[str, tuple[bool, list[str | None]]]:
    """By tap: whether `kvm-ifup show` finds it wired, and the ports that it finds instead."""
    result = hooks.call("kvm-ifup", "show", "--json")
    check(result, 0)
    return {
        one["tap"]: (one["wired"], [op["now"] for op in one["missing"] if op["op"] == "ovs-port"])
        for one in json.loads(result.out)
    }


def test_the_switch_is_asked_once_however_many_nics_there_are(four: Node, questions: list[tuple[str, ...]]) -> None:
    assert seen() == {tap: (True, []) for tap in VLANS}
    assert len(questions) == 1
    check(hooks.call("kvm-ifup", "check"), 0)
    assert len(questions) == 2


def test_whatever_differs_on_the_switch_is_found(four: Node) -> None:
    vsctl("add-br", "ovs1", "--", "set", "bridge", "ovs1", "datapath_type=netdev")
    vsctl("set", "Port", "tap0", "tag=7")
    vsctl("del-port", "tap1", "--", "add-port", "ovs1", "tap1", "tag=100", "vlan_mode=access")
    vsctl("set", "Port", "tap2", "vlan_mode=native-tagged")
    vsctl("del-port", "tap3")
    assert seen() == {
        "tap0": (False, [f"ovs0 .7 {WHOSE}"]),
        "tap1": (False, ["ovs1 .100"]),
        "tap2": (False, [f"ovs0 :200:300 native-tagged {WHOSE}"]),
        "tap3": (False, [None]),
    }
    assert hooks.call("kvm-ifup", "check").code == 1
    vsctl("add-br", "ovs0.20", "ovs0", "20")
    vsctl("add-port", "ovs0.20", "tap3")
    assert seen()["tap3"] == (False, ["ovs0 .20"]), "a bridge within another"
    vsctl("del-br", "ovs1", "--", "del-br", "ovs0")
    for _, ports in seen().values():
        assert ports == []
    assert "no such Open vSwitch bridge: ovs0" in hooks.call("kvm-ifup", "check").out


def test_a_switch_that_has_ended_is_what_check_says(four: Node) -> None:
    for name in ("ovs-vswitchd", "ovsdb-server"):
        pid = int((SWITCH / f"{name}.pid").read_text())
        os.kill(pid, 15)
        while (SWITCH / f"{name}.pid").exists():
            pass
    result = hooks.call("kvm-ifup", "check")
    assert result.code == 1
    assert result.out.count("systemctl start openvswitch-switch") == len(VLANS)


def test_the_agent_puts_a_port_back_that_somebody_has_removed(switch: Node) -> None:
    with agents.running() as agent:
        manager.write_nic(mode="openvswitch", link="ovs0", vlan=".100")
        agents.through("kvm-ifup-post", "tap0")
        time.sleep(1)  # it looks at what it has done
        for _ in range(2):
            vsctl("del-port", "tap0")
            agents.until(lambda: vsctl("list-ports", "ovs0") == "tap0")
            agents.until(lambda: vsctl("get", "Port", "tap0", "tag") == "100")
        agent.heard("tap0", "mended", "Open vSwitch port")
        check(hook("kvm-ifdown", "tap0"), 0)
        time.sleep(1)
        assert vsctl("list-ports", "ovs0") == ""


def test_a_running_tap_moves_to_a_linux_bridge_and_back(switch: Node) -> None:
    """It is never on both networks, and neither bridge takes over its MTU."""
    nodes.add_bridge("br0", mtu=1300)
    tools.ip("link add name p0 mtu 1300 type veth peer name q0")
    tools.ip("link set p0 master br0 up")

    def apart(_number: int, _op: object) -> None:
        on_both = "tap0" in vsctl("list-ports", "ovs0").split() and "master" in link("tap0")
        assert not on_both
        assert (link("br0")["mtu"], link("ovs0")["mtu"]) == (1300, 1400)

    nics: tuple[dict[str, Any], ...] = ({"mode": "openvswitch", "link": "ovs0"}, {"mode": "bridged", "link": "br0"})
    for nic in nics * 2:
        manager.write_nic(**nic)
        with disturb.disturbed(after=apart):
            check(hooks.call("kvm-ifup-post", "tap0"), 0)
        on_bridge = nic["mode"] == "bridged"
        assert link("tap0").get("master") == ("br0" if on_bridge else None)
        assert vsctl("list-ports", "ovs0").split() == ([] if on_bridge else ["tap0"])
        assert link("tap0")["mtu"] == (1300 if on_bridge else 1400)
