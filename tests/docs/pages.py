"""The sources of the man pages and the README, taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "man"
COMMANDS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown", "kvm-ifup", "kvm-ifupd")
PAGES = tuple(sorted(path.stem for path in MAN.glob("*.scd")))


@dataclass(frozen=True)
class Section:
    """A heading, and what is below it up to the next one of the same rank or a higher one."""

    title: str
    text: str

    def sections(self, mark: str = "##") -> list[Section]:
        """The parts with headings of the rank *mark*."""
        return list(_split(self.text, mark))

    @property
    def entries(self) -> list[str]:
        """The terms that are explained: lines that begin in bold or italics, with an indented text behind them."""
        found = re.findall(r"^([*_].*)\n\t", self.text, re.MULTILINE)
        return [re.sub(r"[*_](.+?)[*_](?!\w)", r"\1", one).replace("\\", "") for one in found]

    @property
    def blocks(self) -> list[str]:
        """What is printed as it is to be typed."""
        return re.findall(r"^```(?:sh)?\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)


def _split(text: str, mark: str) -> Iterator[Section]:
    # A line that begins like a heading may also be a comment in an example.
    in_block = False
    title, lines = "", list[str]()
    for line in text.splitlines(keepends=True):
        in_block ^= line.startswith("```")
        if line.startswith(f"{mark} ") and not in_block:
            if title:
                yield Section(title, "".join(lines))
            title, lines = line.removeprefix(mark).strip(), []
        else:
            lines.append(line)
    if title:
        yield Section(title, "".join(lines))


def source(name: str) -> str:
    """The source of a page, with the parts that it includes."""
    text = (MAN / f"{name}.scd").read_text(encoding="utf-8")
    return re.sub(r"^@include (.+)\n", lambda m: (MAN / "parts" / f"{m[1]}.scd").read_text("utf-8"), text, flags=re.M)


def section(name: str, title: str) -> Section:
    """One section of a page."""
    (found,) = [one for one in _split(source(name), "#") if one.title == title]
    return found


def examples(name: str) -> dict[str, list[str]]:
    """The examples of a page: their headings, and the blocks below each. An overview has none."""
    if name.endswith(".7"):
        return {}
    return {one.title: one.blocks for one in section(name, "EXAMPLES").sections()}


def readme(title: str) -> Section:
    """One section of the README."""
    (found,) = [one for one in _split((ROOT / "README.md").read_text(encoding="utf-8"), "##") if one.title == title]
    return found
