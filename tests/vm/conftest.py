"""Tests that need what the kernel of this machine may lack: they are done in a machine with Debian's own kernel.

`./dev vm` runs them, or `pytest tests/vm -k NAME`, as root. Here, pytest only collects them. The first one boots the
machine, with the checkout in it, and one run of pytest over there does them all; their results are reported as if the
tests had been done here. Over there this file is what tests/kernel/conftest.py is for kernel tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import machine, namespaces, remote, roots
from harness.fixtures import node, on_our_own  # noqa: F401 (fixtures of these tests, over there)
from lab import debian

if remote.there():
    namespaces.isolate()

# What the tests need besides a kernel.
PACKAGES = (
    *("iproute2", "iputils-ping", "mount", "nftables", "openvswitch-switch", "util-linux"),
    *("python3-nftables", "python3-pyroute2", "python3-pytest", "python3-tomli"),
    # For Ganeti.
    *("qemu-system-x86", "socat", "python3-openssl", "python3-psutil", "python3-pyparsing", *debian.DEPENDENCIES),
)
CHECKOUT = Path("opt/kvm-ifup")  # over there
TREES = ("harness", "kvmifup", "lab", "scripts", "tests/ganeti", "tests/vm")
PYTHON = "/usr/bin/python3"  # the machine has the same release of Python, if this is Debian 12 as well
GANETI = "usr/lib/ganeti/3.0/usr/lib/ganeti"  # its scripts, which look for each other in usr/lib/ganeti
GANETI_TREE = Path("opt/ganeti")  # over there: what is below its usr
# The longest time that a test may take; only turns a hang into a failure.
PATIENCE = 240.0

_RUN = pytest.StashKey[remote.Remote]()
_MACHINE = pytest.StashKey[contextlib.ExitStack]()


# --- here -----------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Have a test done over there."""
    if remote.there():
        return None
    config = item.config
    if _RUN not in config.stash:
        config.stash[_MACHINE] = contextlib.ExitStack()
        node = config.stash[_MACHINE].enter_context(booted())
        here = Path(__file__).parent
        tests = [one.nodeid for one in item.session.items if one.path.is_relative_to(here)]
        config.stash[_RUN] = remote.Remote(
            tests, lambda script: node.follow(f"cd /{CHECKOUT} && {script}", patience=PATIENCE)
        )
    config.stash[_RUN].protocol(item)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The machine ends with the tests."""
    if _MACHINE in session.config.stash:
        session.config.stash[_MACHINE].close()


@contextlib.contextmanager
def booted() -> Iterator[machine.Machine]:
    """A machine with Debian's kernel and the checkout."""
    roots.require()
    machine.require()
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-vm-") as scratch:
        files = Path(scratch) / "files.tar"
        pack(Path(scratch), files)
        with machine.bare(PACKAGES, files) as node:
            yield node


def pack(scratch: Path, files: Path) -> None:
    """The checkout as it is now, compiled, and the pyroute2 that is used here, as a tar file."""
    tree = scratch / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in TREES:
        shutil.copytree(roots.CHECKOUT / name, tree / CHECKOUT / name, ignore=ignored)
    for name in ("pyproject.toml", "tests/__init__.py"):
        shutil.copy(roots.CHECKOUT / name, tree / CHECKOUT / name)
    (tree / "usr/lib/ganeti").mkdir(parents=True)
    for name in ("kvm-ifup", "net-common"):
        shutil.copy(debian.ganeti() / GANETI / name, tree / "usr/lib/ganeti" / name)
    for name in ("etc", "usr/lib/ganeti", "usr/share/ganeti"):
        shutil.copytree(debian.ganeti() / name, tree / GANETI_TREE / name, symlinks=True)
    install(tree)
    found = importlib.util.find_spec("pyroute2")
    assert found
    assert found.origin
    packages = tree / "usr/local/lib/python3.11/dist-packages"  # before Debian's own
    shutil.copytree(Path(found.origin).parent, packages / "pyroute2", ignore=ignored)
    # Over there it would take most of the time.
    roots.run([PYTHON, "-m", "compileall", "-q", "-s", tree, "-p", "/", tree])
    with tarfile.open(files, "w") as archive:
        archive.add(tree, arcname="", filter=_root_s)


def install(tree: Path) -> None:
    """Our commands and what Ganeti runs of us, at the places where our packages have them."""
    share = tree / "usr/share/kvm-ifup"
    for name in ("kvmifup", "scripts"):
        shutil.copytree(roots.CHECKOUT / name, share / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "usr/sbin").mkdir()
    for script in (share / "scripts").iterdir():
        (tree / "usr/sbin" / script.name).symlink_to(f"../share/kvm-ifup/scripts/{script.name}")
    for line in (roots.CHECKOUT / "debian/kvm-ifup-ganeti.install").read_text().splitlines():
        source, target = line.split()
        (tree / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(roots.CHECKOUT / source, tree / target)


def _root_s(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """What hooks load must be root's, and nobody else's to write to."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode &= 0o755
    return member
