"""Hooks through the agent are as hooks without it; and without it, or with another one, they do it themselves."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import agents, guests, hooks, manager, monitors, nodes, oracle, snapshots, tools
from harness.addresses import IPS
from harness.agents import SOCKET, Agent, phase, through, until, wired
from harness.guests import witness
from harness.hooks import Result, check, hook
from harness.nodes import Node
from kvmifup import __version__
from kvmifup.client import PATIENCE

BY_ITSELF = re.compile(r"^kvm-if\w+(-\w+)?: done without the agent: .*\n")


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


# --- alike ----------------------------------------------------------------------------------------------

BRIDGED = manager.ganeti("tap0", MODE="bridged", LINK="br0")
CALLS: list[tuple[str, list[str], dict[str, str], int]] = [
    ("kvm-ifup-pre", ["tap0"], {}, 0),
    ("kvm-ifup-pre", ["tap0", "--json"], {}, 0),
    ("kvm-ifup-pre", ["tap0", "-v", "--json"], {}, 0),
    ("kvm-ifup-post", ["tap0", "--json"], {}, 0),
    ("kvm-ifup-post", ["tap0", "-v"], {}, 0),
    ("kvm-ifup-post", ["tap0", "--plan"], {}, 0),
    ("kvm-ifup-post", ["tap0", "--plan", "--json", "-v"], {}, 0),
    ("kvm-ifup-post", ["--instance", "web1.example.com", "-v"], {}, 0),
    ("kvm-ifup-post", ["b'tap0'"], BRIDGED, 0),
    ("kvm-ifup-pre", ["-v"], {**BRIDGED, "MIGRATION_PHASE": "pre"}, 0),
    ("kvm-ifup-post", ["-v", "--announce"], {**BRIDGED, "TAGS": "ä\nb=c d", "EMPTY": ""}, 0),
    ("kvm-ifdown", ["tap0", "-v"], {}, 0),
    ("kvm-ifdown", ["tap0", "--json"], {}, 0),
    ("kvm-ifup", ["gc", "-v"], {}, 0),
    ("kvm-ifup", ["gc", "--json"], {}, 0),
    *((program, [option], {}, 0) for program in ("kvm-ifup-pre", "kvm-ifdown") for option in ("--help", "--version")),
    ("kvm-ifup", ["--help"], {}, 0),
    ("kvm-ifup-post", [], {}, 64),
    ("kvm-ifup-post", [""], {}, 64),
    ("kvm-ifup-post", ["tap0", "--nonsense"], {}, 64),
    ("kvm-ifup-post", ["tap0"], {**BRIDGED, "MIGRATION_PHASE": "pre"}, 64),
    ("kvm-ifup", ["nonsense"], {}, 64),
    ("kvm-ifup-post", ["tap9"], {}, 65),
    ("kvm-ifup-post", ["tap0 \x1b[31m\n\udcff"], {}, 65),
    ("kvm-ifup-post", ["--instance", "nobody", "--json"], {}, 65),
    ("kvm-ifup-post", ["--json"], {**BRIDGED, "MAC": "nonsense"}, 65),
    ("kvm-ifup-post", ["-v"], {**BRIDGED, "LINK": "br9"}, 69),
    ("kvm-ifup-post", ["--json"], {**BRIDGED, "LINK": "br9"}, 69),
    ("kvm-ifup-post", ["--plan"], {**BRIDGED, "LINK": "eth0"}, 69),
]


def outputs() -> list[Result]:
    """What each of the calls gives back, from the same node."""
    found = []
    for program, argv, environ, code in CALLS:
        if program == "kvm-ifdown":
            check(hook("kvm-ifup-post", "tap0"), 0)
        result = hook(program, *argv, environ=environ)
        assert result.code == code, (program, argv, result)
        found.append(Result(result.code, result.out, BY_ITSELF.sub("", result.err)))
        check(hook("kvm-ifdown", "tap0"), 0)
    return found


def test_exit_code_and_output_are_those_of_a_run_without_the_agent(uplinked: Node) -> None:
    nodes.add_bridge("br0")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    hook("kvm-ifup-post", "tap0", "--announce")
    hook("kvm-ifdown", "tap0")
    without = outputs()
    hooks.reap()
    with agents.running():
        through("kvm-ifup-post", "tap0")
        check(hook("kvm-ifdown", "tap0"), 0)
        for call, one, other in zip(CALLS, without, outputs(), strict=True):
            assert one == other, call


def test_a_bad_configuration_is_78_either_way_and_does_not_end_the_agent(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS)
    with agents.configured(), agents.running() as agent:
        agents.configure(routed={"nonsense": 1})
        through_agent, directly = (
            hook("kvm-ifup-post", "tap0"),
            hook("kvm-ifup-post", "tap0", "--run-dir", "/run/kvm-ifup"),
        )
        check(through_agent, 78, "routed.nonsense")
        assert through_agent == directly
        agent.send(signal.SIGHUP)
        agent.heard("configuration not read; the agent goes on with the one it has", "routed.nonsense")
        agents.configure()
        through("kvm-ifup-post", "tap0")


def test_with_a_bad_configuration_the_agent_goes_on_with_the_one_before(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS)
    with agents.configured(routed={"rp_filter": "loose"}), agents.running() as agent:
        through("kvm-ifup-post", "tap0")
        agents.configure(routed={"rp_filter": "strict", "nonsense": 1})
        agent.send(signal.SIGHUP)
        agent.heard("configuration not read")
        setting = Path("/proc/sys/net/ipv4/conf/tap0/rp_filter")
        setting.write_text("0")
        until(lambda: setting.read_text() == "2\n")


def test_a_kernel_that_refuses_is_the_same_error_and_all_is_put_back(uplinked: Node) -> None:
    """An administrator's program that fails: 71."""
    nodes.add_tap()
    manager.write_nic(mode="ext", link="blue")
    with agents.configured() as etc:
        program(etc, "echo what it says >&2; exit 3")
        before = snapshots.snapshot()
        directly = hook("kvm-ifup-post", "tap0")
        check(directly, 71, "what it says")
        with agents.running():
            assert hook("kvm-ifup-post", "tap0") == directly
        (manager.RUN_DIR / "agent.lock").unlink()
        assert snapshots.changes(before, snapshots.snapshot()) == []


