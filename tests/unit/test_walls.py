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

from kvmifup.core import errors
from kvmifup.core.ops import KINDS, Op
from kvmifup.node import nfmessages, nfnetlink, nft, remains

from .conftest import ROOT

PACKAGE = ROOT / "kvmifup"

# The rooms of kvmifup, and into which others each may look: arrows run one way, from the right to the left.
#
#     core  <-  phases, inputs  <-  node  <-  runs  <-  tell  <-  diagnosis  <-  commands  <-  client, agent
#
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "phases": {"core"},
    "inputs": {"core"},
    "node": {"core", "inputs"},
    "runs": {"core", "phases", "inputs", "node"},
    "tell": {"core", "inputs", "runs"},
    "diagnosis": {"core", "phases", "inputs", "node", "runs", "tell"},
    "commands": {"core", "inputs", "runs", "tell", "diagnosis"},
    "client": {"commands"},
    "agent": {"core", "phases", "inputs", "node", "runs", "tell", "commands", "client"},
}
# The only imports inside functions: what the agent has not done is done here, of all verbs only one is loaded, and few
# NICs have a filter, or a limit.
LATE = {
    "client": {"commands.main"},
    "commands.main": {"commands"},
    "node.kernel": {"node.filters"},
    "node.remains": {"node.nfmessages", "node.nfnetlink"},
    "node.view": {"node.limits", "node.sources"},
}
LINES, METHODS = 400, 20  # of a module and of a class, unless its first lines say why


def name_of(path: Path) -> str:
    """The module's name below kvmifup: "runs.up"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    name_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
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


def own(names: set[str]) -> set[str]:
    """The modules of kvmifup among *names*, by their names below it."""
    return {one.removeprefix("kvmifup.") for one in names} & MODULES.keys()


def importers(package: str) -> set[str]:
    """The modules of kvmifup that import *package* or something in it."""
    return {
        name for name, tree in MODULES.items() if any(f"{found}.".startswith(f"{package}.") for found in imports(tree))
    }


def modules_imported(name: str) -> set[str]:
    """The modules that *name* imports: without the names that it takes out of them, and the rooms that they are in."""
    found = imports(MODULES[name])
    rooms = {"kvmifup", *(f"kvmifup.{room}" for room in ROOMS)}
    return {one for one in found if not any(one.startswith(f"{other}.") for other in found - rooms)} - rooms


def upward(name: str, tree: ast.AST) -> set[str]:
    """What the module *name* imports out of rooms that it may not look into."""
    room = name.partition(".")[0]
    return {one for one in own(imports(tree)) if one.partition(".")[0] not in ROOMS[room] | {room}}


def late(tree: ast.AST) -> set[str]:
    """The modules of kvmifup that *tree* imports inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {one for function in functions for one in own(imports(function))}


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
    assert {"phases", "core.ops", "inputs.config", "node.kernel", "runs.apply", "commands.main"} <= MODULES.keys()
    assert {name.partition(".")[0] for name in MODULES} == ROOMS.keys()


# --- doors ----------------------------------------------------------------------------------------------


@every_module
def test_a_module_looks_only_into_rooms_that_it_may_look_into(name: str) -> None:
    assert not upward(name, MODULES[name])


@pytest.mark.parametrize(
    "planted",
    [
        "from kvmifup.agent import loop",
        "def f() -> None:\n    from kvmifup.commands.main import main",
        "if TYPE_CHECKING:\n    from kvmifup.runs.session import Session",
        "import kvmifup.tell.render",
    ],
)
def test_an_import_that_goes_up_is_found(planted: str) -> None:
    assert upward("node.kernel", ast.parse(planted))


def test_the_rooms_are_in_one_order() -> None:
    seen: set[str] = set()
    for room, below in ROOMS.items():
        assert below <= seen, room
        seen.add(room)


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name: own(imports(tree)) for name, tree in MODULES.items()}
    while left:
        free = {name for name, found in left.items() if not found & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: found for name, found in left.items() if name not in free}


@every_module
def test_imports_inside_functions_are_those_of_the_table(name: str) -> None:
    allowed = LATE.get(name, set())
    assert not {one for one in late(MODULES[name]) if not any(f"{one}.".startswith(f"{door}.") for door in allowed)}


# --- sizes ----------------------------------------------------------------------------------------------


def excused(tree: ast.Module | ast.ClassDef) -> bool:
    """Whether the first lines say why it is as large as it is."""
    return "Large because" in (ast.get_docstring(tree) or "")


@every_module
def test_no_module_is_too_large_to_be_read(name: str) -> None:
    path = PACKAGE / f"{name.replace('.', '/')}.py"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES or excused(MODULES[name]), lines


@every_module
def test_no_class_has_too_many_methods(name: str) -> None:
    for cls in (node for node in ast.walk(MODULES[name]) if isinstance(node, ast.ClassDef)):
        methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
        assert len(methods) <= METHODS or excused(cls), f"{cls.name}: {len(methods)}"


# --- who does what ----------------------------------------------------------------------------------------


def test_only_one_module_takes_pyroute2() -> None:
    assert importers("pyroute2") == {"node.pyroute"}


def test_only_one_module_takes_libnftables() -> None:
    assert importers("nftables") == {"node.nft"}


def test_only_the_kernel_is_asked_and_changed_by_netlink() -> None:
    asking = {name for name, tree in MODULES.items() if "Netlink" in words(tree)}
    assert asking
    assert all(name.startswith("node.") for name in asking)
    # What the agent is told unasked has the same layouts.
    outside = {name for name in importers("kvmifup.node.messages") if not name.startswith("node.")}
    assert outside == {"agent.events", "agent.rulesets"}
    assert {name for name in importers("kvmifup.node.nfmessages") if not name.startswith("node.")} == {"agent.rulesets"}


def test_what_every_hook_asks_of_nftables_has_the_numbers_of_all_else() -> None:
    """It writes them itself, since most hooks do without the module that has them."""
    assert remains.NETLINK_NETFILTER == nfmessages.NETLINK_NETFILTER
    assert nfnetlink.kind(nfmessages.NFT_MSG_GETTABLE) == remains.GETTABLE
    assert remains.LED.keys() == {nfmessages.NFPROTO_BRIDGE, nfmessages.NFPROTO_INET}
    assert remains.TABLE == nft.TABLE


def test_only_inputs_imports_a_toml_parser() -> None:
    assert importers("tomli") == {"inputs.toml"}
    assert importers("tomllib") == set()


def test_data_is_made_of_records() -> None:
    """A frozen dataclass takes longer to define (see core/records.py), and hooks wait for it."""
    frozen = {name for name, tree in MODULES.items() for node in ast.walk(tree) if getattr(node, "arg", "") == "frozen"}
    assert frozen == set()


def test_only_procfs_touches_proc_sys() -> None:
    touching = {name for name, tree in MODULES.items() if any("/proc/sys" in word for word in words(tree))}
    assert touching == {"node.procfs"}


PURE = {
    "phases": {
        "__future__",
        "collections.abc",
        "dataclasses",
        "ipaddress",
        "typing",
        "kvmifup.core.errors",
        "kvmifup.core.filters",
        "kvmifup.core.model",
        "kvmifup.core",
        "kvmifup.core.ops",
        "kvmifup.core.ovsport",
        "kvmifup.core.rates",
        "kvmifup.core.vlans",
    },
    "core.ops": {
        "__future__",
        "collections.abc",
        "dataclasses",
        "functools",
        "operator",
        "typing",
        "kvmifup.core.records",
        "kvmifup.core.text",
        "kvmifup.core.bridgeport",
        "kvmifup.core.vlans",
    },
    "core.model": {
        "__future__",
        "collections.abc",
        "dataclasses",
        "enum",
        "functools",
        "ipaddress",
        "kvmifup.core.ops",
        "kvmifup.core.rates",
        "kvmifup.core.records",
    },
    "core.records": {"__future__", "dataclasses", "operator", "typing"},
    "core.errors": {"__future__", "collections.abc", "errno", "typing"},
    "core.text": {"__future__", "collections.abc"},
    "core.filters": {"__future__", "collections.abc", "functools", "ipaddress", "kvmifup.core.records"},
    "core.rates": {"__future__", "collections.abc", "re"},
    "core.ovsport": {"__future__", "re", "kvmifup.core.records"},
    "core.bridgeport": {"__future__", "collections.abc"},
    "core.vlans": {"__future__", "collections.abc", "re"},
}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_that_could_do_anything(name: str) -> None:
    assert modules_imported(name) <= PURE[name]
    calls = {
        node.func.id for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert not calls & {"open", "print", "input", "breakpoint"}


def test_apply_knows_no_mode_and_no_phase() -> None:
    tree = MODULES["runs.apply"]
    known = {"core.errors", "core.ops", "core.records", "core.signals", "runs.draft", "runs.journal", "runs.store"}
    assert own(imports(tree)) <= known
    assert not [word for word in words(tree) if re.search("bridged|routed|openvswitch|phase", word, re.IGNORECASE)]


FORBIDDEN_IMPORTS = ("pickle", "marshal", "shelve", "importlib", "ctypes", "multiprocessing")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}


def test_only_programs_runs_programs() -> None:
    assert importers("subprocess") == {"node.programs"}


@every_module
def test_nothing_runs_what_it_was_given(name: str) -> None:
    tree = MODULES[name]
    # Metadata is only read.
    harmless = imports(tree) & {"importlib.metadata", "importlib.metadata.version"}
    if name == "agent.directories":  # two functions of the C library: what they get is from us
        harmless |= {"ctypes"}
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
        for node in MODULES["core.ops"].body
        if isinstance(node, ast.ClassDef) and "Op" in {getattr(base, "id", "") for base in node.bases}
    }


def test_every_op_is_in_kinds() -> None:
    assert {cls.__name__ for cls in KINDS.values()} == op_classes() == {cls.__name__ for cls in Op.__subclasses__()}
    assert all(cls.kind == kind for kind, cls in KINDS.items())


def matched(method: str) -> set[str]:
    """The classes that the match statement of *method* in node/kernel.py has a case for."""
    functions = [n for n in ast.walk(MODULES["node.kernel"]) if isinstance(n, ast.FunctionDef) and n.name == method]
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
    allowed = ours | {"Untrusted", "NotText", "NotUs", "Told", "ValueError", "AssertionError", "ExceptionGroup"}
    raised = [node.exc for node in ast.walk(MODULES[name]) if isinstance(node, ast.Raise)]
    named = {exc.func.id for exc in raised if isinstance(exc, ast.Call) and isinstance(exc.func, ast.Name)}
    # Helpers that return the error to raise have names in lower case.
    assert {one for one in named if one[0].isupper()} <= allowed


# --- what is loaded -----------------------------------------------------------------------------------


def test_importing_everything_leaves_pyroute2_and_libnftables_alone() -> None:
    """The one takes longer than all that a hook does; the other need not be installed."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + "".join(f"import kvmifup.{name}\n" for name in MODULES)
        + "print(*sorted({'pyroute2', 'nftables', 'kvmifup.commands.main'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["kvmifup.commands.main"]


def test_the_scripts_are_alike_but_for_their_name() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in Path(ROOT / "scripts").iterdir()}
    hooks = {name: text for name, text in scripts.items() if "client.script" in text}
    assert hooks.keys() >= {"kvm-ifup", "kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"}
    assert all(f'client.script("{name}")' in text for name, text in hooks.items())
