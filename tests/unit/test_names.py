"""The names of tests, as a person reads them in a line of a terminal."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .conftest import ROOT

COLUMN = 80
FILES = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_the_name_of_each_test_ends_before_column_80(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [one.name for one in tests if one.col_offset + len(f"def {one.name}") >= COLUMN] == []
