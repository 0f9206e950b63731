"""The options of each part, its values as a file, and two such files side by side: `python -m bench --compare A B`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import output

Rows = Mapping[str, Sequence[float]]  # each label with its values; the label says the unit if that is not ms


def parser(part: str, description: str | None, runs: int) -> argparse.ArgumentParser:
    """The command line of a *part*, which does everything so many times if nobody says otherwise."""
    made = argparse.ArgumentParser(prog=f"bench.{part}", description=description)
    made.add_argument("--runs", type=int, default=runs)
    made.add_argument("--out", type=output.directory, default="demo-out")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="all values, in ms if their labels do not say otherwise"
    )
    return made


def write(file: Path | None, rows: Rows) -> None:
    """Write *rows* to *file*, if there is one."""
    if file:
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def comparison(one: Path, other: Path) -> str:
    """The medians of both files, and how the second is to the first; of what both have."""
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (one, other))
    both = [label for label in first if label in second]
    width = max(map(len, both), default=0)
    lines = [f"{'':{width}}  {one.stem[:10]:>10} {other.stem[:10]:>10} ratio"]
    for label in both:
        before, after = (statistics.median(rows[label]) for rows in (first, second))
        lines.append(f"{label:{width}}  {before:10.2f} {after:10.2f} {after / before:5.2f}")
    lines += [f"only in {path}: {label}" for path, mine, its in ((one, first, second), (other, second, first))
              for label in mine if label not in its]  # fmt: skip
    return "\n".join(lines)
