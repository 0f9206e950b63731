"""How the project's pictures look, and the two files that each is written to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, VERMILION = "#0072B2", "#D55E00"

STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "kvm-ifup",  # the same data give the same file
    "svg.fonttype": "none",
}


# What a reader of a picture must know of the guests in it: they run slower than on a real node.
EMULATED = f"Guests with emulated CPUs (QEMU's TCG), {len(os.sched_getaffinity(0))} cores for everything"


def write(figure: Any, directory: Path, name: str, dpi: int) -> list[Path]:
    """Writes `figure` as name.png, at `dpi`, and name.svg, and closes it; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths
