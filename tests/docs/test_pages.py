"""The pages say what the code does: every option, code, key and name, and none that does not exist."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kvmifup.commands.check import WRONG
from kvmifup.commands.objects import nic_object
from kvmifup.core import errors, model
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import State
from kvmifup.inputs import config, environment, nicfiles
from tests.docs import pages
from tests.docs.machine import CLEAN, TOOLS, require
from tests.docs.pages import COMMANDS, MAN, PAGES, ROOT, readme, section

HOOKS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown")
SECTIONS = {
    "8": ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"],
    "7": ["NAME", "DESCRIPTION", "THE PHASES", "WHO CALLS", "WHERE TO READ ON", "FILES", "SEE ALSO"],
    "5": ["NAME", "DESCRIPTION", "KEYS", "FILES", "EXAMPLES", "SEE ALSO"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built."""
    require(TOOLS)
    out = tmp_path_factory.mktemp("man")
    subprocess.run([MAN / "build", out], env=CLEAN, check=True)
    return out


def shown(path: Path) -> str:
    """A built page as a person reads it on a wide terminal."""
    done = subprocess.run(
        ["man", "--warnings", "-Tutf8", "-l", path],
        env={**CLEAN, "MANWIDTH": "200", "MAN_KEEP_FORMATTING": "", "GROFF_NO_SGR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return re.sub(".\b", "", done.stdout)


# --- as pages --------------------------------------------------------------------------------------------


def test_there_is_a_page_for_every_command() -> None:
    scripts = {path.name for path in (ROOT / "scripts").iterdir()}
    assert scripts == set(COMMANDS)
    assert set(PAGES) == {f"{name}.8" for name in scripts} | {"kvm-ifup.7", "kvm-ifup.toml.5", "kvm-ifup-nic.5"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_good_roff(name: str, built: Path) -> None:
    page = built / name
    assert shown(page)
    assert page.read_text().startswith("'\\\" t\n")  # lintian's man does not run tbl by itself
    lint = subprocess.run(["mandoc", "-T", "lint", "-W", "error", page], env=CLEAN, capture_output=True, text=True)
    assert (lint.returncode, lint.stdout) == (0, "")
    whatis = subprocess.run(["lexgrog", page], env=CLEAN, capture_output=True, text=True)
    assert f'"{Path(name).stem} - ' in whatis.stdout


@pytest.mark.parametrize("name", PAGES)
def test_an_example_is_shown_as_it_is_to_be_typed(name: str, built: Path) -> None:
    lines = {line.strip() for line in shown(built / name).splitlines()}
    typed = [line for blocks in pages.examples(name).values() for block in blocks for line in block.splitlines()]
    assert [line for line in typed if line.strip() not in lines] == []


def test_the_same_sources_make_the_same_pages(built: Path, tmp_path: Path) -> None:
    subprocess.run([MAN / "build", tmp_path], env={**CLEAN, "TZ": "Asia/Tokyo", "LC_ALL": "C"}, check=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in built.iterdir()}


def test_the_date_is_the_packagers(tmp_path: Path) -> None:
    subprocess.run([MAN / "build", tmp_path], env={**CLEAN, "SOURCE_DATE_EPOCH": "86400"}, check=True)
    assert '"1970-01-02"' in (tmp_path / "kvm-ifup.8").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_its_sections_and_leads_on(name: str) -> None:
    stem, _, number = name.rpartition(".")
    titles = [one.title for one in pages.Section(name, pages.source(name)).sections("#")]
    expected = SECTIONS[number]
    assert [title for title in titles if title in expected] == expected
    others = re.findall(r"\*(\S+)\*\((\d)\)", section(name, "SEE ALSO").text)
    assert {f"{other}.{n}" for other, n in others} == set(PAGES) - {name}
    # A reference from the text leads somewhere, too. Pages of other programs are theirs.
    named = re.findall(r"\*(kvm-\S+?)\*\((\d)\)", pages.source(name))
    assert {f"{other}.{n}" for other, n in named} <= set(PAGES)
    assert pages.source(name).startswith(f'{stem}({number}) "kvm-ifup @VERSION@" ')


# --- as documentation of the commands --------------------------------------------------------------------


def help_of(command: str, *subcommand: str) -> str:
    """What --help says."""
    # A narrow terminal would break the lines that are looked for.
    environ = {**CLEAN, "COLUMNS": "200"}
    argv = [sys.executable, str(ROOT / "scripts" / command), *subcommand, "--help"]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=True).stdout


@cache
def subcommands(*above: str) -> tuple[str, ...]:
    """All that `kvm-ifup` can be told to do, as --help lists it: "show", ..., "nic put", ..."""
    listed = re.findall(r"^    ([a-z]+) ", help_of("kvm-ifup", *above), re.MULTILINE)
    found: list[str] = []
    for name in listed:
        below = subcommands(*above, name)
        found += [f"{name} {one}" for one in below] or [name]
    return tuple(found)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_help(command: str) -> None:
    helps = [help_of(command), *(help_of(command, *path.split()) for path in subcommands() if command == "kvm-ifup")]
    offered = {one for text in helps for one in re.findall(r"^  (-.*?)(?:  .*)?$", text, re.MULTILINE)}
    offered |= set(re.findall(r"^  (TAP)\b", helps[0], re.MULTILINE))
    assert sorted(section(f"{command}.8", "OPTIONS").entries) == sorted(offered)


def test_the_subcommands_are_those_of_help() -> None:
    assert tuple(section("kvm-ifup.8", "SUBCOMMANDS").entries) == subcommands()
    synopsis = re.sub(r"[*_]|\+\+", "", section("kvm-ifup.8", "SYNOPSIS").text)
    for path in subcommands():
        assert f"\nkvm-ifup {path}" in f"\n{synopsis}"


def test_every_error_is_explained() -> None:
    entries = re.findall(r"^\*(\w+)\* \((\d+)\)\n((?:\t.*\n)+)", section("kvm-ifup.8", "ERRORS").text, re.MULTILINE)
    kinds, tree = [errors.KvmIfupError], dict[str, int]()
    while kinds:
        kinds += kinds.pop().__subclasses__()
        tree |= {kind.__name__: kind.code for kind in kinds}
    assert {name: int(code) for name, code, _ in entries} == tree
    assert [name for name, _, text in entries if " Remedy: " not in " ".join(text.split())] == []


def test_every_key_of_the_json_is_explained() -> None:
    entries = section("kvm-ifup.8", "JSON").entries
    documented = [name for entry in entries for name in entry.split(", ")]
    nic = Known("tap0", None)
    assert documented == list(nic_object(nic, "none", State(None)))


def codes() -> set[int]:
    """Every code that a command can exit with."""
    found, kinds = {0}, [errors.KvmIfupError]
    while kinds:
        kind = kinds.pop()
        found.add(kind.code)
        kinds += kind.__subclasses__()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_exit_codes_are_those_of_the_errors(command: str) -> None:
    listed = re.findall(r"^\|  (\d+)$", section(f"{command}.8", "EXIT STATUS").text, re.MULTILINE)
    assert [int(code) for code in listed] == sorted(codes())
    check = {WRONG} if command == "kvm-ifup" else set[int]()
    said = re.findall(r"\b\d\d?\b", help_of(command).split("exit codes:")[1])
    assert {int(code) for code in said} == codes() | check


def test_the_readme_lists_the_same_exit_codes() -> None:
    listed = re.findall(r"^\| (\d+) \|", readme("When something is wrong").text, re.MULTILINE)
    assert [int(code) for code in listed] == sorted(codes())


@pytest.mark.parametrize("page", ["man/parts/exit.scd", "docs/qemu.md"])
def test_qemus_number_stands_beside_each_code(page: str) -> None:
    """It is what waitpid returns: 256 times the code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| +(\d+)(?: \||\n:) +(\d+)\b", text, re.MULTILINE)
    assert {int(code): int(said) for code, said in rows} == {code: 256 * code for code in codes() if code}


def test_qemus_script_is_pre_on_every_page() -> None:
    printed = [*(ROOT / "docs").glob("*.md"), *MAN.rglob("*.scd"), *ROOT.glob("*.md"), *ROOT.glob("integration/*/*.md")]
    named = [
        one for page in printed for one in re.findall(r"(?<!down)script=(\S+?/kvm-if[a-z-]+)", page.read_text("utf-8"))
    ]
    assert named
    assert [one for one in named if not one.endswith("/kvm-ifup-pre")] == []


@pytest.mark.parametrize("command", HOOKS)
def test_every_mode_is_explained(command: str) -> None:
    if command != "kvm-ifdown":
        assert section(f"{command}.8", "MODES").entries == list(model.MODES)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_code_that_the_text_names_exists(command: str) -> None:
    assert {int(code) for code in re.findall(r"\bcode (\d+)", pages.source(f"{command}.8"))} <= codes()


# --- the map of the code ---------------------------------------------------------------------------------


def test_every_module_is_on_the_map() -> None:
    text = (ROOT / "docs/code.md").read_text(encoding="utf-8")
    listed = set[str]()
    for row in re.findall(r"^\| (`.+?`) \| .+ \|$", text, re.MULTILINE):
        # "`commands/show`, `plan`": the room is said once.
        first, *more = re.findall(r"`([\w/]+)`", row)
        listed |= {first, *(one if "/" in one else f"{first.partition('/')[0]}/{one}" for one in more)}
    package = ROOT / "kvmifup"
    modules = {str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py")}
    assert {one for one in listed if "/" in one or one in modules} == {
        one for one in modules if not one.endswith("__init__")
    }


# --- as documentation of the files -----------------------------------------------------------------------


def settings() -> dict[str, object]:
    """Every key of the configuration, with its default; a key of [ext.NAME] has none. [link.NAME] has its defaults."""
    found: dict[str, object] = {}
    for outer in dataclasses.fields(model.Config):
        value = getattr(model.Config(), outer.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{outer.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        else:
            found[outer.name] = value
    del found["ext.networks"], found["link"]  # the sections [ext.NAME] and [link.NAME]
    found |= {f"ext.NAME.{inner.name}": None for inner in dataclasses.fields(model.ExtNetwork)}
    return found | {f"link.NAME.{inner.name}": inner.default for inner in dataclasses.fields(model.LinkConfig)}


def documented_settings() -> dict[str, str]:
    """Every key that kvm-ifup.toml(5) explains, with what it says of it."""
    found: dict[str, str] = {}
    keys = section("kvm-ifup.toml.5", "KEYS")
    top = pages.Section("", keys.text.split("\n## ", 1)[0])
    for part in (top, *keys.sections()):
        prefix = f"{part.title.strip('[]')}." if part.title else ""
        for entry, text in re.findall(r"^\*(\w+)\* = .*\n((?:\t.*\n)+)", part.text, re.MULTILINE):
            found[prefix + entry] = " ".join(text.split())
    return found


def test_every_setting_is_explained_with_its_default() -> None:
    documented = documented_settings()
    assert set(documented) == set(settings())
    for key, default in settings().items():
        if isinstance(default, float | int | str):
            said = f'"{default}"' if isinstance(default, str) else str(default)
            if isinstance(default, bool):
                said = said.lower()
            assert documented[key].endswith(f"Default: {said}"), key


def test_every_setting_that_is_checked_is_explained() -> None:
    plain = {key.rpartition(".")[2] for key in documented_settings() if not key.startswith("ext.NAME.")}
    assert {key for _, key in config.CHECKS} == plain
    (mode,) = [
        e for part in section("kvm-ifup.toml.5", "KEYS").sections() for e in part.entries if e.startswith("mode")
    ]
    assert tuple(re.findall(r'"(\w+)"', mode)) == config.EXT_MODES


def test_the_shipped_configuration_has_the_same_settings() -> None:
    found, prefix = set[str](), ""
    for line in (ROOT / "etc/config.toml").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"#?\[(.+)\]", line):
            prefix = f"{heading[1]}."
        elif key := re.match(r"#(\w+) = ", line):
            found.add(prefix + key[1])
    assert found == set(documented_settings())


def test_every_key_of_a_nic_file_is_explained() -> None:
    keys = section("kvm-ifup-nic.5", "KEYS")
    assert tuple(entry.split(" = ")[0] for entry in keys.entries) == nicfiles.KEYS
    modes = next(entry for entry in keys.entries if entry.startswith("mode = "))
    assert re.findall(r'"(\w+)"', modes) == list(model.MODES)
    for key in ("tap", "mac", "mode"):
        assert re.search(rf"^\*{key}\* = .*\n(\t.*\n)*?\t.*\bRequired\.", keys.text, re.MULTILINE), key


def test_every_name_in_the_environment_is_explained() -> None:
    text = (ROOT / "kvmifup/inputs/environment.py").read_text(encoding="utf-8")
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', text))
    listed = {name for entry in section("kvm-ifup-nic.5", "ENVIRONMENT").entries for name in entry.split(", ")}
    assert listed == read | set(environment.FURTHER)
