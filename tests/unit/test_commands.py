"""The commands as functions: any arguments, any environment, and a documented exit code."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup import __version__
from kvmifup.commands import arguments, call, main, options, request
from kvmifup.commands.call import need_capability, need_privileges
from kvmifup.core.errors import KernelError
from kvmifup.core.ops import Op
from kvmifup.inputs import config, ganeti

from .conftest import ROOT
from .nodes import FakeKernel
from .samples import MAC
from .test_inputs import ENVIRONMENT, contents, nic_toml, put, variables

pytestmark = pytest.mark.usefixtures("quick_disk")

HOOKS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown")
PROGRAMS = (*HOOKS, "kvm-ifup")
every_program = pytest.mark.parametrize("program", PROGRAMS)
every_hook = pytest.mark.parametrize("program", HOOKS)
NEED_PRIVILEGES = need_privileges
DOCUMENTED = {0, 64, 65, 69, 70, 71, 75, 77, 78}


class Ran:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Shell:
    """Runs commands on a node in memory, with empty directories of their own."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.kernel = FakeKernel("tap0", "tap1")
        self.later: list[Any] = []

    def __call__(self, program: str, *argv: str, environ: Mapping[str, str] | None = None) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        arguments = ["--run-dir", str(self.run_dir), *argv]
        code = main.main(program, arguments, environ or {}, out, err, lambda *args: self.later.append(args))
        return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def module_shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kvmifup.runs.session.Kernel", "kvmifup.diagnosis.state.Overview"):
            patch.setattr(name, lambda: shell.kernel)
        patch.setattr(config, "DIRECTORY", tmp_path_factory.mktemp("etc"))
        patch.setattr(ganeti, "DIRECTORY", tmp_path_factory.mktemp("ganeti"))
        patch.setattr(call, "need_privileges", lambda: None)
        yield shell


@pytest.fixture
def shell(module_shell: Shell, tmp_path: Path) -> Shell:
    module_shell.__init__(tmp_path)  # type: ignore[misc]
    return module_shell


# --- nothing ever escapes -----------------------------------------------------------------------------

words = st.text(max_size=8) | st.sampled_from(
    [
        "tap0",
        "b'tap0'",
        "--instance",
        "web1",
        "--json",
        "-v",
        "--announce",
        "--",
        "-",
        "--version",
        "--help",
        "gc",
        "show",
        "plan",
        "post",
        "check",
        "--node",
        "--repair",
        "nic",
        "list",
        "put",
        "0",
        "--pl",
        "\udcff",
        "--config",
        "/dev/null",
        "gnt.com.0",
        "é" * 130,
    ]
)


@every_program
@given(argv=st.lists(words, max_size=5), environ=st.dictionaries(variables, contents))
def test_any_arguments_in_any_environment(
    module_shell: Shell, program: str, argv: list[str], environ: dict[str, str]
) -> None:
    # Nothing that `kvm-ifup` may be told to repair is there.
    ran = module_shell(program, *(() if program == "kvm-ifup" else ("--plan",)), *argv, environ=environ)
    assert ran.code in DOCUMENTED - {70, 71, 75, 77} or "\0" in "".join(argv) or (ran.code == 1 and "check" in argv)
    assert len(ran.err.splitlines()) == (ran.code > 1 or "nobody knows it" in ran.err) or "-v" in argv
    assert module_shell.kernel.writes == []


@every_hook
@given(changes=st.dictionaries(variables, contents))
def test_almost_ganetis_environment(module_shell: Shell, program: str, changes: dict[str, str]) -> None:
    ran = module_shell(program, "--plan", environ=ENVIRONMENT | changes)
    assert ran.code in {0, 64, 65, 69}
    assert bool(ran.err) == bool(ran.code)


