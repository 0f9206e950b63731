"""The guest: Debian's cloud kernel and a busybox initramfs that configures one NIC and then keeps quiet.

The guest sends nothing of its own accord: no DAD, no router solicitations, no neighbour probes, no daemons.
Whatever leaves it is an answer, or an announcement after a migration: QEMU's RARP, and the gratuitous ARP and
unsolicited NA of its own virtio-net driver, which QEMU asks for (GUEST_ANNOUNCE, left at QEMU's default).
One that takes its addresses from the network (`DYNAMIC`) does what that takes.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import debian
from lab.errors import LabError

# Not a round 128 MiB, for a reason: QEMU before 9.0 loses writes of a TCG guest during a migration (it clears the
# dirty bits without telling the vCPU's TLB) when a RAM block is a whole number of 256 KiB, and then the busy guest
# crashes on the target about every other time. An odd size takes QEMU's other path, which is right.
MEMORY_KIB = 128 * 1024 + 8

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
READY = "guest ready"
DYNAMIC = "dhcp"  # for `Addresses.ip4`: DHCP, and SLAAC beside the address that is given, each checked by DAD

# In the order in which they can be inserted: each needs the ones before it.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "af_packet",
)

INIT = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
/bin/busybox --install -s /bin
export PATH=/bin

# What the kernel command line says for lab.$1.
arg() {{ tr ' ' '\\n' </proc/cmdline | sed -n "s/^lab\\.$1=//p"; }}
set -e
trap 'echo guest failed' EXIT

for module in $(cat /modules/order); do insmod /modules/$module.ko; done
ip link set lo up
sysctl -qw net.ipv6.conf.eth0.accept_ra=0 net.ipv6.conf.eth0.dad_transmits=0
# Its own questions about the gateway would teach the switch where it is; a guest that is asked nothing keeps quiet.
sysctl -qw net.ipv4.neigh.eth0.delay_first_probe_time=3600 net.ipv6.neigh.eth0.delay_first_probe_time=3600
if [ "$(arg ip4)" = {DYNAMIC} ]; then
    sysctl -qw net.ipv6.conf.eth0.accept_ra=1 net.ipv6.conf.eth0.dad_transmits=1
    ip link set eth0 up
    ip -6 addr add "$(arg ip6)" dev eth0
    udhcpc -i eth0 -n -q -t 40 -T 1 -s /leased
    until [ "$(ip -6 addr show dev eth0 scope global | grep -c inet6)" = 2 ]; do sleep 0.2; done
    while ip -6 addr show dev eth0 | grep tentative; do sleep 0.2; done
    if ip -6 addr show dev eth0 | grep dadfailed; then exit 1; fi
    # A first packet can be lost while the other end asks for the guest's MAC.
    until ping -c 1 -W 1 "$(arg gw4)"; do :; done
    until ping -6 -c 1 -W 1 "$(arg gw6)"; do :; done
    echo "{READY}"
    while :; do sleep 3600; done
fi
ip link set eth0 up
ip addr add "$(arg ip4)" dev eth0
ip route add "$(arg gw4)/32" dev eth0
ip route add default via "$(arg gw4)"
ip -6 addr add "$(arg ip6)" dev eth0
ip -6 route add "$(arg gw6)/128" dev eth0
ip -6 route add default via "$(arg gw6)" dev eth0
echo "{READY}"
while :; do sleep 3600; done
"""

LEASED = """#!/bin/sh
# What udhcpc calls with what it has been given.
[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
"""


@dataclass(frozen=True)
class Image:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Addresses:
    """How the guest's NIC is configured. `ip4` and `ip6` carry a prefix length, the gateways do not."""

    mac: str
    ip4: str
    gw4: str
    ip6: str
    gw6: str


# On a busy machine too few ticks come while the kernel tests its timer: then it tries another way, or does not boot.
UNTESTED = "tsc=reliable no_timer_check"


def command_line(addresses: Addresses) -> str:
    """The kernel command line that makes the guest take `addresses` (its MAC comes from QEMU)."""
    a = addresses
    return (
        f"console=ttyS0 quiet panic=-1 {UNTESTED} net.ifnames=0 "
        f"lab.ip4={a.ip4} lab.gw4={a.gw4} lab.ip6={a.ip6} lab.gw6={a.gw6}"
    )


def build(progress: Callable[[str], None]) -> Image:
    """Returns the guest's kernel and initramfs, from the cache when this version was built before.

    Raises LabError when the kernel package or a tool is missing.
    """
    package, version = _kernel_package()
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("busybox is not installed", "apt-get install busybox-static")
    recipe = hashlib.sha256("\n".join((INIT, LEASED, *MODULES)).encode() + Path(busybox).read_bytes()).hexdigest()
    name = f"{package}_{version}_{recipe[:12]}".replace(":", "%")

    def make(scratch: Path) -> Path:
        progress(f"building the guest from {package} {version} (once; kept in {debian.CACHE})")
        _build_into(scratch, f"{package}={version}", Path(busybox))
        return scratch / "image"

    done = debian.kept("kvm-ifup-lab", name, make)
    return Image(kernel=done / "vmlinuz", initrd=done / "initrd")


def _kernel_package() -> tuple[str, str]:
    """Name and version of the concrete kernel package that the metapackage stands for today."""
    hint = "run apt-get update; the lab needs Debian's package archive"
    shown = debian.tool(["apt-cache", "show", "--no-all-versions", KERNEL_METAPACKAGE], hint)
    found = re.search(r"^Depends:.*?(linux-image-[^ ,]+) \(= ([^)]+)\)", shown, re.MULTILINE)
    if found is None:
        raise LabError(f"{KERNEL_METAPACKAGE} names no kernel package", hint)
    return found[1], found[2]


def _build_into(tmp: Path, package: str, busybox: Path) -> None:
    debian.tool(["apt-get", "-q", "download", package], debian.ARCHIVE, cwd=tmp)
    unpacked, root, image = tmp / "unpacked", tmp / "root", tmp / "image"
    (deb,) = tmp.glob("*.deb")
    debian.unpack_package(deb, unpacked)
    for directory in (image, root / "bin", root / "modules"):
        directory.mkdir(parents=True)

    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copyfile(kernel, image / "vmlinuz")
    needed = [name for name in MODULES if _copy_module(unpacked, name, root / "modules")]
    (root / "modules/order").write_text("".join(f"{name}\n" for name in needed))
    shutil.copy(busybox, root / "bin/busybox")
    for name, script in (("init", INIT), ("leased", LEASED)):
        (root / name).write_text(script)
        (root / name).chmod(0o755)

    names = sorted(str(p.relative_to(root)) for p in root.rglob("*"))
    with (image / "initrd").open("wb") as out:
        debian.tool(
            ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"],
            "apt-get install cpio",
            cwd=root,
            stdin="\n".join(names),
            stdout=out.fileno(),
        )


def _copy_module(unpacked: Path, name: str, to: Path) -> bool:
    """Copies one module, decompressed. False when this kernel has it built in."""
    # Debian 12 is not merged-/usr inside the package, Debian 13 is; a file may be .ko or .ko.xz.
    for found in unpacked.rglob(f"{name}.ko*"):
        data = found.read_bytes()
        (to / f"{name}.ko").write_bytes(lzma.decompress(data) if found.suffix == ".xz" else data)
        return True
    for builtin in unpacked.rglob("modules.builtin"):
        if f"/{name}.ko" in builtin.read_text():
            return False
    raise LabError(f"the kernel package has no module {name}", "adapt MODULES in lab/guest.py to this kernel")
