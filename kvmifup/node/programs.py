"""Run other programs: for a limited time, with a clean environment, and never through a shell."""

from __future__ import annotations

import os
import select
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvmifup.core.errors import ConfigError, NotReadyError, ProgramError
from kvmifup.core.ops import Program
from kvmifup.core.records import record
from kvmifup.inputs import trust

DIRECTORY = Path("/etc/kvm-ifup/ext")  # the administrator's programs, one for each ext network
LOOK = 0.2  # seconds to wait for a line
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@record
class Result:
    """How a program ended: its exit code, all that it wrote to stdout, and the last line that it wrote to stderr."""

    code: int
    output: str
    complaint: str


def find(directory: Path, name: str) -> str:
    """The path of the administrator's program *name* in *directory*.

    Raises NotReadyError if it is missing or cannot be executed, ConfigError if others could have written it.
    """
    path = directory / name
    try:
        info = trust.check(path, directory.parent).stat()
    except FileNotFoundError:
        raise NotReadyError(f"no such program: {path}", hint=f"put one there, or set [ext.{name}]") from None
    except trust.Untrusted as error:
        raise ConfigError(f"not to be trusted: {error}", hint=error.mend, where=str(path)) from None
    if not stat.S_ISREG(info.st_mode) or not info.st_mode & stat.S_IXUSR:
        raise NotReadyError(f"{path} is not an executable file", hint=f"`chmod 755 {path}`")
    return str(path)


def in_memory(name: str) -> BinaryIO:
    """An empty file that exists nowhere else: memfd_create(2)."""
    return open(os.memfd_create(name), "w+b")


def run(argv: Sequence[str], environ: Mapping[str, str], timeout: float) -> Result:
    """Run *argv* for at most *timeout* seconds; it and its children are killed when the time is up.

    Its output goes to files, not pipes: a child that it leaves behind cannot keep us waiting. The files are in memory:
    no disk can be too full for them, and `tempfile` takes every hook 4 ms to import.
    Raises ProgramError when it cannot be started or does not end in time.
    """
    import subprocess  # only here, and only now: no bridged or routed NIC needs it, and it takes 3 ms to import

    with in_memory("stdout") as out, in_memory("stderr") as err:
        try:
            process = subprocess.Popen(
                argv,
                env={"PATH": PATH, "LC_ALL": "C", **environ},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            raise ProgramError(f"{argv[0]} cannot be started: {error.strerror}") from error
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise ProgramError(f"{argv[0]} did not end within {timeout:g} s") from None
        out.seek(0)
        err.seek(0)
        lines = err.read().decode(errors="replace").strip().splitlines()
        return Result(code, out.read().decode(errors="replace"), lines[-1] if lines else "")


@contextmanager
def following(argv: Sequence[str]) -> Iterator[Iterator[str]]:
    """The lines that *argv* prints as it prints them, until it ends; "" after `LOOK` seconds without one.

    It ends with the block. Raises ProgramError when it cannot be started.
    """
    import subprocess

    try:
        process = subprocess.Popen(
            argv,
            env={"PATH": PATH, "LC_ALL": "C"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise ProgramError(f"{argv[0]} cannot be started: {error.strerror}") from error
    assert process.stdout is not None
    try:
        yield lines_of(process.stdout.fileno())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def lines_of(descriptor: int) -> Iterator[str]:
    """The lines that come out of *descriptor*."""
    poll, rest = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(1000 * LOOK):
            yield ""
            continue
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole if line)


def run_for_phase(op: Program) -> None:
    """Run the administrator's program of *op* for its phase, or for the phase down to undo pre. Raises ProgramError."""
    if not op.want and op.phase == "post":
        return  # undoing pre comes next, and the program then takes everything down
    environ = dict(op.environment) | {"KVM_IFUP_PHASE": op.phase if op.want else "down"}
    result = run((op.program,), environ, op.timeout)
    if result.code:
        said = result.complaint or "it says nothing"
        raise ProgramError(f"{op.program} failed with exit code {result.code}: {said}", untouched=True)
