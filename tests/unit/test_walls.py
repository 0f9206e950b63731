"""The walls between the modules, as their syntax trees show them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvmifup import errors
from kvmifup.ops import KINDS, Op

from .conftest import ROOT

PACKAGE = ROOT / "kvmifup"
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}
every_module = pytest.mark.parametrize("name", MODULES)


@cache
def imports(tree: ast.AST) -> set[str]:
    """Every module that *tree* imports, wherever the statement is; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, or these tests would not see them"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(package: str) -> set[str]:
    """The modules of kvmifup that import *package* or something in it."""
    return {
        name for name, tree in MODULES.items() if any(f"{found}.".startswith(f"{package}.") for found in imports(tree))
    }


def modules_imported(name: str) -> set[str]:
    """The modules that *name* imports: without the names that it takes out of them."""
    found = imports(MODULES[name])
    return {one for one in found if not any(one.startswith(f"{other}.") for other in found - {"kvmifup"})} - {"kvmifup"}


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the nodes that are docstrings: they may mention anything."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def words(tree: ast.AST) -> Iterator[str]:
    """Every name, attribute and string constant, docstrings left out."""
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value
        for field in ("id", "attr", "name", "arg", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


def test_there_are_modules_to_look_at() -> None:
    assert {"kernel", "phases", "apply", "ops", "model", "inputs", "config", "errors", "run", "cli"} <= MODULES.keys()


def test_only_kernel_imports_pyroute2() -> None:
    assert importers("pyroute2") == {"kernel"}


def test_only_kernel_asks_and_changes_the_kernel_by_netlink() -> None:
    assert {name for name, tree in MODULES.items() if "Netlink" in words(tree)} == {"netlink", "kernel"}
    # What it is told unasked has the same layouts.
    assert importers("kvmifup.netlink") == {"kernel", "events"}


def test_only_config_and_inputs_import_a_toml_parser() -> None:
    assert importers("tomli") == {"config", "inputs"}
    assert importers("tomllib") == set()


def test_only_kernel_touches_proc_sys() -> None:
    assert {name for name, tree in MODULES.items() if any("/proc/sys" in word for word in words(tree))} == {"kernel"}


PURE = {
    "phases": {"__future__", "collections.abc", "typing", "kvmifup.errors", "kvmifup.model", "kvmifup.ops"},
    "ops": {"__future__", "dataclasses", "functools", "typing"},
    "model": {"__future__", "dataclasses", "enum", "ipaddress", "kvmifup.ops"},
    "errors": {"__future__", "typing"},
}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_that_could_do_anything(name: str) -> None:
    assert modules_imported(name) <= PURE[name]
    calls = {
        node.func.id for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert not calls & {"open", "print", "input", "breakpoint"}


def test_apply_knows_no_mode_and_no_phase() -> None:
    tree = MODULES["apply"]
    assert not imports(tree) & {"kvmifup.phases", "kvmifup.model", "kvmifup.run", "kvmifup.kernel"}
    assert not [word for word in words(tree) if re.search("bridged|routed|openvswitch|phase", word, re.IGNORECASE)]


FORBIDDEN_IMPORTS = ("pickle", "marshal", "shelve", "importlib", "ctypes", "multiprocessing")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}


def test_only_programs_runs_programs() -> None:
    assert importers("subprocess") == {"programs"}


@every_module
def test_nothing_runs_what_it_was_given(name: str) -> None:
    tree = MODULES[name]
    # Metadata is only read.
    harmless = imports(tree) & {"importlib.metadata", "importlib.metadata.version"}
    assert not [package for package in FORBIDDEN_IMPORTS if name in importers(package) and not harmless]
    called = {
        getattr(node.func, "id", getattr(node.func, "attr", ""))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    # re.compile is not the builtin.
    assert not (called - ({"compile"} if "re" in imports(tree) else set())) & FORBIDDEN_CALLS
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "shell"]


@every_module
def test_no_bare_except(name: str) -> None:
    handlers = [node for node in ast.walk(MODULES[name]) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None]


@every_module
def test_the_first_line_says_what_the_module_is_for(name: str) -> None:
    lines = (ast.get_docstring(MODULES[name]) or "").splitlines() or [""]
    assert lines[0].endswith((".", "?")), "one whole sentence"
    assert lines[1:2] in ([], [""]), "on a line of its own"


# --- ops ----------------------------------------------------------------------------------------------


def op_classes() -> set[str]:
    """Every subclass of Op that ops.py defines."""
    return {
        node.name
        for node in MODULES["ops"].body
        if isinstance(node, ast.ClassDef) and "Op" in {getattr(base, "id", "") for base in node.bases}
    }


def test_every_op_is_in_kinds() -> None:
    assert {cls.__name__ for cls in KINDS.values()} == op_classes() == {cls.__name__ for cls in Op.__subclasses__()}
    assert all(cls.kind == kind for kind, cls in KINDS.items())


def matched(method: str) -> set[str]:
    """The classes that the match statement of *method* in kernel.py has a case for."""
    functions = [n for n in ast.walk(MODULES["kernel"]) if isinstance(n, ast.FunctionDef) and n.name == method]
    assert len(functions) == 1
    return {
        node.cls.id for node in ast.walk(functions[0]) if isinstance(node, ast.MatchClass) and hasattr(node.cls, "id")
    }


def test_the_kernel_handles_every_op() -> None:
    # `apply.survey` never reads an op that depends on what the others changed.
    assert matched("read") == {cls.__name__ for cls in KINDS.values() if not cls.after_change}
    assert matched("_write") == {cls.__name__ for cls in KINDS.values()}


# --- errors -------------------------------------------------------------------------------------------

TREE_LINE = re.compile(
    r"^ {4}(?P<lead>[│ ]*)(?:├── |└── )?(?P<name>[A-Z]\w+)(?: +(?P<code>\d+) {2}\S.*)?$", re.MULTILINE
)


def test_the_tree_of_errors_in_the_docstring_is_the_real_one() -> None:
    lines = TREE_LINE.findall(errors.__doc__ or "")
    drawn = {name: int(code) for _lead, name, code in lines if code}
    classes = {
        name: cls
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.KvmIfupError)
    }
    assert drawn == {name: cls.code for name, cls in classes.items() if cls is not errors.KvmIfupError}
    parent = "KvmIfupError"
    for lead, name, code in lines:
        if code:
            assert classes[name].__mro__[1] is classes[parent if lead else "KvmIfupError"], name
            parent = parent if lead else name


