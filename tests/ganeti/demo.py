"""What an unmodified Ganeti's guests notice of a migration: bridged, routed, and routed with our agent on both nodes.

`./dev demo --ganeti --out docs` measures, and draws the last round as ganeti.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import clock, guest, instrument, observe, output, plot
from lab.cases import OBSERVED_AFTER, PING_TIMEOUT, Case, Result
from lab.errors import LabError
from lab.observe import Record
from tests.ganeti.cluster import FIRST, INSTANCE, Cluster, Instance, Node, cluster, our_packages

POLL = 1.0  # seconds between two looks of Ganeti's at a migration that runs
STEADY = 1.0  # seconds of replies
CASES = (
    Case("bridged", "Ganeti, bridged", "bridged", None, True, 0.0),
    Case("routed", "Ganeti, routed, without the agent", "routed", None, True, 0.0),
    Case("routed-agent", "Ganeti, routed, with the agent", "routed", None, True, 0.0, agent=True),
)


class Monitor:
    """A connection to a guest's QEMU, on the socket that is Ganeti's kvmd's. It notes when the guest runs there."""

    def __init__(self, node: Node) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(f"/proc/{node.init}/root/run/ganeti/kvm-hypervisor/ctrl/{INSTANCE}.kvmd")
        self._lines = self._socket.makefile("rw")
        self.resumed = 0.0
        self._lines.readline()
        self._answered = threading.Semaphore(0)
        self._answer: dict[str, object] = {}
        threading.Thread(target=self._read, daemon=True).start()
        self.ask("qmp_capabilities")

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it ends with its QEMU
            for line in self._lines:
                said = json.loads(line)
                if said.get("event") == "RESUME" and not self.resumed:
                    stamp = said["timestamp"]
                    self.resumed = clock.from_realtime(stamp["seconds"] + stamp["microseconds"] / 1e6)
                elif "return" in said:
                    self._answer = said["return"]
                    self._answered.release()

    def ask(self, command: str) -> dict[str, object]:
        """What QEMU answers."""
        self._lines.write(json.dumps({"execute": command}) + "\n")
        self._lines.flush()
        if not self._answered.acquire(timeout=60):
            raise LabError(f"QEMU does not answer {command}", "is this machine overloaded?")
        return self._answer


@dataclass(frozen=True)
class Measured:
    """One migration. *announced* is from the guest's arrival to its announcement at the client, in ms."""

    result: Result
    announced: float


def run(case: Case, image: guest.Image, packages: Sequence[Path], version: str) -> Measured:
    """One migration, as Ganeti does it. Raises LabError and GanetiError."""
    instance = Instance((FIRST[case.mode],), image)
    with cluster(case.mode, packages, version) as on:
        for node in on.nodes if case.agent else ():
            node.start_agent()
        on.a.ganeti("start", instance)
        on.must_reach_guest()
        with observe.observer(on.net) as observer:
            observer.wait("the guest answers", steady_since(clock.now()), 60)
            return moved(case, on, observer, instance)


def moved(case: Case, on: Cluster, observer: observe.Observer, instance: Instance) -> Measured:
    """The guest of *instance* runs on node a, and moves to b."""
    begin = clock.now()
    on.b.before_move("instance-migrate", instance)
    info = on.a.ganeti("migration_info", instance)
    on.b.ganeti("accept", instance, info=info, target=on.b.address)
    source, target = Monitor(on.a), Monitor(on.b)
    started = clock.now()
    on.a.ganeti("migrate", instance, target=on.b.address)
    while (status := on.a.ganeti("migration_status", instance)) == "active":
        time.sleep(POLL)
    if status != "completed":
        raise LabError(f"the migration is {status}", "see above")
    downtime = float(str(source.ask("query-migrate")["downtime"]))
    on.a.ganeti("finalize_source", instance, success=True)
    on.b.ganeti("finalize_target", instance, info=info, success=True)
    observer.wait("the guest answers", steady_since(clock.now()), 90)
    time.sleep(max(0.0, target.resumed + OBSERVED_AFTER + PING_TIMEOUT - clock.now()))
    record = observer.record()
    sent = [ping for ping in record.pings if begin <= ping.sent < record.pings[-1].sent - PING_TIMEOUT]
    told = tuple(f for f in record.at_client if f.at >= begin and f.seen.kind in ("rarp", "garp", "unsolicited-na"))
    result = Result(
        case=case,
        started=started,
        resumed=target.resumed,
        downtime_ms=downtime,
        silence=observe.silence(record.pings, target.resumed, instrument.PING_SECONDS[4]),
        silence6_ms=0.0,
        lost=sum(ping.replied is None or ping.replied - ping.sent > PING_TIMEOUT for ping in sent),
        pings=record.pings,
        announcements=told,
        probes=(),
        contested=(),
    )
    first = min((f.at for f in told if f.at > target.resumed), default=float("nan"))
    return Measured(result, (first - target.resumed) * 1000)


def steady_since(since: float) -> Callable[[Record], bool]:
    """For `Observer.wait`: what was sent in the last second is answered, and that second began after *since*."""

    def steady(record: Record) -> bool:
        now = clock.now()
        recent = [ping.replied is not None for ping in record.pings if now - STEADY <= ping.sent < now - 0.2]
        return now - STEADY >= since and sum(recent) >= 0.9 * len(recent) > 0

    return steady


def lines(rounds: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """What was measured, in ms: each round, and the median."""
    for number, case in enumerate(CASES):
        of_case = [one[number] for one in rounds]
        for name, values in (
            ("client's silence", [one.result.silence_ms for one in of_case]),
            ("guest's own downtime", [one.result.downtime_ms for one in of_case]),
            ("arrival to announcement", [one.announced for one in of_case]),
        ):
            each = " ".join(f"{value:.0f}" for value in values)
            yield f"{case.title:36} {name:24} median {statistics.median(values):6.0f} ms   of {each}"


def main(argv: Sequence[str]) -> int:
    """Runs all rounds, prints what was measured, and draws the last one."""
    parser = argparse.ArgumentParser(prog="tests.ganeti.demo", description=__doc__)
    parser.add_argument("--out", type=output.directory, default="demo-out", help="for the picture (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of all cases (%(default)s)")
    parser.add_argument("--version", default="3.0", help="of Ganeti: 3.0 or 3.1 (%(default)s)")
    options = parser.parse_args(argv)
    image = guest.build(print)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        packages = our_packages(Path(scratch))
        for number in range(options.rounds):
            found = []
            for case in CASES:
                print(f"round {number + 1}: {case.title}", flush=True)
                found.append(one := run(case, image, packages, options.version))
                print(f"    silence {one.result.silence_ms:.0f} ms, announced after {one.announced:.1f} ms", flush=True)
            rounds.append(found)
    for picture in plot.save([one.result for one in rounds[-1]], options.out, "ganeti"):
        print(picture)
    for line in lines(rounds):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
