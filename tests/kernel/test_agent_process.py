"""The agent as a process: one of it, its signals, systemd's protocols, its end; and another one after it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import agents, guests, hooks, manager, nodes, snapshots, tools, wire
from harness.addresses import GUEST_MAC, IPS
from harness.agents import NOT_WIRED, SOCKET, WIRED, Agent, phase, through, until, wired
from harness.guests import answering, incoming, rarp
from harness.hooks import check, hook
from harness.nodes import Node

pytestmark = pytest.mark.userns  # the agent's own privileges, files and sockets


def test_a_second_agent_ends_with_75_and_the_first_goes_on(uplinked: Node) -> None:
    with agents.running():
        check(hook("kvm-ifupd"), 75, "kvm-ifupd: another agent runs on this node", "systemctl stop")
        through("kvm-ifup", "gc")
    with agents.running():
        through("kvm-ifup", "gc")


def test_version_help_and_wrong_arguments(node: Node) -> None:
    version = hook("kvm-ifupd", "--version")
    assert (version.code, version.err) == (0, "")
    assert version.out.split()[0] == "kvm-ifupd"
    described = hook("kvm-ifupd", "--help")
    assert (described.code, described.err) == (0, "")
    assert "foreground" in described.out
    for wrong, hint in {"--nonsense": "kvm-ifupd --help", "tap0": "kvm-ifupd --help", "--vers": "--version"}.items():
        check(hook("kvm-ifupd", wrong), 64, "kvm-ifupd: ", hint)
    assert not manager.RUN_DIR.exists()


def test_without_the_privileges_it_takes_it_is_77(node: Node) -> None:
    unprivileged = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    check(hook("kvm-ifupd", within=unprivileged), 77, "kvm-ifupd: root, but not permitted")


def test_a_bad_configuration_is_78_and_leaves_no_socket(node: Node) -> None:
    with agents.configured(agent={"nonsense": 1}):
        check(hook("kvm-ifupd"), 78, "kvm-ifupd: ", "agent.nonsense")
        assert not SOCKET.exists()


def test_a_run_directory_that_cannot_be_made_is_one_clear_line(node: Node) -> None:
    manager.RUN_DIR.write_text("in the way")
    result = hook("kvm-ifupd")
    assert result.code == 69
    assert result.err.startswith("kvm-ifupd: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("closed", ["0<", "1>", "2>"])
def test_a_closed_standard_stream_changes_nothing(uplinked: Node, closed: str) -> None:
    """Its number must not go to the socket, nor what is said into something else."""
    log = Path("/run/agent.closed.log").open("w")  # noqa: SIM115
    line = ["sh", "-c", f'exec "$@" {closed}&-', "sh", *hooks.command("kvm-ifupd")]
    process = subprocess.Popen(line, env=tools.CLEAN, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: SOCKET.exists())
        nodes.add_tap()
        manager.write_nic(mode="routed", ip=IPS)
        until(lambda: "without the agent" not in hook("kvm-ifup", "gc", "-v").err)
        through("kvm-ifup-post", "tap0")
        assert (manager.RUN_DIR / "agent.lock").read_bytes() == b""
    finally:
        process.terminate()
        assert process.wait(tools.PATIENCE) == 0
        log.close()
    assert not SOCKET.exists()


# --- signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_the_socket_is_gone(uplinked: Node, number: int) -> None:
    with agents.running() as agent:
        incoming(uplinked, agent)
        before = snapshots.snapshot()
        assert agent.end(number) == 0
        assert not SOCKET.exists()
        assert snapshots.changes(before, snapshots.snapshot()) == []


def test_a_hook_that_runs_when_it_is_to_end_comes_to_its_end(uplinked: Node) -> None:
    """However long that takes. Whoever comes meanwhile does it without the agent."""
    uplinked.guest()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    with agents.configured() as etc:
        (etc / "config.toml").write_text("lock_timeout = 600\n")
        with agents.running() as agent:
            with agents.locked("tap0"):
                waiting = hooks.start("kvm-ifup-pre", "tap0", "-v")
                until(lambda: agent.holds(agents.lock_file("tap0")))
                agent.send(signal.SIGTERM)
                until(lambda: not SOCKET.exists())
                Path("/run/elsewhere").mkdir()
                meanwhile = hook("kvm-ifup", "gc", "--run-dir=/run/elsewhere")
                check(meanwhile, 0)
                assert agent.process.poll() is None
            result = hooks.finish(waiting)
            assert result.code == 0
            assert "without the agent" not in result.err
            assert agent.process.wait(tools.PATIENCE) == 0
    assert phase() == "pre"


def test_somebody_who_is_connected_and_silent_does_not_keep_it(uplinked: Node) -> None:
    with agents.running() as agent, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(SOCKET))
        through("kvm-ifup", "gc")
        assert agent.end() == 0
        assert client.recv(1) == b""


def test_announcements_are_finished_first(uplinked: Node) -> None:
    client = uplinked.listen()
    with agents.running() as agent:
        guest = incoming(uplinked, agent)
        guest.send(rarp())
        heard = client.until(lambda frame: bool(guests.announcements([frame], IPS[0])))
        assert agent.end() == 0
    heard += uplinked.fence(client)
    assert [len(guests.announcements(heard, address)) for address in IPS] == [5, 5]


def test_many_signals_at_once_lose_none(uplinked: Node) -> None:
    with agents.running() as agent:
        for _ in range(2000):
            agent.send(signal.SIGHUP)
            agent.send(signal.SIGCHLD)
        assert agent.end() == 0


# --- systemd --------------------------------------------------------------------------------------------


class Activated:
    """An agent that is started as systemd starts it: with a socket as descriptor 3, and somebody to notify."""

    def __init__(self, descriptors: str = "1") -> None:
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind("/run/notify")
        self.notified.settimeout(tools.PATIENCE)
        manager.RUN_DIR.mkdir(exist_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        SOCKET.unlink(missing_ok=True)
        self.listener.bind(str(SOCKET))
        SOCKET.chmod(0o600)
        self.listener.listen(64)
        self.descriptors = descriptors

    def start(self) -> Agent:
        """An agent."""
        become = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        with pytest.MonkeyPatch.context() as patch:
            plain = hooks.command
            number = self.listener.fileno()
            patch.setattr(
                hooks, "command", lambda *argv: [sys.executable, "-I", "-c", become, str(number), *plain(*argv)]
            )
            environ = {"LISTEN_FDS": self.descriptors, "NOTIFY_SOCKET": "/run/notify"}
            return Agent(environ=environ, pass_fds=[number])

    def close(self) -> None:
        """The socket unit ends."""
        self.notified.close()
        self.listener.close()


@pytest.fixture
def activated(uplinked: Node) -> Iterator[Activated]:
    """systemd's side."""
    one = Activated()
    yield one
    one.close()


