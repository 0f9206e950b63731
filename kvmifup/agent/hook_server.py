"""Run the commands that scripts hand over (`kvmifup.client`): each in a thread, as they would run them."""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from kvmifup import __version__
from kvmifup.agent.loop import Loop, Timer
from kvmifup.client import ALIVE, DONE, HEARTBEAT, NAMESPACE, PROTOCOL, REFUSED
from kvmifup.commands import arguments, main
from kvmifup.commands.main import Observer
from kvmifup.core import signals
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Background
from kvmifup.core.records import record

MAX_REQUEST = 1 << 20  # bytes
MAX_EXCHANGES = 1024
MANY = 4  # of them
AT_ONCE = 32  # scripts that are taken in before the loop does anything else
TO_ASK = 5.0  # seconds that a script may take to say what it wants
PAUSE = 0.1  # seconds without new scripts when there are no descriptors left
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
TOO_FEW = "it has no descriptors or no memory left"
SAID = 60.0  # seconds until that is said again
CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


@record
class Request:
    """A command to run, and whether its stdout and stderr are terminals."""

    program: str
    argv: tuple[str, ...]
    environ: dict[str, str]
    terminals: tuple[bool, bool]


class Refused(Exception):
    """A request that is not for us."""


def exhausted(error: BaseException | None) -> bool:
    """Whether *error* is that this process has no more of something that a script has by itself."""
    return error is not None and (getattr(error, "errno", None) in EXHAUSTED or exhausted(error.__cause__))


def parse(body: bytes) -> Request:
    """The request in *body*. Raises Refused for one that is not of this version, program and namespace."""
    fields = body.split(b"\0")
    try:
        protocol, version, namespace, terminals, program, count = fields[:6]
        rest = [field.decode("utf-8", "surrogateescape") for field in fields[6:]]
        if (protocol, version.decode()) != (PROTOCOL, __version__) or int(namespace) != Path(NAMESPACE).stat().st_ino:
            raise Refused
        if program.decode() not in arguments.DOES:
            raise Refused
        split = int(count)
        environ = dict(one.partition("=")[::2] for one in rest[split:] if one)
        return Request(program.decode(), tuple(rest[:split]), environ, (terminals[:1] == b"y", terminals[1:] == b"y"))
    except ValueError:
        raise Refused from None


class Stream(io.StringIO):
    """What a command writes, for a script whose own stream may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        """Whether the script's stream is a terminal."""
        return self._terminal

    @property
    def content(self) -> bytes:
        """All of it, with its length."""
        data = self.getvalue().encode("utf-8", "surrogateescape")
        return len(data).to_bytes(4, "big") + data


