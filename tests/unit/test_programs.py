"""Programs that are not ours, and ovs-vsctl in particular."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core import ovsport
from kvmifup.core.errors import ConfigError, NotReadyError, ProgramError
from kvmifup.node import ovs, programs

from .samples import MAC


def shell(script: str, environ: dict[str, str] | None = None, timeout: float = 60.0) -> programs.Result:
    return programs.run(("/bin/sh", "-c", script), environ or {}, timeout)


def test_the_result() -> None:
    assert shell("echo out; echo first >&2; echo last >&2; exit 3") == programs.Result(3, "out\n", "last")
    assert shell("printf '\\377'").output == "\ufffd"


def test_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    lines = programs.run(("/usr/bin/env",), {"MAC": "y"}, 60).output.splitlines()
    assert sorted(lines) == ["LC_ALL=C", "MAC=y", f"PATH={programs.PATH}"]


def test_nothing_to_read_and_nowhere_to_be() -> None:
    assert shell("pwd; cat").output == "/\n"


def test_no_shell_in_between() -> None:
    assert programs.run(("/bin/echo", "$HOME; `id`"), {}, 60).output == "$HOME; `id`\n"


def test_a_late_program_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"

    class Late(subprocess.Popen[bytes]):
        """Its time is up as soon as it has a child, however slow this machine is."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None:
                if pid.exists():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.01)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Late)
    with pytest.raises(ProgramError, match="did not end within 60 s") as caught:
        shell(f"sleep 600 & echo $! >{tmp_path}/new; mv {tmp_path}/new {pid}; wait")
    assert caught.value.code == 71
    assert not caught.value.untouched, "it may have got half-way"
    child = Path("/proc") / pid.read_text().strip() / "stat"
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # the signal is on its way; a test that hangs here has found it missing


def test_a_child_left_behind_keeps_nobody_waiting() -> None:
    result = shell("sleep 60 & echo $!")
    programs.run(("/bin/kill", result.output.strip()), {}, 60)
    assert result.code == 0


def test_a_program_that_cannot_be_started() -> None:
    with pytest.raises(ProgramError, match="/nowhere cannot be started"):
        programs.run(("/nowhere",), {}, 60)


# --- the administrator's programs ---------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "etc" / "ext"
    place.mkdir(parents=True)
    (place / "site").write_text("#!/bin/sh\n")
    (place / "site").chmod(0o755)
    return place


def test_found(directory: Path) -> None:
    assert programs.find(directory, "site") == str(directory / "site")


def test_missing(directory: Path) -> None:
    with pytest.raises(NotReadyError, match="no such program") as caught:
        programs.find(directory, "other")
    assert "[ext.other]" in caught.value.hint


def test_not_executable(directory: Path) -> None:
    (directory / "site").chmod(0o644)
    with pytest.raises(NotReadyError, match="not an executable"):
        programs.find(directory, "site")
    (directory / "sub").mkdir()
    with pytest.raises(NotReadyError, match="not an executable"):
        programs.find(directory, "sub")


@pytest.mark.parametrize("place", ["site", ".", ".."])
def test_not_trusted(place: str, directory: Path) -> None:
    (directory / place).chmod(0o777)
    with pytest.raises(ConfigError, match="trusted") as caught:
        programs.find(directory, "site")
    assert caught.value.where == str(directory / "site")


# --- Open vSwitch -------------------------------------------------------------------------------------


class Switch:
    """Answers for ovs-vsctl, and remembers what it was asked."""

    def __init__(self, *results: programs.Result) -> None:
        self.results = list(results)
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *arguments: str) -> programs.Result:
        self.asked.append(arguments)
        return self.results.pop(0)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    fake = Switch()
    monkeypatch.setattr(ovs, "vsctl", fake)
    return fake


def ok(output: str = "") -> programs.Result:
    return programs.Result(0, output, "")


