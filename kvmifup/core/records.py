"""Records: dataclasses that nobody changes, and that take little time to define.

A hook that no agent runs defines some sixty of them before it begins, while its guest waits. `dataclass(frozen=True)`
writes and compiles six functions for each of them. A record has one such function, `__init__`; those that compare and
print it are here, once for all. That nobody changes a record is for mypy to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: Class) -> Class:
    """A class decorator: a dataclass whose instances are equal if their classes and their fields are."""
    made: Any = dataclass(eq=False, repr=False)(cls)
    made.__fields__ = tuple([one.name for one in fields(made)])
    made.__values__ = attrgetter("__class__", *made.__fields__)
    made.__eq__, made.__hash__, made.__repr__ = equal, hashed, printed
    return cls


def field_names(data: Any) -> tuple[str, ...]:
    """The names of the fields of a record; `dataclasses.fields` would take longer."""
    names: tuple[str, ...] = data.__fields__
    return names


def equal(one: Any, other: object) -> Any:
    """`__eq__` of all records."""
    values = one.__values__
    return values(one) == values(other) if one.__class__ is other.__class__ else NotImplemented


def hashed(one: Any) -> int:
    """`__hash__` of all records."""
    return hash(one.__values__(one))


def printed(one: Any) -> str:
    """`__repr__` of all records."""
    return f"{type(one).__name__}({', '.join(f'{name}={getattr(one, name)!r}' for name in field_names(one))})"
