"""What README.md says of the pictures: ratios alone, because a reader's machine is another one."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from bench import hook, picture, scale
from bench.results import Rows

MEDIAN = r"[\d.]+ ms"


def medians(directory: Path, name: str) -> Rows:
    """The median of each row of the picture *name* in *directory*, as it is written there."""
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (directory / f"{name}.svg").read_text(encoding="utf-8"))
    values = [float(text.removesuffix(" ms")) for text in texts if re.fullmatch(MEDIAN, text)]
    first = next(number for number, text in enumerate(texts) if re.fullmatch(MEDIAN, text))
    return {label: [value] for label, value in zip(texts[first - len(values) : first], values, strict=True)}


def ratio(rows: Rows, one: str, other: str) -> str:
    """How *one* is to *other*, by their medians."""
    return f"{picture.median(rows[one]) / picture.median(rows[other]):.2g}"


def lines(directory: Path) -> list[str]:
    """The items of the list, from the pictures in *directory*."""
    names = "hook", "scale", "arrival", "migration"
    hooks, full, arrival, migration = (medians(directory, f"bench-{name}") for name in names)
    bridged, agent, late = migration
    beside: Mapping[str, str] = {
        who: f"{hook.ratios(hooks, who, hook.GANETI)} times as long as Ganeti's own script, "
        f"{hook.ratios(hooks, who, hook.SHELL)} times as long as a shell script of the commands that "
        f"`kvm-ifup plan` prints, {hook.ratios(hooks, who, hook.BATCHES)} times as long as these with `ip -batch`, and "
        f"{hook.ratios(hooks, who, hook.BARE)} times as long as a Python that has nothing to do"
        for who in (hook.AGENT, hook.ALONE)
    }
    said = [
        f"A whole hook takes {beside[hook.AGENT]}. {scale.title(full)}.",
        f"**Without the agent** it takes {beside[hook.ALONE]}, with the configuration that is installed, which sets "
        "nothing.",
        "A guest's announcement is at the client in "
        f"{ratio(arrival, 'IPv4, agent', 'IPv4, kvm-ifup-post')} of the time that it takes when a manager runs "
        f"kvm-ifup-post, without the agent, at that moment (IPv6: "
        f"{ratio(arrival, 'IPv6, agent', 'IPv6, kvm-ifup-post')}).",
        "A client's silence, less the guest's own downtime, is for a routed guest with the agent "
        f"{ratio(migration, agent, bridged)} times that for a bridged one; when post is called one second late, "
        f"{ratio(migration, late, bridged)} times.",
    ]
    return [textwrap.fill(f"- {one}", 120, subsequent_indent="  ", break_on_hyphens=False) for one in said]
