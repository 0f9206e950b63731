"""The guest's QEMU processes: start one on a node, have it wait for a migration, migrate, fail a migration.

Spoken to over QMP with qemu.qmp, QEMU's own client; its asyncio stays inside this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError

from lab import clock, guest
from lab.errors import LabError
from lab.nodes import Namespace, end

T = TypeVar("T")

# Slow enough that a migration lasts a good second, and things that go wrong meanwhile can be seen.
BANDWIDTH = 40 * 1024 * 1024


@dataclass(frozen=True)
class Event:
    """A QMP event; `at` is QEMU's own time stamp in CLOCK_MONOTONIC seconds."""

    name: str
    at: float
    data: dict[str, Any]


@dataclass(frozen=True)
class Migrated:
    """A migration that succeeded: when it was ordered and when the guest ran at the target (CLOCK_MONOTONIC
    seconds), and the guest's own downtime in ms as the source's QEMU measured it."""

    started: float
    resumed: float
    downtime_ms: float


@dataclass(frozen=True)
class Wiring:
    """What QEMU is told of the guest's NIC: the tap's name and its scripts (None: no script)."""

    tap: str
    script: Path | None = None
    downscript: Path | None = None


class Guest:
    """One QEMU process on one node. Made by `start`."""

    def __init__(self, node: Namespace, process: subprocess.Popen[str], directory: Path) -> None:
        self.node, self.process, self.directory = node, process, directory
        self.incoming = directory / "migration.sock"
        self._loop = asyncio.new_event_loop()
        self._qmp = QMPClient(node.name)
        self._events: list[Event] = []

    def command(self, name: str, **arguments: object) -> Any:
        """One QMP command and its answer. LabError when QEMU refuses it or is gone."""
        # QMP's names have dashes where Python's cannot.
        dashed = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return self._await(self._qmp.execute(name, dashed), 60.0)
        except (QMPError, OSError, TimeoutError) as e:
            raise LabError(
                f"QEMU on node {self.node.name} refused {name}: {e}; {self._words()}", "the lab needs QEMU 7.2 or newer"
            ) from e

    def wait_event(self, name: str, seconds: float = 120.0, **data: str) -> Event:
        """The first event of that name with those data, from the guest's start on; LabError if none comes."""
        deadline = clock.now() + seconds
        seen = 0
        while True:
            for event in self._events[seen:]:
                if event.name == name and all(event.data.get(key) == value for key, value in data.items()):
                    return event
            seen = len(self._events)
            left = deadline - clock.now()
            try:
                raw = self._await(self._qmp.events.get(), max(left, 0.0))
            except (QMPError, OSError, TimeoutError) as e:
                what = f"{name} {' '.join(data.values())}".strip()
                raise LabError(
                    f"QEMU on node {self.node.name} never reported {what}; {self._words()}",
                    "is this machine overloaded?",
                ) from e
            stamp: Any = raw["timestamp"]
            data_of: Any = raw.get("data", {})
            at = clock.from_realtime(stamp["seconds"] + stamp["microseconds"] / 1e6)
            self._events.append(Event(str(raw["event"]), at, data_of))

    def wait_booted(self, seconds: float = 120.0) -> None:
        """Returns when the guest's NIC is configured; LabError when it does not get there."""
        deadline = clock.now() + seconds
        while guest.READY not in (said := self.serial()):
            if "guest failed" in said or self.process.poll() is not None or clock.now() > deadline:
                last = (said.strip().splitlines() or ["nothing"])[-1]
                raise LabError(
                    f"the guest did not boot, it last said: {last}; {self._words()}", "is this machine overloaded?"
                )
            time.sleep(0.05)

    def serial(self) -> str:
        """All that the guest has written to its console."""
        log = self.directory / "serial.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def must_run(self) -> None:
        """LabError with the guest's last words when QEMU has ended by itself."""
        if self.process.poll() is not None:
            last = (self.serial().strip().splitlines() or ["nothing"])[-1]
            what = f"QEMU on node {self.node.name} has ended; {self._words()}; the guest last said: {last}"
            raise LabError(what, "a guest that crashes is a fault of the lab or of QEMU")

    def status(self) -> str:
        """QEMU's run state: running, inmigrate, postmigrate, …"""
        return str(self.command("query-status")["status"])

    def order_migration(self, target: Guest, bandwidth: int = BANDWIDTH) -> float:
        """Starts a live migration at `bandwidth` bytes/s and returns when (CLOCK_MONOTONIC seconds)."""
        self.command("migrate-set-parameters", max_bandwidth=bandwidth)
        at = clock.now()
        self.command("migrate", uri=f"unix:{target.incoming}")
        return at

    def wait_migrated(self, target: Guest, started: float) -> Migrated:
        """Waits until the guest runs at the target and the source has said so too."""
        resumed = target.wait_event("RESUME").at
        self.wait_event("MIGRATION", status="completed")
        return Migrated(started, resumed, float(self.command("query-migrate")["downtime"]))

    def quit(self) -> None:
        """Ends QEMU in an orderly way, downscript included."""
        with contextlib.suppress(LabError):  # it may be gone before it has answered
            self.command("quit")
        end(self.process, seconds=10)

    def kill(self) -> None:
        """Ends QEMU at once, as a crash would: no downscript."""
        end(self.process)

    def connect(self, seconds: float = 120.0) -> None:
        """Opens the QMP connection as soon as QEMU listens; LabError with QEMU's words when it has ended."""
        deadline = clock.now() + seconds
        socket = self.directory / "qmp.sock"
        while not socket.exists() and self.process.poll() is None and clock.now() < deadline:
            time.sleep(0.01)
        while True:
            try:
                # QEMU greets when its NIC's script has ended, so this waits for the script as well.
                self._await(self._qmp.connect(str(socket)), max(deadline - clock.now(), 0.1))
                break
            except (QMPError, OSError, EOFError, TimeoutError) as e:
                if self.process.poll() is not None:
                    what = f"QEMU on node {self.node.name} did not start; {self._words()}"
                    raise LabError(what, "a script that refuses the NIC ends QEMU: its message comes first") from e
                if clock.now() > deadline:
                    what = f"QEMU on node {self.node.name} does not answer; {self._words()}"
                    raise LabError(what, "does the NIC's script hang?") from e
                time.sleep(0.02)
        self.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def close(self) -> None:
        """Ends QEMU if it still runs, and the connection."""
        end(self.process)
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            self._await(self._qmp.disconnect(), 5.0)
        self._loop.close()

    def _await(self, what: Awaitable[T], seconds: float) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(what, seconds))

    def _words(self) -> str:
        lines = (self.directory / "stderr.log").read_text(errors="replace").strip().splitlines()
        return f"QEMU's words: {' / '.join(lines[-3:])}" if lines else "QEMU said nothing"


@contextlib.contextmanager
def start(
    node: Namespace,
    image: guest.Image,
    addresses: guest.Addresses,
    wiring: Wiring,
    directory: Path,
    incoming: bool = False,
) -> Iterator[Guest]:
    """A guest on `node`; with `incoming` it waits there for a migration. Killed when the block ends.

    `directory` is new or empty and takes sockets and logs. Raises LabError when QEMU does not start, for instance
    because a script has failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    netdev = f"tap,id=n0,ifname={wiring.tap},script={wiring.script or 'no'},downscript={wiring.downscript or 'no'}"
    argv = [
        *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-accel", "tcg", "-cpu", "max", "-m", f"{guest.MEMORY_KIB}k"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", guest.command_line(addresses)),
        *("-serial", f"file:{directory}/serial.log"),
        *("-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"),
        *("-netdev", netdev, "-device", f"virtio-net-pci,netdev=n0,mac={addresses.mac},romfile="),
    ]
    if incoming:
        argv += ["-incoming", f"unix:{directory}/migration.sock"]
    with (directory / "stderr.log").open("w") as stderr:
        process = node.popen(argv, stderr=stderr, stdout=stderr)
    running = Guest(node, process, directory)
    try:
        running.connect()
        yield running
    finally:
        running.close()
