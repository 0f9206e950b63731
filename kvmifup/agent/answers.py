"""What a guest says of its own addresses, where a configuration may know them better, or worse, than the guest."""

from __future__ import annotations

from kvmifup import phases
from kvmifup.core.model import Nic
from kvmifup.node import frames


class Answers:
    """Which addresses of *nic* its guest has shown to be its own: those in *given*.

    *first* is its first frame, and when it came; *answered*, when the first address was shown.

    A packet that the guest has sent from an address is as good as an answer. It can be forged, but so can ARP, and
    nobody gains by it: these are addresses that the guest is to have. The question is only whether it has them yet.
    """

    def __init__(self, nic: Nic) -> None:
        self._mac = nic.mac
        self._hosts = {phases.bare(prefix) for prefix in nic.ip if phases.is_host(prefix)}
        self._more = len(nic.networks)
        self.first: tuple[str, float] | None = None
        self.answered: float | None = None
        self.given: set[str] = set()

    def take(self, frame: bytes, sent: float) -> None:
        """The guest has *sent* this *frame*. What it announces unasked is an answer as well."""
        self.first = self.first or (frames.name_of(frame), sent)
        found = frames.answer_in(frame) or frames.announcement_in(frame)
        shown = found[0] if found and found[1] == self._mac else frames.sender_in(frame)
        if shown and shown in self._hosts:
            self.answered = self.answered or sent
            self.given.add(shown)

    @property
    def complete(self) -> bool:
        """Whether it has shown all that it can be asked for."""
        return bool(self._hosts) and self.given == self._hosts

    @property
    def whole(self) -> bool:
        """Whether that is all that the NIC has: nobody can be asked for a prefix."""
        return self.complete and not self._more
