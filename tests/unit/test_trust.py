"""Which files are believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmifup.inputs import trust


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base" / "sub").mkdir(parents=True)
    write(tmp_path / "base" / "sub" / "file", b"text")
    return tmp_path / "base"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o644)
    return path


def refusal(path: Path, base: Path) -> str:
    with pytest.raises(trust.Untrusted) as caught:
        trust.read(path, base)
    return str(caught.value)


def test_a_file_of_roots(base: Path) -> None:
    assert trust.read(base / "sub" / "file", base) == "text"


@pytest.mark.parametrize("bits", [0o020, 0o002, 0o022])
@pytest.mark.parametrize("place", ["sub/file", "sub", "."])
def test_writable_by_others(place: str, bits: int, base: Path) -> None:
    (base / place).chmod((base / place).stat().st_mode | bits)
    assert "written to by others" in refusal(base / "sub" / "file", base)


def test_what_is_above_the_base_does_not_matter(base: Path) -> None:
    base.parent.chmod(0o777)
    assert trust.read(base / "sub" / "file", base) == "text"


@pytest.mark.parametrize("place", ["sub/file", "sub", "."])
def test_owned_by_somebody_else(place: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, real = os.path.realpath(base / place), os.lstat

    def lstat(path: str | Path) -> os.stat_result:
        info = real(path)
        return os.stat_result((*info[:4], 4242, *info[5:])) if str(path) == theirs else info

    monkeypatch.setattr(os, "lstat", lstat)
    assert "uid 4242" in refusal(base / "sub" / "file", base)


def test_symlinks_inside_are_followed(base: Path) -> None:
    (base / "link").symlink_to("sub/file")
    assert trust.read(base / "link", base) == "text"
    (base.parent / "way").symlink_to(base)
    assert trust.read(base.parent / "way" / "sub" / "file", base) == "text"


@pytest.mark.parametrize("target", ["../outside", "sub/../../outside"])
def test_symlinks_that_lead_out(target: str, base: Path) -> None:
    write(base.parent / "outside", b"text")
    (base / "link").symlink_to(target)
    assert "leads out" in refusal(base / "link", base)


@pytest.mark.parametrize("linked", ["sub", "sub/file"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_symlink_at_any_level_is_followed_and_judged_by_where_it_leads(linked: str, inside: bool, base: Path) -> None:
    there = base.parent / "base" / "there" if inside else base.parent / "there"
    (base / linked).rename(there)
    (base / linked).symlink_to(there)
    if not inside:
        assert "leads out" in refusal(base / "sub" / "file", base)
        return
    assert trust.read(base / "sub" / "file", base) == "text"
    there.chmod(there.stat().st_mode | 0o002)
    assert "written to by others" in refusal(base / "sub" / "file", base)


def test_where_no_symlink_is_each_level_is_looked_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    look = os.lstat

    def counted(path: str) -> os.stat_result:
        seen.append(path)
        return look(path)

    monkeypatch.setattr(os, "lstat", counted)
    assert trust.read(base / "sub" / "file", base) == "text"
    assert seen == [str(base / "sub" / "file"), str(base / "sub"), str(base)]


def test_a_name_that_only_begins_like_the_base_is_outside(base: Path) -> None:
    near = base.with_name("base2")
    near.mkdir()
    assert "leads out" in refusal(write(near / "file", b""), base)


def test_dots_do_not_lead_out(base: Path) -> None:
    write(base.parent / "outside", b"text")
    assert "leads out" in refusal(base / ".." / "outside", base)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"x" * (trust.MAX_BYTES + 1), "larger than"), (b"ab\xff", "not UTF-8 at byte 2"), (b"\xed\xa0\x80", "not UTF-8")],
)
def test_refused_contents(content: bytes, why: str, base: Path) -> None:
    assert why in refusal(write(base / "file", content), base)


def test_the_largest_file(base: Path) -> None:
    assert len(trust.read(write(base / "file", b"x" * trust.MAX_BYTES), base)) == trust.MAX_BYTES


def test_a_fifo_is_refused_and_not_waited_for(base: Path) -> None:
    os.mkfifo(base / "fifo", 0o644)
    assert "regular" in refusal(base / "fifo", base)


def test_a_missing_file_is_not_a_matter_of_trust(base: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trust.read(base / "missing", base)
