"""What the lab refuses before it measures anything."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lab import output


def test_the_directory_of_pictures_is_made_first_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(prog="lab.demo")
    parser.add_argument("--out", type=output.directory, default=str(tmp_path / "a"))
    assert parser.parse_args([]).out.is_dir()
    assert parser.parse_args(["--out", f"{tmp_path}/b/c"]).out == tmp_path / "b/c"
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", "/proc/x"])
    assert capsys.readouterr().err.splitlines()[1:] == [
        "lab.demo: error: argument --out: /proc/x cannot be made: No such file or directory"
    ]