def test_it_takes_the_socket_it_is_given_and_tells_of_its_start_and_end(activated: Activated) -> None:
    first = hooks.start("kvm-ifup", "gc", "-v")  # before there is an agent: this is what starts it
    agent = activated.start()
    assert activated.notified.recv(100) == b"READY=1"
    result = hooks.finish(first)
    assert result.code == 0
    through("kvm-ifup", "gc")
    assert agent.end() == 0
    assert activated.notified.recv(100) == b"STOPPING=1"
    assert SOCKET.exists()  # systemd's
    again = activated.start()
    through("kvm-ifup", "gc")
    assert again.end() == 0


@pytest.mark.parametrize("agent", ["none yet", "systemd's"])
def test_run_by_hand_it_leaves_systemds_socket_alone(activated: Activated, agent: str) -> None:
    """And asking for it wakes nobody."""
    systemds = activated.start().ready() if agent == "systemd's" else None
    code = 75 if systemds else 69
    check(hook("kvm-ifupd"), code, "kvm-ifupd: ", "systemctl")
    assert SOCKET.exists()
    if not systemds:
        activated.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            activated.listener.accept()
        systemds = activated.start().ready()
    through("kvm-ifup", "gc")
    assert systemds.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_socket_that_systemd_has_made_meanwhile_outlives_it(uplinked: Node, number: int) -> None:
    with agents.running() as agent, contextlib.closing(Activated()):
        assert agent.end(number) == 0
        assert SOCKET.exists()


def test_a_socket_that_a_killed_agent_has_left_is_replaced(uplinked: Node) -> None:
    with agents.running() as agent:
        agent.end(signal.SIGKILL)
    assert SOCKET.exists()
    with agents.running():
        through("kvm-ifup", "gc")
    assert not SOCKET.exists()