REMOVE = ("--", "--if-exists", "del-port", "tap0")
EMPTY = ["set", []]


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ("ovs0", ()),
        ("ovs0 .100", ("tag=100", "vlan_mode=access")),
        ("ovs0 :20:300", ("trunks=20,300", "vlan_mode=trunk")),
        ("ovs0 .5:20:300", ("tag=5", "trunks=20,300", "vlan_mode=native-untagged")),
        ("ovs0 :20:100-199", ("trunks=20,100-199", "vlan_mode=trunk")),
    ],
)
def test_a_port_is_replaced_in_one_transaction(value: str, columns: tuple[str, ...], switch: Switch) -> None:
    switch.results = [ok(), tables([])]
    ovs.put("tap0", value, None)
    assert switch.asked[0] == (*REMOVE, "--", "add-port", "ovs0", "tap0", *columns)


def tables(
    row: list[object], ofport: object = 1, error: object = EMPTY, ids: dict[str, str] | None = None
) -> programs.Result:
    """The switch's database: the port tap0 with the columns *row* in the bridge ovs0; *ids* are its external ones."""
    bridges = [["ovs0", ["set", [["uuid", "a"], ["uuid", "f"]]]]]
    config = ["map", [["transient", "true"], ["other", "kept"]] if ids else []]
    ports = [[["uuid", "a"], "tap0", False, config, *(row or [EMPTY, EMPTY, EMPTY])]]
    ports.append([["uuid", "f"], "vlan300", True, ["map", []], 300, EMPTY, EMPTY])
    interfaces = [["tap0", ofport, error, ["map", [*map(list, (ids or {}).items())]]]]
    return ok("".join(json.dumps({"data": data}) + "\n" for data in (bridges, ports, interfaces)))


@pytest.mark.parametrize("alive", [True, False])
def test_a_port_is_removed_and_a_dead_daemon_is_not_waited_for(
    alive: bool, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ovs, "is_alive", lambda: alive)
    switch.results = [ok()]
    ovs.put("tap0", None, "ovs0")
    assert switch.asked == [REMOVE if alive else ("--no-wait", *REMOVE)]


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ([EMPTY, EMPTY, EMPTY], "ovs0"),
        ([100, EMPTY, EMPTY], "ovs0 .100"),
        ([100, EMPTY, "access"], "ovs0 .100"),
        ([EMPTY, ["set", [300, 20]], "trunk"], "ovs0 :20:300"),
        ([EMPTY, 20, "trunk"], "ovs0 :20"),
        ([EMPTY, ["set", [22, 20, 21, 300]], "trunk"], "ovs0 :20-22:300"),
        ([5, ["set", [20, 300]], "native-untagged"], "ovs0 .5:20:300"),
        ([5, 20, "native-tagged"], "ovs0 .5:20 native-tagged"),
    ],
)
def test_what_a_port_is(row: list[object], value: str, switch: Switch) -> None:
    switch.results = [tables(row), tables(row, -1, "no such device"), tables(row, EMPTY)]
    found = ovs.read()
    assert found.ports["tap0"] == value
    assert found.bridges == {"ovs0": ("ovs0", 0), "vlan300": ("ovs0", 300)}
    assert ovs.read().ports["tap0"] == f"{value} (no such device)"
    assert ovs.read().ports["tap0"] == f"{value} (not taken by ovs-vswitchd)"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ([5, 20, "native-tagged"], ("tag=5", "trunks=20", "vlan_mode=native-tagged")),
        ([EMPTY, EMPTY, "dot1q-tunnel"], ("vlan_mode=dot1q-tunnel",)),
    ],
)
@pytest.mark.parametrize("error", [EMPTY, "no such device"])
def test_a_port_in_a_mode_that_is_never_ours_can_be_put_back(
    row: list[object], columns: tuple[str, ...], error: object, switch: Switch
) -> None:
    """A failed run leaves every port as it was, whoever made it."""
    switch.results = [tables(row, error=error), ok(), tables(row)]
    ovs.put("tap0", ovs.read().ports["tap0"], None)
    assert switch.asked[1] == (*REMOVE, "--", "add-port", "ovs0", "tap0", *columns)


WHOSE = "attached-mac=aa:00:00:35:ac:01 iface-id=web1-0 kvm-ifup-instance=web%20;one transient=true"


