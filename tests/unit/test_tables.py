"""Names of routing tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmifup.inputs import tables


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, ...]:
    for place, content in {
        "etc/rt_tables": "# comment\n\n255 local\n100\tguests # the guests\n 7 blanks \n101 twice\n"
        "0x66 hex\nten ten\n300\n",
        "etc/rt_tables.d/b.conf": "200 dropin\n101 shadowed\n",
        "etc/rt_tables.d/a.conf": "199 dropin\n",
        "etc/rt_tables.d/ignored": "5 ignored\n",
        "usr/rt_tables": "111 guests\n112 vendor\n\xff\n",
    }.items():
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="latin-1")
    return str(tmp_path / "etc"), str(tmp_path / "missing"), str(tmp_path / "usr")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("100", 100),
        ("4294967295", 4294967295),
        ("guests", 100),
        ("blanks", 7),
        ("twice", 101),
        ("hex", 0x66),
        ("dropin", 199),
        ("vendor", 112),
        ("main", 254),
        ("default", 253),
        ("local", 255),
        ("ignored", None),
        ("comment", None),
        ("ten", None),
        ("GUESTS", None),
        ("\u0661", None),
        ("", None),
    ],
)
def test_number(name: str, number: int | None, places: tuple[str, ...]) -> None:
    assert tables.number(name, places) == number


@pytest.mark.parametrize("number", ["1_0", "+5", "\u0661", "0b1", "0o7", "-1", "010"])
def test_a_number_that_iproute2_does_not_read_is_none(number: str, tmp_path: Path) -> None:
    (tmp_path / "rt_tables").write_text(f"{number} guests\n", encoding="utf-8")
    assert tables.number("guests", (str(tmp_path),)) is None


def test_without_any_file(tmp_path: Path) -> None:
    assert tables.number("main", (str(tmp_path),)) == 254
    assert tables.number("guests", (str(tmp_path),)) is None


def test_the_administrators_file_may_rename_main(tmp_path: Path) -> None:
    (tmp_path / "rt_tables").write_text("99 main\n")
    assert tables.number("main", (str(tmp_path),)) == 99
