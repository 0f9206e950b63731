"""The situations that the tests of rollback, crashes and repetition go through: a NIC, a tap, and what was before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness import manager, nodes, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.hooks import call, check

NICS: dict[str, dict[str, Any]] = {
    "bridged": {"mode": "bridged", "link": "br0"},
    "bridged, filter": {"mode": "bridged", "link": "br0", "ip": [GUEST_IP4, GUEST_IP6], "filter": "address"},
    "routed, table": {
        "mode": "routed", "link": "100", "ip": [GUEST_IP4, "198.51.100.0/29", GUEST_IP6],
    },
    "routed": {"mode": "routed", "ip": [GUEST_IP4, GUEST_IP6]},
}  # fmt: skip
# So many writes the whole of each takes at least, from any tap: a loop over all of them that ends early has
# missed some. Without the announcement: its failure undoes nothing.
WRITES = {"bridged": 4, "bridged, filter": 5, "routed, table": 19, "routed": 16}


@dataclass(frozen=True)
class Scene:
    """One run of *program* on tap0, which is *tap* ("fresh", "elsewhere"), perhaps after the hook *earlier*."""

    nic: str
    tap: str = "fresh"
    program: str = "kvm-ifup-post"
    earlier: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.nic, self.tap, self.program, self.earlier and f"after {self.earlier}")))

    @property
    def least(self) -> int:
        """The fewest writes that the run can take."""
        return WRITES[self.nic] if self.earlier is None else 1

    def make_tap(self) -> None:
        """tap0, for the first time or anew."""
        nodes.add_tap()
        if self.tap == "elsewhere":
            tools.ip("link set tap0 address 02:00:00:00:77:77 master br1 up")

    def set_up(self) -> None:
        """Bridges, the tap, its NIC file; to be called on a node with an uplink."""
        nodes.add_bridge("br0", mtu=9000)
        nodes.add_bridge("br1")
        self.make_tap()
        manager.write_nic(**{"incoming": True, **NICS[self.nic], **self.more})
        self.prepare()

    def prepare(self) -> None:
        """What was run before."""
        if self.earlier:
            check(call(self.earlier, "tap0"), 0)


def scenes(*, elsewhere: bool = True) -> list[Scene]:
    """Each kind of NIC, from each state in which a hook can find its tap."""
    return [
        scene
        for nic in NICS
        for scene in (
            Scene(nic),
            *([Scene(nic, "elsewhere")] if elsewhere else []),
            *([Scene(nic, earlier="kvm-ifup-pre")] if not nic.startswith("bridged") else []),
        )
    ]