def program(etc: Path, body: str) -> None:
    """The administrator's program for the link blue."""
    place = etc / "ext" / "blue"
    place.parent.mkdir(exist_ok=True)
    place.write_text(f"#!/bin/sh\necho $KVM_IFUP_PHASE >> /run/calls\n{body}\n")
    place.chmod(0o755)


def calls() -> list[str]:
    """The phases that it was called with."""
    file = Path("/run/calls")
    return file.read_text().split() if file.exists() else []


def test_long_arguments_and_a_large_environment_arrive_whole(uplinked: Node, agent: Agent) -> None:
    nodes.add_tap()
    addresses = [f"2001:db8:1::{number:x}" for number in range(1, 2000)]
    environ = manager.ganeti("tap0", MODE="routed", IP=",".join(addresses), TAGS="x" * 100_000)
    result = hook("kvm-ifup-post", "--plan", "-v", environ=environ)
    assert result.code == 0
    assert "without the agent" not in result.err
    assert all(f"route {address}/128" in result.out for address in addresses)


def test_what_is_too_large_for_the_agent_is_done_without_it(uplinked: Node, agent: Agent) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS)
    environ = {f"LARGE{number}": "x" * 120_000 for number in range(12)}
    result = hook("kvm-ifup-post", "tap0", "-v", environ=environ)
    assert result.code == 0
    assert "done without the agent" in result.err
    assert wired() == agents.WIRED
    through("kvm-ifdown", "tap0")


# --- without it -----------------------------------------------------------------------------------------