def test_what_the_database_says_of_whose_a_port_is(switch: Switch) -> None:
    ids = {"vm-id": "foreign", "iface-id": "web1-0", "attached-mac": MAC, "kvm-ifup-instance": "web one"}
    switch.results = [tables([100, EMPTY, "access"], ids=ids)]
    assert ovs.read().ports["tap0"] == f"ovs0 .100 {WHOSE}"


SET = ("--", "set", "Interface", "tap0", f'external_ids:attached-mac="{MAC}"', 'external_ids:iface-id="web1-0"',
       'external_ids:kvm-ifup-instance="web one"')  # fmt: skip
CLEAR = ("--", "clear", "Port", "tap0", "tag", "trunks", "vlan_mode")
TAG = ("tag=100", "vlan_mode=access", "other_config:transient=true")
ADD = ("--", "add-port", "ovs0", "tap0", *TAG)
OTHER = "attached-mac=aa:00:00:35:ac:77"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (None, (*REMOVE, *ADD, *SET)),
        ("ovs0", (*CLEAR, "--", "set", "Port", "tap0", *TAG, *SET)),  # as an earlier kvm-ifup has made it
        (f"ovs0 .7 {WHOSE}", (*CLEAR, "--", "set", "Port", "tap0", *TAG, *SET)),
        (f"ovs0 .100 {OTHER}", (*REMOVE, *ADD, *SET)),  # another guest's
        (f"ovs1 .100 {WHOSE}", (*REMOVE, *ADD, *SET)),  # on another bridge
        (f"ovs0 .100 {WHOSE} (no such device)", (*REMOVE, *ADD, *SET)),
    ],
)
def test_the_port_of_the_same_nic_is_changed_and_any_other_replaced(now: str | None, words: tuple[str, ...]) -> None:
    assert ovs.transaction("tap0", f"ovs0 .100 {WHOSE}", now) == words


def test_what_is_not_wanted_any_more_is_taken_out_of_the_database() -> None:
    words = ovs.transaction("tap0", "ovs0", f"ovs0 .100 {WHOSE}")
    gone = ("kvm-ifup-instance", "iface-id", "attached-mac")
    assert words == (*CLEAR, "--", "remove", "Interface", "tap0", "external_ids", *gone,
                     "--", "remove", "Port", "tap0", "other_config", "transient")  # fmt: skip


@pytest.mark.parametrize("text", ["ovs0", "ovs0 .5:20-30", "ovs0 .5:20 native-tagged", f"o :1 {WHOSE}"])
def test_a_port_comes_back_from_its_text(text: str) -> None:
    assert ovsport.parsed(text).text == text
    assert ovsport.parsed(f"{text} (no such device (really))").text == text


@given(st.text(min_size=1))
def test_any_name_of_a_guest_comes_back_from_the_text_of_its_port(name: str) -> None:
    port = ovsport.Port("ovs0", ".1", ids=((ovsport.INSTANCE, name),))
    assert ovsport.parsed(port.text) == ovsport.parsed(f"{port.text} (broken)") == port


@pytest.mark.parametrize(("code", "untouched"), [(1, True), (-14, False)])
def test_a_change_that_its_time_limit_ended_may_have_been_made(code: int, untouched: bool, switch: Switch) -> None:
    switch.results = [programs.Result(code, "", "no")]
    with pytest.raises(ProgramError) as caught:
        ovs.put("tap0", "ovs0", None)
    assert caught.value.untouched is untouched


def test_a_switch_that_does_not_answer(switch: Switch) -> None:
    switch.results = [programs.Result(1, "", "no socket")] * 2
    with pytest.raises(NotReadyError, match="no socket") as caught:
        ovs.read()
    assert caught.value.hint
    with pytest.raises(ProgramError, match="no socket") as failed:
        ovs.put("tap0", "ovs0", None)
    assert failed.value.untouched


def test_no_ovs_vsctl_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> programs.Result:
        raise ProgramError("ovs-vsctl cannot be started: No such file")

    monkeypatch.setattr(programs, "run", missing)
    with pytest.raises(NotReadyError, match="ovs-vsctl") as caught:
        ovs.read()
    assert "install" in caught.value.hint
