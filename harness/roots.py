"""Fresh Debian systems in directories, each with namespaces of its own.

`archive` makes a system once with mmdebstrap and keeps it as a tar file; `Root` unpacks a fresh copy. Its
mounts and its network belong to one process, which ends with the test: nothing is mounted, and no device
appears, where the tests run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
CACHE = Path.home() / ".cache/kvm-ifup-roots"
DAY = 24 * 60 * 60
# Debian's lists in a kept system name files that its mirror drops at a point release.
KEPT = 7 * DAY
# Generous: this only turns a hang into a failure.
PATIENCE = 900

TOOLS = {
    "apt-get": "apt",
    "bridge": "iproute2",
    "dpkg-buildpackage": "dpkg-dev",
    "git": "git",
    "ip": "iproute2",
    "lintian": "lintian",
    "mmdebstrap": "mmdebstrap",
    "nsenter": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
}
# What an administrator's login has; nothing of the caller's environment reaches the systems.
CLEAN: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
PROXIES = {name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy") if name in os.environ}


def require() -> None:
    """Fail, and never skip, when something that is needed is missing."""
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=CLEAN["PATH"])})
    if missing:
        pytest.exit(f"apt-get install {' '.join(missing)}", returncode=3)
    if os.geteuid() != 0:
        pytest.exit("installing packages takes root", returncode=3)


def run(
    argv: Sequence[str | Path],
    *,
    check: bool = True,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a clean environment, and *env*; it has to succeed unless *check* is False."""
    done = subprocess.run(
        [*prefix, *map(str, argv)],
        cwd=cwd or "/",
        env={**CLEAN, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        assert done.returncode == 0, f"{' '.join(map(str, argv))}: exit {done.returncode}\n{said}"
    return done


def mirror() -> str:
    """Where this machine gets Debian from; the systems get theirs from there too."""
    ask = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"]
    with (CACHE / "lists.lock").open("w") as lock:  # two updates at the same time: one of them would fail
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not run(ask).stdout.strip():
            run(["apt-get", "update"], env=PROXIES)
    found = [line.split()[1] for line in run(ask).stdout.splitlines() if line.startswith("Debian ")]
    # Updates and security have the same origin, and nothing that the tests need.
    plain = [uri for uri in found if "security" not in uri]
    if not plain:
        pytest.exit("apt on this machine knows no Debian mirror", returncode=3)
    return plain[0]


# dpkg syncs every file that it unpacks, which on a busy disk takes most of the time: so systems live in memory.
_IN_MEMORY = """
mount -t tmpfs -o mode=1777 tmpfs "$0"
TMPDIR=$0 exec "$@"
"""


def archive(suite: str, installed: Sequence[str], fetched: Sequence[str] = ()) -> Path:
    """The tar file of a minimal *suite* with *installed*, and the packages of *fetched* in apt's cache.

    It keeps apt's lists, so that what is installed later needs the network only for what is not there.
    """

    def make(made: Path) -> None:
        command = ["mmdebstrap", "--variant=apt", f"--include={','.join(installed)}", "--skip=cleanup/apt"]
        if fetched:
            command.append(f'--customize-hook=chroot "$1" apt-get -qq --download-only install {" ".join(fetched)}')
        # In a mount namespace of its own: whatever becomes of it, nothing stays mounted here.
        with tempfile.TemporaryDirectory(prefix="kvm-ifup-root-") as scratch:
            own = ["unshare", "--mount", "--propagation=private", "sh", "-eu", "-c", _IN_MEMORY, scratch]
            run([*command, "--format=tar", suite, made, mirror()], env=PROXIES, prefix=own)

    return kept(suite, ".tar", [suite, sorted(installed), sorted(fetched)], make)


def kept(name: str, suffix: str, recipe: object, make: Callable[[Path], None]) -> Path:
    """The file or directory that *make* makes of *recipe*, from the cache if it is there and not too old.

    The name in the cache says what *recipe* was: another one makes another file.
    """
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    done = CACHE / f"{name}-{digest}{suffix}"
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Two runs must not both spend a minute on the same system; different ones are made at the same time.
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in (*CACHE.glob(f"*{suffix}"), *CACHE.glob("*.making")):  # the latter of a run that was killed
            with contextlib.suppress(FileNotFoundError):  # another run has just made it a whole one, or removed it
                if time.time() - old.stat().st_mtime > KEPT:
                    _remove(old)
        if done.exists():
            return done
        made = done.with_suffix(".making")
        _remove(made)
        make(made)
        made.replace(done)  # only now: nobody takes half a system for a whole one
    return done


def _remove(old: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


_MOUNTS = """
mount -t tmpfs -o mode=755 tmpfs "$1"
tar --extract --file "$2" --directory "$1" --numeric-owner
cp /etc/resolv.conf "$1/etc/resolv.conf"
mount -t proc proc "$1/proc"
mount -t sysfs sysfs "$1/sys"
mount -t tmpfs -o mode=755 tmpfs "$1/run"
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
mkdir "$1/dev/net" "$1/dev/pts" "$1/dev/shm"
for node in null zero full random urandom tty net/tun; do
    touch "$1/dev/$node"
    mount --bind "/dev/$node" "$1/dev/$node"
done
mount -t devpts -o newinstance,ptmxmode=666 devpts "$1/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$1/dev/shm"
ln -s pts/ptmx "$1/dev/ptmx"
ln -s /proc/self/fd "$1/dev/fd"
ip link set lo up
cd "$1"
exec /usr/bin/python3 -I -c "$3"
"""
# Make it the root of its namespaces: out of a mere chroot, whoever enters a namespace again (`nsenter`) gets out.
# Then wait until the input closes; as its init it takes all its processes along, and leaves no zombies till then.
_PIVOT = """
import ctypes, os, signal, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)  # while the old root is still there
subprocess.run(["pivot_root", ".", "mnt"], check=True)
os.chdir("/")
if libc.umount2(b"/mnt", 2):  # MNT_DETACH
    sys.exit(f"umount: {os.strerror(ctypes.get_errno())}")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


_NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--propagation=private")


class Root:
    """A running copy of an archive: a directory that only the process that holds its namespaces sees."""

    def __init__(self, init: int) -> None:
        self._init = init
        self.path = Path(f"/proc/{init}/root")  # its /, seen from outside

    def enter(self) -> list[str]:
        """What to put before a program of this machine, so that it sees the system's network."""
        return ["nsenter", f"--target={self._init}", "--net", "--"]

    def run(
        self,
        *argv: str | Path,
        network: bool = False,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = PATIENCE,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of this system on it; with *network* it has the machine's network in place of its own."""
        own = [] if network else ["--net"]
        prefix = ["nsenter", f"--target={self._init}", "--mount", "--pid", *own, "--"]
        return run(
            argv, check=check, env={**(PROXIES if network else {}), **(env or {})}, prefix=prefix, timeout=timeout
        )

    def shell(self, script: str, *, network: bool = False) -> str:
        """Run a shell script on this system; returns its output."""
        return self.run("sh", "-eu", "-c", script, network=network).stdout

    def oracle(self, *argv: str) -> list[dict[str, Any]]:
        """What a program of this machine (`ip -j`, `bridge -j`) says about the system's network."""
        found: list[dict[str, Any]] = json.loads(run(argv, prefix=self.enter()).stdout or "[]")
        return [one for one in found if one]  # `ip` prints {} for what its filter left out

    def install(self, *packages: Path) -> str:
        """`apt install ./FILE...` of packages that lie somewhere else, also older ones; returns what it printed."""
        inside = self.path / "tmp/packages"
        inside.mkdir(exist_ok=True)
        names = [f"./{Path(shutil.copy(package, inside)).name}" for package in packages]
        command = f"cd /tmp/packages && apt-get install -y --no-install-recommends --allow-downgrades {' '.join(names)}"
        done = self.run("sh", "-c", command, network=True)
        shutil.rmtree(inside)
        return done.stdout + done.stderr

    def files(self) -> dict[str, str]:
        """Every path of the system, /run and /dev too, with what tells whether it is another file now.

        Of a directory the time is left out: it changes when something in it comes and goes.
        """
        expression = (
            r"( -path /proc -o -path /sys ) -prune -o "
            r"-type d -printf %p\t%y:%m:%U\n -o -printf %p\t%y:%m:%U:%s:%T@\n"
        )
        listing = self.run("find", "/", *expression.split()).stdout
        return {line.split("\t")[0]: line.split("\t")[1] for line in listing.splitlines()}


@contextmanager
def root(tar: Path) -> Iterator[Root]:
    """A fresh copy of *tar*, with an empty network, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-root-") as path:
        holder = subprocess.Popen(
            [*_NAMESPACES, "sh", "-eu", "-c", _MOUNTS, "sh", path, tar, _PIVOT],
            env=dict(CLEAN),
            stdin=subprocess.PIPE,  # which closes when this process ends, however it does; and then so does the holder
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin
        assert holder.stdout
        try:
            assert holder.stdout.readline() == "ready\n", "the namespaces of a system could not be made"
            (init,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text(encoding="ascii").split()
            yield Root(int(init))
        finally:
            holder.stdin.close()
            holder.stdout.close()
            holder.wait(timeout=PATIENCE)


def deb(directory: Path, package: str) -> Path:
    """The one file of *package* in *directory*."""
    (found,) = directory.glob(f"{package}_*.deb")
    return found


def field(package: Path, name: str) -> str:
    """A field of a package's control file."""
    return run(["dpkg-deb", "--field", package, name]).stdout.strip()


def contents(package: Path) -> set[str]:
    """The paths that a package installs; directories left out."""
    names = run(["sh", "-c", 'dpkg-deb --fsys-tarfile "$1" | tar --list --file=-', "sh", package]).stdout.splitlines()
    return {name.removeprefix(".") for name in names if not name.endswith("/")}


def relations(text: str) -> set[str]:
    """The single relations of a Depends field, without blanks and architecture qualifiers."""
    return {"".join(one.split()).replace(":any", "") for one in text.split(",") if one.strip()}


def versionless(text: str) -> set[str]:
    """The names in a Depends field."""
    return {one.split("(")[0] for one in relations(text)}


def build_needs() -> list[str]:
    """The packages that building takes, as mmdebstrap can install them."""
    text = (CHECKOUT / "debian/control").read_text(encoding="utf-8")
    stanza = text.split("Build-Depends:")[1].split("Standards-Version:")[0]
    # debhelper-compat and dh-sequence-* are virtual, and name what is not a package.
    names = {one.split()[0] for one in stanza.split(",") if one.strip()}
    real = {name for name in names if not name.startswith(("debhelper-", "dh-"))}
    return sorted({"dpkg-dev", "debhelper", "dh-python"} | real)
