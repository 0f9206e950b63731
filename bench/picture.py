"""One kind of picture for all: every measured value as a dot, its median as a line, one row for each thing compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from lab.style import BLUE, STYLE, VERMILION, write

DOT, MEDIAN = BLUE, VERMILION


def save(
    name: str, title: str, unit: str, rows: Mapping[str, Sequence[float]], directory: Path, note: str = ""
) -> list[Path]:
    """Draws `rows` (label to values in `unit`) from top to bottom and writes name.png and name.svg; their paths."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.5))
        for row, values in enumerate(rows.values()):
            spread = [row + (index / max(len(values) - 1, 1) - 0.5) * 0.4 for index in range(len(values))]
            axes.scatter(values, spread, s=9, color=DOT, alpha=0.6, linewidths=0)
            median = statistics.median(values)
            axes.plot([median, median], [row - 0.32, row + 0.32], color=MEDIAN, linewidth=2)
            axes.annotate(
                f"{number(median)} {unit}", (median, row - 0.34), ha="center", va="bottom", size=9, color=MEDIAN
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.75)
        said = "\n".join([f"{unit}, logarithmic; dots: every run, lines: medians", *([note] if note else [])])
        axes.set_xlabel(said, x=1, ha="right")
        axes.grid(axis="x", which="both", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=12)
        figure.tight_layout(rect=(0, 0, 1, 0.99))
        return write(figure, directory, name, 150)


def number(value: float) -> str:
    """*value* with three digits, and more only before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def median(values: Sequence[float]) -> float:
    """The median as it stands in the picture, so that what is computed of it can be checked."""
    return float(number(statistics.median(values)))


def table(unit: str, rows: Mapping[str, Sequence[float]], reference: str) -> str:
    """Minimum, median and maximum of each row, and the median's ratio to that of the row `reference`."""
    width = max(map(len, rows))
    base = statistics.median(rows[reference])
    lines = [f"{'':{width}}  {'min':>8} {'median':>8} {'max':>8} {'ratio':>6}   runs"]
    for label, values in rows.items():
        median = statistics.median(values)
        cells = " ".join(f"{value:8.2f}" for value in (min(values), median, max(values)))
        lines.append(f"{label:{width}}  {cells} {median / base:6.2f}   {len(values)}  ({unit})")
    return "\n".join(lines)
