"""The picture of the migrations: what the client got from the guest, second by second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lab.cases import OBSERVED_AFTER, PING_TIMEOUT, Result
from lab.style import BLUE, EMULATED, STYLE, VERMILION, write

REPLY, LOST, SILENT, DOWN = BLUE, VERMILION, "#F6DDA8", "#4D4D4D"
BEFORE, AFTER = 3.0, OBSERVED_AFTER  # seconds around the guest's arrival
# Heights in the panels, in ms on their logarithmic axis: below the replies what was lost, above them who announced.
BOTTOM, LOST_AT, TOP = 0.1, 0.16, 150000.0


@dataclass(frozen=True)
class Mark:
    """How one kind of announcement is drawn."""

    label: str
    shape: str
    colour: str
    height: float


MARKS = {
    "rarp": Mark("RARP (QEMU)", "v", "#CC79A7", 80000.0),
    "garp": Mark("gratuitous ARP", "o", "#009E73", 28000.0),
    "unsolicited-na": Mark("unsolicited NA (IPv6)", "x", "#000000", 10000.0),
}


def save(results: Sequence[Result], directory: Path, name: str = "migration") -> list[Path]:
    """Draws one panel for each result and writes *name*.png and *name*.svg; returns their paths."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(results), 1, figsize=(9, 2.15 * len(results) + 0.9), sharex=True, squeeze=False)
        for panel, result in zip(axes[:, 0], results, strict=True):
            _panel(panel, result)
        axes[-1, 0].set_xlabel("seconds since the guest runs on the target node")
        figure.suptitle(
            "A live migration as the client sees it (a ping every 5 ms)", x=0.01, ha="left", weight="bold", size=12
        )
        figure.legend(
            handles=_legend(),
            loc="lower center",
            bbox_to_anchor=(0.5, 0.028),
            ncols=4,
            frameon=False,
            handletextpad=0.5,
            columnspacing=2.0,
        )
        figure.text(
            0.01,
            0.006,
            "Slow replies just after a migration is ordered: QEMU holds the guest up then. No wiring changes that.\n"
            f"{EMULATED}.",
            size=8.5,
        )
        figure.tight_layout(rect=(0, 0.08, 1, 0.995), h_pad=1.0)
        return write(figure, directory, name, 200)


# The first second from close by, in milliseconds: what is in the frames' lanes, from top to bottom.
FROM, TO = -150.0, 900.0
LANES = ("guest", "rarp", "garp", "unsolicited-na", "reply")
NAMES = {"guest": "guest runs", "reply": "reply to a ping", **{kind: mark.label for kind, mark in MARKS.items()}}


def save_frames(results: Sequence[Result], directory: Path) -> list[Path]:
    """Draws the second around each arrival, frame by frame; writes frames.png and frames.svg, returns their paths."""
    with plt.rc_context({**STYLE, "axes.spines.left": False}):
        figure, axes = plt.subplots(len(results), 1, figsize=(9, 1.75 * len(results) + 0.8), sharex=True, squeeze=False)
        for panel, result in zip(axes[:, 0], results, strict=True):
            _lanes(panel, result)
        axes[-1, 0].set_xlabel("milliseconds since the guest runs on the target node")
        figure.suptitle("The frames at the client", x=0.01, ha="left", weight="bold", size=12)
        figure.text(0.01, 0.006, f"{EMULATED}.", size=8.5)
        figure.legend(handles=[_silent()], loc="lower right", frameon=False, borderpad=0, borderaxespad=0.4)
        figure.tight_layout(rect=(0, 0.02, 1, 0.995), h_pad=1.0)
        return write(figure, directory, "frames", 200)


def _lanes(axes: Any, result: Result) -> None:
    def ms(at: float) -> float:
        return (at - result.resumed) * 1000

    axes.set_xlim(FROM, TO)
    axes.set_ylim(len(LANES) - 0.5, -0.7)
    axes.set_yticks(range(len(LANES)), [NAMES[lane] for lane in LANES])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(result.case.title, loc="left", weight="bold", size=10)
    axes.set_title(f"no reply for {silence(result)}", loc="right", size=9.5)
    for begin, end in result.silence:
        axes.axvspan(max(ms(begin), FROM), min(ms(end), TO), color=SILENT, linewidth=0)
    axes.axvline(0, color=DOWN, linewidth=0.8)
    axes.barh(0, -FROM - result.downtime_ms, left=FROM, height=0.3, color=DOWN)
    axes.barh(0, TO, left=0, height=0.3, color=DOWN)
    for kind, mark in MARKS.items():
        at = [ms(f.at) for f in result.announcements if f.seen.kind == kind]
        lane = LANES.index(kind)
        axes.plot(at, [lane] * len(at), mark.shape, color=mark.colour, markersize=6)
        # The last of a burst says when, so that the numbers do not cover each other.
        for x, after in zip(at, [*at, float("inf")][1:], strict=True):
            if FROM < x < TO - 40 and after - x > 40:
                axes.annotate(f"{x:.0f}", (x, lane), (5, 0), textcoords="offset points", va="center", size=8)
        # What the panel is too narrow for is counted, so that an empty lane says what it means.
        if earlier := sum(x < FROM for x in at):
            axes.text(FROM + 8, lane, f"◀ {earlier} before", va="center", size=8)
        if later := sum(x > TO for x in at):
            axes.text(TO + 8, lane, f"▶ {later} later", va="center", size=8)
        if not at:
            axes.text(FROM + 8, lane, "none", va="center", size=8)
    replies = [ms(p.replied) for p in result.pings if p.replied is not None]
    lane = LANES.index("reply")
    axes.plot(replies, [lane] * len(replies), "|", color=REPLY, markersize=6)
    if not any(0 < x < TO for x in replies):
        until = f"none until +{result.silence[-1][1] - result.resumed:.1f} s ▶"
        axes.text(TO - 8, lane, until, ha="right", va="center", size=8)


