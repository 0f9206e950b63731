"""The start of every command: hand it to the agent, or else do it in this process.

Scripts run this with almost nothing imported, because every import delays the start of a VM. So it uses no
`os`, `socket` or `struct`, and the fields of a message are separated by NULs, which neither arguments
nor variables can contain.

A request is a length (4 bytes, big-endian) and that many bytes, `PROTOCOL` and the version first. While the agent
works, it answers with `ALIVE` every `HEARTBEAT` seconds. In the end it answers with `DONE`, the exit code (1 byte), and
the texts for stdout and stderr, each with its length (4 bytes). Or it answers `REFUSED` and why, and hangs up.
"""

import _socket
import sys
from posix import _exit, environ, get_terminal_size, geteuid, isatty, stat, write

from kvmifup import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

SOCKET = "/run/kvm-ifup/agent.sock"
FOR_OTHERS = 0o022  # the bits of a mode that let others write
PROTOCOL = b"1"
ALIVE, DONE, REFUSED = b".", b"=", b"!"
HEARTBEAT = 0.5  # seconds
# Whole seconds without a sign of life after which the agent counts as stuck. It may only be busy, with all the guests
# of a node that has just booted: then it is better to wait, because without it all takes several times as long.
PATIENCE = 10
NAMESPACE = "/proc/self/ns/net"

# These paths may be relative, so the command runs here. So do `nic`, which reads standard input, and `watch`,
# which does not end.
OURSELVES = ("--config", "--run-dir", "nic", "watch")


def script(program: str) -> "NoReturn":
    """Run *program* with the arguments of this process, and exit with its code: all that a script does."""
    why = "--config, --run-dir, nic or watch given"
    if not any(argument.startswith(OURSELVES) for argument in sys.argv[1:]):
        try:
            _exit(by_agent(program, sys.argv[1:], environ))
        except KeyboardInterrupt:  # the agent sees that we have gone, and puts back what it has done
            say(2, f"{program}: interrupted by SIGINT (run it again)\n".encode())
            _exit(75)
        except (FileNotFoundError, ConnectionRefusedError):
            why = "there is none"
        except (BrokenPipeError, ConnectionResetError):
            why = "it ended"
        except BlockingIOError:
            why = "it does not answer"
        except (NotUs, OSError) as error:
            why = str(error)
    if sys.flags.no_site:
        import site

        site.main()
    if program != "kvm-ifup":
        import gc

        gc.disable()  # a hook ends before there is much to collect, and looking for it takes 4 ms
    from kvmifup.commands import main

    main.script(program, f"done without the agent: {why}")


class NotUs(Exception):
    """Why the agent has not done it."""


def by_agent(program: str, argv: list[str], environment: "Mapping[bytes, bytes]") -> int:
    """Have the agent run *program*; returns the exit code. Raises NotUs or OSError if it has not run it.

    What it says goes to our stdout and stderr.
    """
    with _Connection() as connection:
        connection.send(request(program, argv, environment))
        while (sign := connection.exactly(1)) == ALIVE:
            pass
        if sign != DONE:
            raise NotUs("it refuses: " + connection.rest().decode("utf-8", "replace"))
        code = connection.exactly(1)[0]
        for descriptor in (1, 2):
            output = connection.exactly(int.from_bytes(connection.exactly(4), "big"))
            why = say(descriptor, output)
            if why and descriptor == 1:
                say(2, f"{program}: stdout: {why}\n".encode())
    return code


def say(descriptor: int, output: bytes) -> str:
    """Write *output*. Why it is lost, if it is; not that nobody reads it. It does not change what was done."""
    try:
        while output:
            output = output[write(descriptor, output) :]
    except BrokenPipeError:
        pass
    except OSError as error:
        return str(error.strerror)
    return ""


def request(program: str, argv: list[str], environment: "Mapping[bytes, bytes]") -> bytes:
    """The request to run *program* with *argv* and *environment*, with its length."""
    terminals = "".join("y" if isatty(descriptor) else "n" for descriptor in (1, 2))
    head = (__version__, str(stat(NAMESPACE).st_ino), terminals, program, str(len(argv)), *argv)
    fields = [PROTOCOL, *(field.encode("utf-8", "surrogateescape") for field in head)]
    fields += [name + b"=" + value for name, value in environment.items()]
    if program == "kvm-ifup" and terminals[0] == "y" and not environment.get(b"COLUMNS"):
        fields.append(b"COLUMNS=%d" % get_terminal_size(1)[0])  # the agent cannot ask
    body = b"\0".join(fields)
    return len(body).to_bytes(4, "big") + body


class _Connection:
    """A connection to the agent."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        if self._socket.fileno() <= 2:
            raise NotUs("a standard stream is closed")
        # Not settimeout: that would poll before each call.
        patience = PATIENCE.to_bytes(8, sys.byteorder) + bytes(8)  # struct timeval
        for option in (_socket.SO_RCVTIMEO, _socket.SO_SNDTIMEO):
            self._socket.setsockopt(_socket.SOL_SOCKET, option, patience)
        # Before anything is said: nobody else may be listening there, nor have put another's socket there.
        directory = SOCKET[: SOCKET.rfind("/")]
        place = stat(directory)
        if place.st_uid not in (0, geteuid()) or place.st_mode & FOR_OTHERS:
            raise NotUs(f"others can write to {directory}")
        self._socket.connect(SOCKET)
        peer = self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)  # struct ucred: pid, uid, gid
        if int.from_bytes(peer[4:8], sys.byteorder) not in (0, geteuid()):
            raise NotUs("who listens there is not root")

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send all of *data*, unless the agent has hung up: then it may have said why."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def rest(self) -> bytes:
        """All that comes until the agent hangs up."""
        data = b""
        while more := self._socket.recv(4096):
            data += more
        return data

    def exactly(self, size: int) -> bytes:
        """The next *size* bytes. Raises NotUs when the agent ends, BlockingIOError when it is stuck."""
        data = b""
        while len(data) < size:
            more: bytes = self._socket.recv(size - len(data))
            if not more:
                raise NotUs("it ended")
            data += more
        return data