def test_the_unforeseen_is_a_bug_with_a_trace_on_request(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell.kernel, "facts", lambda *_: 1 // 0)
    quiet = shell("kvm-ifup-pre", environ=ENVIRONMENT)
    assert quiet.code == 70
    assert quiet.err.startswith("kvm-ifup-pre: unexpected ZeroDivisionError")
    assert len(quiet.err.splitlines()) == 1
    loud = shell("kvm-ifup-pre", environ=ENVIRONMENT | {"KVM_IFUP_DEBUG": "1"})
    assert loud.code == 70
    assert "Traceback" in loud.err


# --- the command line ---------------------------------------------------------------------------------


@every_program
def test_help_and_version(program: str, shell: Shell) -> None:
    ran = shell(program, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert program in ran.out
    assert "exit codes" in ran.out
    ran = shell(program, "--version")
    assert (ran.code, ran.out, ran.err) == (0, f"{program} {__version__}\n", "")


@pytest.mark.parametrize(
    "words", ["show", "plan", "check", "gc", "expect", "watch", "nic", "nic put", "nic list", "nic rm", "nic rm web1"]
)
def test_help_and_version_behind_each_subcommand(words: str, shell: Shell) -> None:
    path = put(shell.run_dir, "web1/0.toml", nic_toml())
    for flag in ("--help", "-h"):
        ran = shell("kvm-ifup", *words.split(), flag)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"usage: kvm-ifup {words.removesuffix(' web1')} [-h]")
    ran = shell("kvm-ifup", *words.split(), "--version")
    assert (ran.code, ran.out, ran.err) == (0, f"kvm-ifup {__version__}\n", "")
    assert path.exists()


@pytest.mark.parametrize("word", ["help", "version"])
def test_an_option_without_its_dashes_is_known(word: str, shell: Shell) -> None:
    ran = shell("kvm-ifup", word)
    assert (ran.code, ran.out) == (64, "")
    assert f"(`kvm-ifup --{word}`)" in ran.err


@pytest.mark.parametrize(
    ("program", "argv", "environ"),
    [
        ("kvm-ifup-pre", [], {}),
        ("kvm-ifdown", [], {}),
        ("kvm-ifup-pre", ["tap0", "tap1"], {}),
        ("kvm-ifup-pre", ["--nonsense"], {}),
        ("kvm-ifup-pre", ["--pla", "tap0"], {}),
        ("kvm-ifup-pre", ["--instance"], {}),
        ("kvm-ifdown", ["--announce", "tap0"], {}),
        ("kvm-ifup-pre", ["tap0", "--instance", "web1"], {}),
        ("kvm-ifup-pre", ["--instance", "web1"], ENVIRONMENT),
        ("kvm-ifup-pre", ["tap1"], ENVIRONMENT),
        ("kvm-ifup-post", ["--plan"], ENVIRONMENT | {"MIGRATION_PHASE": "pre"}),
        ("kvm-ifup", [], {}),
        ("kvm-ifup", ["nonsense"], {}),
    ],
)
def test_usage(program: str, argv: Sequence[str], environ: dict[str, str], shell: Shell) -> None:
    ran = shell(program, *argv, environ=environ)
    assert (ran.code, ran.out) == (64, "")
    assert ran.err.startswith(f"{program}: ")
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "environ", "code"),
    [
        (["--plan", "a/b"], {}, 65),
        (["--plan", "tap0"], {}, 65),  # nothing describes it
        (["--instance", "web1"], {}, 65),
        (["--plan", "--instance", "../x"], {}, 65),
        ([], ENVIRONMENT | {"MAC": ""}, 65),
        ([], ENVIRONMENT | {"INTERFACE": "tap7"}, 69),
        ([], ENVIRONMENT | {"LINK": "nosuchtable"}, 69),
        (["--config", "/nonexistent.toml"], ENVIRONMENT, 78),
        # The NIC is looked at first: without it nothing else matters.
        (["--config", "/nonexistent.toml"], ENVIRONMENT | {"MAC": ""}, 65),
    ],
)
def test_refusals(argv: Sequence[str], environ: dict[str, str], code: int, shell: Shell) -> None:
    ran = shell("kvm-ifup-post", *argv, environ=environ)
    assert (ran.code, ran.out) == (code, "")
    assert len(ran.err.splitlines()) == 1
    assert shell.kernel.writes == []