def _panel(axes: Any, result: Result) -> None:
    zero = result.resumed
    silent = [(begin - zero, end - zero) for begin, end in result.silence]
    axes.set_xlim(-BEFORE, AFTER)
    axes.set_yscale("log")
    axes.set_ylim(BOTTOM, TOP)
    axes.set_yticks([1, 10, 100, 1000], ["1 ms", "10 ms", "100 ms", "1 s"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylabel("reply took")

    for begin, end in silent:
        axes.axvspan(max(begin, -BEFORE), min(end, AFTER), color=SILENT, linewidth=0)
    axes.axvspan(-result.downtime_ms / 1000, 0, color=DOWN, linewidth=0, ymin=0.09, ymax=0.77)

    axes.axvline(result.started - zero, color=DOWN, linewidth=0.8, linestyle=(0, (2, 2)))

    # Replies stand where they arrived, lost pings where they were sent.
    replies = [(p.replied - zero, (p.replied - p.sent) * 1000) for p in result.pings if p.replied is not None]
    replies = [(x, y) for x, y in replies if -BEFORE <= x <= AFTER]
    axes.scatter([x for x, _ in replies], [y for _, y in replies], s=5, color=REPLY, linewidths=0, rasterized=True)
    lost = [p.sent - zero for p in result.pings if p.replied is None or p.replied - p.sent > PING_TIMEOUT]
    lost = [x for x in lost if -BEFORE <= x <= AFTER]
    axes.plot(lost, [LOST_AT] * len(lost), "|", color=LOST, markersize=5, rasterized=True)
    for kind, mark in MARKS.items():
        at = [f.at - zero for f in result.announcements if f.seen.kind == kind and -BEFORE <= f.at - zero <= AFTER]
        face = {"markerfacecolor": "none"} if mark.shape == "o" else {}
        axes.plot(at, [mark.height] * len(at), mark.shape, color=mark.colour, markersize=5, **face)

    answering = "one node answers ARP" if result.nodes_answering == 1 else "TWO nodes answer ARP"
    nodes = f"  ·  {answering}" if result.probes else ""  # else nobody was asked
    axes.set_title(result.case.title, loc="left", weight="bold", size=10)
    axes.set_title(
        f"guest down {milliseconds(result.downtime_ms)}  ·  no reply for {silence(result)}{nodes}",
        loc="right",
        size=9.5,
    )
    if silent[-1][1] > AFTER:
        why = "when the client asks for the guest's MAC anew" if result.case.mode == "bridged" else ""
        until = f"no reply until +{silent[-1][1]:.1f} s  ▶\n{why}"
        axes.text(AFTER - 0.06, 60, until, ha="right", va="center", size=9.5)


def _legend() -> list[Any]:
    def dot(label: str, shape: str, colour: str, **more: Any) -> Line2D:
        return Line2D([], [], linestyle="", marker=shape, color=colour, markersize=5, label=label, **more)

    return [
        dot("reply", "o", REPLY, markeredgewidth=0),
        dot("ping lost (no reply in 1 s)", "|", LOST),
        Line2D([], [], color=DOWN, linewidth=0.8, linestyle=(0, (2, 2)), label="migration ordered"),
        _silent(),
        Patch(color=DOWN, label="guest down"),
        *(
            dot(m.label, m.shape, m.colour, markerfacecolor="none" if m.shape == "o" else m.colour)
            for m in MARKS.values()
        ),
    ]


def _silent() -> Patch:
    """What the coloured areas are."""
    return Patch(color=SILENT, label="client without reply")


def silence(result: Result) -> str:
    """The client's silence for people, and in how many parts if single replies split it."""
    parts = f" in {len(result.silence)} parts" if len(result.silence) > 1 else ""
    return f"{milliseconds(result.silence_ms)}{parts}"


def milliseconds(value: float) -> str:
    """A duration in ms for people: `61 ms`, `22.3 s`."""
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.1f} s"