def test_another_number_of_sockets_is_64(uplinked: Node) -> None:
    for number in ("0", "2", "x"):
        with contextlib.closing(Activated(number)) as one:
            agent = one.start()
            assert agent.process.wait(tools.PATIENCE) == 64
            assert agent.said().count("\n") == 1
        Path("/run/notify").unlink()


def test_somebody_elses_socket_is_none_of_its_business(uplinked: Node) -> None:
    with agents.running(environ={"LISTEN_PID": "1", "LISTEN_FDS": "1"}) as agent:
        through("kvm-ifup", "gc")
        assert agent.end() == 0
    assert not SOCKET.exists()


class Log:
    """systemd's journal as a service finds it: a stream on stderr, which $JOURNAL_STREAM names."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.settimeout(tools.PATIENCE)
        status = os.fstat(self.theirs.fileno())
        self.environ = {**tools.CLEAN, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    def until(self, text: bytes) -> list[bytes]:
        """The lines up to one with *text*."""
        read = b""
        while text not in read or not read.endswith(b"\n"):
            more = self._ours.recv(4096)
            assert more, read
            read += more
        return read.splitlines()

    def close(self) -> None:
        """Nobody reads it any more."""
        self._ours.close()
        self.theirs.close()


@pytest.fixture
def log() -> Iterator[Log]:
    """A journal."""
    with contextlib.closing(Log()) as one:
        yield one


def test_in_the_journal_a_line_has_its_priority_and_no_name_of_its_own(uplinked: Node, log: Log) -> None:
    """systemd puts the name before each line."""
    with agents.configured():
        process = subprocess.Popen(
            hooks.command("kvm-ifupd"), env=log.environ, stdin=subprocess.DEVNULL, stderr=log.theirs.fileno()
        )
        try:
            assert log.until(b"ready") == [b"<6>ready"]
            process.send_signal(signal.SIGHUP)
            assert log.until(b"read") == [b"<6>configuration read"]
            agents.configure(agent={"nonsense": 1})
            process.send_signal(signal.SIGHUP)
            (line,) = log.until(b"nonsense")
            assert line.startswith(b"<3>configuration not read; the agent goes on with the one it has: ")
            again = subprocess.run(hooks.command("kvm-ifupd"), env=log.environ, stderr=log.theirs.fileno(), check=False)
            assert again.returncode == 75
            (line,) = log.until(b"another")
            assert line.startswith(b"<3>another agent runs on this node (")
        finally:
            process.terminate()
            assert process.wait(tools.PATIENCE) == 0


def test_somebody_elses_journal_is_none_of_its_business(node: Node, log: Log) -> None:
    """Started by a hand in a service, with its output somewhere else."""
    check(hook("kvm-ifupd", "x", env=log.environ), 64, "kvm-ifupd: 'x' is one argument too many")


def test_idle_it_exits_but_only_if_there_is_nothing_to_look_after(activated: Activated) -> None:
    with agents.configured(agent={"idle_exit": 0.2}):
        nodes.add_tap()
        manager.write_nic(mode="routed", ip=IPS, incoming=True)
        check(hook("kvm-ifup-pre", "tap0", "--run-dir=/run/kvm-ifup"), 0)
        agent = activated.start().ready()
        agent.armed()
        until(looks_of(agent, 20))
        assert agent.process.poll() is None
        through("kvm-ifdown", "tap0")
        assert agent.process.wait(tools.PATIENCE) == 0
        assert activated.notified.recv(100) == b"READY=1"
        assert activated.notified.recv(100) == b"STOPPING=1"
        assert SOCKET.exists()


def looks_of(agent: Agent, number: int) -> Callable[[], bool]:
    """For `until`: it has waked up so often."""

    def count() -> int:
        lines = Path(f"/proc/{agent.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    enough = count() + number
    return lambda: count() >= enough


def test_started_by_hand_it_stays(uplinked: Node) -> None:
    with agents.configured(agent={"idle_exit": 0.05}), agents.running() as agent:
        until(looks_of(agent, 10))
        assert agent.process.poll() is None
        through("kvm-ifup", "gc")


# --- another one after it ---------------------------------------------------------------------------------


def test_killed_and_started_anew_it_is_still_armed(uplinked: Node) -> None:
    with agents.running() as first:
        guest = incoming(uplinked, first)
        first.end(signal.SIGKILL)
    with agents.running() as second:
        second.armed()
        assert wired() == NOT_WIRED
        guest.send(rarp())
        until(lambda: phase() == "post")
        assert wired() == WIRED


@pytest.mark.parametrize("ip", [IPS, IPS[:1], IPS[1:]], ids=["both", "IPv4", "IPv6"])
def test_a_guest_that_has_arrived_while_there_was_no_agent_is_asked_and_wired(uplinked: Node, ip: list[str]) -> None:
    """Also when there was something else to clear up first."""
    guest = incoming(uplinked, None, ip=ip)
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="routed", ip=["192.0.2.99"])
    check(hook("kvm-ifup-post", "tap1"), 0)
    tools.ip("link del tap1")
    guest.send(rarp())  # nobody listens
    with answering(guest), agents.running():
        # The two go on side by side; the guest may be first.
        until(lambda: phase() == "post" and phase("tap1") is None)
        assert wired() == (set(ip), set(ip))


def test_a_guest_that_has_not_arrived_is_asked_and_nothing_happens(uplinked: Node) -> None:
    guest = incoming(uplinked)
    with agents.running() as agent:
        agent.armed()
        asked = guest.until(lambda frame: bool((arp := wire.arp(frame)) and arp.target == IPS[0]))
        arp = wire.arp(asked[-1])
        # A probe, to the guest alone: no neighbour learns anything from it.
        assert arp is not None
        assert (arp.target_frame, arp.sender, arp.op) == (GUEST_MAC, "0.0.0.0", 1)
        guests.witness(uplinked, agent)
        assert wired() == NOT_WIRED


def test_a_guest_that_left_unseen_is_withdrawn_at_the_next_announcement(uplinked: Node) -> None:
    with agents.running() as first:
        guests.arrived(uplinked, first)
        first.end(signal.SIGKILL)
    client = uplinked.listen()
    with agents.running():
        guests.withdraw(client)
        assert wired() == NOT_WIRED


KILLS = 25  # of each of the two


@pytest.mark.sweep
@pytest.mark.parametrize("remedy", ["another agent", "kvm-ifup gc"])
def test_killed_again_and_again_at_any_moment_the_node_is_in_the_end_as_before(uplinked: Node, remedy: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with agents.running():
        through("kvm-ifup", "gc")
    before = left()
    over = threading.Event()
    killer = threading.Thread(target=kill_again_and_again, args=(random.Random(seed + 1), over))
    killer.start()
    try:
        while not over.is_set():
            cycle(uplinked, chance)
    finally:
        over.set()
        killer.join()
    if remedy == "kvm-ifup gc":
        check(hook("kvm-ifup", "gc"), 0)
        assert snapshots.changes(before, left()) == []
    else:
        with agents.running():
            until(lambda: snapshots.changes(before, left()) == [])


def left() -> snapshots.Snapshot:
    """The node, without NIC files, half a journal that the next overwrites, and what was heard, which grows old."""
    found, others = snapshots.snapshot(), ("/nic/", "/tap/", ".new: ", "/rivals.json")
    return snapshots.Snapshot({line: n for line, n in found.items() if not any(word in line for word in others)})


def kill_again_and_again(chance: random.Random, over: threading.Event) -> None:
    """An agent, killed at a moment that nobody has chosen, and the next one."""
    for _ in range(KILLS):
        if over.is_set():
            break
        agent = Agent()
        time.sleep(chance.uniform(0.1, 1.0))
        agent.end(signal.SIGKILL)
    over.set()


def cycle(node: Node, chance: random.Random) -> None:
    """A guest comes, perhaps arrives, is perhaps wired by its manager or announced elsewhere, and goes."""
    guest = node.guest()
    manager.write_nic(mode="routed", link="100", ip=IPS, incoming=True)
    # A script that loses its agent does it itself, so this never fails.
    check(hook("kvm-ifup-pre", "tap0"), 0)
    client = node.listen()
    for _ in range(chance.randrange(4)):
        guest.send(rarp())
        time.sleep(chance.uniform(0, 0.1))
        if chance.random() < 0.3:
            client.send(guests.garp())
    if chance.random() < 0.5:
        check(hook("kvm-ifup-post", "tap0"), 0)
    if chance.random() < 0.5:
        check(hook("kvm-ifdown", "tap0"), 0)
    tools.ip("link del tap0")
    guest.close()
    node.taps.remove(guest)
    node.wires.remove(client)
    client.close()
