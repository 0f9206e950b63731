"""What the lab refuses before it measures anything, and how it counts."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lab import observe, output
from lab.errors import LabError
from lab.observe import Gap, Ping

EVERY = 0.005
ARRIVED = 10.0


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


# --- the client's silence -----------------------------------------------------------------------------------


def pinged(*silent: Gap, lucky: tuple[float, ...] = ()) -> tuple[Ping, ...]:
    """A ping every 5 ms from 5 s to 15 s, answered at once, but not in *silent*, except for those of *lucky*."""
    sent = [round(5 + EVERY * number, 3) for number in range(2001)]
    mute = {at for at in sent if any(begin < at < end for begin, end in silent)} - set(lucky)
    return tuple(Ping(at, None if at in mute else at) for at in sent)


def around(pings: tuple[Ping, ...]) -> list[Gap]:
    return [(round(begin, 3), round(end, 3)) for begin, end in observe.silence(pings, ARRIVED, EVERY)]


def test_one_silence_reaches_to_the_arrival() -> None:
    assert around(pinged((9.97, 10.05))) == [(9.97, 10.05)]


def test_a_lucky_reply_splits_a_silence_and_does_not_end_it() -> None:
    assert around(pinged((9.95, 10.2), lucky=(10.05,))) == [(9.95, 10.05), (10.05, 10.2)]
    assert around(pinged((9.9, 10.4), lucky=(10.0, 10.2))) == [(9.9, 10.0), (10.0, 10.2), (10.2, 10.4)]


def test_the_part_before_the_arrival_counts_when_the_longest_is_behind_it() -> None:
    assert around(pinged((9.9, 9.98), (10.03, 10.5))) == [(9.9, 9.98), (10.03, 10.5)]


def test_what_is_apart_from_the_silence_does_not_belong_to_it() -> None:
    """The guest is held up when the migration begins; and something is slow long after it."""
    assert around(pinged((8.0, 8.05), (9.98, 10.06), (11.0, 11.03))) == [(9.98, 10.06)]


def test_a_few_replies_that_are_late_are_no_silence() -> None:
    assert around(pinged((9.98, 10.06), (10.08, 10.1))) == [(9.98, 10.06)]


def test_without_a_reply_on_both_sides_nothing_is_measured() -> None:
    with pytest.raises(LabError, match="before and after"):
        observe.silence(pinged((10.0, 20.0)), ARRIVED, EVERY)