def does_it_itself(*words: str) -> None:
    """pre on tap0 works, and says that and why the agent has not done it."""
    result = hook("kvm-ifup-pre", "tap0", "-v")
    assert result.code == 0, result.err
    assert result.err.startswith("kvm-ifup-pre: done without the agent: "), result.err
    for word in words:
        assert word in result.err.splitlines()[0]
    assert phase() == "pre"
    check(hook("kvm-ifdown", "tap0"), 0)
    assert phase() is None


@pytest.fixture
def described(uplinked: Node) -> Node:
    """A node with a guest's tap and its NIC's file."""
    uplinked.guest()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    return uplinked


def test_no_agent(described: Node) -> None:
    does_it_itself("there is none")


def test_the_socket_of_an_agent_that_was_killed(described: Node) -> None:
    with agents.running() as agent:
        agent.end(signal.SIGKILL)
    assert SOCKET.exists()
    does_it_itself("there is none")
    with agents.running():
        through("kvm-ifup-pre", "tap0")


@pytest.mark.usefixtures("impatient")
def test_an_agent_that_is_stopped(described: Node) -> None:
    with agents.running() as agent:
        agent.send(signal.SIGSTOP)
        does_it_itself("does not answer")


def checkout(where: Path, module: str, old: str, new: str) -> Path:
    """A copy of all that runs, with *new* in the place of *old* in a *module*."""
    shutil.copytree(tools.ROOT / "kvmifup", where / "kvmifup", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tools.SCRIPTS, where / "scripts")
    file = where / "kvmifup" / module
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return where


