"""./dev refuses what it does not know before it installs anything, and building takes only what building takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import PARTS, results

from .conftest import ROOT

VERBS = sorted(set(re.findall(r"^\./dev (\w+)", (ROOT / "dev").read_text(encoding="utf-8"), re.MULTILINE)))


def dev(there: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of ./dev on a machine that has no package, where nobody is root; *there* has what it called."""
    shutil.copy(ROOT / "dev", there)
    stubs = there / "stubs"
    stubs.mkdir()
    for name, script in {"dpkg-query": "true", "id": "echo 1000", "apt-get": "exit 9"}.items():
        (stubs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{there}/called"\n{script}\n')
        (stubs / name).chmod(0o755)
    environ = {"PATH": f"{stubs}:/usr/bin:/bin"}
    return subprocess.run([there / "dev", *words], env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("word", ["nonsense", "--nonsense", "--all --nonsense", "tests/unit"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_word_that_is_not_known_is_refused_at_once(verb: str, word: str, tmp_path: Path) -> None:
    done = dev(tmp_path, verb, *word.split())
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith(f"dev: {verb} takes ")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(("words", "said"), [
    ("demo --out", "dev: --out needs a value"),
    ("bench --jsn x", "dev: bench takes --out --runs --json, not: --jsn"),
    ("bench --compare x", "dev: --compare takes two files of --json"),
    ("bench --runs 3 --compare x y", "dev: bench takes --out --runs --json, not: --compare"),
    ("demo --out=x more", "dev: demo takes --out --scripts --python, not: more"),
    ("demos", "dev: no verb demos"),
])  # fmt: skip
def test_what_is_wrong_with_a_word_is_said(words: str, said: str, tmp_path: Path) -> None:
    done = dev(tmp_path, *words.split())
    assert done.returncode == 64
    assert done.stderr.startswith(said)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("words", ["demo --help", "deb -h", "--help", "-h", "help", ""])
def test_help_costs_nothing(words: str, tmp_path: Path) -> None:
    done = dev(tmp_path, *words.split())
    assert done.returncode == 0
    assert done.stdout.startswith("./dev check ")
    assert not (tmp_path / "called").exists()


def test_what_is_known_goes_on(tmp_path: Path) -> None:
    done = dev(tmp_path, "demo", "--out", "x", "--python=/usr/bin/python3")
    assert done.returncode == 1
    assert "these Debian packages are missing" in done.stderr


def test_the_options_of_demo_and_bench_are_those_that_they_have() -> None:
    text = (ROOT / "dev").read_text(encoding="utf-8")
    sources = {"    demo)": "lab/demo.py", "--ganeti)": "tests/ganeti/demo.py", "    bench)": "bench/__main__.py"}
    for verb, source in sources.items():
        part = text.split(f"\n{verb}")[1] if verb.startswith(" ") else text.split(verb)[1]
        lines = [line for line in part.split("\n        ;;")[0].splitlines() if "--ganeti)" not in line]
        takes = re.search(r'only "(.*?)"', "\n".join(lines))
        assert takes
        has = set(re.findall(r'add_argument\(\s*"(--[a-z]+)"', (ROOT / source).read_text(encoding="utf-8")))
        assert set(takes[1].split()) == has - {"--compare"}  # which stands alone


def test_each_part_of_the_bench_takes_what_the_whole_gives_it() -> None:
    for part in PARTS:
        text = (ROOT / f"bench/{part}.py").read_text(encoding="utf-8")
        assert f'results.parser("{part}", ' in text
        assert {"--runs", "--out", "--json"} <= set(
            re.findall(r"--[a-z]+", results.parser(part, None, 1).format_usage())
        )


def test_building_installs_what_debian_control_and_the_build_need(tmp_path: Path) -> None:
    done = dev(tmp_path, "deb")
    assert done.returncode == 1
    missing = set(done.stderr.split("takes root:")[1].split())
    control = (ROOT / "debian/control").read_text(encoding="utf-8")
    stanza = control.split("Build-Depends:")[1].split("Standards-Version:")[0]
    needs = {one.split()[0] for one in stanza.split(",") if one.strip() and "<!nocheck>" not in one}
    real = {"debhelper-compat": "debhelper", "dh-sequence-python3": "dh-python"}
    assert missing == {real.get(one, one) for one in needs} | {"dpkg-dev", "git"}
