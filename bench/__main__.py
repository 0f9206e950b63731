"""All measurements, one after the other: `python -m bench [--runs N] [--out DIR] [--json FILE]`, or ./dev bench.

With --compare it measures nothing, and shows two files of --json beside each other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import PARTS, results, summary
from lab import output


def main(argv: Sequence[str]) -> int:
    """Measures, or compares."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--runs", help="of each thing; default: as many as it needs")
    parser.add_argument("--out", type=output.directory, default="demo-out", help="where the pictures go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there, in ms")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two such files: medians, ratios")
    options = parser.parse_args(argv)
    if options.compare:
        print(results.comparison(*options.compare))
        return 0
    more = [] if options.runs is None else ["--runs", options.runs]
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-bench-") as scratch:
        for part in PARTS:
            print(f"\n== bench: {part}", flush=True)
            started, found = time.monotonic(), Path(scratch) / part
            module = [sys.executable, "-m", f"bench.{part}", "--out", options.out, "--json", found]
            subprocess.run([*module, *more], check=True)
            print(f"{part} took {time.monotonic() - started:.0f} s")
            rows |= {f"{part}: {label}": values for label, values in json.loads(found.read_text()).items()}
    results.write(options.json, rows)
    print("\nREADME.md says of these pictures:", *summary.lines(options.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
