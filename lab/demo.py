"""The demonstration: `python -m lab.demo` migrates a guest five times and shows what its client noticed."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab import clock, guest, hooks, nodes, output
from lab.errors import LabError

if TYPE_CHECKING:
    from lab import cases

REPOSITORY = Path(__file__).resolve().parents[1]
HEADER = ("case", "guest's own downtime", "client's silence", "difference", "lost pings", "answered ARP")


def table(results: Sequence[cases.Result]) -> str:
    """The results as an aligned table; durations in ms."""
    rows: list[tuple[str, ...]] = [HEADER]
    for r in results:
        answered = "one node" if r.nodes_answering == 1 else "two nodes"
        down, silent, more = (f"{value:.0f} ms" for value in (r.downtime_ms, r.silence_ms, r.difference_ms))
        if len(r.silence) > 1:
            silent += f" in {len(r.silence)} parts"
        rows.append((r.case.title, down, silent, more, str(r.lost), answered))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = []
    for row in rows:
        first, *middle, last = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(" | ".join((first.strip().ljust(widths[0]), *middle, last.strip())))
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs all cases, prints the table and writes the pictures. 0 when everything was measured, else 1."""
    parser = argparse.ArgumentParser(prog="lab.demo", description=__doc__)
    parser.add_argument(
        "--out", type=output.directory, default="demo-out", help="directory for the pictures (%(default)s)"
    )
    parser.add_argument("--scripts", type=Path, default=REPOSITORY / "scripts", help="directory of kvm-ifup-pre etc.")
    parser.add_argument("--python", type=Path, help="run the scripts with this Python (default: as they say)")
    options = parser.parse_args(argv)

    # Ended from outside, the lab still takes its namespaces and guests down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = clock.now()

    def progress(line: str) -> None:
        print(f"{clock.now() - began:6.1f} s  {line}", flush=True)

    try:
        nodes.require_tools()
        from lab import cases, plot  # here, so that a module that is missing is one sentence too

        progress("looking for the guest's kernel")
        image = guest.build(progress)
        results = []
        with tempfile.TemporaryDirectory(prefix="kvm-ifup-hooks-") as scratch:
            scripts = hooks.hooks(options.scripts, options.python, Path(scratch))
            for number, case in enumerate(cases.CASES, 1):
                progress(f"migration {number} of {len(cases.CASES)}: {case.title}")
                results.append(cases.run(case, scripts, image, lambda line: progress(f"    {line}")))
        progress("drawing")
        pictures = [*plot.save(results, options.out), *plot.save_frames(results, options.out)]
    except LabError as e:
        print(f"lab.demo: {e}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as e:
        print(
            f"lab.demo: the Python module {e.name} is not installed (pip install qemu.qmp matplotlib)", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("lab.demo: interrupted; everything is taken down (run it again to measure)", file=sys.stderr)
        return 130
    print()
    print(table(results))
    print()
    for picture in pictures:
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
