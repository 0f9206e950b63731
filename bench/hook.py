"""A hook through the agent beside Ganeti 3.0's own kvm-ifup: `python -m bench.hook [--runs N] [--out DIR]`.

Whole processes, from their start to their end, in turn in one run: each wires a new tap, as a NIC of a guest that
starts. Ganeti's script comes from Debian's package, and is run from a copy that finds its library beside itself
instead of below /usr. Then the same among 100 and among 500 other routed NICs, on two nodes in turn, with 64 hooks at
once, and the agent's memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench import picture
from harness import agents, manager, nodes, tools
from harness.addresses import CLIENT_IP4
from lab import debian, output

PATIENCE = 60.0  # seconds
AT_ONCE = 64
TABLE = "100"
KINDS: Mapping[str, Mapping[str, str]] = {
    "bridged": {"MODE": "bridged", "LINK": "br0"},
    "routed": {"MODE": "routed"},
    "routed with a table": {"MODE": "routed", "LINK": TABLE},
}
GANETI, AGENT, ALONE = "Ganeti 3.0", "kvm-ifup-post, agent", "kvm-ifup-post, no agent"


def environment(kind: str, number: int) -> dict[str, str]:
    """What Ganeti's node daemon says of NIC *number*."""
    told = {**tools.CLEAN, **manager.ganeti(f"tap{number}", **KINDS[kind])}
    told |= {"INSTANCE": f"web{number}.example.com", "MAC": f"aa:00:00:35:{number >> 8:02x}:{number & 255:02x}"}
    if told["MODE"] == "routed":
        told["IP"] = f"198.18.{number >> 8}.{number & 255}"
    return told


def spawn(argv: list[str], environ: Mapping[str, str], silent: Sequence[int] = (0, 1)) -> int:
    """Start a program, with these descriptors leading nowhere; its process id."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in silent]
    return os.posix_spawn(argv[0], argv, environ, file_actions=null)


def succeed(pid: int) -> None:
    """Wait for a program, which must succeed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"exit code {code}"


def timed(argv: list[str], environ: Mapping[str, str], silent: Sequence[int] = (0, 1)) -> float:
    """Milliseconds from the start of a program, which must succeed, to its end."""
    started = time.perf_counter()
    succeed(spawn(argv, environ, silent))
    return (time.perf_counter() - started) * 1000


def script(name: str) -> str:
    """One of our scripts, started as a manager does: by its path."""
    return str(tools.SCRIPTS / name)


def ganetis() -> str:
    """Ganeti's script, where it finds its library."""
    source = debian.ganeti() / "usr/lib/ganeti/3.0/usr/lib/ganeti"
    here = Path("/run/ganeti-scripts")
    here.mkdir()
    for name in ("kvm-ifup", "net-common"):
        text = (source / name).read_text(encoding="utf-8")
        (here / name).write_text(text.replace("/usr/lib/ganeti/net-common", str(here / "net-common")))
        (here / name).chmod(0o755)
    return str(here / "kvm-ifup")


def add_taps(numbers: Iterable[int]) -> None:
    """New taps, down, as a process manager makes them."""
    batch = "".join(f"tuntap add tap{number} mode tap\n" for number in numbers)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


def memory(pid: int) -> float:
    """The most that a process has had in memory, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def one(who: str, kind: str, number: int, ganeti: str) -> float:
    """A new NIC wired by *who*: milliseconds. Nothing of it is left."""
    add_taps([number])
    environ, tap = environment(kind, number), f"tap{number}"
    # With --run-dir the agent is not asked.
    ours = [script("kvm-ifup-post"), tap, *([f"--run-dir={manager.RUN_DIR}"] if who == ALONE else [])]
    if who == GANETI:
        taken = timed([ganeti, tap], environ, silent=(0, 1, 2))  # it first removes what is not there, and says so
        if environ.get("LINK") == TABLE:  # the rule outlives the tap
            tools.ip(f"rule del iif {tap}")
    else:
        taken = timed(ours, environ)
        timed([script("kvm-ifdown"), tap], environ)
    tools.ip(f"link del {tap}")
    return taken


def compare(runs: int, ganeti: str) -> dict[str, list[float]]:
    """All three kinds, by Ganeti's script and by ours, in turn."""
    rows: dict[str, list[float]] = {f"{kind}: {who}": [] for kind in KINDS for who in (GANETI, AGENT, ALONE)}
    number = 4000
    for run in range(runs):
        for kind in KINDS:
            # Taking turns in being first; and it takes long without the agent, so not each time.
            for who in [*((GANETI, AGENT)[:: 1 if run % 2 else -1]), *([ALONE] if run % 10 == 0 else [])]:
                number += 1
                rows[f"{kind}: {who}"].append(one(who, kind, number, ganeti))
    return rows