def test_an_error_as_json(shell: Shell) -> None:
    ran = shell("kvm-ifup-post", "--json", "a/b")
    assert json.loads(ran.out)["code"] == ran.code == 65
    assert len(ran.err.splitlines()) == 1


@every_hook
@pytest.mark.parametrize(("uid", "effective"), [(1000, -1), (1000, 0), (0, 0), (0, ~(1 << 12))])
def test_who_may_not(program: str, uid: int, effective: int, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a user, nor a root without CAP_NET_ADMIN (12), whatever else either has."""
    privileges(uid, effective, monkeypatch)
    ran = shell(program, environ=ENVIRONMENT)
    assert (ran.code, shell.kernel.writes) == (77, [])
    assert len(ran.err.splitlines()) == 1
    assert shell(program, "--plan", environ=ENVIRONMENT).code == 0


def test_who_may(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    privileges(0, 1 << 12, monkeypatch)
    assert shell("kvm-ifup-post", environ=ENVIRONMENT).code == 0


def privileges(uid: int, effective: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what *uid* has with the capabilities *effective*."""
    status = f"Name:\tx\nCapPrm:\t{2**41 - 1:016x}\nCapEff:\t{effective & 2**41 - 1:016x}\n"
    monkeypatch.setattr(call, "need_privileges", NEED_PRIVILEGES)
    need_capability.cache_clear()
    monkeypatch.setattr("kvmifup.commands.call.os", types.SimpleNamespace(geteuid=lambda: uid))
    monkeypatch.setattr(call, "open", lambda *_args, **_options: io.StringIO(status), raising=False)


@pytest.mark.parametrize("argv", [["gnt.com.0"], []])
@every_hook
def test_ganetis_own_taps_are_left_alone(program: str, argv: Sequence[str], shell: Shell) -> None:
    ran = shell(program, *argv, environ={"INTERFACE": "gnt.com.0"})
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert shell.kernel.reads == []


# --- what is done -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["tap0"], ["b'tap0'"]])
def test_a_whole_life_in_silence(argv: Sequence[str], shell: Shell) -> None:
    for program, more in (
        ("kvm-ifup-pre", {"MIGRATION_PHASE": "pre"}),
        ("kvm-ifup-post", {"MIGRATION_PHASE": "post"}),
        ("kvm-ifdown", {"ACTION": "down"}),
        ("kvm-ifdown", {"ACTION": "down"}),
    ):
        ran = shell(program, *argv, environ=ENVIRONMENT | more)
        assert (ran.code, ran.out, ran.err) == (0, "", ""), program
    assert shell.kernel.writes
    assert shell.kernel.values == {}


def test_later_rounds_go_out_only_while_the_guest_is_here(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmifup.runs.store.devices.index_of", lambda name: shell.kernel.indexes.get(name))
    shell("kvm-ifup-pre", environ=ENVIRONMENT | {"MIGRATION_PHASE": "pre"})
    shell("kvm-ifup-post", "--plan", environ=ENVIRONMENT)
    assert shell.later == []
    shell("kvm-ifup-post", environ=ENVIRONMENT)
    ((messages, still_true),) = shell.later
    assert messages == (("eth0", "192.0.2.8", "192.0.2.8"),)
    assert still_true()
    shell("kvm-ifup-post", environ=ENVIRONMENT)
    assert len(shell.later) == 1, "nothing had changed"
    shell("kvm-ifup-post", "--announce", environ=ENVIRONMENT)
    assert len(shell.later) == 2
    shell("kvm-ifdown", environ=ENVIRONMENT)
    assert not still_true()


def test_the_plan_is_what_is_done(shell: Shell) -> None:
    plan = shell("kvm-ifup-post", "--plan", "-v", environ=ENVIRONMENT)
    assert plan.code == 0
    assert shell.kernel.writes == []
    assert not list(shell.run_dir.iterdir())
    planned = [line.removeprefix("  do     ") for line in plan.out.splitlines() if line.startswith("  do ")]
    done = shell("kvm-ifup-post", "-v", environ=ENVIRONMENT)
    assert [line.strip() for line in done.err.splitlines()[1:]] == planned
    assert len(shell.kernel.writes) == len(planned)


def test_json(shell: Shell) -> None:
    ran = shell("kvm-ifup-post", "--json", environ=ENVIRONMENT)
    assert [one["tap"] for one in json.loads(ran.out)] == ["tap0"]
    assert ran.err == ""


def test_a_missing_uplink_is_told_with_v_alone(shell: Shell) -> None:
    shell.kernel.uplinks = ()
    assert "no IPv4 uplink" in shell("kvm-ifup-post", "--plan", "-v", environ=ENVIRONMENT).err
    assert shell("kvm-ifup-post", environ=ENVIRONMENT).err == ""


def test_an_instance(shell: Shell) -> None:
    put(shell.run_dir, "web1/0.toml", nic_toml())
    put(shell.run_dir, "web1/1.toml", nic_toml(tap='"tap1"', incoming="true"))
    assert shell("kvm-ifup-pre", "--instance", "web1").code == 0
    assert [path.name for path in sorted((shell.run_dir / "state").iterdir())] == ["tap0.json", "tap1.json"]
    assert shell("kvm-ifdown", "--instance", "web1").code == 0
    assert shell.kernel.values == {}


def test_the_nic_file_comes_before_the_journal_and_the_environment_first(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode(environ: Mapping[str, str]) -> str:
        return str(json.loads(shell("kvm-ifup-post", "--plan", "--json", "tap0", environ=environ).out)[0]["mode"])

    monkeypatch.setattr("kvmifup.runs.store.devices.index_of", lambda name: shell.kernel.indexes.get(name))
    shell("kvm-ifup-post", environ=ENVIRONMENT)
    assert mode({}) == "routed", "from the journal"
    path = put(shell.run_dir, "web1/0.toml", nic_toml())
    assert mode({}) == "bridged", "from the file"
    assert mode(ENVIRONMENT) == "routed"
    path.unlink()
    shell.kernel.replace_tap("tap0")
    assert shell("kvm-ifup-post", "--plan", "tap0").code == 65, "the journal is about a dead NIC"


def test_down_needs_no_description_where_there_is_a_journal(shell: Shell) -> None:
    shell("kvm-ifup-post", environ=ENVIRONMENT)
    ran = shell("kvm-ifdown", environ={"INTERFACE": "tap0"})
    assert (ran.code, ran.err) == (0, "")
    assert shell.kernel.values == {}


def test_down_goes_on_past_a_failure(shell: Shell) -> None:
    put(shell.run_dir, "web1/0.toml", nic_toml())
    put(shell.run_dir, "web1/1.toml", nic_toml(tap='"tap1"'))
    shell("kvm-ifup-post", "--instance", "web1")
    (shell.run_dir / "state" / "tap0.json").write_text("{")
    ran = shell("kvm-ifdown", "--instance", "web1")
    assert ran.code == 70
    assert "tap0" in ran.err
    assert {getattr(shell.kernel.known[key], "dev", None) for key in shell.kernel.values} == {"tap0"}


def test_gc(shell: Shell, tmp_path: Path) -> None:
    shell("kvm-ifup-post", environ=ENVIRONMENT)
    shell.kernel.remove_tap("tap0")
    assert "undo" in shell("kvm-ifup", "gc", "--plan").out
    (tmp_path / "empty").mkdir()
    assert shell("kvm-ifup", "gc", "--plan", "--run-dir", str(tmp_path / "empty")).out == "nothing to do\n"
    ran = shell("kvm-ifup", "gc")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert shell.kernel.values == {}


# --- several failures -----------------------------------------------------------------------------------------


def refused(shell: Shell, *taps: str) -> None:
    """From now on nothing can be put back on *taps*."""
    write = shell.kernel.write

    def refuse(op: Op) -> None:
        if getattr(op, "dev", None) in taps:
            raise KernelError(f"{op.describe()}: refused", errno=16)
        write(op)

    shell.kernel.write = refuse  # type: ignore[method-assign]


def wired(shell: Shell, *taps: str) -> None:
    """All of one guest's NICs, on *taps*."""
    for number, tap in enumerate(taps):
        nic = {"INTERFACE": tap, "INSTANCE": "web1", "INTERFACE_INDEX": str(number)}
        environ = {**nic, "MODE": "bridged", "LINK": "br0", "MAC": f"aa:00:00:35:ac:0{number}"}
        assert shell("kvm-ifup-post", environ=environ).code == 0


@pytest.mark.parametrize("command", ["down", "gc"])
def test_every_nic_that_fails_is_reported(shell: Shell, command: str) -> None:
    wired(shell, "tap0", "tap1")
    program, argv = ("kvm-ifdown", ["--instance", "web1"]) if command == "down" else ("kvm-ifup", ["gc"])
    if command == "gc":
        for tap in ("tap0", "tap1"):
            pending = shell.run_dir / "state" / f"{tap}.json"
            data = json.loads(pending.read_text())
            pending.write_text(json.dumps(data | {"pending": data["entries"], "entries": []}))
    refused(shell, "tap0", "tap1")
    ran = shell(program, *argv, "--json")
    assert ran.code == 70
    first, second = ran.err.splitlines()
    assert "tap0" in first
    assert "tap1" in second
    told = json.loads(ran.out)
    assert (told["code"], [one["code"] for one in told["others"]]) == (70, [70])


def test_what_went_right_is_told_beside_what_failed(shell: Shell) -> None:
    wired(shell, "tap0", "tap1")
    refused(shell, "tap0")
    ran = shell("kvm-ifdown", "--instance", "web1", "-v")
    assert ran.code == 70
    assert "web1/1 (tap1): bridged, down: " in ran.err
    assert len([line for line in ran.err.splitlines() if line.startswith("kvm-ifdown: ")]) == 1
    assert not (shell.run_dir / "state/tap1.json").exists()


def test_every_nic_file_that_is_wrong_is_reported(shell: Shell) -> None:
    for number in range(3):
        file = shell.run_dir / "nic/web1" / f"{number}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        right = f'tap = "tap0"\nmac = "{MAC}"\nmode = "bridged"\nlink = "br0"\n'
        file.write_text('mac = "nonsense"' if number else right)
    ran = shell("kvm-ifup", "nic", "list")
    assert ran.code == 65
    assert "tap0" in ran.out
    assert [line.partition(".toml")[0][-1] for line in ran.err.splitlines()] == ["1", "2"]
    told = json.loads(shell("kvm-ifup", "nic", "list", "--json").out)
    assert (told["code"], len(told["others"])) == (65, 1)


def test_an_ext_network_is_wired_as_configured(shell: Shell) -> None:
    settings = shell.run_dir / "config.toml"
    settings.write_text('[ext.site]\nmode = "bridged"\nlink = "br0"\n')
    settings.chmod(0o644)
    environ = {"INTERFACE": "tap0", "MODE": "ext", "LINK": "site", "MAC": MAC}
    ran = shell("kvm-ifup-post", "--plan", "--json", "--config", str(settings), environ=environ)
    assert json.loads(ran.out)[0]["mode"] == "bridged"


# --- what is loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "argv", "environ", "code"),
    [
        ("kvm-ifup-pre", ["--plan", "a/b"], {}, 65),
        ("kvm-ifup-pre", ["--plan", "tap0"], {}, 65),
        ("kvm-ifup-post", ["--plan"], ENVIRONMENT | {"MAC": "nonsense"}, 65),
        ("kvm-ifup-post", ["--plan"], ENVIRONMENT | {"MIGRATION_PHASE": "pre"}, 64),
        ("kvm-ifup-post", ["--plan", "--config", "/nonexistent"], ENVIRONMENT, 78),
        ("kvm-ifdown", ["--plan", "a/b"], {}, 65),
        ("kvm-ifdown", ["--plan", "--instance", "../x"], {}, 65),
        ("kvm-ifup", ["--config", "/nonexistent", "check"], {}, 78),
        ("kvm-ifup", ["show", "--config", "/nonexistent"], {}, 78),
        ("kvm-ifup", ["plan", "post", "a b"], {}, 65),
        ("kvm-ifup", ["check", "--node", "tap0"], {}, 64),
        ("kvm-ifup", ["nic", "list", "../x"], {}, 65),
        ("kvm-ifdown", ["gnt.com.0"], {}, 0),
    ],
)
def test_what_is_refused_never_loads_what_speaks_to_the_kernel(
    program: str, argv: Sequence[str], environ: dict[str, str], code: int, tmp_path: Path
) -> None:
    script = (
        f"import io, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from kvmifup.commands import main\n"
        f"argv = [*{list(argv)!r}, '--run-dir', {str(tmp_path)!r}]\n"
        f"code = main.main({program!r}, argv, {environ!r}, io.StringIO(), io.StringIO())\n"
        "print(code, *sorted({'pyroute2', 'kvmifup.node.kernel', 'kvmifup.node.netlink'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(code)]


@pytest.mark.parametrize(
    ("command", "environ", "code"),
    [
        ("kvm-ifup-post", {}, 64),
        ("kvm-ifup-post tap0 tap1", {}, 64),
        ("kvm-ifup-post tap0 --instance web1", {}, 64),
        ("kvm-ifup-post tap0 --nonsense", {}, 64),
        ("kvm-ifup-post tap0", ENVIRONMENT | {"INTERFACE": "tap1"}, 64),
        ("kvm-ifup-post", ENVIRONMENT | {"MIGRATION_PHASE": "pre"}, 64),
        ("kvm-ifup-post", ENVIRONMENT | {"MIGRATION_PHASE": "x"}, 64),
        ("kvm-ifup-post", ENVIRONMENT | {"ACTION": "down"}, 64),
        ("kvm-ifdown", ENVIRONMENT | {"ACTION": "x"}, 64),
        ("kvm-ifup-post a_name_that_is_too_long", {}, 65),
        ("kvm-ifup-post a/b", {}, 65),
        ("kvm-ifup-post tap9", {}, 65),
        ("kvm-ifup-post --instance web9", {}, 65),
        ("kvm-ifup-post --instance ../x", {}, 65),
        ("kvm-ifup-post", ENVIRONMENT | {"MODE": "bridge"}, 65),
        ("kvm-ifup-post", ENVIRONMENT | {"MAC": "01:00:00:00:00:01"}, 65),
        ("kvm-ifup-post", {"INTERFACE": "tap0"}, 65),
        ("kvm-ifup", {}, 64),
        ("kvm-ifup shw", {}, 64),
        ("kvm-ifup plan pst tap0", {}, 64),
        ("kvm-ifup check --node tap0", {}, 64),
        ("kvm-ifup nic", {}, 64),
        ("kvm-ifup nic put web1 0 -", {}, 64),
        ("kvm-ifup nic put web1 0 /nonexistent", {}, 64),
        ("kvm-ifup nic put web1 10000 /dev/null", {}, 64),
        ("kvm-ifup nic put web1 0 /dev/null", {}, 65),
        ("kvm-ifup nic list web9", {}, 65),
        ("kvm-ifup check --config /nonexistent", {}, 78),
    ],
)
def test_a_mistake_is_answered_by_one_line_with_a_hint(
    command: str, environ: dict[str, str], code: int, tmp_path: Path
) -> None:
    program, *argv = command.split()
    out, err = io.StringIO(), io.StringIO()
    assert main.main(program, ["--run-dir", str(tmp_path), *argv], environ, out, err) == code
    assert out.getvalue() == ""
    assert re.fullmatch(rf"{program}: .+ \(.+\)\n", err.getvalue()), err.getvalue()


def test_the_scripts_are_executable_and_isolated() -> None:
    for program in PROGRAMS:
        script = ROOT / "scripts" / program
        assert os.access(script, os.X_OK)
        run = subprocess.run([sys.executable, "-I", script, "--version"], capture_output=True, text=True, check=True)
        assert run.stdout == f"{program} {__version__}\n"
        assert script.read_text().startswith("#!/usr/bin/python3 -I")


def test_help_goes_to_who_asked_for_it_also_from_many_threads() -> None:
    """The parsers are shared."""
    wrong: list[str] = []

    def ask(program: str) -> None:
        for _ in range(10):
            out, err = io.StringIO(), io.StringIO()
            code = main.main(program, ["--version"], {}, out, err)
            if (code, out.getvalue(), err.getvalue()) != (0, f"{program} {__version__}\n", ""):
                wrong.append(program)

    threads = [threading.Thread(target=ask, args=(program,)) for program in (*request.PHASES, "kvm-ifup") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- options and numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        ("kvm-ifup", ["--no-such-option"]),
        ("kvm-ifup", ["-v", "--no-such-option=7"]),
        ("kvm-ifup", ["plan", "--no-such-option"]),
        ("kvm-ifup", ["nic", "--no-such-option"]),
        ("kvm-ifup", ["nic", "put", "--no-such-option"]),
        ("kvm-ifup", ["nic", "put", "web1", "--no-such-option"]),
        ("kvm-ifup", ["show", "--no-such-option"]),
        ("kvm-ifup-pre", ["--no-such-option"]),
        ("kvm-ifdown", ["tap0", "--no-such-option"]),
    ],
)
def test_an_option_that_there_is_not_is_named(program: str, argv: list[str]) -> None:
    ran = call_main(program, *argv)
    assert ran.code == 64
    assert "--no-such-option" in ran.err


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ([], "SUBCOMMAND"),
        (["-vv"], "SUBCOMMAND"),
        (["plan", "--json"], "pre|post|down"),
        (["nic", "rm", "-v"], "INSTANCE"),
    ],
)
def test_what_is_missing_is_named_when_the_options_are_right(argv: list[str], missing: str) -> None:
    ran = call_main("kvm-ifup", *argv)
    assert ran.code == 64
    assert missing in ran.err


