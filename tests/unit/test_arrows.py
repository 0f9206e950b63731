"""Who may import whom at the top level: what is measured and shown does not hang on the tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .conftest import ROOT

# Besides itself and kvmifup, which imports none of them.
MAY: dict[str, set[str]] = {
    "kvmifup": set(),
    "harness": set(),
    "lab": {"harness"},
    "bench": {"harness", "lab"},
    "tests": {"bench", "harness", "lab"},
}
FILES = [(package, path) for package in MAY for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever the statement is."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda one: str(one).removeprefix(f"{ROOT}/"))
def test_a_package_imports_only_those_below_it(package: str, path: Path) -> None:
    assert imported(path) & MAY.keys() <= MAY[package] | {package, "kvmifup"}


@pytest.mark.parametrize("module", ["monitors", "oracle", "snapshots", "tools", "wire"])
def test_what_tests_judge_by_is_none_of_our_code(module: str) -> None:
    assert "kvmifup" not in imported(ROOT / "harness" / f"{module}.py")
