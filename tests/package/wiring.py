"""Guests on a fresh system, and how its network looks to `ip`, `bridge` and /proc/sys."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from harness.roots import CLEAN, Root, run

GUEST_IP = "192.0.2.8"
GUEST_MAC = "aa:00:00:35:ac:01"

# An uplink that forwards, a bridge, and nothing in the background that changes addresses by itself.
NODE = """
for which in all default; do
    for name in accept_dad router_solicitations; do echo 0 > /proc/sys/net/ipv6/conf/$which/$name; done
done
ip link add eth0 type veth peer name client
ip link set eth0 up
ip link set client up
ip address add 192.0.2.1/24 dev eth0
echo 1 > /proc/sys/net/ipv4/conf/all/forwarding
ip route add default via 192.0.2.254
ip link add br0 address 02:00:00:00:b0:00 type bridge
echo 1 > /proc/sys/net/ipv6/conf/br0/disable_ipv6
ip link set br0 up
"""

_NICS = f"""
umask 022
mkdir -p /run/kvm-ifup/nic/web1 /run/kvm-ifup/nic/web2
cat > /run/kvm-ifup/nic/web1/0.toml <<END
tap = "tap0"
mac = "{GUEST_MAC}"
mode = "bridged"
link = "br0"
END
cat > /run/kvm-ifup/nic/web2/0.toml <<END
tap = "tap1"
mac = "aa:00:00:35:ac:02"
mode = "routed"
ip = ["{GUEST_IP}"]
END
"""

# Plays QEMU: makes taps and holds them, so that they have a carrier, until its input closes.
_GUESTS = """
import fcntl, struct, sys
held = []
for name in sys.argv[1:]:
    tun = open("/dev/net/tun", "r+b", buffering=0)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
    held.append(tun)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def guests(root: Root) -> Iterator[None]:
    """tap0 and tap1 with a guest behind each, an uplink, a bridge, and NIC files, until the end of the block."""
    run(["sh", "-eu", "-c", NODE], prefix=root.enter())
    root.shell(_NICS)
    qemu = subprocess.Popen(
        [*root.enter(), "python3", "-c", _GUESTS, "tap0", "tap1"],
        env=dict(CLEAN), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert qemu.stdin
    assert qemu.stdout
    try:
        assert qemu.stdout.readline() == "ready\n", "the taps could not be made"
        yield
    finally:
        qemu.stdin.close()
        qemu.stdout.close()
        qemu.wait(timeout=60)


def network(root: Root) -> set[str]:
    """All that wiring could change, one line each, so that a difference names itself."""
    found: set[str] = set()
    for what in ("-4 route show table all", "-6 route show table all", "-4 rule", "-6 rule", "neigh show proxy",
                 "neigh show nud permanent", "link", "addr"):  # fmt: skip
        for one in root.oracle("ip", "-j", *what.split()):
            # A device keeps the queue discipline that it gets when it first comes up; nobody could take it back.
            # And a bridge has a carrier exactly while it has a live port.
            for volatile in ("qdisc", "operstate", "flags"):
                if what in ("link", "addr") and (volatile == "qdisc" or one.get("ifname") == "br0"):
                    one.pop(volatile, None)
            found.add(f"{what}: {json.dumps(one, sort_keys=True)}")
    found.update(f"port: {json.dumps(one, sort_keys=True)}" for one in root.oracle("bridge", "-j", "link"))
    # A few settings can be written but not read (status 2); those are not the question.
    settings = run(["grep", "-rs", "", "/proc/sys/net"], prefix=root.enter(), check=False).stdout.splitlines()
    found.update(line for line in settings if "/conf/" in line or "/neigh/" in line)
    return found


def difference(before: set[str], after: set[str]) -> list[str]:
    """What came and what went, one line each; empty when nothing did."""
    return [f"- {line}" for line in sorted(before - after)] + [f"+ {line}" for line in sorted(after - before)]


def master(root: Root, tap: str) -> str | None:
    """The bridge that *tap* is a port of."""
    (link,) = root.oracle("ip", "-j", "link", "show", "dev", tap)
    found: str | None = link.get("master")
    return found


def routes(root: Root, tap: str) -> set[str]:
    """The destinations that are routed out of *tap*."""
    return {route["dst"] for route in root.oracle("ip", "-j", "route", "show", "table", "all", "dev", tap)}
