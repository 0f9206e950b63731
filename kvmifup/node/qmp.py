"""Asks a QEMU one question through its QMP socket, for a limited time.

A QMP socket serves one client at a time: on a busy one nobody answers.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from kvmifup.core.errors import NotReadyError

PATIENCE = 1.0  # seconds for the whole talk; it takes a few ms
MAX_BYTES = 1 << 20  # a QEMU may be its guest's by now


def ask(path: Path, command: str, **arguments: object) -> Any:
    """The answer of the QEMU behind the socket *path* to *command*. Raises NotReadyError."""
    ends = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as caller:
        try:
            caller.settimeout(PATIENCE)
            caller.connect(str(path))
            talk = Talk(caller, ends)
            talk.message("QMP")
            talk.say({"execute": "qmp_capabilities"})
            talk.message("return")
            talk.say({"execute": command, "arguments": arguments})
            return talk.message("return")
        except TimeoutError:
            why = "it is busy"
        except OSError as error:
            why = error.strerror or str(error)
        except (ValueError, RecursionError):
            why = "it does not answer in QMP"
    raise NotReadyError(f"no answer from QEMU on {path}: {why}")


class Talk:
    """A connection to a QEMU that ends at a certain time."""

    def __init__(self, caller: socket.socket, ends: float) -> None:
        self._caller, self._ends = caller, ends
        self._text = b""
        self._read = 0

    def say(self, message: object) -> None:
        """Send *message*. Raises OSError."""
        self._caller.sendall(json.dumps(message).encode() + b"\n")

    def message(self, key: str) -> Any:
        """What the next message with *key* says; events come in between. Raises OSError and ValueError."""
        while True:
            line, found, rest = self._text.partition(b"\n")
            if not found:
                self._more()
                continue
            self._text = rest
            message = json.loads(line)
            if not isinstance(message, dict) or "error" in message:
                raise ValueError(line)
            if key in message:
                return message[key]

    def _more(self) -> None:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._caller.settimeout(left)
        data = self._caller.recv(65536)
        self._read += len(data)
        if not data or self._read > MAX_BYTES:
            raise ValueError(f"it ends after {self._read} bytes")
        self._text += data
