"""Who does not read what the agent says, or has it say a lot, holds up nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from harness import hooks, manager, nodes, tools, wire
from harness.addresses import IPS
from harness.agents import WIRED, phase, running, through, until, wired
from harness.guests import answering, arrived, garp, rarp
from harness.nodes import Node


@contextlib.contextmanager
def unread() -> Iterator[subprocess.Popen[bytes]]:
    """An agent whose stderr is a pipe that is full, and that nobody reads."""
    reader, writer = os.pipe()
    # Through another open file: the agent's own must stay blocking.
    filler = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        hooks.command("kvm-ifupd"), env=tools.CLEAN, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer
    )
    try:
        assert os.read(reader, 4096) == b"kvm-ifupd: ready\n"
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(filler, bytes(4096))
        yield process
    finally:
        process.kill()
        process.wait()
        for descriptor in (reader, writer, filler):
            os.close(descriptor)


def test_an_agent_whose_stderr_nobody_reads_goes_on(uplinked: Node) -> None:
    with unread() as agent:
        for number in range(5):
            guest = uplinked.guest(f"tap{number}")
            ip, mac = [f"192.0.2.{50 + number}"], f"aa:00:00:00:02:{number:02x}"
            manager.write_nic(f"tap{number}", mode="routed", ip=ip, mac=mac, incoming=True, instance=f"vm{number}")
            through("kvm-ifup-pre", f"tap{number}")
            until(partial(heard, guest, mac))
        through("kvm-ifdown", "tap0")
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(tools.PATIENCE) == 0


def heard(guest: wire.Tap, mac: str) -> bool:
    """Whether the agent has heard *guest*, which speaks once more."""
    guest.send(rarp(mac))
    return phase(guest.name) == "post"


def test_an_agent_that_cannot_start_does_not_wait_for_a_reader(uplinked: Node) -> None:
    with running(), unread_pipe() as full:
        process = subprocess.Popen(hooks.command("kvm-ifupd"), env=tools.CLEAN, stdin=subprocess.DEVNULL, stderr=full)
        assert process.wait(tools.PATIENCE) == 75


@contextlib.contextmanager
def unread_pipe() -> Iterator[int]:
    """The end of a full pipe to write to, for a child: it blocks."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    try:
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


def test_forged_announcements_do_not_fill_the_log(uplinked: Node) -> None:
    with running() as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        with answering(guest):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                for number in range(100):
                    client.send(garp(f"02:00:00:00:0b:{number:02x}"))
            agent.heard("the guest runs here")
            assert wired() == WIRED
        assert len(agent.said().splitlines()) < 70


def test_a_watcher_that_has_stopped_holds_up_nobody(uplinked: Node) -> None:
    out = Path("/run/watch.stopped")
    with running(), out.open("w") as file:
        watcher = subprocess.Popen(
            hooks.command("kvm-ifup", "watch"), env=tools.CLEAN, stdin=subprocess.DEVNULL, stdout=file
        )
        until(lambda: list((manager.RUN_DIR / "watch").glob("*.sock")))
        watcher.send_signal(signal.SIGSTOP)
        nodes.add_tap()
        manager.write_nic(mode="routed", ip=IPS)
        for _ in range(30):  # an agent that waited for it would not do them
            through("kvm-ifup-post", "tap0")
            through("kvm-ifdown", "tap0")
        watcher.send_signal(signal.SIGCONT)
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(tools.PATIENCE) == 0
