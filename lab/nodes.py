"""The network: a client and two nodes on one switch, each in anonymous namespaces that end with this process.

    client eth0 ── to-client ┐
    node a eth0 ── to-a      ├─ sw0 (switch)
    node b eth0 ── to-b      ┘

A node also has a mount namespace of its own, with its own /run and /sys. The switch is a Linux bridge: it
learns MAC addresses and keeps them for 300 s, as a real one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from harness import addresses
from harness.addresses import CLIENT_IP4, CLIENT_IP6, CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.tools import CLEAN
from lab.errors import LabError
from lab.guest import DYNAMIC, Addresses

# A filtered guest is a bridged one with `filter = "address"`, which takes its addresses from the network.
Mode = Literal["bridged", "routed", "filtered"]

# What the tap's MAC (fe: + the guest's last five bytes, the same on each node) makes of a link-local address.
TAP_LINK_LOCAL = "fe80::fc00:ff:fe35:ac01"

NODE_MAC = {"a": addresses.NODE_MAC, "b": addresses.FOREIGN_MAC}
NODE_IP4 = {"a": addresses.NODE_IP4, "b": "192.0.2.12"}
NODE_IP6 = {"a": addresses.NODE_IP6, "b": "2001:db8::12"}

TOOLS = {
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "bridge": "iproute2",
    "qemu-system-x86_64": "qemu-system-x86",
}

# A child must not outlive us, whatever ends us: the kernel kills it.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")


def guest_addresses(mode: Mode) -> Addresses:
    """How the guest is configured. A routed guest has no on-link prefix: all it sends goes to the node."""
    if mode == "filtered":
        return Addresses(GUEST_MAC, DYNAMIC, CLIENT_IP4, f"{GUEST_IP6}/64", CLIENT_IP6)
    if mode == "bridged":
        return Addresses(GUEST_MAC, f"{GUEST_IP4}/24", CLIENT_IP4, f"{GUEST_IP6}/64", CLIENT_IP6)
    return Addresses(GUEST_MAC, f"{GUEST_IP4}/32", CLIENT_IP4, f"{GUEST_IP6}/128", TAP_LINK_LOCAL)


def end(process: subprocess.Popen[Any], seconds: float = 0.0) -> None:
    """Waits `seconds` for one of our own processes to end by itself, then kills it; reaps it either way."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Namespace:
    """A network and mount namespace, held open by the process `pid`."""

    name: str
    pid: int

    def enter(self, argv: Sequence[str]) -> list[str]:
        """`argv` as a command that runs inside and dies with us."""
        return [*_DIES_WITH_US, "nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt", *argv]

    def try_run(self, *argv: str, env: Mapping[str, str] = CLEAN) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end and returns it, whatever its exit code. At most 60 s, else LabError."""
        try:
            return subprocess.run(
                self.enter(argv), env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
            )
        except subprocess.TimeoutExpired as e:
            raise LabError(f"`{' '.join(argv)}` on {self.name} does not end", "gave it 60 s") from e

    def run(self, *argv: str) -> str:
        """Runs a command to its end and returns its output. LabError when it fails."""
        done = self.try_run(*argv)
        if done.returncode != 0:
            why = " / ".join(done.stderr.strip().splitlines()) or "no message"
            raise LabError(
                f"`{' '.join(argv)}` on {self.name} exited with {done.returncode}: {why}",
                "the lab expects it to succeed",
            )
        return done.stdout

    def json(self, *argv: str) -> list[dict[str, Any]]:
        """Runs a command that prints a JSON list (`ip -j …`, `bridge -j …`). LabError when it fails."""
        found: list[dict[str, Any]] = json.loads(self.run(*argv) or "[]")
        return found

    def popen(
        self,
        argv: Sequence[str],
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.DEVNULL,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] = CLEAN,
    ) -> subprocess.Popen[str]:
        """Starts a command inside. The caller ends it (`end`)."""
        return subprocess.Popen(self.enter(argv), env=env, stdin=stdin, stdout=stdout, stderr=stderr, text=True)

    def sysctl(self, **values: int) -> None:
        """Sets sysctls of this namespace; a name's dots are written as double underscores."""
        for name, value in values.items():
            self.run("sysctl", "-qw", f"{name.replace('__', '.')}={value}")


@dataclass(frozen=True)
class Network:
    """The four of them. `a` is where the guest starts, `b` is where it goes."""

    mode: Mode
    client: Namespace
    switch: Namespace
    a: Namespace
    b: Namespace


@contextlib.contextmanager
def network(mode: Mode) -> Iterator[Network]:
    """Client, switch and two nodes, ready for guests of one mode; gone when the block ends, however it ends.

    Raises LabError when a tool is missing or we are not root.
    """
    require_tools()
    with contextlib.ExitStack() as stack:
        net = Network(mode, *(stack.enter_context(_namespace(name)) for name in ("client", "switch", "a", "b")))
        _wire(net)
        yield net


def require_tools() -> None:
    """LabError when something the lab needs is missing; nothing is ever skipped."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root, for namespaces and taps", "run it with sudo")
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=CLEAN["PATH"]) is None:
            raise LabError(f"{tool} is not installed", f"apt-get install {package}")
    if not Path("/dev/net/tun").exists():
        raise LabError("/dev/net/tun does not exist, so there can be no taps", "modprobe tun")


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[Namespace]:
    # The holder says when it is inside; before that, nsenter would enter our own namespaces.
    script = "mount -t sysfs sysfs /sys && mount -t tmpfs -o mode=755 tmpfs /run && echo held && exec sleep infinity"
    argv = [*_DIES_WITH_US, "unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script]
    holder = subprocess.Popen(
        argv,
        env=CLEAN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "held\n":
            why = holder.stderr.read().strip() or "no message"
            raise LabError(f"cannot make the namespaces of {name}: {why}", "is CAP_SYS_ADMIN missing?")
        yield Namespace(name, holder.pid)
    finally:
        end(holder)
        holder.stdout.close()
        holder.stderr.close()


def _wire(net: Network) -> None:
    net.switch.run("ip", "link", "add", "sw0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
    for host in (net.client, net.a, net.b):
        port, mac = f"to-{host.name}", NODE_MAC.get(host.name, CLIENT_MAC)
        veth = f"ip link add {port} type veth peer name eth0 address {mac} netns {host.pid}"
        net.switch.run(*veth.split())
        net.switch.run("ip", "link", "set", port, "master", "sw0", "up")
        host.run("ip", "link", "set", "lo", "up")
    net.switch.run("ip", "link", "set", "sw0", "up")

    _address(net.client, "eth0", CLIENT_IP4, CLIENT_IP6)
    for node in (net.a, net.b):
        if net.mode != "routed":
            node.run("ip", "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
            node.run("ip", "link", "set", "eth0", "master", "br0", "up")
            node.run("ip", "link", "set", "br0", "up")
        else:
            # Forwarding first: switching it on makes the kernel forget IPv6 routes it learned as a host.
            node.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
            _address(node, "eth0", NODE_IP4[node.name], NODE_IP6[node.name])
            node.run("ip", "route", "add", "default", "via", CLIENT_IP4)
            node.run("ip", "-6", "route", "add", "default", "via", CLIENT_IP6)


def _address(host: Namespace, device: str, ip4: str, ip6: str) -> None:
    host.run("ip", "link", "set", device, "up")
    host.run("ip", "addr", "add", f"{ip4}/24", "dev", device)
    host.run("ip", "-6", "addr", "add", f"{ip6}/64", "dev", device, "nodad")
