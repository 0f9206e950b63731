"""What bash offers behind each command, in a real bash."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.docs.machine import CLEAN, Machine, machine
from tests.docs.pages import COMMANDS, ROOT
from tests.docs.test_pages import HOOKS, help_of, subcommands

COMPLETION = ROOT / "completion/kvm-ifup"

# As readline does it: break the line into words, find the function of the command, and read what it leaves.
OFFER = """
. completion/kvm-ifup
read -r -a COMP_WORDS <<< "${1//=/ = }"
[[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
spec=$(complete -p "${COMP_WORDS[0]}")
spec=${spec##*-F }
${spec%% *}
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Machine]:
    """A machine with two taps, a tun that is none, what a dead tap left, and two guests."""
    with machine() as made:
        made.run(
            """
            ip tuntap add tap0 mode tap
            ip tuntap add vnet1 mode tap
            ip tuntap add vpn0 mode tun
            mkdir -p /run/kvm-ifup/state /run/kvm-ifup/nic/web1 /run/kvm-ifup/nic/db1.example.com
            touch /run/kvm-ifup/state/tap9.json
            mkdir -p /run/other/nic/elsewhere
            """
        )
        yield made


def offered(line: str, on: Machine | None = None) -> list[str]:
    """What the TAB key offers at the end of *line*."""
    argv = ["bash", "--norc", "-c", OFFER, "bash", line]
    done = subprocess.run(
        on.enter(*argv) if on else argv, env=CLEAN, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_help(command: str) -> None:
    (listed,) = re.findall(r"options:\n(.*?)\n\n", help_of(command), re.DOTALL)
    options = re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", "\n".join(re.findall(r"^  (-.*?)(?:  |$)", listed, re.M)))
    assert offered(f"{command} -") == sorted(options)


@pytest.mark.parametrize("command", HOOKS)
def test_taps(command: str, node: Machine) -> None:
    assert offered(f"{command} ", node) == ["tap0", "tap9", "vnet1"]
    assert offered(f"{command} -v t", node) == ["tap0", "tap9"]
    assert offered(f"{command} vn", node) == ["vnet1"]


@pytest.mark.parametrize("command", HOOKS)
def test_instances(command: str, node: Machine) -> None:
    assert offered(f"{command} --instance ", node) == ["db1.example.com", "web1"]
    assert offered(f"{command} --instance w", node) == ["web1"]
    assert offered(f"{command} --instance=w", node) == ["web1"]
    assert offered(f"{command} --instance=", node) == ["db1.example.com", "web1"]


def test_another_run_directory(node: Machine) -> None:
    assert offered("kvm-ifdown --run-dir /run/other --instance ", node) == ["elsewhere"]
    assert offered("kvm-ifdown --run-dir=/run/other --instance ", node) == ["elsewhere"]
    assert offered("kvm-ifdown --run-dir /run/oth", node) == ["/run/other"]


def test_subcommands_and_files(node: Machine) -> None:
    assert offered("kvm-ifup ", node) == sorted({path.split()[0] for path in subcommands()})
    assert offered("kvm-ifup nic ", node) == sorted(path.split()[1] for path in subcommands() if " " in path)
    assert offered("kvm-ifup plan ", node) == ["down", "post", "pre"]
    assert offered("kvm-ifup gc ", node) == offered("kvm-ifup nic put web1 ", node) == []
    assert offered("kvm-ifup nic put web1 0 etc/conf", node) == ["etc/config.toml"]
    assert offered("kvm-ifup --config etc/conf", node) == ["etc/config.toml"]


def test_names(node: Machine) -> None:
    names = ["db1.example.com", "tap0", "tap9", "vnet1", "web1"]
    assert offered("kvm-ifup show ", node) == offered("kvm-ifup --json check ", node) == names
    assert offered("kvm-ifup plan post w", node) == ["web1"]
    assert offered("kvm-ifup --run-dir=/run/other nic put ", node) == ["elsewhere"]


@pytest.mark.parametrize("path", ["show", "plan", "check", "gc", "nic"])
def test_the_options_of_subcommands_are_those_of_help(path: str) -> None:
    listed = re.findall(r"^  (-.*?)(?:  |$)", help_of("kvm-ifup", *path.split()), re.MULTILINE)
    options = re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", "\n".join(listed))
    assert offered(f"kvm-ifup {path} -") == sorted(options)


def test_nothing_there() -> None:
    with machine() as bare:
        assert offered("kvm-ifdown ", bare) == []
        assert offered("kvm-ifdown --instance ", bare) == []


def test_the_tab_key(node: Machine) -> None:
    """One key press in an interactive bash; "echo" shows what the line has become."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        node.enter("bash", "--norc", "--noprofile", "-i"),
        env={**CLEAN, "TERM": "dumb", "PS1": "", "INPUTRC": "/dev/null"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as shell:
        os.close(theirs)
        # Control-A goes to the beginning of the line.
        os.write(ours, b". completion/kvm-ifup\nkvm-ifup-post --inst\tdb\t\x01echo \nexit\n")
        said = b""
        while True:
            try:
                got = os.read(ours, 4096)
            except OSError:  # a terminal whose other end is closed
                break
            if not got:
                break
            said += got
        os.close(ours)
        shell.wait(60)
    assert b"\nkvm-ifup-post --instance db1.example.com" in said.replace(b"\r", b"")
