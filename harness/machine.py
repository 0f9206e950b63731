"""A whole Debian system in QEMU, with its own kernel, that runs shell scripts for a test.

    with machine.boot(root) as node:         a Debian with systemd: `root` and what has been installed in it
        node.shell("systemctl is-active cron")
        node.json("ip -j route")

    with machine.bare(packages, tree) as node:         a kernel, some programs, and the files of `tree`; no systemd
        for line in node.follow("ls -R /"): ...

What boots is what is in a `roots.Root`: installed first, at full speed, then copied to a disk. /dev/kvm is not
used, so that it runs everywhere; a program that computes takes some 25 times longer in there than here.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import roots
from harness.roots import CLEAN, Root, run

# What a system needs to be booted: what has to be installed, and what only has to be in apt's cache.
BARE = ("kmod", "procps", "python3-minimal")
INSTALLED = (*BARE, "systemd-sysv", "udev")
FETCHED = ("linux-image-cloud-amd64",)  # unpacked, and not installed: that would make an initramfs for an hour
TOOLS = {
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
}

SUITE = "bookworm"  # of a bare system
SIZE = "2G"  # of the disk; its file takes what is in it
MEMORY = "1G"
# Generous: these only turn a hang into a failure.
BOOT = 600.0
SCRIPT = 300.0
PATIENCE = 120.0

# These modules, and what they need, find the disk; udev finds the rest.
_MODULES = ("virtio_pci", "virtio_blk", "ext4")
_INIT = """#!/bin/busybox sh
set -e
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
while read -r module; do /bin/busybox insmod "/modules/$module"; done </modules/order
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox umount /proc /sys /dev
exec /bin/busybox switch_root /root "${first:-/sbin/init}"
"""

# The first process of a bare system, in the place of systemd: no service, no udev. The second disk has a tar file.
_BARE = f"""#!/bin/sh
set -e
export PATH={CLEAN["PATH"]}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir /dev/pts /dev/shm /dev/virtio-ports
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -o remount,rw /
modprobe -a virtio_console tun
tar --extract --file=/dev/vdb --directory=/
ip link set lo up
for port in /sys/class/virtio-ports/*; do
    ln -s "../${{port##*/}}" "/dev/virtio-ports/$(cat "$port/name")"
done
python3 -I /usr/local/sbin/run-scripts
"""

# The other end of `Machine.follow`. One line of JSON for each script, for each line that it writes, and for its end.
_PORT = "/dev/virtio-ports/scripts"
_RUNNER = f"""
import json, os, subprocess, tempfile
port = os.open("{_PORT}", os.O_RDWR)
def tell(what):
    answer = json.dumps(what).encode() + b"\\n"
    while answer:
        answer = answer[os.write(port, answer):]
for line in os.fdopen(port, "rb", closefd=False):
    script, environ = json.loads(line)
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(["sh", "-eu", "-c", script], env=environ, cwd="/", stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=said)
        for text in running.stdout:
            tell(text.decode(errors="replace"))
        running.wait()
        said.seek(0)
        tell([running.returncode, said.read().decode(errors="replace")])
"""
_UNIT = r"""
[Unit]
Description=Runs scripts for the test
BindsTo=dev-virtio\x2dports-scripts.device
After=dev-virtio\x2dports-scripts.device

[Service]
ExecStart=/usr/bin/python3 -I /usr/local/sbin/run-scripts
# What a script leaves running is the script's business.
KillMode=process