@every_module
def test_every_error_raised_on_purpose_is_one_of_ours(name: str) -> None:
    ours = {cls for cls in vars(errors) if cls[0].isupper()}
    # ValueError: what `journal.decode` documents; AssertionError: a contract between modules was broken.
    allowed = ours | {"Untrusted", "NotUs", "Told", "ValueError", "AssertionError"}
    raised = [node.exc for node in ast.walk(MODULES[name]) if isinstance(node, ast.Raise)]
    named = {exc.func.id for exc in raised if isinstance(exc, ast.Call) and isinstance(exc.func, ast.Name)}
    # Helpers that return the error to raise have names in lower case.
    assert {one for one in named if one[0].isupper()} <= allowed


# --- what is loaded -----------------------------------------------------------------------------------


def test_importing_everything_else_leaves_pyroute2_alone() -> None:
    agent = ("kernel", "runner", "departure", "restore", "agent", "daemon")
    names = [f"kvmifup.{name}" for name in MODULES if name not in (*agent, "__init__")]
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + "".join(f"import {name}\n" for name in names)
        + "print(*sorted({'pyroute2', 'kvmifup.kernel', 'kvmifup.cli'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["kvmifup.cli"]


def test_the_scripts_are_alike_but_for_their_name() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in Path(ROOT / "scripts").iterdir()}
    hooks = {name: text for name, text in scripts.items() if "client.script" in text}
    assert hooks.keys() >= {"kvm-ifup", "kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"}
    assert all(f'client.script("{name}")' in text for name, text in hooks.items())
