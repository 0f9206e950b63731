"""Files that somebody else could have written, and users who may not change the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import manager, namespaces, nodes, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.hooks import call, check, hook
from harness.nodes import Node

pytestmark = pytest.mark.userns  # who owns a file, and what root without its capabilities may do


def group_writable(file: Path) -> None:
    file.chmod(0o664)


def world_writable(file: Path) -> None:
    file.chmod(0o606)


def in_a_writable_directory(file: Path) -> None:
    file.parent.chmod(0o777)


def in_a_sticky_directory(file: Path) -> None:
    file.parent.chmod(0o1777)


def owned_by_another_uid(file: Path) -> None:
    if not own(file, 1234):
        # In a user namespace there is nobody else; but what the host's root owns looks like nobody's.
        namespaces.bind_mount(Path("/etc/passwd"), file)


def a_symlink_out(file: Path) -> None:
    target = Path("/run/elsewhere.toml")
    file.rename(target)
    file.symlink_to(target)


def a_symlink_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def huge(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"#" * (1 << 20))


def sparse_and_huge(file: Path) -> None:
    os.truncate(file, 1 << 40)


def not_utf8(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" + file.read_bytes())


def own(place: Path, uid: int) -> bool:
    """Give *place* to *uid*; False where there is no such user."""
    try:
        os.chown(place, uid, uid)
    except OSError:
        return False
    return True


CASES: list[Callable[[Path], None]] = [
    group_writable, world_writable, in_a_writable_directory, in_a_sticky_directory, owned_by_another_uid,
    a_symlink_out, a_symlink_loop, a_fifo, a_directory, huge, sparse_and_huge, not_utf8,
]  # fmt: skip


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
def test_a_nic_file_that_is_not_to_be_trusted_is_65(
    uplinked: Node, spoil: Callable[[Path], None], program: str
) -> None:
    nodes.add_tap()
    file = manager.write_nic(mode="routed", ip=[GUEST_IP4])
    spoil(file)
    before = snapshots.snapshot_of_kernel()
    check(call(program, "tap0"), 65, str(manager.RUN_DIR))
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


@pytest.mark.parametrize("level", ["", "nic"])
def test_a_directory_above_that_others_can_write_to_is_65(uplinked: Node, level: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    (manager.RUN_DIR / level).chmod(0o777)
    check(call("kvm-ifup-post", "tap0"), 65, "can be written to by others")


def test_a_symlink_within_the_run_directory_is_fine(uplinked: Node) -> None:
    nodes.add_tap()
    file = manager.write_nic(mode="routed", ip=[GUEST_IP4])
    file.rename(file.with_name("7.toml"))
    file.symlink_to("7.toml")
    check(call("kvm-ifup-post", "tap0"), 0)


def test_the_run_directory_itself_may_be_reached_through_a_symlink(uplinked: Node) -> None:
    """/var/run is one."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    Path("/run/alias").symlink_to("/run")
    check(call("kvm-ifup-post", "tap0", "--run-dir=/run/alias/kvm-ifup"), 0)


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_a_configuration_that_is_not_to_be_trusted_is_78(uplinked: Node, spoil: Callable[[Path], None]) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    option = manager.configuration(lock_timeout=1)
    file = Path(option.partition("=")[2])
    spoil(file)
    before = snapshots.snapshot()
    for program in (["kvm-ifup-pre", "tap0"], ["kvm-ifdown", "tap0"], ["kvm-ifup", "gc"]):
        check(call(*program, option), 78, str(file))
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("mistake", ["x = 1", "not toml", "[routed]\nuplinks = 5"])
@pytest.mark.parametrize("program", ["kvm-ifdown tap0", "kvm-ifup gc"])
def test_undoing_needs_no_configuration_that_is_right(uplinked: Node, program: str, mistake: str) -> None:
    """What was drawn here must not stay because of a typo. The typo is told all the same."""
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    before = snapshots.snapshot()
    nodes.add_tap()
    option = manager.configuration()
    check(call("kvm-ifup-post", "tap0", option), 0)
    Path(option.partition("=")[2]).write_text(mistake)
    if program == "kvm-ifup gc":
        tools.ip("link del tap0")
    found = call(*program.split(), option)
    check(found, 78, option.partition("=")[2])
    assert found.err.count("\n") == 1
    if program != "kvm-ifup gc":
        tools.ip("link del tap0")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    check(call(*program.split()), 0)
    assert not list((manager.RUN_DIR / "state").glob("*.json"))


@pytest.mark.parametrize("option", ["--config=/nonexistent.toml", "--config=/run/no/such/dir.toml", "--config=/run"])
def test_a_missing_configuration_is_78(uplinked: Node, option: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0", option), 78)


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
def test_root_without_cap_net_admin_is_77_and_nothing_changes(uplinked: Node, program: str) -> None:
    """Root in a container that may not change the network."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    if program == "kvm-ifdown":
        check(call("kvm-ifup-post", "tap0"), 0)
    before = snapshots.snapshot()
    result = hook(program, "tap0", within=["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"])
    # To be found before the first change: some sysctls root may write without it, and then half would be undone.
    check(result, 77, "CAP_NET_ADMIN")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
def test_not_root_is_77_and_nothing_changes(uplinked: Node, program: str) -> None:
    """In a user namespace without any user the hook runs as nobody, and has no power over this network."""
    nodes.add_tap()
    file = manager.write_nic(mode="routed", ip=[GUEST_IP4])
    file.chmod(0o644)
    before = snapshots.snapshot()
    check(hook(program, "tap0", within=["unshare", "--user"]), 77, "root")
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_a_plan_needs_no_privileges(uplinked: Node) -> None:
    """The NIC's file belongs to root and may be read by everybody."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4]).chmod(0o644)
    expected = hook("kvm-ifup-post", "--plan", "tap0")
    without_power = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    assert hook("kvm-ifup-post", "--plan", "tap0", within=without_power) == expected
    assert expected
