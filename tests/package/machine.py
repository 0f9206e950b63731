"""A whole Debian system in QEMU, with its own kernel and systemd, that runs shell scripts for a test.

    with machine.boot(root) as node:
        node.shell("systemctl is-active cron")
        node.json("ip -j route")

What boots is what is in a `roots.Root`: installed first, at full speed, then copied to a disk. /dev/kvm is not
used, so that it runs everywhere; a program that computes takes some 25 times longer in there than here.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.package.roots import CLEAN, Root, run

# What a system needs to be booted: what has to be installed, and what only has to be in apt's cache.
INSTALLED = ("kmod", "procps", "python3-minimal", "systemd-sysv", "udev")
FETCHED = ("linux-image-cloud-amd64",)  # unpacked, and not installed: that would make an initramfs for an hour
TOOLS = {
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
}

SIZE = "2G"  # of the disk; its file takes what is in it
MEMORY = "1G"
# Generous: these only turn a hang into a failure.
BOOT = 300.0
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
exec /bin/busybox switch_root /root /sbin/init
"""

# The other end of `Machine.run`: one line of JSON for each script, and one for its result.
_PORT = "/dev/virtio-ports/scripts"
_RUNNER = f"""
import json, os, subprocess
port = os.open("{_PORT}", os.O_RDWR)
for line in os.fdopen(port, "rb", closefd=False):
    script, environ = json.loads(line)
    done = subprocess.run(["sh", "-eu", "-c", script], env=environ, cwd="/", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    texts = [text.decode(errors="replace") for text in (done.stdout, done.stderr)]
    answer = json.dumps([done.returncode, *texts]).encode() + b"\\n"
    while answer:
        answer = answer[os.write(port, answer):]
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
systemctl -q enable run-scripts.service
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
        done = self._exchange(script, timeout)
        said = f"{script}\nexit {done.code}\n{done.out[-6000:]}\n{done.err[-6000:]}"
        assert not check or done.code == 0, said
        return done

    def _exchange(self, script: str, timeout: float) -> Done:
        self._channel.settimeout(timeout)
        try:
            self._channel.sendall(json.dumps([script, dict(CLEAN)]).encode() + b"\n")
            answer = self._answers.readline()
        except OSError as error:
            pytest.fail(f"{script}\n{error}\n{self.console()}")
        assert answer, f"{script}\nthe system has gone\n{self.console()}"
        return Done(*json.loads(answer))

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
        ours, theirs = socket.socketpair()
        console = directory / "console"
        with ours:
            with theirs:
                qemu = subprocess.Popen(_command(directory, theirs.fileno()), stdin=subprocess.DEVNULL,
                                        env=dict(CLEAN), pass_fds=[theirs.fileno()])  # fmt: skip
            try:
                node = Machine(ours, console)
                # It answers as soon as somebody over there reads, and says when all has been started.
                node.run("systemctl is-system-running --wait", timeout=BOOT, check=False)
                yield node
            finally:
                qemu.kill()
                qemu.wait()


def _command(directory: Path, channel: int) -> list[str]:
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", MEMORY),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{directory / 'console'}"),
        *("-kernel", str(directory / "vmlinuz"), "-initrd", str(directory / "initrd")),
        *("-append", "console=ttyS0 quiet panic=-1 tsc=reliable net.ifnames=0 systemd.mask=getty.target"),
        *("-drive", f"file={directory / 'disk'},format=raw,if=virtio,cache=unsafe"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=scripts,fd={channel}"),
        *("-device", "virtserialport,chardev=scripts,name=scripts"),
    ]


def _prepare(root: Root, directory: Path) -> None:
    """Kernel, initramfs and disk in *directory*."""
    (root.path / "usr/local/sbin/run-scripts").write_text(_RUNNER)
    (root.path / "etc/systemd/system/run-scripts.service").write_text(_UNIT)
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