@pytest.fixture
def impatient(described: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that wait for one second only for an agent that gives no sign of life."""
    copy = checkout(nodes.scratch(), "client.py", f"PATIENCE = {PATIENCE}\n", "PATIENCE = 1\n")
    monkeypatch.setattr(hooks, "SCRIPTS", copy / "scripts")


def test_an_agent_of_another_version(described: Node) -> None:
    copy = checkout(nodes.scratch(), "__init__.py", __version__, "99")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "SCRIPTS", copy / "scripts")
        other = Agent().ready()
    try:
        for _ in range(3):
            does_it_itself("another version")
    finally:
        other.end()


def test_an_agent_in_another_network_namespace(described: Node) -> None:
    with described.client:
        other = Agent().ready()
    try:
        result = hook("kvm-ifup-pre", "tap0", "-v")
        assert result.code == 0
        assert "another network namespace" in result.err.splitlines()[0]
        assert len(oracle.neighbours()) == 2
    finally:
        other.end()


@pytest.mark.usefixtures("impatient")
def test_something_else_behind_the_socket(described: Node) -> None:
    """That says nothing; that hangs up at once; that answers nonsense."""
    SOCKET.parent.mkdir(exist_ok=True)
    for answer in (b"", b"?", b".", b"=", b"=\0\0\0"):
        with socket.socket(socket.AF_UNIX) as server:
            SOCKET.unlink(missing_ok=True)
            server.bind(str(SOCKET))
            server.listen()
            pid = os.fork()
            if pid == 0:
                while True:
                    with server.accept()[0] as connection:
                        connection.recv(1 << 20)
                        connection.send(answer)
            does_it_itself()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_a_standard_stream_that_is_closed(described: Node, descriptor: int) -> None:
    with agents.running():
        line = f'exec "$@" {descriptor}{"<" if descriptor == 0 else ">"}&-'
        done = hook("kvm-ifup-pre", "tap0", "-v", within=["sh", "-c", line, "sh"])
        assert done.code == 0
        assert ("a standard stream is closed" in done.err) == (descriptor != 2)
        assert phase() == "pre"


def test_a_reader_that_has_gone_changes_nothing_about_what_is_done(described: Node) -> None:
    with agents.running():
        reading, writing = os.pipe()
        os.close(reading)
        done = hook("kvm-ifup-post", "tap0", "--json", "-v", stdout=writing, stderr=writing)
        os.close(writing)
        assert done.code == 0
        assert wired() == agents.WIRED


# --- given up, or killed ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_what_a_script_has_given_up_on_is_not_done_later(described: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """pre does not get an answer and does it itself; so does ifdown. When the agent goes on, that is how it stays."""
    before = snapshots.snapshot()
    with agents.running() as agent:
        agent.send(signal.SIGSTOP)
        for program in ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"):
            result = hook(program, "tap0", "-v")
            assert result.code == 0
            assert "does not answer" in result.err
        monkeypatch.setattr(hooks, "SCRIPTS", tools.SCRIPTS)  # which have more patience
        with monitors.monitored() as monitor:
            agent.send(signal.SIGCONT)
            through("kvm-ifup", "gc")
            through("kvm-ifdown", "tap0")
            assert monitor.events() == []
    (manager.RUN_DIR / "agent.lock").unlink()
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_a_script_that_is_killed_while_it_waits_for_a_lock_has_done_nothing(described: Node) -> None:
    with agents.running() as agent:
        through("kvm-ifup", "gc")
        before = snapshots.snapshot()
        with agents.locked("tap0"):
            waiting = hooks.start("kvm-ifup-post", "tap0")
            until(lambda: agent.holds(agents.lock_file("tap0")))
            waiting.kill()
            hooks.finish(waiting)
        until(lambda: not agent.holds(agents.lock_file("tap0")))
        assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_script_that_is_killed_while_its_program_runs_is_rolled_back(described: Node, number: int) -> None:
    manager.write_nic(mode="ext", link="blue", incoming=True)
    with agents.configured() as etc, agents.running():
        program(etc, "[ $KVM_IFUP_PHASE = down ] || read answer < /run/answer")
        os.mkfifo("/run/answer")
        before = snapshots.snapshot()
        waiting = hooks.start("kvm-ifup-pre", "tap0")
        until(lambda: calls() == ["pre"])
        waiting.send_signal(number)
        result = hooks.finish(waiting)
        if number == signal.SIGINT:
            check(result, 75, "kvm-ifup-pre: interrupted by SIGINT")
        else:
            assert result.code == -number
        Path("/run/answer").write_text("go on\n")
        until(lambda: calls() == ["pre", "down"])
        until(lambda: phase() is None)
        assert snapshots.changes(before, snapshots.snapshot()) == []


def test_a_script_that_is_killed_while_a_port_learns_is_rolled_back(described: Node) -> None:
    nodes.add_bridge("br0", options="stp_state 1 forward_delay 200")
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    with agents.running():
        before = snapshots.snapshot()
        waiting = hooks.start("kvm-ifup-pre", "tap0")
        until(lambda: "master" in oracle.link("tap0"))
        waiting.kill()
        hooks.finish(waiting)
        until(lambda: phase() is None)
        assert snapshots.changes(before, snapshots.snapshot()) == []


def test_an_agent_that_is_killed_while_a_hook_runs_leaves_it_to_the_script(described: Node) -> None:
    nodes.add_bridge("br0", options="stp_state 1 forward_delay 200")
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    with agents.running() as agent:
        waiting = hooks.start("kvm-ifup-pre", "tap0", "-v")
        until(lambda: "master" in oracle.link("tap0"))
        agent.end(signal.SIGKILL)
        result = hooks.finish(waiting)
        assert result.code == 0
        assert "done without the agent" in result.err
        (port,) = tools.ask("bridge -j link show dev tap0")
        assert port["state"] == "forwarding"
        assert phase() == "pre"


# --- whoever else connects --------------------------------------------------------------------------------


def connected() -> socket.socket:
    """A connection to the agent."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(tools.PATIENCE)
    client.connect(str(SOCKET))
    return client


BAD = {
    "nothing": b"",
    "garbage": b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
    "a huge length": b"\xff\xff\xff\xff" + bytes(1000),
    "no length": b"\0\0\0\0",
    "half a length": b"\0\0",
    "half a request": b"\0\0\1\0" + b"1\0",
    "no fields": b"\0\0\0\1x",
    "no numbers": b"\0\0\0\x0f1\0000.9\0x\0nn\0y\0z\0",
    "nothing but NULs": b"\0\0\0\x20" + bytes(32),
    "no UTF-8": b"\0\0\0\x20" + b"\xff\0" * 16,
}


def test_whoever_says_nothing_or_nonsense_keeps_nobody_from_being_served(described: Node) -> None:
    with agents.running() as agent, contextlib.ExitStack() as stack:
        for said in BAD.values():
            for _ in range(3):
                client = stack.enter_context(connected())
                client.sendall(said)
        through("kvm-ifup-post", "tap0")
        through("kvm-ifdown", "tap0")
        # Each is hung up on, the silent ones after a while, and nothing is left of them.
        for client in connections(stack):
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass
        witness(described, agent)


def connections(stack: contextlib.ExitStack) -> list[socket.socket]:
    """The sockets that *stack* will close."""
    return [callback.__self__ for _, callback in stack._exit_callbacks if hasattr(callback, "__self__")]  # type: ignore[attr-defined]


def test_those_who_have_been_refused_do_not_count_any_more(described: Node) -> None:
    """More than may connect at the same time, one after the other."""
    with agents.running():
        for said in (b"", b"\xff\xff\xff\xff", b"\0\0\0\1x"):
            for _ in range(1100):
                with connected() as client:
                    client.sendall(said)
                    client.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):
                        client.recv(16)
        through("kvm-ifup-post", "tap0")