@every_hook
@pytest.mark.parametrize("argv", [[], ["tap0"], ["a b"], ["tap-0"]])
def test_what_managers_give_is_read_as_argparse_would_read_it(program: str, argv: list[str]) -> None:
    plain, full = options.of_manager(argv), arguments.parse(program, argv)
    names = [name for name, value in vars(options.Options).items() if name[0] != "_" and not callable(value)]
    assert [getattr(plain, name) for name in names] == [getattr(full, name) for name in names]


@pytest.mark.parametrize("argv", [["-v"], ["--"], ["-"], [""], ["--help"], ["tap0", "-v"], ["tap0", "tap1"]])
def test_all_else_is_left_to_argparse(argv: list[str]) -> None:
    assert options.of_manager(argv) is None


INDICES = ["\u0661", "\uff11", "+1", " 1", "1 ", "1_0", "0x1", "1.0", "", " ", "-1", "00", "10000", "web1", "--"]


@pytest.mark.parametrize("index", INDICES)
def test_an_index_is_a_number_written_in_the_one_way(index: str, shell: Shell) -> None:
    path = put(shell.run_dir, "web1/0.toml", nic_toml())
    for argv in (["put", "--", "web1", index, "-"], ["rm", "--", "web1", index], ["rm", "web1", "--", index]):
        ran = shell("kvm-ifup", "nic", *argv)
        assert (ran.code, ran.out, path.exists()) == (64, "", True), argv
        assert "INDEX" in ran.err


