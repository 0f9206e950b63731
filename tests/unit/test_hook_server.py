"""Both ends of the agent's socket: what a script asks for is what is run, and what it says is what is said."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup import __version__, client
from kvmifup.agent import hook_server
from kvmifup.agent.hook_server import HookServer, Refused, Request, parse
from kvmifup.agent.loop import Loop
from kvmifup.commands.main import Observer
from kvmifup.core import signals
from kvmifup.core.errors import InterruptedRun, KernelError, KvmIfupError, RollbackError

# What can be in an argument or a variable: any bytes but NUL.
anything = st.binary(max_size=30).map(lambda data: data.replace(b"\0", b""))
names = anything.map(lambda data: data.replace(b"=", b"") or b"X")


def text(data: bytes) -> str:
    """As Python shows arguments and variables."""
    return data.decode("utf-8", "surrogateescape")


@given(st.lists(anything, max_size=5), st.dictionaries(names, anything, max_size=5))
def test_arguments_and_environment_arrive_as_they_were(argv: list[bytes], environ: dict[bytes, bytes]) -> None:
    message = client.request("kvm-ifup-post", [text(one) for one in argv], environ)
    assert int.from_bytes(message[:4], "big") == len(message) - 4
    found = parse(message[4:])
    assert (found.program, found.argv) == ("kvm-ifup-post", tuple(text(one) for one in argv))
    assert found.environ == {text(name): text(value) for name, value in environ.items()}


def body(**changes: bytes) -> bytes:
    """A request's fields, some of them changed."""
    fields = client.request("kvm-ifup", ["gc"], {})[4:].split(b"\0")
    for name, value in changes.items():
        fields[("protocol", "version", "namespace", "terminals", "program", "count").index(name)] = value
    return b"\0".join(fields)


def test_a_request_of_ours_is_taken() -> None:
    assert parse(body()) == Request("kvm-ifup", ("gc",), {}, parse(body()).terminals)


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": b"0"}, {"version": b"0"}, {"version": b"\xff"}, {"namespace": b"1"}, {"namespace": b"x"},
        {"count": b"x"}, {"count": b""}, {"program": b"\xff"}, {"program": b"ls"},
    ],
    ids=str,
)  # fmt: skip
def test_one_from_elsewhere_is_refused(wrong: dict[str, bytes]) -> None:
    with pytest.raises(Refused):
        parse(body(**wrong))


@given(st.binary(max_size=100))
def test_whatever_comes_is_a_request_or_refused(data: bytes) -> None:
    for head in (b"", b"1\0", f"1\0{__version__}\0".encode()):
        with contextlib.suppress(Refused):
            parse(head + data)


# --- both ends ------------------------------------------------------------------------------------------

Main = Callable[[Sequence[str], Mapping[str, str], TextIO, TextIO], int]


