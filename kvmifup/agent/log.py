"""The agent's log: lines on stderr that nobody has to wait for, and never too many of one kind.

Who reads stderr may stop, and then a write there waits for as long as it likes. So a thread writes, and what it cannot
write in time is left out. Without memory for a thread, as much as fits is written at once. Who sends frames to the node
can have many lines written. So each kind of line has an allowance, and what is beyond it is left out, too. What was
left out is counted, and said.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from select import PIPE_BUF, POLLOUT, poll

from kvmifup.agent.systemd import is_journal
from kvmifup.core.text import printable
from kvmifup.tell import syslog

WAITING = 1000  # lines that may wait to be written
BURST, EVERY = 50, 1.0  # lines of a kind at once; seconds until there may be one more
REPORT = 10.0  # seconds between two reports of what was left out
REPORTED = 10  # kinds in one report
KINDS = 4096  # that are remembered
PAUSE = 0.01  # seconds between two looks whether there is room, if there is no thread that waits for it


class Allowance:
    """How many lines of one kind may still be written, and what was left out since the last report."""

    def __init__(self, now: float) -> None:
        self._lines = float(BURST)
        self._at = now
        self.left_out = 0
        self.last = ""  # one of those left out

    def take(self, now: float) -> bool:
        """Whether one more may be written."""
        self._lines = min(BURST, self._lines + (now - self._at) / EVERY)
        self._at = now
        if self._lines < 1:
            return False
        self._lines -= 1
        return True

    def is_full(self, now: float) -> bool:
        """Whether nothing of it is in use: it is the same as a new one."""
        return not self.left_out and self._lines + (now - self._at) / EVERY >= BURST


class Log:
    """Lines of *program* for *descriptor*. For any thread."""

    def __init__(self, program: str, descriptor: int = 2) -> None:
        self._program = program
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._unread = 0  # lines for which there was no room
        self._kinds: dict[tuple[int, str], Allowance] = {}
        self._reported = time.monotonic()
        self._changed = threading.Condition()
        self._busy = False
        self._thread: threading.Thread | None = None

    def say(self, line: str, severity: int = syslog.INFO, kind: str = "") -> bool:
        """Have *line* written, if there is room for one more of its *kind*. Returns whether there was."""
        now = time.monotonic()
        with self._changed:
            allowance = self._kinds.get((severity, kind))
            if allowance is None:
                if len(self._kinds) >= KINDS:
                    self._kinds = {key: one for key, one in self._kinds.items() if not one.is_full(now)}
                allowance = self._kinds[severity, kind] = Allowance(now)
            allowed = allowance.take(now)
            if allowed:
                self._add(line, severity)
            else:
                allowance.left_out += 1
                allowance.last = line
                if self._thread is None and now >= self._reported + REPORT:
                    self._report(now)
                self._changed.notify()
        return allowed

    def write(self, line: str, severity: int = syslog.INFO) -> None:
        """Have *line* written, however many there are of its kind."""
        with self._changed:
            self._add(line, severity)

    def close(self, patience: float = 1.0) -> None:
        """Wait until all is written, but not for a reader that has stopped. Lines after that are written, too."""
        end = time.monotonic() + patience
        with self._changed:
            self._report(time.monotonic())
            while (self._lines or self._busy) and (left := end - time.monotonic()) > 0:
                self._changed.wait(left if self._thread else min(left, PAUSE))
                self._have_written()

    def _add(self, line: str, severity: int) -> None:
        """With the lock: have *line* written.

        It begins with our name, or in systemd's journal, which knows the name, with the priority, as in sd-daemon(3).
        """
        if len(self._lines) >= WAITING:
            self._unread += 1
            return
        start = f"<{severity}>" if is_journal(self._descriptor) else f"{self._program}: "
        self._lines.append(f"{start}{printable(line)}\n".encode("utf-8", "backslashreplace"))
        self._have_written()

    def _have_written(self) -> None:
        """With the lock: have a thread write what there is; each time, as long as there is none."""
        if self._thread is None:
            thread = threading.Thread(target=self._write_all, name="log", daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # there is no memory for it: it may come with the next line
                self._write_what_fits()
                return
            self._thread = thread
        self._changed.notify_all()

    def _write_what_fits(self) -> None:
        """With the lock, and without a thread: write as long as the reader has room, and wait for nobody."""
        room = poll()
        room.register(self._descriptor, POLLOUT)
        while self._lines and any(event & POLLOUT for _, event in room.poll(0)):
            data = self._lines.popleft()
            with suppress(OSError):  # nobody reads it
                # A pipe that takes anything takes so much at once (pipe(7)).
                data = data[os.write(self._descriptor, data[:PIPE_BUF]) :]
                if data:
                    self._lines.appendleft(data)

    def _report(self, now: float) -> None:
        """With the lock: say what was left out."""
        self._reported = now
        full = [one for one in self._kinds.values() if one.left_out]
        for one in full[:REPORTED]:
            self._add(f"{lines(one.left_out)} left out, the last of them: {one.last}", syslog.INFO)
        if rest := sum(one.left_out for one in full[REPORTED:]):
            self._add(f"{lines(rest)} of other kinds left out", syslog.INFO)
        for one in full:
            one.left_out = 0

    def _write_all(self) -> None:
        """In a thread of its own."""
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._lines:
                    left_out = any(one.left_out for one in self._kinds.values())
                    due = max(0.0, self._reported + REPORT - time.monotonic())
                    if left_out and not due:
                        self._report(time.monotonic())
                    else:
                        self._changed.wait(due if left_out else None)
                data = self._lines.popleft()
                self._busy = True
                if self._unread and len(self._lines) < WAITING // 2:
                    unread, self._unread = self._unread, 0
                    self._add(f"{lines(unread)} left out: nobody read them in time", syslog.ERROR)
            with suppress(OSError):  # nobody reads it
                self._write(data)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody has made it non-blocking: then we wait in another way
                waiting = poll()
                waiting.register(self._descriptor, POLLOUT)
                waiting.poll()


def lines(number: int) -> str:
    """So many lines, for people."""
    return f"{number} line{'s' * (number != 1)}"