# --- "--", and what is empty --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "argv", "expected"),
    [
        ("kvm-ifup-pre", ["--", "tap0"], {"tap": "tap0"}),
        ("kvm-ifup-pre", ["--", "--"], {"tap": "--"}),
        ("kvm-ifdown", ["--", "-v"], {"tap": "-v", "verbose": 0}),
        ("kvm-ifdown", ["-v", "--"], {"tap": None, "verbose": 1}),
        ("kvm-ifdown", ["--instance=--"], {"instance": "--"}),
        ("kvm-ifup", ["show", "--"], {"name": None}),
        ("kvm-ifup", ["show", "--", "--"], {"name": "--"}),
        ("kvm-ifup", ["--", "show", "--wrong"], {"name": "--wrong", "wrong": False}),
        ("kvm-ifup", ["gc", "--"], {"subcommand": "gc"}),
        ("kvm-ifup", ["plan", "--", "post", "--"], {"phase": "post", "name": "--"}),
        ("kvm-ifup", ["plan", "post", "--", "--"], {"phase": "post", "name": "--"}),
        ("kvm-ifup", ["watch", "--trace=--"], {"trace": "--"}),
        ("kvm-ifup", ["--config=--", "check"], {"config": Path("--")}),
        ("kvm-ifup", ["nic", "rm", "web1", "--"], {"instance": "web1", "index": None}),
        ("kvm-ifup", ["nic", "rm", "--", "--"], {"instance": "--", "index": None}),
        ("kvm-ifup", ["nic", "rm", "--", "web1", "0"], {"instance": "web1", "index": 0}),
        ("kvm-ifup", ["nic", "rm", "web1", "--", "0"], {"instance": "web1", "index": 0}),
        ("kvm-ifup", ["nic", "--", "rm", "web1", "0"], {"verb": "rm", "instance": "web1", "index": 0}),
        ("kvm-ifup", ["nic", "put", "--", "--", "0", "--"], {"instance": "--", "index": 0, "file": "--"}),
    ],
)
def test_behind_two_dashes_every_word_is_itself(program: str, argv: list[str], expected: dict[str, object]) -> None:
    found = arguments.parse(program, argv)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("program", "argv", "surplus"),
    [
        ("kvm-ifup-pre", ["--", "tap0", "--"], "--"),
        ("kvm-ifdown", ["tap0", "tap0"], "tap0"),
        ("kvm-ifdown", ["tap0", "--", "-v"], "-v"),
        ("kvm-ifup", ["show", "tap0", "tap0"], "tap0"),
        ("kvm-ifup", ["gc", "--", "--"], "--"),
        ("kvm-ifup", ["gc", ""], ""),
        ("kvm-ifup", ["nic", "rm", "web1", "0", "0"], "0"),
        ("kvm-ifup", ["nic", "list", "--", "web1", "--"], "--"),
        ("kvm-ifup", ["nic", "put", "web1", "0", "-", "--", "--"], "--"),
    ],
)
def test_an_argument_too_many_is_named(program: str, argv: list[str], surplus: str) -> None:
    ran = call_main(program, *argv)
    assert (ran.code, ran.out) == (64, "")
    assert f"{surplus!r} is one argument too many" in ran.err


