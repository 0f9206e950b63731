"""What every error carries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core import errors
from kvmifup.core.errors import KernelError, KvmIfupError, NicError, ProgramError, as_ours
from kvmifup.core.text import shown

CLASSES = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, KvmIfupError) and cls is not KvmIfupError
]
SYSEXITS = {64, 65, 69, 70, 71, 75, 77, 78}


def made(cls: type[KvmIfupError]) -> KvmIfupError:
    if issubclass(cls, KernelError):
        return cls("cause", errno=5, hint="hint")
    return cls("cause") if issubclass(cls, ProgramError) else cls("cause", hint="hint")


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class(cls: type[KvmIfupError]) -> None:
    error = made(cls)
    assert error.code in SYSEXITS
    assert str(error) == "cause"
    assert error.hint == ("" if isinstance(error, ProgramError) else "hint")
    assert cls.__doc__


def test_codes_are_documented_at_the_command_line() -> None:
    from kvmifup.commands.arguments import EPILOG

    assert {cls.code for cls in CLASSES} == SYSEXITS
    assert all(f" {code} " in EPILOG for code in SYSEXITS | {0})


def test_the_closest_caller_names_the_place() -> None:
    error = NicError("cause")
    assert error.where == ""
    assert error.at("near") is error
    assert error.at("far").where == "near"
    assert NicError("cause", where="here").at("far").where == "here"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PermissionError(13, "Permission denied", "/run/x"), 77, "/run/x: Permission denied"),
        (OSError(28, "No space left on device", "/run/x"), 71, "/run/x: No space left on device"),
        (OSError(28, "No space left on device"), 71, "No space left on device"),
        (OSError("what a library says"), 71, "what a library says"),
        (ZeroDivisionError("division by zero"), 70, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_of_others_becomes_one_of_ours(error: Exception, code: int, text: str) -> None:
    found = as_ours(error)
    assert (found.code, str(found)) == (code, text)
    assert bool(found.hint) == (code != 71)


def test_an_error_of_ours_stays_as_it_is() -> None:
    error = NicError("cause")
    assert as_ours(error) is error


@given(st.text() | st.binary() | st.none() | st.integers())
def test_shown_is_short_and_printable(value: object) -> None:
    text = shown(value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 80


def test_shown_keeps_what_fits() -> None:
    assert shown("tap0") == "'tap0'"
    assert shown("x" * 78) == f"'{'x' * 78}'"
    assert shown("x" * 79).endswith("...'")