class Agent:
    """A service in a thread; what it runs is *main*."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.main: Main = lambda argv, environ, out, err: 0
        self.failures: list[KvmIfupError] = []
        patch.setattr("kvmifup.commands.main.main", self._run)
        patch.setattr(client, "SOCKET", str(place / "agent.sock"))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(client.SOCKET)
        listener.listen(1000)
        self.programs: list[str] = []
        self.loop = Loop()
        self.server = HookServer(self.loop, listener, lambda messages, still_true: None)
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def _run(
        self,
        program: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        out: TextIO,
        err: TextIO,
        _later: object,
        *,
        observer: Observer,
    ) -> int:
        self.programs.append(program)
        code = self.main(argv, environ, out, err)
        observer(program, code, 0.0, self.failures)
        return code

    def do(self, action: Callable[[], None]) -> None:
        """In the loop, and wait until it is done."""
        done = threading.Event()
        self.loop.soon(action)
        self.loop.soon(done.set)
        assert done.wait(30)

    def exchanges(self) -> int:
        """How many it has."""
        found: list[int] = []
        self.do(lambda: found.append(len(self.server.exchanges)))
        return found[0]

    def connect(self, said: bytes = b"") -> socket.socket:
        """Somebody who says something."""
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(30)
        one.connect(client.SOCKET)
        one.sendall(said)
        return one

    def close(self) -> None:
        """The end of it."""
        self.loop.soon(self.server.close)
        self.loop.soon(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """One."""
    monkeypatch.setattr(hook_server, "HEARTBEAT", 0.01)
    made = Agent(tmp_path, monkeypatch)
    yield made
    made.close()


def rest(connection: socket.socket) -> bytes:
    """All that is said until the other end hangs up."""
    with connection:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                data += more
    return data


def test_exit_code_and_output_come_back(agent: Agent, capfd: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str], environ: Mapping[str, str], out: TextIO, err: TextIO) -> int:
        out.write(f"{list(argv)} {environ['LINK']} {out.isatty()}\n" + "ä" * 300_000)
        err.write("to stderr \udcff\n")
        return 69

    agent.main = main
    assert client.by_agent("kvm-ifup-post", ["tap0", "--plan"], {b"LINK": b"a=b"}) == 69
    out, err = capfd.readouterr()
    assert out == "['tap0', '--plan'] a=b False\n" + "ä" * 300_000
    assert err.encode("utf-8", "surrogateescape")[:10] == b"to stderr "
    assert agent.programs == ["kvm-ifup-post"]


def test_long_output_arrives_whole_though_nobody_has_read_it_yet(agent: Agent) -> None:
    """It is more than the socket takes at once."""
    said = "x" * 3_000_000

    def main(_argv: Sequence[str], _environ: Mapping[str, str], out: TextIO, _err: TextIO) -> int:
        out.write(said)
        return 7

    agent.main = main
    with socket.socket(socket.AF_UNIX) as script:
        script.connect(client.SOCKET)
        script.sendall(client.request("kvm-ifup", [], {}))
        time.sleep(0.1)  # so that it is full
        answer = b""
        while more := script.recv(1 << 20):
            answer += more
    answer = answer.lstrip(client.ALIVE)
    assert answer == client.DONE + bytes([7]) + len(said).to_bytes(4, "big") + said.encode() + bytes(4)


def test_a_hook_that_takes_its_time_gives_signs_of_life(agent: Agent) -> None:
    free = threading.Event()
    agent.main = lambda argv, environ, out, err: int(not free.wait(30))
    connection = agent.connect(client.request("kvm-ifup", ["gc"], {}))
    assert [connection.recv(1) for _ in range(5)] == [client.ALIVE] * 5
    free.set()
    said = rest(connection).lstrip(client.ALIVE)
    assert said[:2] == client.DONE + b"\0"


def test_a_request_in_pieces_is_a_request(agent: Agent) -> None:
    message = client.request("kvm-ifup", ["gc"], {})
    connection = agent.connect()
    for at in range(len(message)):
        connection.sendall(message[at : at + 1])
        agent.exchanges()
    assert rest(connection).lstrip(client.ALIVE)[:1] == client.DONE


def test_a_caller_that_has_gone_is_told_to_whoever_works_for_it(agent: Agent) -> None:
    running, told = threading.Event(), threading.Event()

    def main(*_: object) -> int:
        running.set()
        with contextlib.suppress(InterruptedRun):
            while True:
                signals.checkpoint()
        told.set()
        return 75

    agent.main = main
    connection = agent.connect(client.request("kvm-ifup", ["gc"], {}))
    assert running.wait(30)
    signals.checkpoint()  # not ours
    connection.close()
    assert told.wait(30)


def test_who_has_hung_up_before_it_was_its_turn_is_not_served(agent: Agent) -> None:
    """As after a stop: the request is there, and so is the end."""
    held = threading.Event()

    def busy() -> None:
        held.wait(30)

    agent.loop.soon(busy)
    for _ in range(5):
        agent.connect(client.request("kvm-ifup", ["gc"], {})).close()
    held.set()
    with contextlib.suppress(client.NotUs):
        client.by_agent("kvm-ifup-post", [], {})
    assert agent.programs == ["kvm-ifup-post"]


SHORT = {"an end": b"", "a huge length": b"\xff" * 4, "no length": bytes(4), "nonsense": b"\0\0\0\1x"}


@pytest.mark.parametrize("said", SHORT.values(), ids=list(SHORT))
def test_nothing_is_left_of_those_who_are_not_served(agent: Agent, said: bytes) -> None:
    for _ in range(50):
        connection = agent.connect(said)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection)[:1] in (b"", client.REFUSED)
    assert agent.exchanges() == 0
    assert agent.programs == []


def test_who_says_nothing_is_hung_up_on(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_server, "TO_ASK", 0.01)
    assert rest(agent.connect(b"\0\0\0")) == b""
    assert agent.exchanges() == 0


def test_at_its_end_who_waits_is_hung_up_on_and_who_is_served_is_answered(agent: Agent) -> None:
    free, running = threading.Event(), threading.Event()

    def main(*_: object) -> int:
        running.set()
        return int(not free.wait(30))

    agent.main = main
    served, silent = agent.connect(client.request("kvm-ifup", ["gc"], {})), agent.connect()
    assert running.wait(30)
    agent.do(agent.server.close)
    agent.do(agent.server.close)  # once more changes nothing
    assert rest(silent) == b""
    with pytest.raises(ConnectionRefusedError):
        agent.connect()
    free.set()
    assert rest(served).lstrip(client.ALIVE)[:2] == client.DONE + b"\0"


@pytest.mark.parametrize("reserve", [True, False])
def test_without_descriptors_it_says_so_and_recovers(
    reserve: bool, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the one that it keeps it tells the script, who need not wait; without it, it waits until there are some."""
    left = [1 if reserve else 3]
    said: list[str] = []
    monkeypatch.setattr(agent.server, "say", said.append)
    if not reserve:
        assert agent.server._reserve is not None
        os.close(agent.server._reserve)
        agent.server._reserve = None
        monkeypatch.setattr(hook_server, "spare", lambda: None)
    accept = agent.server.listener.accept

    class Listener:
        """Refuses at first, as with EMFILE."""

        def accept(self) -> object:
            if left[0]:
                left[0] -= 1
                raise OSError(24, "Too many open files")
            return accept()

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    real = agent.server.listener
    monkeypatch.setattr(hook_server, "PAUSE", 0.001)
    monkeypatch.setattr(agent.server, "listener", Listener())
    if reserve:
        with pytest.raises((client.NotUs, OSError)):
            client.by_agent("kvm-ifup", ["gc"], {})
    assert client.by_agent("kvm-ifup", ["gc"], {}) == 0
    assert left == [0]
    assert len(said) == 1
    assert "no descriptors" in said[0]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_that_had_too_few_descriptors_is_handed_back(agent: Agent, number: int, inside: bool) -> None:
    """Also if that is why something could not be put back: the script puts it back first."""
    error: KvmIfupError = KernelError("too few", errno=number)
    if inside:
        cause, error = error, RollbackError("could not put back")
        error.__cause__ = cause

    agent.main = lambda *_: error.code
    agent.failures.append(error)
    with pytest.raises(client.NotUs, match="no descriptors"):
        client.by_agent("kvm-ifup-post", [], {})


# --- an agent that is none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"", b".", b"...", b"!", b"?", b"=", b"=\0", b"=\0\0\0\0\5abc", b".=\0\0\0\0\0"])
def test_an_answer_that_is_none_is_an_error_and_nothing_counts_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(client, "SOCKET", str(tmp_path / "sock"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(client.SOCKET)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1 << 20)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises((client.NotUs, OSError)):
            client.by_agent("kvm-ifup", ["gc"], {})
        thread.join()


def test_no_agent_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SOCKET", str(tmp_path / "sock"))
    with pytest.raises(FileNotFoundError):
        client.by_agent("kvm-ifup", ["gc"], {})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(client.SOCKET)
    assert os.path.exists(client.SOCKET)
    with pytest.raises(ConnectionRefusedError):
        client.by_agent("kvm-ifup", ["gc"], {})
