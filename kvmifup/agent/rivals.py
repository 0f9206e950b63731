"""Somebody else announces the address of a guest that runs here: it is defended, and people are told.

Defended means announced again, by which most caches have the right MAC again. Not more often than every `DEFEND`
seconds (DEFEND_INTERVAL of RFC 5227, section 2.4): two machines that both insist must not flood the segment. If the
other one goes on in the meantime, the defence is repeated at the end of it, so that the last word is ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import Place
from kvmifup.core.model import Nic
from kvmifup.core.records import record
from kvmifup.node import announce
from kvmifup.runs import rivals
from kvmifup.runs.rivals import RECENT, Rival
from kvmifup.tell import syslog

DEFEND = 10.0  # seconds between two defences of an address
REMIND = 600.0  # seconds until it is said once more that the same one does
MACS = 4  # that are named for one address in that time
WRITE = 0.5  # seconds from an announcement until it is written down
WRITTEN = 500  # rivals, at most


@record
class Heard:
    """What speaks for a guest's having left: *what*, an address or a prefix, is announced or routed elsewhere.

    *uplink* and *mac* are those of an announcement. *times*: how often it was heard. *patience*: how many seconds the
    guest has to answer, at least, if that is not what others have.
    """

    what: str
    how: str
    uplink: str = ""
    mac: str = ""
    times: int = 1
    patience: float | None = None

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.what} {self.how}"

    def again(self, before: Heard) -> Heard:
        """The same once more."""
        return replace(self, times=before.times + 1)


class Contest:
    """One address on one uplink, which others announce, too."""

    def __init__(self) -> None:
        self.defended = -DEFEND
        self.due = False  # another defence
        self.told: dict[str, float] = {}  # when it was said who does


class Rivals:
    """Who else announces guests that run here."""

    def __init__(self, loop: Loop, runner: Runner) -> None:
        self._loop = loop
        self._runner = runner
        self._guests: Mapping[Place, Nic] = {}
        self._contests: dict[Place, Contest] = {}
        self._rivals: dict[tuple[Place, str], Rival] = {}  # by MAC, too
        self._writing = False

    def look_after(self, guests: Mapping[Place, Nic]) -> None:
        """These guests run here."""
        self._guests = guests
        # What is routed elsewhere has no uplink.
        self._contests = {place: one for place, one in self._contests.items() if place in guests or not place[0]}

    def confirm(self, nic: Nic, heard: Iterable[Heard]) -> None:
        """The guest of *nic* runs here, whatever was *heard*."""
        for one in heard:
            place = one.uplink, one.what
            contest = self._contests.setdefault(place, Contest())
            if one.mac:
                self._runner.metrics.add("kvm_ifup_rival_announcements_total", one.times, uplink=one.uplink)
                self._note(place, one)
                self._defend(place, contest)
            self._tell(nic, one.sentence, "it is announced again" if one.mac else "its route stays", contest)

    def probed(self, place: Place, mac: str) -> None:
        """Somebody with *mac* asks whether an address is free, before it takes it: it learns that it is not."""
        if nic := self._guests.get(place):
            contest = self._contests.setdefault(place, Contest())
            self._defend(place, contest)
            self._tell(nic, f"{place[1]} is wanted by {mac} on {place[0]}", "it is announced", contest)

    def _defend(self, place: Place, contest: Contest) -> None:
        wait = contest.defended + DEFEND - time.monotonic()
        if wait <= 0:
            self._announce(place, contest)
        elif not contest.due:
            contest.due = True
            self._loop.later(wait, partial(self._announce, place, contest))

    def _announce(self, place: Place, contest: Contest) -> None:
        contest.due = False
        contest.defended = time.monotonic()
        if place in self._guests:
            uplink, address = place
            if not announce.send([(uplink, address, address)]):  # else it is down, gone or busy: there is another time
                self._runner.metrics.add("kvm_ifup_defences_total", uplink=uplink)

    def _tell(self, nic: Nic, why: str, done: str, contest: Contest) -> None:
        now = time.monotonic()
        contest.told = {who: when for who, when in contest.told.items() if now - when < REMIND}
        if why not in contest.told and len(contest.told) < MACS:
            contest.told[why] = now
            self._runner.say(f"{why}, but the guest runs here: {done}", nic.label, syslog.WARNING, kind="rivals")

    # --- for `kvm-ifup check` -------------------------------------------------------------------------------

    def _note(self, place: Place, heard: Heard) -> None:
        now = time.monotonic()
        before = self._rivals.pop((place, heard.mac), None)
        self._rivals[place, heard.mac] = Rival(
            heard.what, heard.uplink, heard.mac, before.first if before else now, now,
            heard.times + (before.times if before else 0),
        )  # fmt: skip
        if not self._writing:
            self._writing = True
            self._loop.later(WRITE, self._write)

    def _write(self) -> None:
        self._writing = False
        now = time.monotonic()
        recent = [(key, one) for key, one in self._rivals.items() if now - one.last < RECENT]
        self._rivals = dict(recent[-WRITTEN:])
        with suppress(OSError):  # no room: `check --probe` asks by itself
            rivals.save(self._runner.run_dir, self._rivals.values())