@pytest.mark.parametrize(
    ("program", "argv", "what"),
    [
        ("kvm-ifup-pre", [""], "TAP"),
        ("kvm-ifdown", ["--", ""], "TAP"),
        ("kvm-ifdown", ["--instance", ""], "--instance"),
        ("kvm-ifup-post", ["--run-dir="], "--run-dir"),
        ("kvm-ifup", ["--config", "", "show"], "--config"),
        ("kvm-ifup", ["show", ""], "INSTANCE|TAP"),
        ("kvm-ifup", ["check", ""], "INSTANCE|TAP"),
        ("kvm-ifup", ["plan", "post", ""], "INSTANCE|TAP"),
        ("kvm-ifup", ["watch", "--trace", ""], "--trace"),
        ("kvm-ifup", ["nic", "list", ""], "INSTANCE"),
        ("kvm-ifup", ["nic", "rm", ""], "INSTANCE"),
        ("kvm-ifup", ["nic", "rm", "web1", ""], "INDEX"),
        ("kvm-ifup", ["nic", "put", "web1", "0", ""], "FILE"),
    ],
)
def test_what_is_empty_names_nothing(program: str, argv: list[str], what: str) -> None:
    ran = call_main(program, *argv)
    assert (ran.code, ran.out) == (64, "")
    assert ran.err.startswith(f"{program}: {what} is empty (")


def call_main(program: str, *argv: str) -> Ran:
    """*program* with just these arguments."""
    out, err = io.StringIO(), io.StringIO()
    return Ran(main.main(program, argv, {}, out, err), out.getvalue(), err.getvalue())
