"""Who else has announced a guest: said rarely, defended rarely, and written down for check."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from kvmifup.agent import rivals as room
from kvmifup.agent.loop import Loop
from kvmifup.agent.rivals import DEFEND, MACS, Heard, Rivals
from kvmifup.agent.runner import Runner
from kvmifup.core.model import Config
from kvmifup.node import announce
from kvmifup.runs import rivals
from kvmifup.runs.rivals import RECENT, Rival

from .samples import ROUTED, into

MAC = "02:00:00:00:00:0b"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    now = time.monotonic()
    one = Rival("192.0.2.8", "eth0", MAC, now - 20, now, 7)
    old = Rival("192.0.2.9", "eth0", MAC, now - RECENT - 20, now - RECENT - 10, 7)
    to_come = Rival("192.0.2.10", "eth0", MAC, now + 100, now + 200, 7)  # of before the node was booted
    rivals.save(tmp_path, [one, old, to_come])
    assert rivals.recent(tmp_path) == [one]
    assert [path.name for path in tmp_path.iterdir()] == ["rivals.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '[{"address": "192.0.2.8"}]', "null", "\udcff"])
def test_what_is_none_names_nobody(tmp_path: Path, text: str) -> None:
    rivals.path(tmp_path).write_bytes(text.encode("utf-8", "surrogateescape"))
    rivals.path(tmp_path).chmod(0o600)
    assert rivals.recent(tmp_path) == []


def test_what_others_could_have_written_names_nobody(tmp_path: Path) -> None:
    now = time.monotonic()
    rivals.save(tmp_path, [Rival("192.0.2.8", "eth0", MAC, now, now, 1)])
    file = rivals.path(tmp_path)
    file.chmod(0o622)
    assert rivals.recent(tmp_path) == []
    file.chmod(0o600)
    file.rename(tmp_path / "other")
    file.symlink_to("/etc/hostname")
    assert rivals.recent(tmp_path) == []


def test_a_flood_of_machines_is_named_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    sent: list[float] = []

    def send(_messages: object) -> list[object]:
        sent.append(time.monotonic())
        return []

    monkeypatch.setattr(announce, "send", send)
    monkeypatch.setattr(room, "WRITE", 0.01)
    loop = Loop()
    runner = Runner(tmp_path, into(said))
    runner.config = Config()
    one = Rivals(loop, runner)
    one.look_after({("eth0", "192.0.2.8"): ROUTED})
    for number in range(2000):
        mac = f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"
        one.confirm(ROUTED, [Heard("192.0.2.8", f"announced by {mac} on eth0", "eth0", mac, 3)])
    assert (len(said), len(sent)) == (MACS, 1)
    loop.later(0.1, loop.stop)
    loop.run()
    loop.close()
    written = json.loads(rivals.path(tmp_path).read_text())
    assert len(written) == room.WRITTEN
    assert written[-1]["mac"] == "02:00:00:00:07:cf"
    assert len(rivals.recent(tmp_path)) == room.WRITTEN
    assert 'kvm_ifup_rival_announcements_total{uplink="eth0"} 6000' in runner.metrics.text()
    assert DEFEND >= 10  # RFC 5227, section 2.4
