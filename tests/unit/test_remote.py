"""Tests that are done somewhere else end as if they had been done here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import roots

from .conftest import ROOT

# "There" is another process of this machine.
CONFTEST = """
import subprocess, sys
from harness import remote

class Config:
    run = None

def follow(script):
    done = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield from done.stdout
    return done.wait(), done.stderr.read()

def pytest_runtest_protocol(item):
    if remote.there():
        return None
    Config.run = Config.run or remote.Remote([one.nodeid for one in item.session.items], follow)
    Config.run.protocol(item)
    return True
"""
THERE = """
import os
from harness import remote
import pytest

def test_is_done_there():
    assert remote.there()
"""


def outcome(tmp_path: Path, tests: str) -> tuple[int, str]:
    """How a run of pytest with *tests*, which are done over there, ends; and what it prints."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_there.py").write_text(THERE + tests)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "test_there.py"], cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(("tests", "said"), [
    ("def test_one():\n    print('it printed')\n    assert 6 == 7",
     ["FAILED test_there.py::test_one", "it printed", "assert 6 == 7", "1 failed, 1 passed"]),
    ("@pytest.fixture\ndef broken():\n    raise ValueError('the fixture')\ndef test_one(broken):\n    pass",
     ["ERROR test_there.py::test_one", "ValueError: the fixture", "1 passed, 1 error"]),
    ("@pytest.fixture\ndef broken():\n    yield\n    raise ValueError('the end')\ndef test_one(broken):\n    pass",
     ["ERROR test_there.py::test_one", "ValueError: the end", "2 passed, 1 error"]),
    ("@pytest.mark.xfail(strict=True)\ndef test_one():\n    pass",
     ["FAILED test_there.py::test_one", "1 failed, 1 passed"]),
    ("def test_one():\n    os._exit(7)\ndef test_two():\n    pass",
     ["FAILED test_there.py::test_one", "FAILED test_there.py::test_two", "exit 7", "2 failed, 1 passed"]),
], ids=["test", "setup", "teardown", "strict", "death"])  # fmt: skip
def test_what_fails_there_fails_here_with_its_output(tests: str, said: list[str], tmp_path: Path) -> None:
    code, printed = outcome(tmp_path, tests)
    assert code == 1
    for words in said:
        assert words in printed


def test_what_passes_or_is_skipped_there_is_so_here(tmp_path: Path) -> None:
    code, printed = outcome(
        tmp_path,
        "@pytest.mark.parametrize('word', ['a b', '[c]'])\ndef test_one(word):\n    pass\n"
        "def test_two():\n    pytest.skip('why not')\n"
        "@pytest.mark.xfail\ndef test_three():\n    assert False\n",
    )
    assert code == 0
    assert "SKIPPED [1] test_there.py:12: why not" in printed
    assert "3 passed, 1 skipped, 1 xfailed" in printed


def test_what_is_kept_is_made_anew_when_its_recipe_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "CACHE", tmp_path / "cache")
    made = []

    def make(place: Path) -> None:
        made.append(place)
        place.mkdir()

    def kept(*recipe: str) -> Path:
        return roots.kept("machine", ".image", recipe, make)

    first = kept("kmod", "init")
    assert kept("kmod", "init") == first
    assert len(made) == 1
    assert len({first, kept("kmod", "another init"), kept("init", "kmod")}) == 3
    assert len(made) == 3
    assert all(place.is_dir() for place in (first, kept("kmod", "another init")))
    assert len(made) == 3


def test_what_is_kept_is_whole_and_not_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "CACHE", tmp_path / "cache")

    def fail(place: Path) -> None:
        place.mkdir()
        (place / "half").touch()
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        roots.kept("machine", ".image", [], fail)
    found = roots.kept("machine", ".image", [], Path.mkdir)
    assert list(found.iterdir()) == []
    monkeypatch.setattr(roots, "KEPT", -1)
    (found / "old").touch()
    assert list(roots.kept("machine", ".image", [], Path.mkdir).iterdir()) == []