@pytest.mark.userns
def test_the_socket_is_roots_alone_and_nobody_else_is_served(described: Node) -> None:
    with agents.running():
        info = SOCKET.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o600, os.geteuid())
        SOCKET.chmod(0o666)
        result = as_nobody(lambda: asked(hooks.command("kvm-ifup-post", "tap0")))
        assert result in (b"", "no other user")
        through("kvm-ifup-post", "tap0")


def asked(_: object) -> bytes:
    """What the agent answers to a request that it would otherwise refuse with a sign."""
    with connected() as client:
        with contextlib.suppress(BrokenPipeError):
            client.sendall(b"\0\0\0\1x")
        try:
            return client.recv(16)
        except ConnectionResetError:
            return b""


def as_nobody(what: Callable[[], bytes]) -> bytes | str:
    """The result of *what*, in a process of another user; in a user namespace there may be none."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        except OSError:
            os._exit(77)
        try:
            os.write(writing, b"=" + what())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77:
        assert len(Path("/proc/self/uid_map").read_text().splitlines()) == 1
        assert " 4294967295" not in Path("/proc/self/uid_map").read_text()
        return "no other user"
    assert said[:1] == b"="
    return said[1:]


def test_64_hooks_at_once(uplinked: Node) -> None:
    numbers = range(64)
    for number in numbers:
        nodes.add_tap(f"tap{number}")
        manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=[f"192.0.2.{100 + number}"])
    with agents.running():
        for program in ("kvm-ifup-post", "kvm-ifdown"):
            started = [hooks.start(program, f"tap{number}", "-v") for number in numbers]
            for process in started:
                result = hooks.finish(process)
                assert result.code == 0, result.err
                assert "without the agent" not in result.err
            there = {f"192.0.2.{100 + number}" for number in numbers} if program == "kvm-ifup-post" else set()
            assert oracle.proxies() == there


def test_many_descriptors_are_no_trouble(described: Node) -> None:
    """More than select(2) can wait for: as with a thousand armed taps."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most >= 2048
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, most))
    held = [os.dup(0) for _ in range(1200)]
    one = Agent(pass_fds=held)
    try:
        one.ready()
        client = described.listen()
        tools.ip("link del tap0")
        guest = guests.incoming(described, one)
        guest.send(guests.rarp())
        client.until(guests.rounds_of(*IPS))
        client.send(guests.garp())
        until(lambda: phase() == "pre")
        assert oracle.proxies() == set()
    finally:
        one.end()
        for descriptor in held:
            os.close(descriptor)
