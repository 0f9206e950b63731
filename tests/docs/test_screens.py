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


@pytest.mark.parametrize("page", [*screens.PAGES, ROOT / "README.md"], ids=lambda page: str(page.name))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
