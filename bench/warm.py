"""What a hook takes in a process that is warm already: `python -m bench.warm [--others N …] [--profile]`.

`commands.main` itself, without the start of an interpreter: post, post once more when there is nothing to do, and down,
for each kind of NIC, alone and among others. Medians; or where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import platform
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from harness import manager, nodes, tools
from harness.addresses import CLIENT_IP4
from kvmifup.commands.main import main as run_command

KINDS: Mapping[str, Mapping[str, str]] = {
    "bridged": {"MODE": "bridged", "LINK": "br0"},
    "routed": {"MODE": "routed", "IP": "{4}"},
    "dual-stack": {"MODE": "routed", "IP": "{4},{6}"},
    "table": {"MODE": "routed", "LINK": "100", "IP": "{4}"},
}
MINE = 4000


def environment(kind: str, number: int) -> dict[str, str]:
    """What Ganeti's node daemon says of NIC *number*."""
    told = {**manager.ganeti(f"tap{number}", **KINDS[kind]), "INSTANCE": f"web{number}.example.com"}
    told["MAC"] = f"aa:00:00:35:{number >> 8:02x}:{number & 255:02x}"
    addresses = {"{4}": f"198.18.{number >> 8}.{number & 255}", "{6}": f"2001:db8:1::{number:x}"}
    for mark, address in addresses.items():
        told["IP"] = told.get("IP", "").replace(mark, address)
    return told


def add_taps(numbers: Sequence[int]) -> None:
    """New taps."""
    batch = "".join(f"tuntap add tap{number} mode tap\n" for number in numbers)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


def call(program: str, environ: Mapping[str, str]) -> float:
    """Milliseconds that a hook takes, which must succeed."""
    out, err = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    code = run_command(program, [], environ, out, err, lambda _messages, _still_true: None)
    taken = (time.perf_counter() - started) * 1000
    assert code == 0, err.getvalue()
    return taken


def measure(kind: str, runs: int) -> str:
    """Medians of *runs*."""
    environ = environment(kind, MINE)
    times: dict[str, list[float]] = {"post": [], "again": [], "down": []}
    for _ in range(runs):
        times["post"].append(call("kvm-ifup-post", environ))
        times["again"].append(call("kvm-ifup-post", environ))
        times["down"].append(call("kvm-ifdown", environ))
    return "  ".join(f"{name} {statistics.median(many):6.2f} ms" for name, many in times.items())


def profile(kind: str, runs: int) -> None:
    """Print where the time of post goes."""
    environ = environment(kind, MINE)
    profiler = cProfile.Profile()
    for _ in range(runs):
        profiler.enable()
        call("kvm-ifup-post", environ)
        profiler.disable()
        call("kvm-ifdown", environ)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def main(argv: Sequence[str]) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="bench.warm", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--others", type=int, nargs="*", default=[0, 100, 500], help="in ascending order")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    with nodes.fresh_node() as node:
        node.uplink()
        nodes.add_bridge()
        tools.ip(f"route add default via {CLIENT_IP4} table 100")
        add_taps([MINE])
        there = 0
        for others in options.others:
            new = range(there, others)
            add_taps(new)
            for number in new:
                call("kvm-ifup-post", environment("table" if number % 2 else "routed", number))
            there = others
            for kind in options.kinds:
                if options.profile:
                    profile(kind, options.runs)
                print(
                    f"Python {platform.python_version()}, {others:3} others, {kind:10}  {measure(kind, options.runs)}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
