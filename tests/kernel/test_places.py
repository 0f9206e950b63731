"""The directories, locks and sockets that we make: root's alone, whatever the umask is and whoever was there first."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import agents, hooks, manager, nodes, snapshots, tools
from harness.addresses import GUEST_IP4
from harness.agents import SOCKET, STATE, through, until
from harness.hooks import check, finish, hook, start
from harness.manager import RUN_DIR
from harness.nodes import Node

SOMEBODY = 1234
ENVIRON = manager.ganeti(MODE="routed", IP=GUEST_IP4, LINK="100")  # no NIC file, whose directories are looked at first


def modes() -> dict[str, str]:
    """What is below the run directory, with the modes."""
    found = [RUN_DIR, *sorted(RUN_DIR.rglob("*"))]
    return {str(path.relative_to(RUN_DIR)): f"{path.lstat().st_mode & 0o777:o}" for path in found}


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
@pytest.mark.parametrize("agent", [False, True])
def test_whatever_the_umask_only_root_can_write(uplinked: Node, umask: int, agent: bool) -> None:
    nodes.add_tap()
    file = Path("/run/nic.toml")
    file.write_text(f'tap = "tap0"\nmac = "aa:00:00:35:ac:01"\nmode = "routed"\nip = ["{GUEST_IP4}"]\n')
    with contextlib.ExitStack() as stack:
        if agent:
            stack.enter_context(agents.running(umask=umask))
        check(finish(start("kvm-ifup", "nic", "put", "web1", "0", str(file), umask=umask)), 0)
        check(finish(start("kvm-ifup-post", "tap0", umask=umask)), 0)
        found = modes()
    directories = {".", "state", "lock", "nic", "nic/web1", "tap"}
    files = {"state/tap0.json", "lock/tap.tap0", "lock/uplink", "nic/web1/0.toml"}
    assert {name for name, mode in found.items() if mode == "755"} >= directories
    assert {name for name, mode in found.items() if mode == "600"} >= files
    if agent:
        assert (found["agent.lock"], found["agent.sock"], found["metrics.prom"]) == ("600", "600", "644")


def anybody_may_write(place: Path) -> None:
    place.chmod(0o777)


def a_group_may_write(place: Path) -> None:
    place.chmod(0o775)


def somebody_owns_it(place: Path) -> None:
    os.chown(place, SOMEBODY, SOMEBODY)


def it_is_a_symlink(place: Path) -> None:
    place.rename("/run/elsewhere")
    place.symlink_to("/run/elsewhere")


def it_is_a_file(place: Path) -> None:
    place.rename("/run/elsewhere")
    place.touch()


@contextlib.contextmanager
def spoilt(place: Path, spoil: Callable[[Path], None]) -> Iterator[None]:
    """*place*, spoilt; and then as it was."""
    spoil(place)
    yield
    if Path("/run/elsewhere").exists():
        place.unlink()
        Path("/run/elsewhere").rename(place)
    place.chmod(0o755)
    os.chown(place, 0, 0)


WRONG = [
    *((name, spoil) for name in ("", "state", "lock") for spoil in (anybody_may_write, a_group_may_write)),
    *((name, somebody_owns_it) for name in ("", "state", "lock")),
    *((name, spoil) for name in ("state", "lock") for spoil in (it_is_a_symlink, it_is_a_file)),
]


@pytest.mark.parametrize(("name", "spoil"), WRONG, ids=lambda part: part if isinstance(part, str) else part.__name__)
def test_a_directory_that_is_not_roots_alone_is_refused(
    uplinked: Node, name: str, spoil: Callable[[Path], None]
) -> None:
    """By every command, before anything is changed; and no journal is blamed or moved."""
    nodes.add_tap()
    check(hook("kvm-ifup-post", environ=ENVIRON), 0)
    hooks.reap()
    nodes.add_tap("tap1")
    before, journal = snapshots.snapshot_of_kernel(), (STATE / "tap0.json").read_bytes()
    other = {**ENVIRON, "INTERFACE": "tap1", "IP": "192.0.2.9", "MAC": "aa:00:00:35:ac:02"}
    with spoilt(RUN_DIR / name, spoil):
        for result in (
            hook("kvm-ifup-post", environ=ENVIRON),
            hook("kvm-ifup-pre", environ=other),
            hook("kvm-ifdown", environ=ENVIRON),
            *([hook("kvm-ifup", "gc")] if spoil is not it_is_a_file else []),
        ):
            check(result, 69, str(RUN_DIR / name))
            assert "kvm-ifup gc" not in result.err
        if name != "lock":
            assert hook("kvm-ifupd").code == 69
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert (STATE / "tap0.json").read_bytes() == journal
    assert sorted(path.name for path in STATE.iterdir()) == ["tap0.json"]
    check(hook("kvm-ifdown", environ=ENVIRON), 0)


def test_an_agent_goes_on_when_its_directory_is_spoilt_and_mended(uplinked: Node) -> None:
    nodes.add_tap()
    with agents.running() as agent:
        check(hook("kvm-ifup-post", environ=ENVIRON), 0)
        with spoilt(STATE, anybody_may_write):
            check(hook("kvm-ifup-post", environ=ENVIRON), 69, "written to by others")
            tools.ip("link del tap0")
        through("kvm-ifup", "gc")
        until(lambda: not (STATE / "tap0.json").exists())
        assert agent.process.poll() is None


@pytest.mark.parametrize("name", ["agent.lock", "lock/tap.tap0", "lock/uplink"])
def test_nobody_but_root_can_hold_a_lock(uplinked: Node, name: str) -> None:
    """Not even one that an earlier version has made for all to read."""
    nodes.add_tap()
    check(hook("kvm-ifup-post", environ=ENVIRON), 0)
    (RUN_DIR / name).touch()
    (RUN_DIR / name).chmod(0o644)
    with agents.running():
        check(hook("kvm-ifup-post", environ=ENVIRON), 0)
        taking = ["setpriv", f"--reuid={SOMEBODY}", "--clear-groups", "flock", "-n", str(RUN_DIR / name), "true"]
        assert subprocess.run(taking, capture_output=True, check=False).returncode != 0


# --- who poses as the agent -----------------------------------------------------------------------------------


@contextlib.contextmanager
def posing(owner: int) -> Iterator[Callable[[], bytes]]:
    """A process of *owner* listens where the agent should; yields a function that tells what it has been told."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(SOCKET))
    heard, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(owner, owner, owner)
            listener.listen(8)
            os.write(tell, b"ready")
            while True:
                connection = listener.accept()[0]
                os.write(tell, b"+" + connection.recv(65536))
        finally:
            os._exit(0)
    assert os.read(heard, 5) == b"ready"

    def told() -> bytes:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(tell)
        return os.read(heard, 1 << 20)

    yield told
    os.close(heard)
    listener.close()


@pytest.mark.parametrize(("where", "mode"), [("in a directory of root's", 0o755), ("in one of everybody's", 0o777)])
def test_who_poses_as_the_agent_is_told_nothing(uplinked: Node, where: str, mode: int) -> None:
    nodes.add_tap()
    RUN_DIR.mkdir()
    RUN_DIR.chmod(mode)
    with posing(SOMEBODY) as told:
        result = hook("kvm-ifup-post", "-v", environ=ENVIRON)
        assert "without the agent" in result.err
        assert result.code == (0 if mode == 0o755 else 69)
        assert told().strip(b"+") == b""


def test_a_symlink_to_another_service_of_roots_is_not_talked_to(uplinked: Node) -> None:
    RUN_DIR.mkdir()
    RUN_DIR.chmod(0o777)
    with posing(0) as told:
        SOCKET.rename("/run/other.sock")
        SOCKET.symlink_to("/run/other.sock")
        assert "others can write" in hook("kvm-ifup-post", "-v", environ=ENVIRON).err
        assert told() == b""
