"""How ./dev check runs its parts: in order, side by side, with a failure that nobody can miss."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import parts
from tests.parts import Part, Run, both, only_all, side_by_side

from .conftest import ROOT


def shell(script: str) -> tuple[str, str, str]:
    return ("sh", "-c", script)


def results(runs: list[Run]) -> dict[str, int]:
    return {run.part.name: run.code for run in runs}


def test_each_part_runs_once_and_its_output_is_kept(tmp_path: Path) -> None:
    table = [both("one", "v", shell("echo first"), shell("echo second")), both("two", "v", shell("echo other"))]
    done = side_by_side(table, everything=False, logs=tmp_path, cores=2)
    assert results(done) == {"one": 0, "two": 0}
    printed = [line for line in (tmp_path / "one.log").read_text().splitlines() if not line.startswith("$ ")]
    assert printed == ["first", "second"]


def test_a_part_that_fails_is_shown_and_its_other_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = side_by_side([both("bad", "v", shell("echo why; exit 3"), shell("echo more"))], False, tmp_path, 2)
    assert results(done) == {"bad": 3}
    said = capsys.readouterr().out
    assert "why" in said
    assert "more" in said
    assert "== bad: FAILED" in said


def test_what_depends_on_a_failure_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [only_all("deb", "v", shell("false")), only_all("package", "v", shell("true"), after=("deb",))]
    assert results(side_by_side(table, True, tmp_path, 2)) == {"deb": 1}
    assert "== package: not run, because deb failed" in capsys.readouterr().out


def test_a_part_waits_for_what_it_depends_on_and_for_free_cores(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    table = [
        both("before", "v", shell(f"sleep 0.3; touch {mark}")),
        Part("all cores", "v", check=(shell(f"test -e {mark}; rm {mark}"),), all=(), cores=2),
        both("after", "v", shell(f"! test -e {mark}")),
    ]
    assert results(side_by_side(table, False, tmp_path, 2)) == {"before": 0, "all cores": 0, "after": 0}


def test_what_is_only_in_all_is_left_out_of_check(tmp_path: Path) -> None:
    assert side_by_side([only_all("long", "v", shell("false"))], False, tmp_path, 2) == []


def gone(pid: int) -> bool:
    """Whether a process has ended; who collects it may take a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_an_interrupt_ends_the_parts_and_what_they_have_started(tmp_path: Path) -> None:
    """The part's own child has to be gone, too."""
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    program = f"""
import pathlib, sys
from tests import parts
parts.PARTS = (parts.both("slow", "v", ("sh", "-c", {script!r})),)
parts.LOGS = pathlib.Path({str(tmp_path / "logs")!r})
sys.exit(parts.check(False))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not pid_file.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in out
    deadline = time.monotonic() + 60
    while not gone(int(pid_file.read_text())):
        assert time.monotonic() < deadline, "what the part has started is still there"


LOG = """
..F
=================== slowest 10 durations ===================
59.06s call     tests/kernel/test_a.py::test_slow[x, y]
0.50s setup    tests/kernel/test_a.py::test_quick
1 failed, 790 passed, 2 skipped in 412.98s (0:06:52)
$ another command
============= 3 passed, 5 deselected, 1 error in 2.00s =============
"""


def test_counts_are_those_of_every_run_of_pytest_in_a_log() -> None:
    assert parts.said(parts.counts(LOG)) == "793 passed, 2 failed, 2 skipped"
    assert parts.said(parts.counts("7 passed in 0.10s\n")) == "7 passed, 0 failed"
    assert parts.counts("nothing to count\n") == {}


def test_the_slowest_tests_are_found_in_a_log() -> None:
    assert parts.durations(LOG) == [
        (59.06, "tests/kernel/test_a.py::test_slow[x, y]"),
        (0.5, "tests/kernel/test_a.py::test_quick"),
    ]


def test_a_failure_that_no_test_tells_of_counts(tmp_path: Path) -> None:
    done = side_by_side([both("lint", "v", shell("exit 1"))], False, tmp_path, 2)
    assert parts.table(done, 0.0).splitlines()[-1] == "0 passed, 1 failed"


def test_what_a_part_depends_on_comes_before_it() -> None:
    names = [part.name for part in parts.PARTS]
    assert len(set(names)) == len(names)
    for number, part in enumerate(parts.PARTS):
        assert set(part.after) <= set(names[:number])


@pytest.mark.parametrize(
    "words", [["chek"], ["check", "--al"], ["check", "--all", "x"], ["unit", "-k"], ["help", "me"]]
)
def test_dev_refuses_what_it_does_not_know(words: list[str]) -> None:
    done = subprocess.run([str(ROOT / "dev"), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (64, "")
    assert words[-1] in done.stderr
    assert done.stderr.count("\n") == 1
