"""What the pages in docs/ show is what a person sees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import screens
from tests.docs.machine import ROOT

ALL = [screen for page in screens.PAGES for screen in screens.screens(page)]


@pytest.mark.parametrize("screen", ALL, ids=str)
def test_a_screen_is_what_is_shown_now(screen: screens.Screen) -> None:
    assert screens.comparable(screens.shown(screen)) == screens.comparable(screen.text), "python -m tests.docs.screens"


def test_every_block_that_looks_like_a_screen_is_one() -> None:
    for page in screens.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```console") == len(list(screens.screens(page))), page.name


TEXTS = [*screens.PAGES, ROOT / "README.md", ROOT / "integration/libvirt/README.md"]


def anchors(page: Path) -> set[str]:
    """The names that the headings of a page get."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