[Install]
WantedBy=multi-user.target
"""

_COPY = """
echo 0123456789abcdef0123456789abcdef > /etc/machine-id  # not a first boot, which would enable every unit
echo node > /etc/hostname
! command -v systemctl >/dev/null || systemctl -q enable run-scripts.service
mkdir -p /unpacked
dpkg -x /var/cache/apt/archives/linux-image-[0-9]*.deb /unpacked
cp -r /unpacked/lib/modules /unpacked/boot /usr/lib
rm -r /unpacked
version=$(ls /usr/lib/modules)
depmod "$version"
modprobe --set-version "$version" --show-depends --all "$@" | sed -n 's/^insmod //p' > /usr/lib/boot/order
"""


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int
    out: str
    err: str


class Machine:
    """A running system."""

    def __init__(self, channel: socket.socket, console: Path) -> None:
        self._channel = channel
        self._answers = channel.makefile("rb")
        self._console = console

    def run(self, script: str, *, check: bool = True, timeout: float = SCRIPT) -> Done:
        """Run a shell script (`sh -eu`); it has to succeed unless *check* is False."""
        out = []
        following = self.follow(script, timeout)
        while True:
            try:
                out.append(next(following))
            except StopIteration as end:
                code, err = end.value
                break
        done = Done(code, "".join(out), err)
        said = f"{script}\nexit {done.code}\n{done.out[-6000:]}\n{done.err[-6000:]}"
        assert not check or done.code == 0, said
        return done

    def follow(self, script: str, patience: float) -> Generator[str, None, tuple[int, str]]:
        """The lines that a shell script writes, as they come; returns its exit code and what it wrote to stderr.

        It fails the test if for *patience* seconds nothing comes.
        """
        self._channel.settimeout(patience)
        try:
            self._channel.sendall(json.dumps([script, dict(CLEAN)]).encode() + b"\n")
            while True:
                answer = self._answers.readline()
                assert answer, f"{script}\nthe system has gone\n{self.console()}"
                found = json.loads(answer)
                if not isinstance(found, str):
                    code, err = found
                    return code, err
                yield found
        except OSError as error:
            pytest.fail(f"{script}\n{error}\n{self.console()}")

    def shell(self, script: str) -> str:
        """What a shell script that succeeds writes to its standard output."""
        return self.run(script).out

    def json(self, script: str) -> Any:
        """What a program that prints JSON says; `ip` prints nothing, or {}, for what there is not."""
        found = json.loads(self.shell(script) or "[]")
        return [one for one in found if one] if isinstance(found, list) else found

    def until(self, script: str) -> str:
        """Run *script* again and again until it succeeds; returns its output."""
        end = time.monotonic() + PATIENCE
        while (done := self.run(script, check=False)).code:
            if time.monotonic() > end:
                pytest.fail(f"what was waited for does not happen: {script}\n{done.out}\n{done.err}")
            time.sleep(0.2)
        return done.out

    def console(self) -> str:
        """The end of what the kernel and systemd have printed."""
        return self._console.read_text(errors="replace")[-6000:]


def require() -> None:
    """Fail, and never skip, when something that is needed is missing."""
    path = CLEAN["PATH"].split(":")
    missing = sorted({p for tool, p in TOOLS.items() if not any((Path(d) / tool).exists() for d in path)})
    if missing:
        pytest.exit(f"apt-get install {' '.join(missing)}", returncode=3)


@contextmanager
def boot(root: Root) -> Iterator[Machine]:
    """A machine with a copy of *root*, until the end of the block. *root* itself is made ready for it."""
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-machine-") as scratch:
        directory = Path(scratch)
        _prepare(root, directory)
        with _started(directory, directory / "console") as node:
            # It answers as soon as somebody over there reads, and says when all has been started.
            node.run("systemctl is-system-running --wait", timeout=BOOT, check=False)
            yield node


@contextmanager
def bare(installed: Sequence[str], files: Path) -> Iterator[Machine]:
    """A machine with the packages *installed*, and what is in the tar file *files*, until the end of the block.

    It runs nothing but the scripts. Its disk is made once, and kept; what is written to it is not.
    """
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-machine-") as scratch:
        more = ("-drive", f"file={files},format=raw,if=virtio,readonly=on")
        with _started(image(installed), Path(scratch) / "console", *more, first="/usr/local/sbin/bare") as node:
            node.run("true", timeout=BOOT)
            yield node


def image(installed: Sequence[str]) -> Path:
    """The directory with kernel, initramfs and disk of a bare system; made anew when anything that is in it changes."""
    packages = sorted({*BARE, *installed})

    def make(made: Path) -> None:
        made.mkdir()
        with roots.root(roots.archive(SUITE, packages, FETCHED)) as root:
            _prepare(root, made)

    ours = (_INIT, _BARE, _RUNNER, _COPY, _MODULES, SIZE)
    return roots.kept(f"machine-{SUITE}", ".image", [packages, FETCHED, ours], make)


@contextmanager
def _started(directory: Path, console: Path, *more: str, first: str = "") -> Iterator[Machine]:
    """A machine that boots what is in *directory*; what the block raises ends it, too."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [*_command(directory, console, theirs.fileno(), first), *more]
            qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=dict(CLEAN), pass_fds=[theirs.fileno()]
            )  # fmt: skip
        try:
            yield Machine(ours, console)
        finally:
            qemu.kill()
            qemu.wait()