def fill(numbers: range) -> None:
    """Wire that many NICs, every other one with a table."""
    add_taps(numbers)
    for number in numbers:
        kind = "routed with a table" if number % 2 else "routed"
        timed([script("kvm-ifup-post"), f"tap{number}"], environment(kind, number))


class Crowd:
    """A node with an agent and that many routed NICs, in a process of its own."""

    def __init__(self, many: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.hook", "--crowd", str(many)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.ask("ready")

    def ask(self, what: str) -> float:
        """One of `answers`."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{what}\n")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Let the node end."""
        self._process.communicate(timeout=PATIENCE)


def crowd(many: int) -> None:
    """What is at the other end of a Crowd."""
    with nodes.fresh_node() as node:
        node.uplink()
        tools.ip(f"route add default via {CLIENT_IP4} table {TABLE}")
        with agents.running() as agent:
            fill(range(many))
            numbers = itertools.count(4000)
            answers: Mapping[str, Callable[[], float]] = {
                "ready": lambda: 0,
                "one": lambda: one(AGENT, "routed with a table", next(numbers), ""),
                "at once": at_once,
                "memory": lambda: memory(agent.process.pid),
            }
            for line in sys.stdin:
                print(answers[line.strip()](), flush=True)


def at_once() -> float:
    """Milliseconds until that many hooks, started together, have all succeeded."""
    numbers = range(3000, 3000 + AT_ONCE)
    add_taps(numbers)
    started = time.perf_counter()
    for pid in [spawn([script("kvm-ifup-post"), f"tap{n}"], environment("routed", n)) for n in numbers]:
        succeed(pid)
    return (time.perf_counter() - started) * 1000


def title(rows: Mapping[str, Sequence[float]]) -> str:
    """What the picture says in one sentence: how long hooks take with the agent, and how long without it."""
    said = []
    for who in (AGENT, ALONE):
        times = [statistics.median(rows[f"{k}: {who}"]) / statistics.median(rows[f"{k}: {GANETI}"]) for k in KINDS]
        said.append(f"{min(times):.2g} to {max(times):.2g}")
    return f"A hook's time, in times of Ganeti's own script: {said[0]} with the agent, {said[1]} without"


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(prog="bench.hook", description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--out", type=output.directory, default="demo-out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all values, in ms")
    parser.add_argument("--crowd", type=int, help=argparse.SUPPRESS)  # for Crowd
    options = parser.parse_args(argv)
    if options.crowd:
        crowd(options.crowd)
        return 0
    with nodes.fresh_node() as here:
        ganeti = ganetis()
        here.uplink()
        nodes.add_bridge()
        tools.ip(f"route add default via {CLIENT_IP4} table {TABLE}")
        with agents.running():
            rows = compare(options.runs, ganeti)
    few, full = Crowd(100), Crowd(500)
    among: dict[str, list[float]] = {f"{AGENT}, among {many} NICs": [] for many in (100, 500)}
    for _ in range(options.runs):
        for values, node in zip(among.values(), (few, full), strict=True):
            values.append(node.ask("one"))
    together, peak = full.ask("at once"), full.ask("memory")
    few.close()
    full.close()
    for kind in KINDS:
        print(picture.table("ms", {k: v for k, v in rows.items() if k.startswith(f"{kind}:")}, f"{kind}: {GANETI}"))
    print(picture.table("ms", among, f"{AGENT}, among 100 NICs"))
    print(f"{AT_ONCE} hooks at once, {AT_ONCE + 500} NICs: {together:.0f} ms for all, {together / AT_ONCE:.1f} ms each")
    print(f"the agent's memory with {AT_ONCE + 500} NICs, at most: {peak:.1f} MB")
    if options.json:
        options.json.write_text(json.dumps({**rows, **among, "64 at once": [together], "memory in MB": [peak]}))
    for path in picture.save("bench-hook", title(rows), "ms", {**rows, **among}, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