class HookServer:
    """Listens on *listener* and runs what is asked for; for *background* and *observer* see `kvmifup.commands.main`.

    Without descriptors for a script it says so at once, to the script and by *say*; then the script does it by itself.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        background: Background,
        observer: Observer | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.loop = loop
        self.listener = listener
        self.background = background
        self.observer = observer
        self.say = say
        self._said = -SAID
        self._reserve = spare()  # so that somebody who comes can be told when there are none left
        self.exchanges: set[Exchange] = set()
        self.last = time.monotonic()  # when somebody last wanted something
        self.closed = False
        self._listen()

    def _accept(self) -> None:
        # Several at a time: who waits to be taken in has no sign of life until then.
        for _ in range(AT_ONCE):
            try:
                connection = self.listener.accept()[0]
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._turn_away()
                return
            if not welcome(connection) or len(self.exchanges) >= MAX_EXCHANGES:
                connection.close()
                continue
            self.last = time.monotonic()
            exchange = Exchange(self, connection)
            self.exchanges.add(exchange)
            exchange.read()  # the request is there already, nearly always

    def _turn_away(self) -> None:
        """Tell who waits that there are no descriptors left, with the one that is kept for this."""
        self.short()
        if self._reserve is None:
            self.loop.ignore(self.listener)  # it stays readable: that would be a busy loop
            self.loop.later(PAUSE, self._listen)
        else:
            os.close(self._reserve)
            with suppress(OSError), self.listener.accept()[0] as connection:
                if welcome(connection):
                    connection.setblocking(False)
                    connection.send(REFUSED + TOO_FEW.encode())
                    connection.recv(65536)  # what is not read makes it an error for the script
        self._reserve = spare()

    @property
    def crowded(self) -> bool:
        """Whether many scripts wait for their answers."""
        return len(self.exchanges) > MANY

    def short(self) -> None:
        """There is not enough of something. For any thread."""
        now = time.monotonic()
        if now - self._said >= SAID:
            self._said = now
            self.say(f"{TOO_FEW}: scripts do their work themselves")

    def _listen(self) -> None:
        if not self.closed:
            self.loop.watch(self.listener, self._accept)

    def listen_on(self, listener: socket.socket) -> None:
        """From now on scripts come in by *listener*."""
        with suppress(KeyError):  # during a pause
            self.loop.ignore(self.listener)
        self.listener.close()
        self.listener = listener
        self._listen()

    def close(self) -> None:
        """Take no new scripts, nor any that has not yet said what it wants; what runs comes to its end."""
        if self.closed:
            return
        self.closed = True
        with suppress(KeyError):  # during a pause
            self.loop.ignore(self.listener)
        self.listener.close()
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        for exchange in list(self.exchanges):
            if not exchange.running:
                exchange.end()


def spare() -> int | None:
    """A descriptor to give back when one is needed; None if there is none to be had."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def welcome(connection: socket.socket) -> bool:
    """Whether who calls may have us do something."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _pid, uid, _gid = CREDENTIALS.unpack(credentials)
    return uid in (0, os.geteuid())


class Exchange:
    """One connection, from its request to its answer."""

    def __init__(self, server: HookServer, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.server = server
        self.loop = server.loop
        self.connection = connection
        self.received = b""
        self.running = False
        self.gone = False
        self.answering = threading.Lock()
        self._end_of_it = select.poll()
        self._end_of_it.register(connection, select.POLLRDHUP)
        self.timer: Timer | None = self.loop.later(TO_ASK, self.end)
        self.loop.watch(connection, self.read)

    def read(self) -> None:
        """See what the script has sent, or that it has gone."""
        try:
            data = self.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.gone = True  # `signals.checkpoint` in the thread sees it
            self._stop_watching()
            if not self.running:
                self.end()
            return
        if self.running:
            return
        self.received += data
        if len(self.received) < 4:
            return
        size = int.from_bytes(self.received[:4], "big")
        if not 0 < size <= MAX_REQUEST:
            self.end()
        elif len(self.received) >= 4 + size:
            self._start(self.received[4 : 4 + size])

    def _start(self, body: bytes) -> None:
        self.received = b""
        assert self.timer is not None
        self.timer.cancel()
        try:
            request = parse(body)
        except Refused:
            self._send(REFUSED + b"another version or program, or another network namespace")
            self.end()
            return
        # A script that we have kept waiting for too long has done it by itself: then it must not be done again.
        if self._hung_up():
            self.end()
            return
        self.running = True
        self.timer = self.loop.later(HEARTBEAT, self._beat)
        self.loop.work(partial(self._run, request), lambda _: self.end(), hook=True)

    def _hung_up(self) -> bool:
        return bool(self._end_of_it.poll(0))

    def _run(self, request: Request) -> None:
        """In a thread: run the command, and answer."""
        out, err = (Stream(terminal) for terminal in request.terminals)

        def observe(program: str, code: int, seconds: float, failures: Sequence[KvmIfupError]) -> None:
            answer = DONE + bytes([code]) + out.content + err.content
            if any(map(exhausted, failures)):  # whatever had been done is undone, or can be
                self.server.short()
                answer = REFUSED + TOO_FEW.encode()
            self._answer(answer)
            if self.server.observer:
                self.server.observer(program, code, seconds, failures)

        # Not only what the loop has noticed: after a stop (SIGSTOP) this thread may go on before it.
        with signals.while_wanted(lambda: self.gone or self._hung_up()):
            main.main(
                request.program,
                request.argv,
                request.environ,
                out,
                err,
                self.server.background,
                observer=observe,
            )

    def _answer(self, answer: bytes) -> None:
        with self.answering, suppress(OSError):
            # From here, not from the loop, which may be busy.
            sent = 0
            with suppress(BlockingIOError):
                sent = self.connection.send(answer)
            if sent < len(answer):  # the script takes a while to read long output
                self.connection.settimeout(TO_ASK)
                self.connection.sendall(answer[sent:])

    def _beat(self) -> None:
        if self.answering.acquire(blocking=False):  # never in the middle of an answer
            self._send(ALIVE)
            self.answering.release()
            self.timer = self.loop.later(HEARTBEAT, self._beat)

    def _send(self, data: bytes) -> bool:
        try:
            return self.connection.send(data) == len(data)
        except OSError:
            return False

    def _stop_watching(self) -> None:
        with suppress(KeyError, ValueError):
            self.loop.ignore(self.connection)

    def end(self) -> None:
        """Hang up."""
        if self.timer:
            self.timer.cancel()
        self._stop_watching()
        self.connection.close()
        self.server.exchanges.discard(self)
