"""What tests of `kvm-ifup check` share: a NIC that is wired and right, what is found, and a QEMU behind its tap."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from harness import manager, nodes, oracle, tools
from harness import wire as frames
from harness.addresses import CLIENT_MAC, GUEST_IP4, GUEST_MAC
from harness.agents import until
from harness.hooks import call, check
from harness.nodes import Node
from tests.kernel.staging import NICS, Scene

BRIDGED, ROUTED, TABLE = "bridged", "routed", "routed, table"
Findings = list[dict[str, Any]]


def wire(node: Node, nic: str, program: str = "kvm-ifup-post", **more: Any) -> None:
    """A NIC that is wired, and right."""
    node.uplink()
    if nic == TABLE:  # the administrator's part
        tools.ip("rule add iif eth0 lookup 100")
        tools.ip("-6 rule add iif eth0 lookup 100")
    scene = Scene(nic, program=program, more=more)
    nodes.add_bridge("br0", mtu=9000)
    nodes.add_bridge("br1")
    nodes.add_port("br0", mtu=9000)
    nodes.add_port("br1")
    node.guest()
    manager.write_nic(**{"incoming": True, **NICS[nic], **more})
    check(call(scene.program, "tap0"), 0)
    if nic == BRIDGED:
        oracle.settle("br0")  # with its carrier comes its link-local address, a moment later


def found(*argv: str) -> tuple[int, Findings]:
    """Exit code, and the findings about the one NIC that there is."""
    result = call("kvm-ifup", "check", "--json", *argv)
    assert result.err == ""
    (nic,) = json.loads(result.out)["nics"]
    findings: Findings = nic["findings"]
    return result.code, findings


def found_on_node(*argv: str) -> tuple[int, Findings]:
    """Exit code of `check --node`, and what it has found but versions and the agent."""
    result = call("kvm-ifup", "check", "--node", "--json", *argv)
    assert result.err == ""
    findings: Findings = json.loads(result.out)["findings"]
    return result.code, [one for one in findings if one["why"] and "agent" not in one["what"]]


def text(findings: Findings) -> str:
    """All that is said, in one line for each."""
    return "\n".join(f"{one['what']} | {one['why']} | {one['mend']}" for one in findings)


@contextlib.contextmanager
def qemu(*argv: str, tap: str = "tap0", pass_fds: Sequence[int] = ()) -> Iterator[None]:
    """A real QEMU that does not run its guest, with *argv* for its NIC."""
    plain = ("-S", "-nodefaults", "-display", "none", "-machine", "microvm,accel=tcg", "-m", "16")
    process = subprocess.Popen(
        ["qemu-system-x86_64", *plain, *argv],
        env=dict(tools.CLEAN),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=pass_fds,
    )
    try:
        until(lambda: process.poll() is not None or holds(process.pid, tap))
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def holds(pid: int, tap: str) -> bool:
    """Whether a process has *tap* open."""
    with contextlib.suppress(OSError):
        return f"iff:\t{tap}\n" in tools.run("sh", "-c", f"cat /proc/{pid}/fdinfo/* 2>/dev/null || true")
    return False


@contextlib.contextmanager
def unkept_tap(name: str = "tap0") -> Iterator[BinaryIO]:
    """A tap that ends with its process, as QEMU makes one, so that no earlier guest has used it: the guest's end."""
    descriptor = os.open(nodes.TUN, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, frames.TUNSETIFF, struct.pack("16sH22x", name.encode(), frames.IFF_TAP | frames.IFF_NO_PI))
    with os.fdopen(descriptor, "wb", buffering=0) as guest:
        yield guest


def netdev(tap: str = "tap0", mac: str = GUEST_MAC) -> list[str]:
    """The options of a QEMU whose guest has a NIC on *tap*."""
    backend = f"tap,id=net0,ifname={tap},script=no,downscript=no"
    return ["-netdev", backend, "-device", f"virtio-net-device,netdev=net0,mac={mac}"]


def dropped(node: Node, dev: str, source: str) -> bool:
    """Whether a datagram from *source* for the routed guest, sent by the client to *dev*, does not come to it."""
    total = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + addresses(source, GUEST_IP4)
    words = sum(struct.unpack("!10H", total))
    words = ~((words >> 16) + (words & 0xFFFF)) & 0xFFFF
    header = total[:10] + struct.pack("!H", words) + total[12:]
    frame = frames.ethernet(
        oracle.link(dev)["address"], CLIENT_MAC, frames.ETH_P_IP, header + struct.pack("!HHHH", 1, 9, 8, 0)
    )
    with node.client, frames.packet_socket(dev) as sender:
        sender.send(frame)
    return not comes(node.taps[0], addresses(source, GUEST_IP4))


def comes(tap: frames.Tap, wanted: bytes, patience: float = 0.5) -> bool:
    """Whether a frame with *wanted* in it reaches the guest. (No fence can tell: a filter may drop that as well.)"""
    end = time.monotonic() + patience
    while frames.readable(tap.descriptor, max(0.0, end - time.monotonic())):
        if wanted in os.read(tap.descriptor, 65536):
            return True
    return False


def addresses(source: str, target: str) -> bytes:
    """Two IPv4 addresses as they are in a header."""
    return bytes(int(part) for address in (source, target) for part in address.split("."))