def _command(directory: Path, console: Path, channel: int, first: str) -> list[str]:
    # What the kernel does not know goes into the environment of the first process. On a busy machine too few ticks
    # come while it tests its timer: then it would try another way, or not boot.
    parameters = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check net.ifnames=0 systemd.mask=getty.target"
    # On a busy machine a minute and a half, which is systemd's patience, is not enough.
    parameters += f" systemd.default_timeout_start_sec={BOOT:g} systemd.default_device_timeout_sec={BOOT:g}"
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", MEMORY),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{console}"),
        *("-kernel", str(directory / "vmlinuz"), "-initrd", str(directory / "initrd")),
        *("-append", f"{parameters} first={first}" if first else parameters),
        *("-drive", f"file={directory / 'disk'},format=raw,if=virtio,cache=unsafe,snapshot=on"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=scripts,fd={channel}"),
        *("-device", "virtserialport,chardev=scripts,name=scripts"),
    ]


def _prepare(root: Root, directory: Path) -> None:
    """Kernel, initramfs and disk in *directory*."""
    (root.path / "usr/local/sbin/run-scripts").write_text(_RUNNER)
    (root.path / "usr/local/sbin/bare").write_text(_BARE)
    (root.path / "usr/local/sbin/bare").chmod(0o755)
    units = root.path / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    (units / "run-scripts.service").write_text(_UNIT)
    root.run("sh", "-eu", "-c", _COPY, "sh", *_MODULES)

    initrd = directory / "root"
    for made in ("bin", "modules"):
        (initrd / made).mkdir(parents=True)
    order = []
    for line in (root.path / "usr/lib/boot/order").read_text().split("\n"):
        if line and (name := Path(line.strip()).name) not in order:
            order.append(name)
            (initrd / "modules" / name).write_bytes((root.path / line.strip().lstrip("/")).read_bytes())
    (initrd / "modules/order").write_text("".join(f"{name}\n" for name in order))
    (initrd / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (initrd / "init").write_text(_INIT)
    for program in ("init", "bin/busybox"):
        (initrd / program).chmod(0o755)
    pack = "find . | cpio --quiet --create --format=newc --owner=0:0 > ../initrd"
    run(["sh", "-eu", "-c", pack], cwd=initrd)

    (kernel,) = (root.path / "usr/lib/boot").glob("vmlinuz-*")
    (directory / "vmlinuz").write_bytes(kernel.read_bytes())
    root.run("rm", "-rf", "/usr/lib/boot", "/var/cache/apt/archives", "/var/lib/apt/lists")
    # The system alone, without what is mounted in it.
    root.run("mount", "--bind", "/", "/mnt")
    try:
        run(["truncate", f"--size={SIZE}", directory / "disk"])
        run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root.path / "mnt", directory / "disk"])
    finally:
        root.run("umount", "/mnt")
