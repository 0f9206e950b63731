"""How long a hook takes in a process that is warm already: `cli.main`, phase by phase, alone and among others."""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import os
import pstats
import statistics
import sys
import time
from collections.abc import Mapping

from tests import netns

UPLINK = "eth0"


def environment(number: int, kind: str, tap: str | None = None) -> dict[str, str]:
    """Ganeti's environment for NIC *number*, wired as *kind* says."""
    high, low = divmod(number, 200)
    more = {
        "bridged": {"MODE": "bridged", "LINK": "br0"},
        "routed": {"MODE": "routed", "IP": f"198.18.{high}.{low + 1}"},
        "dual": {"MODE": "routed", "IP": f"198.18.{high}.{low + 1},2001:db8:1::{number + 1:x}"},
        "table": {"MODE": "routed", "LINK": "100", "IP": f"198.18.{high}.{low + 1}"},
    }[kind]
    return {
        **netns.ganeti(tap or f"tap{number}", **more),
        "INSTANCE": f"web{number}.example.com",
        "MAC": f"aa:00:00:35:{number >> 8:02x}:{number & 255:02x}",
    }


def add_taps(names: list[str]) -> None:
    """Make taps, many at once."""
    batch = "".join(f"tuntap add {name} mode tap\n" for name in names)
    import subprocess

    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


def call(program: str, environ: Mapping[str, str]) -> float:
    """Milliseconds that a hook takes, which must succeed."""
    from kvmifup import cli

    out, err = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    code = cli.main(program, [], environ, out, err, lambda _messages, _true: None)
    took = (time.perf_counter() - started) * 1000
    assert code == 0, err.getvalue()
    return took


def measure(kind: str, runs: int) -> str:
    """One line of medians: post, post once more, down."""
    environ = environment(5000, kind, "tap5000")
    times: dict[str, list[float]] = {"post": [], "again": [], "down": []}
    for _ in range(runs):
        times["post"].append(call("kvm-ifup-post", environ))
        times["again"].append(call("kvm-ifup-post", environ))
        times["down"].append(call("kvm-ifdown", environ))
    return "  ".join(f"{name} {statistics.median(many):6.2f}" for name, many in times.items())


def profile(kind: str, runs: int) -> None:
    environ = environment(5000, kind, "tap5000")
    profiler = cProfile.Profile()
    for _ in range(runs):
        if os.environ.get("AGAIN"):
            call("kvm-ifup-post", environ)
        profiler.enable()
        call("kvm-ifup-post", environ)
        profiler.disable()
        call("kvm-ifdown", environ)
    pstats.Stats(profiler).sort_stats(os.environ.get("SORT", "tottime")).print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--others", type=int, nargs="*", default=[0])
    parser.add_argument("--kinds", nargs="*", default=["bridged", "routed", "dual", "table"])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    netns.isolate()
    with netns.fresh_node() as node:
        node.uplink()
        netns.ip("route add default via 192.0.2.1 table 100")
        netns.add_bridge()
        add_taps(["tap5000"])
        gc.collect()
        gc.freeze()
        there = 0
        for others in options.others:
            add_taps([f"tap{number}" for number in range(there, others)])
            for number in range(there, others):
                call("kvm-ifup-post", environment(number, "table" if number % 2 else "routed"))
            there = others
            for kind in options.kinds:
                call("kvm-ifup-post", environment(5000, kind, "tap5000"))
                call("kvm-ifdown", environment(5000, kind, "tap5000"))
                if options.profile:
                    profile(kind, options.runs)
                print(f"python {sys.version_info[1]}  others {others:4d}  {kind:8s}  {measure(kind, options.runs)}")


if __name__ == "__main__":
    main()
