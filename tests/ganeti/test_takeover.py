"""What the package does below /etc/ganeti: dpkg itself installs, upgrades and removes it in an empty root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ganeti.cluster import package

SHIMS = "/usr/lib/kvm-ifup/ganeti"
MODES = ("bridged", "routed", "openvswitch", "ext")
OPERATIONS = ("stop", "reboot", "migrate", "failover", "move", "modify", "remove")
MOVES = ("migrate", "failover", "move")
LINKS = {
    "etc/ganeti/kvm-vif-bridge": f"{SHIMS}/kvm-vif-bridge",
    **{f"etc/ganeti/network/{mode}/{action}": f"{SHIMS}/{action}" for mode in MODES for action in ("up", "down")},
    **{f"etc/ganeti/hooks/instance-{name}-post.d/50-kvm-ifup": f"{SHIMS}/hook" for name in OPERATIONS},
    **{f"etc/ganeti/hooks/instance-{name}-pre.d/50-kvm-ifup": f"{SHIMS}/hook-pre" for name in MOVES},
}


class Root:
    """A root directory for dpkg, and what is in it apart from dpkg's own files."""

    def __init__(self, path: Path, takeover: Path) -> None:
        self.path = path
        self.takeover = takeover
        for directory in ("info", "updates", "triggers"):
            (path / "var/lib/dpkg" / directory).mkdir(parents=True)
        (path / "var/lib/dpkg/status").touch()
        (path / "etc").mkdir()

    def dpkg(self, *argv: str) -> str:
        """Run dpkg on this root; returns what was said."""
        force = ("--force-script-chrootless", "--force-depends", "--force-bad-path")
        done = subprocess.run(
            ["dpkg", f"--root={self.path}", *force, *argv],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DPKG_FRONTEND_LOCKED": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def install(self) -> str:
        """Install the package; returns what was said."""
        return self.dpkg("-i", str(self.takeover))

    def write(self, name: str, text: str) -> Path:
        """A file of the administrator's own."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def snapshot(self) -> dict[str, str]:
        """Every file outside dpkg's own, and what it is."""
        found: dict[str, str] = {}
        for place, directories, files in os.walk(self.path):
            for name in (*directories, *files):
                path = Path(place, name)
                short = str(path.relative_to(self.path))
                if path.is_symlink():
                    found[short] = f"-> {path.readlink()}"
                elif not short.startswith("var/lib/dpkg"):
                    found[short] = "directory" if path.is_dir() else f"{path.stat().st_mode:o} {path.read_bytes()!r}"
        return found

    def links(self) -> dict[str, str]:
        """Every symlink in /etc, and where it leads."""
        return {n: what[3:] for n, what in self.snapshot().items() if n.startswith("etc/") and what[:2] == "->"}


@pytest.fixture
def root(tmp_path: Path, packages: list[Path]) -> Root:
    """An empty root, and the package that has the links."""
    return Root(tmp_path / "root", packages[1])


def test_every_link_is_made_and_all_of_it_goes_again(root: Root) -> None:
    before = root.snapshot()
    assert "not ours" not in root.install()
    assert root.links() == LINKS
    for link, shim in LINKS.items():
        assert os.access(f"{root.path}{shim}", os.X_OK), link
    root.dpkg("-r", "kvm-ifup-ganeti")
    assert set(root.snapshot()) - set(before) <= {"var", "var/lib", "usr", "usr/lib"}


def test_repeating_it_changes_nothing(root: Root) -> None:
    root.install()
    before = root.snapshot()
    inodes = {name: (root.path / name).lstat().st_ino for name in LINKS}
    root.install()
    assert root.snapshot() == before
    assert {name: (root.path / name).lstat().st_ino for name in LINKS} == inodes


def test_an_administrators_own_file_wins_and_is_told_of(root: Root) -> None:
    own = [
        root.write("etc/ganeti/kvm-vif-bridge", "#!/bin/sh\necho mine\n"),
        root.write("etc/ganeti/network/routed/up", ""),
    ]
    masked = root.path / "etc/ganeti/network/bridged/down"
    masked.parent.mkdir(parents=True)
    masked.symlink_to("/dev/null")
    dangling = root.path / "etc/ganeti/network/ext/up"
    dangling.parent.mkdir(parents=True)
    dangling.symlink_to("/usr/local/lib/nothing-there")
    before = root.snapshot()

    said = [line for line in root.install().splitlines() if "is not ours" in line]
    expected = [*own, masked, dangling]
    assert sorted(line.split()[1] for line in said) == sorted(f"/{one.relative_to(root.path)}" for one in expected)
    assert all(f"{SHIMS}/takeover on" in line for line in said)
    assert {name: what for name, what in root.snapshot().items() if name in before} == before

    root.dpkg("-r", "kvm-ifup-ganeti")
    assert {n: w for n, w in root.snapshot().items() if n.startswith("etc")} == {
        n: w for n, w in before.items() if n.startswith("etc")
    }


def test_directories_that_were_there_stay(root: Root) -> None:
    (root.path / "etc/ganeti/hooks/instance-stop-post.d").mkdir(parents=True)
    before = {n for n in root.snapshot() if n.startswith("etc")}
    root.install()
    root.dpkg("-r", "kvm-ifup-ganeti")
    assert {n for n in root.snapshot() if n.startswith("etc")} == before


def test_a_directory_that_somebody_else_has_come_to_use_stays(root: Root) -> None:
    root.install()
    other = root.write("etc/ganeti/hooks/instance-stop-post.d/10-other", "")
    root.dpkg("-r", "kvm-ifup-ganeti")
    assert other.exists()
    assert not (root.path / "etc/ganeti/hooks/instance-remove-post.d").exists()


def test_a_copy_that_ganeti_made_is_ours(root: Root) -> None:
    root.install()
    copy = root.path / "etc/ganeti/kvm-vif-bridge"
    copy.unlink()
    shutil.copy(f"{root.path}{SHIMS}/kvm-vif-bridge", copy)
    root.dpkg("-r", "kvm-ifup-ganeti")
    assert not copy.exists()


def test_a_copy_becomes_a_link_again_even_if_the_next_version_has_another_shim(root: Root, tmp_path: Path) -> None:
    root.install()
    copy = root.path / "etc/ganeti/kvm-vif-bridge"
    copy.unlink()
    shutil.copy(f"{root.path}{SHIMS}/kvm-vif-bridge", copy)

    tree = tmp_path / "kvm-ifup-ganeti"
    subprocess.run(["dpkg-deb", "-x", str(root.takeover), str(tree)], check=True)
    with (tree / SHIMS[1:] / "kvm-vif-bridge").open("a") as shim:
        shim.write("# another\n")
    assert "not ours" not in root.dpkg("-i", str(package(tree, version="9")))
    assert root.links() == LINKS


def test_a_copy_that_was_changed_is_the_administrators(root: Root) -> None:
    root.install()
    copy = root.path / "etc/ganeti/kvm-vif-bridge"
    copy.unlink()
    root.write("etc/ganeti/kvm-vif-bridge", Path(f"{root.path}{SHIMS}/kvm-vif-bridge").read_text() + "# mine\n")
    root.dpkg("-r", "kvm-ifup-ganeti")
    assert copy.read_text().endswith("# mine\n")


def test_an_administrator_can_hand_over_later(root: Root) -> None:
    own = root.write("etc/ganeti/kvm-vif-bridge", "")
    root.install()
    own.unlink()
    subprocess.run([f"{root.path}{SHIMS}/takeover", "on"], env={"DPKG_ROOT": str(root.path)}, check=True)
    assert root.links() == LINKS


def test_it_says_how_it_is_used(root: Root) -> None:
    root.install()
    done = subprocess.run([f"{root.path}{SHIMS}/takeover", "of"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("usage: ")
