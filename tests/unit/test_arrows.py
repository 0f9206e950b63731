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
    "tests": {"harness", "lab"},
}
FILES = [(package, path) for package in MAY for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda one: str(one).removeprefix(f"{ROOT}/"))
def test_a_package_imports_only_those_below_it(package: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or package] if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }  # fmt: skip
    assert found & MAY.keys() <= MAY[package] | {package} | ({"kvmifup"} if package != "kvmifup" else set())


@pytest.mark.parametrize("module", ["monitors", "oracle", "snapshots", "tools", "wire"])
def test_what_tests_judge_by_is_none_of_our_code(module: str) -> None:
    text = (ROOT / "harness" / f"{module}.py").read_text(encoding="utf-8")
    assert "import kvmifup" not in text
    assert "from kvmifup" not in text
