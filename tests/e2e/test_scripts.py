"""The scripts as a process manager runs them, QEMU among them; and whatever others may throw at them."""

from __future__ import annotations

import json
import os
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import hooks, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC, TAP_MAC
from harness.hooks import as_manager, call, check
from harness.manager import ganeti
from harness.nodes import Node

HOOKS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown")


@pytest.fixture
def ready(node: Node) -> Node:
    """A node with a bridge, an uplink and tap0."""
    node.uplink()
    nodes.add_bridge(mtu=9000)
    nodes.add_tap()
    return node


def test_a_bridged_guest_from_start_to_stop(ready: Node) -> None:
    """Start, with the VLAN that Ganeti leaves empty; stop, twice; the tap's name as the text of a bytes object."""
    before = snapshots.snapshot()
    environ = ganeti(MODE="bridged", LINK="br0", BRIDGE="br0")
    check(as_manager("kvm-ifup-post", "b'tap0'", environ=environ), 0)
    link = oracle.link("tap0")
    assert (link["address"], link["master"], link["mtu"]) == (TAP_MAC, "br0", 9000)
    for _ in range(2):
        check(as_manager("kvm-ifdown", "b'tap0'", environ={**environ, "ACTION": "down"}), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_a_routed_guest_through_a_migration(ready: Node) -> None:
    """Ganeti 3.2: pre at the start, post at the end, down when it leaves; several addresses in IP."""
    before = snapshots.snapshot()
    environ = ganeti(MODE="routed", LINK="100", IP=f"{GUEST_IP4}, {GUEST_IP6}", ACTION="up")
    check(as_manager("kvm-ifup-pre", "tap0", environ={**environ, "MIGRATION_PHASE": "pre"}), 0)
    assert oracle.routes("tap0") == set()
    check(as_manager("kvm-ifup-post", "tap0", environ={**environ, "MIGRATION_PHASE": "post"}), 0)
    assert oracle.routes("tap0", "100") == {GUEST_IP4, GUEST_IP6}
    assert oracle.proxies("eth0") == {GUEST_IP4, GUEST_IP6}
    check(as_manager("kvm-ifdown", "tap0", environ={**environ, "ACTION": "down"}), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_what_a_run_under_umask_077_leaves_can_be_used_by_the_next(ready: Node) -> None:
    environ = ganeti(MODE="routed", IP=GUEST_IP4)
    check(as_manager("kvm-ifup-pre", environ={**environ, "MIGRATION_PHASE": "pre"}), 0)
    check(as_manager("kvm-ifup-post", "tap0", environ={}), 0)
    assert oracle.routes("tap0") == {GUEST_IP4}


def test_an_empty_environment_and_a_nic_file_are_enough(ready: Node) -> None:
    manager.write_nic(mode="bridged", link="br0")
    check(as_manager("kvm-ifup-pre", "tap0", environ={}), 0)
    assert oracle.link("tap0")["master"] == "br0"


@pytest.mark.parametrize("program", HOOKS)
def test_ganetis_own_taps_are_left_alone(ready: Node, program: str) -> None:
    tools.ip("tuntap add gnt.com.0 mode tap")
    before = snapshots.snapshot()
    files = sorted(manager.RUN_DIR.rglob("*"))
    environ = ganeti("gnt.com.0", MODE="routed", IP=GUEST_IP4, ACTION="nonsense")
    for argv in (["gnt.com.0"], ["b'gnt.com.0'"], []):
        assert as_manager(program, *argv, environ=environ) == hooks.Result(0, "", "")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert sorted(manager.RUN_DIR.rglob("*")) == files


CONTRADICTIONS = [
    ("kvm-ifup-pre", ["tap0"], {"MIGRATION_PHASE": "post"}),
    ("kvm-ifup-post", ["tap0"], {"MIGRATION_PHASE": "pre"}),
    ("kvm-ifup-post", ["tap0"], {"MIGRATION_PHASE": "during"}),
    ("kvm-ifup-pre", ["tap0"], {"ACTION": "down"}),
    ("kvm-ifup-post", ["tap0"], {"ACTION": "down"}),
    ("kvm-ifdown", ["tap0"], {"ACTION": "up"}),
    ("kvm-ifup-post", ["tap0"], {"ACTION": "sideways"}),
    ("kvm-ifup-post", ["tap1"], {}),
    ("kvm-ifup-post", ["--instance", "web1.example.com"], {}),
    ("kvm-ifup-post", ["tap0", "--instance", "web1.example.com"], {}),
    ("kvm-ifup-post", ["tap0", "tap1"], {}),
    ("kvm-ifup-post", ["--no-such-option"], {}),
    ("kvm-ifup-post", ["--config"], {}),
    ("kvm-ifup", [], {}),
    ("kvm-ifup", ["no-such-subcommand"], {}),
]


@pytest.mark.parametrize(("program", "argv", "more"), CONTRADICTIONS)
def test_a_contradiction_is_64_and_nothing_changes(
    ready: Node, program: str, argv: list[str], more: dict[str, str]
) -> None:
    before = snapshots.snapshot()
    environ = ganeti(MODE="routed", IP=GUEST_IP4, **more)
    check(call(program, *argv, environ=environ), 64)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_a_real_contradiction_is_64(ready: Node) -> None:
    environ = ganeti(MODE="routed", IP=GUEST_IP4, MIGRATION_PHASE="pre")
    check(as_manager("kvm-ifup-post", "tap0", environ=environ), 64, "MIGRATION_PHASE=pre")


@pytest.mark.parametrize("program", HOOKS)
@pytest.mark.parametrize("lacking", ["MAC", "MODE"])
def test_an_environment_that_lacks_something_is_65(ready: Node, program: str, lacking: str) -> None:
    environ = ganeti(MODE="routed", IP=GUEST_IP4)
    del environ[lacking]
    check(as_manager(program, "tap0", environ=environ), 65, lacking)


@pytest.mark.parametrize("program", HOOKS)
def test_closed_standard_descriptors_do_not_change_the_exit_code(ready: Node, program: str) -> None:
    """Some daemons close 0 to 2; whatever is opened next gets those numbers."""
    manager.write_nic(mode="bridged", link="nosuch")
    expected = {"kvm-ifdown": 0}.get(program, 69)

    def close() -> None:
        os.closerange(0, 3)

    done = subprocess.run(hooks.command(program, "tap0"), env=tools.CLEAN, preexec_fn=close)
    assert done.returncode == expected


@pytest.mark.parametrize("text", ["", 'tap = "tap0"\nmac = 7\n', "mode = [[[["])
def test_a_bad_nic_file_is_refused_before_pyroute2_is_imported(ready: Node, text: str) -> None:
    manager.write_nic(mode="bridged", link="br0").write_text(text)
    program = f"""
import sys
sys.path.insert(0, {str(tools.ROOT)!r})
from kvmifup.commands import main
code = main.main("kvm-ifup-pre", ["tap0"], {{}}, sys.stdout, sys.stderr)
print(code, "pyroute2" in sys.modules)
"""
    assert tools.run(sys.executable, "-I", "-c", program) == "65 False\n"


@pytest.mark.parametrize("program", [*HOOKS, "kvm-ifup"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_go_to_stdout(node: Node, program: str, option: str) -> None:
    result = as_manager(program, option, environ={})
    assert result.code == 0
    assert result.out.startswith(("usage: " + program, program))
    assert result.err == ""


# --- hostile input --------------------------------------------------------------------------------------

ALLOWED = {0, 64, 65, 69, 75, 77, 78}
HOSTILE = 300
NAMES = [
    "tap0", "", ".", "..", "../../etc", "a" * 16, "a" * 15, "tap0\n", "tap 0", "tap0\0", "täp", "\u202etap0", "\udc80",
    "/dev/null", "-v", "--help", "%s%n", "$(reboot)", "`reboot`", "tap0;reboot", "\x1b[2J", "all", "default", "lo",
    "eth0", "br0", "é" * 200, "x" * 5000, "🦆", "\u2028", "tap0/../eth0",
]  # fmt: skip
ADDRESSES = [
    "0.0.0.0", "0.0.0.0/0", "::", "::/0", "127.0.0.1", "::1", "224.0.0.1", "ff02::1", "255.255.255.255", "fe80::1",
    "192.0.2.8/33", "192.0.2.8/-1", "192.0.2.8/24", "192.0.2.08", "192.0.2", "0x7f000001", "2001:db8::8%eth0",
    "2001:db8::8%1/128", "::ffff:127.0.0.1", "::ffff:192.0.2.8", "::192.0.2.8", "1e3", "٣.٣.٣.٣", "192.0.2.8\n",
    " 192.0.2.8", "192.0.2.8/255.255.255.255", "192.0.2.8/0.0.0.0", "2001:db8::/3", "192.0.2.8/32/32", "", "/", "%",
    "192.0.2.11", "192.0.2.255", "2001:db8::11", "192.0.2.0/24", "3221225992", "9" * 500, "2002:7f00:1::", "::1.2.3.4",
]  # fmt: skip
MACS = [
    "", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00", "aa-00-00-35-ac-01", "aa:00:00:35:ac", "aa" * 99,
    "AA:00:00:35:AC:01", "aa:00:00:35:ac:01\n", "٠٠:00:00:00:00:00", GUEST_MAC,
]  # fmt: skip
LINKS = ["", "0", "255", "local", "all", "-1", "4294967296", "9" * 64, "nosuch", "br0", "tap0", "lo", "100", *NAMES]
MODES = ["routed", "bridged", "ext", "openvswitch", "", "ROUTED", "routed\n", "\x1b[31m", "x" * 9999]
VLANS = ["", ".0", ".4095", ".1.2", ":1:1", "100", "." * 5000, ".100", ":1:2", "\udcff", "٣"]
ODD_TOML = [
    "tap = tap0", "[[tap]]", "tap = {}", "tap.tap = 1", "[" * 5000, "a=" + "[" * 3000, "a=" + "{a=" * 3000,
    "tap = " + "1" * 5000, "tap = 1" + "_1" * 5000, "tap = 0x" + "f" * 30000, "tap = 9999-99-99", "tap = nan",
    "x" * 70000,
    "tap = 1e" + "9" * 400, 'tap = "\\ud800"', 'tap = "\\U0010FFFF"', '"" = 1', '"\\u0000" = 1', '"\\u202e" = 1',
    "\ufefftap = 1", "tap = 1\r", "\x00", "\x1b]0;x\x07", "tap = 1\ntap = 2", '"\\n\\n" = 1', "# " + "é" * 30000,
    "tap = '''\n" + "x\n" * 9000 + "'''", "a." * 10000 + "a = 1", "tap = 1979-05-27T07:32:00.999999999999999Z",
    "ip = [" + '"192.0.2.8",' * 4000 + "]", "incoming = 1", 'incoming = "true"', "ip = [[]]", "ip = 1",
    'ip = "192.0.2.8"',
]  # fmt: skip


def hostile_texts(seed: random.Random) -> Iterator[bytes]:
    """Endlessly many NIC files that nobody should write."""
    yield from (text.encode("utf-8", "surrogatepass") for text in ODD_TOML)
    while True:
        if seed.random() < 0.3:
            yield seed.randbytes(seed.choice([1, 20, 300, 5000]))
            continue
        values: dict[str, Any] = {"tap": "tap0", "mac": GUEST_MAC, "mode": "routed", "ip": [GUEST_IP4]}
        for _ in range(seed.randint(1, 3)):
            key, value = seed.choice(
                [
                    ("tap", seed.choice(NAMES)),
                    ("mac", seed.choice(MACS)),
                    ("mode", seed.choice(MODES)),
                    ("link", seed.choice(LINKS)),
                    ("vlan", seed.choice(VLANS)),
                    ("ip", seed.choices(ADDRESSES, k=seed.randint(0, 4))),
                    ("incoming", seed.choice([True, 0, "yes", [], {}])),
                    ("".join(seed.choices(string.printable, k=9)), seed.choice([1, 1.5, "x", [], {}, [[]]])),
                ]
            )
            values[key] = value
        yield "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in values.items()).encode()


def toml(value: Any) -> str:
    """*value* as TOML: JSON, but for characters beyond 16 bits and objects."""
    if value == {}:
        return "{}"
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def hostile_environments(seed: random.Random) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Endlessly many command lines and environments that nobody should make."""
    while True:
        environ = ganeti(MODE="routed", IP=GUEST_IP4, LINK="")
        for _ in range(seed.randint(1, 3)):
            key, value = seed.choice(
                [
                    ("INTERFACE", seed.choice(NAMES)),
                    ("MAC", seed.choice(MACS)),
                    ("MODE", seed.choice(MODES)),
                    ("LINK", seed.choice(LINKS)),
                    ("VLAN", seed.choice(VLANS)),
                    ("IP", seed.choice([",", " ", ";"]).join(seed.choices(ADDRESSES, k=seed.randint(0, 4)))),
                    ("INSTANCE", seed.choice(NAMES)),
                    ("INTERFACE_INDEX", seed.choice(["", "-1", "x", "99999", "٣", "0x0", "1e9", "9" * 5000])),
                    ("ACTION", seed.choice(["", "up", "down", "UP", "\x1b[2J"])),
                    ("MIGRATION_PHASE", seed.choice(["", "pre", "post", "PRE", "\n"])),
                    ("TAGS", "x" * 9000),
                    ("NETWORK_NAME", "\x1b[2J"),
                ]
            )
            environ[key] = value
        argv = seed.choice([[], ["tap0"], ["b'tap0'"], [seed.choice(NAMES)], ["--instance", seed.choice(NAMES)]])
        if argv[:1] == ["--instance"]:
            del environ["INTERFACE"]
        yield argv, environ


def judge(result: hooks.Result, what: object) -> None:
    """A documented exit code; on failure one line of printable text and no traceback."""
    assert result.code in ALLOWED, f"{result.code}: {result.err!r} for {what!r:.300}"
    assert "Traceback" not in result.err
    if result.code == 0:
        return
    assert result.err.endswith("\n"), result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err[:-1].isprintable(), f"{result.err!r}"
    assert result.out == ""
    result.err.encode()


def withdraw(tap: str = "tap0") -> None:
    """Undo a run that, hostile or not, was in order."""
    check(call("kvm-ifdown", tap), 0)


def test_hostile_nic_files(ready: Node) -> None:
    """300 of them: a documented exit code, one printable line, and a node as before."""
    seed = random.Random(20)
    file = manager.write_nic(mode="bridged", link="br0")
    before = snapshots.snapshot_of_kernel()
    texts = hostile_texts(seed)
    for _ in range(HOSTILE):
        text = next(texts)
        file.write_bytes(text)
        result = call(seed.choice(HOOKS), "tap0")
        judge(result, text)
        if result.code == 0:
            withdraw()
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == [], text
    assert not list((manager.RUN_DIR / "state").glob("*.json"))


def test_hostile_environments(ready: Node) -> None:
    seed = random.Random(21)
    before = snapshots.snapshot()
    for _, (argv, environ) in zip(range(HOSTILE), hostile_environments(seed), strict=False):
        program = seed.choice(HOOKS)
        result = call(program, *argv, environ=environ)
        judge(result, (program, argv, environ))
        if result.code == 0 and program != "kvm-ifdown":
            withdraw()
        assert snapshots.changes(before, snapshots.snapshot()) == [], (program, argv, environ)


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_bad_sort_of_address(ready: Node, address: str) -> None:
    before = snapshots.snapshot()
    manager.write_nic(mode="routed", ip=[address])
    result = call("kvm-ifup-post", "tap0")
    judge(result, address)
    if result.code == 0:
        withdraw()
    (manager.RUN_DIR / "tap/tap0").unlink()
    (manager.RUN_DIR / "nic/web1.example.com/0.toml").unlink()
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_hostile_configurations(ready: Node) -> None:
    manager.write_nic(mode="bridged", link="br0")
    option = manager.configuration()
    file = Path(option.partition("=")[2])
    before = snapshots.snapshot()
    more = [
        "lock_timeout = -1", "lock_timeout = nan", "lock_timeout = inf", "lock_timeout = true", "[bridged]\nx=1",
        "bridged = 1", "[[routed]]", "[routed]\nuplinks = ['a', 'a']", "[routed]\nuplinks = [1]",
        "[routed]\nuplinks = ['../x']", "[routed]\nrule_priority = 32766", "[routed]\nrp_filter = 'x'",
    ]  # fmt: skip
    for text in (*ODD_TOML, *more):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        result = call("kvm-ifup-post", "tap0", option)
        judge(result, text)
        assert result.code in (0, 78), f"{result} for {text:.100}"
        if result.code == 0:
            withdraw()
        assert snapshots.changes(before, snapshots.snapshot()) == [], text


@pytest.mark.parametrize("number", range(10))
def test_hostile_input_to_the_real_scripts(ready: Node, number: int) -> None:
    """Decoding of arguments and environment, and of stderr, is the interpreter's here."""
    seed = random.Random(100 + number)
    file = manager.write_nic(mode="bridged", link="br0")
    before = snapshots.snapshot_of_kernel()
    texts = hostile_texts(seed)
    for _ in range(seed.randint(len(ODD_TOML), len(ODD_TOML) + 20)):
        text = next(texts)
    file.write_bytes(text)
    judge(as_manager("kvm-ifup-pre", "tap0", environ={"LC_ALL": "C"}), text)
    argv, environ = next(
        (argv, environ)
        for argv, environ in hostile_environments(seed)
        if not any("\0" in text for text in (*argv, *environ.values()))
    )
    judge(as_manager("kvm-ifup-pre", *argv, environ=environ), (argv, environ))
    file.unlink()
    (manager.RUN_DIR / "tap/tap0").unlink()
    withdraw()
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


# --- QEMU -----------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(node: Node) -> Path:
    """A directory with the scripts for QEMU to call, which passes no arguments but the tap."""
    if not shutil.which("qemu-system-x86_64"):
        pytest.fail("qemu-system-x86_64 is missing (qemu-system-x86)")
    place = nodes.scratch()
    for program in HOOKS:
        wrapper = place / program
        # Like the script's own first line, but with the interpreter under test.
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(hooks.command(program))} "$@"\n')
        wrapper.chmod(0o755)
    node.uplink()
    nodes.add_bridge(mtu=9000)
    # A live port, or the bridge would get its link-local address together with the guest.
    tools.ip("link add port0 mtu 9000 type veth peer name far")
    tools.ip("link set port0 master br0 up")
    tools.ip("link set far up")
    oracle.settle("port0")
    oracle.settle("far")
    oracle.settle("br0")
    return place


class Qemu:
    """A QEMU without a guest that has tap7, wired by our scripts."""

    def __init__(self, scripts: Path, up: str) -> None:
        netdev = f"tap,id=n0,ifname=tap7,script={scripts / up},downscript={scripts / 'kvm-ifdown'}"
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-m", "16",
             "-qmp", "stdio", "-netdev", netdev, "-device", f"virtio-net-pci,netdev=n0,mac={GUEST_MAC},romfile="],
            env=tools.CLEAN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def execute(self, command: str) -> None:
        """A QMP command, and its answer awaited: QEMU is up then."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"execute": command}) + "\n")
        stdin.flush()
        while (line := stdout.readline()) and "return" not in json.loads(line):
            pass
        assert line, self.process.communicate()[1]


@pytest.mark.parametrize("up", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("mode", ["bridged", "routed"])
def test_qemu_wires_its_tap_with_our_script_and_cleans_up_when_it_quits(scripts: Path, up: str, mode: str) -> None:
    more: dict[str, Any] = {"link": "br0"} if mode == "bridged" else {"ip": [GUEST_IP4, GUEST_IP6], "link": "100"}
    manager.write_nic("tap7", mode=mode, **more)
    before = snapshots.snapshot()
    with Qemu(scripts, up) as qemu:
        qemu.execute("qmp_capabilities")
        assert oracle.link("tap7")["address"] == TAP_MAC
        if mode == "bridged":
            (port,) = [one for one in tools.ask("bridge -j link") if one["ifname"] == "tap7"]
            assert (port["state"], port["mtu"]) == ("forwarding", 9000)
        else:
            assert oracle.routes("tap7", "100") == {GUEST_IP4, GUEST_IP6}
            assert oracle.proxies("eth0") == {GUEST_IP4, GUEST_IP6}
        qemu.execute("quit")
        _, err = qemu.process.communicate(timeout=tools.PATIENCE)
        assert (qemu.process.returncode, err) == (0, "")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mode": "bridged", "link": "nosuch"}, "no such bridge: nosuch"),
        ({"mode": "routed", "ip": ["127.0.0.1"]}, "127.0.0.1 is loopback"),
    ],
)
def test_qemu_aborts_with_our_sentence_when_the_nic_cannot_be_wired(
    scripts: Path, keys: dict[str, Any], words: str
) -> None:
    manager.write_nic("tap7", **keys)
    before = snapshots.snapshot()
    with Qemu(scripts, "kvm-ifup-pre") as qemu:
        _, err = qemu.process.communicate(timeout=tools.PATIENCE)
        assert qemu.process.returncode == 1
        (ours,) = [line for line in err.splitlines() if line.startswith("kvm-ifup-pre: ")]
        assert words in ours
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_after_qemu_was_killed_gc_clears_up(scripts: Path) -> None:
    """Then nobody calls the downscript."""
    manager.write_nic("tap7", mode="routed", ip=[GUEST_IP4, GUEST_IP6], link="100")
    before = snapshots.snapshot()
    with Qemu(scripts, "kvm-ifup-post") as qemu:
        qemu.execute("qmp_capabilities")
        qemu.process.kill()
        qemu.process.wait()
    check(hooks.hook("kvm-ifup", "gc"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []
