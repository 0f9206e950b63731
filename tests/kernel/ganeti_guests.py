"""Guests as Ganeti runs them: a real QEMU, and the files that Ganeti writes about it."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.addresses import GUEST_IP4, GUEST_MAC
from harness.agents import until
from tests.kernel.checking import qemu

DIRECTORY = Path("/run/ganeti/kvm-hypervisor")
GUEST = "web1.example.com"
OTHER_MAC = "aa:00:00:35:ac:02"
UUIDS = {mac: f"{number}1b7a0c-6d0f-4a57-8f7e-111111111111" for number, mac in enumerate((GUEST_MAC, OTHER_MAC))}


def write(place: str, text: str) -> Path:
    """A file of Ganeti's, in directories as it makes them."""
    path = DIRECTORY / place
    for directory in reversed(path.parents):
        if directory.is_relative_to(DIRECTORY.parent) and not directory.exists():
            directory.mkdir()
            directory.chmod(0o775)
    path.unlink(missing_ok=True)  # it may be a socket
    path.write_text(text)
    path.chmod(0o600)
    return path


def routed(mac: str = GUEST_MAC, ip: str = GUEST_IP4) -> dict[str, Any]:
    """A NIC as the runtime file has it."""
    return {"mac": mac, "ip": ip, "nicparams": {"mode": "routed", "link": ""}, "uuid": UUIDS[mac]}


def bridged(mac: str = OTHER_MAC) -> dict[str, Any]:
    """The same for a bridge."""
    return {"mac": mac, "ip": None, "nicparams": {"mode": "bridged", "link": "br0"}, "uuid": UUIDS[mac]}


@contextlib.contextmanager
def started(
    nics: Sequence[Mapping[str, Any]], files: Mapping[str, str], *argv: str, tap: str = "tap0"
) -> Iterator[Path]:
    """A guest whose QEMU runs, with Ganeti's files about it; gives the path of its QMP socket."""
    path = write(f"ctrl/{GUEST}.kvmd", "")
    path.unlink()
    write(f"conf/{GUEST}.runtime", json.dumps(["kvm", nics, {}, []]))
    for name, held in files.items():
        write(f"nic/{GUEST}/{name}", held)
    pid = write(f"pid/{GUEST}", "")
    with qemu(*argv, "-qmp", f"unix:{path},server=on,wait=off", "-pidfile", str(pid), tap=tap):
        until(lambda: pid.read_text() != "" and path.exists())
        yield path


@contextlib.contextmanager
def talk(path: Path) -> Iterator[Callable[..., Any]]:
    """A function that gives QEMU on its socket *path* a command, and perhaps a descriptor; it returns the answer."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
        with caller.makefile("rb") as answers:

            def ask(command: str, arguments: Mapping[str, str] | None = None, *descriptors: int) -> Any:
                text = json.dumps({"execute": command, "arguments": arguments or {}}).encode()
                socket.send_fds(caller, [text], descriptors)
                while "return" not in (answer := json.loads(answers.readline())):
                    assert "event" in answer, answer
                return answer["return"]

            answers.readline()
            ask("qmp_capabilities")
            yield ask
