"""A guest that Ganeti moves to this node: what its hooks get, the QEMU that waits for it, and what is left of it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import wire
from harness.addresses import GUEST_IP4, GUEST_MAC
from harness.tools import PATIENCE

INSTANCE = "web1.example.com"
PIDS = Path("/run/ganeti/kvm-hypervisor/pid")
FIRST = {"MODE": "routed", "MAC": GUEST_MAC, "IP": GUEST_IP4}


def environment(*nics: Mapping[str, str], operation: str = "migrate", instance: str = INSTANCE) -> dict[str, str]:
    """What a pre hook of *operation* gets for a guest with *nics*."""
    found = {
        "PATH": "/sbin:/bin:/usr/sbin:/usr/bin",
        "GANETI_HOOKS_PATH": f"instance-{operation}",
        "GANETI_HOOKS_PHASE": "pre",
        "GANETI_INSTANCE_NAME": instance,
        "GANETI_INSTANCE_STATUS": "up",
        "GANETI_INSTANCE_NIC_COUNT": str(len(nics)),
        "GANETI_INSTANCE_TAGS": "",
    }
    for index, nic in enumerate(nics):
        values = {"LINK": "", "VLAN": "", "IP": "", "UUID": f"0000000{index}-0000-4000-8000-000000000000", **nic}
        found |= {f"GANETI_INSTANCE_NIC{index}_{name}": value for name, value in values.items()}
    return found


class Qemu:
    """A process that calls itself QEMU, holds taps open, and says so on its command line, as Ganeti starts one.

    *nics* are the guest's ends of the taps, each with the MAC of its NIC. The pid file is where Ganeti has it.
    """

    def __init__(
        self, nics: Sequence[tuple[wire.Tap, str]], *, instance: str = INSTANCE, incoming: bool = True
    ) -> None:
        words = ["-name", instance]
        for number, (guest, mac) in enumerate(nics):
            words += ["-netdev", f"type=tap,id=nic{number},fd={guest.descriptor}"]
            words += ["-device", f"virtio-net-pci,id=nic{number},netdev=nic{number},mac={mac}"]
        words += ["-incoming", "tcp:192.0.2.2:8102"] if incoming else []
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-c", "read never", *words],
            executable="/bin/sh",
            pass_fds=[guest.descriptor for guest, _ in nics],
            stdin=subprocess.PIPE,
        )
        for directory in (PIDS.parent.parent, PIDS.parent, PIDS):  # as Ganeti makes them
            directory.mkdir(exist_ok=True)
            directory.chmod(0o775)
        (PIDS / instance).write_text(f"{self.process.pid}\n")

    def end(self) -> None:
        """It is killed. The pid file stays, as after a failure."""
        assert self.process.stdin
        self.process.kill()
        self.process.wait(PATIENCE)
        self.process.stdin.close()
