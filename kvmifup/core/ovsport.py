"""A port of Open vSwitch as text, as the journal and messages have it.

"ovs0", "ovs0 .100:200-299": the bridge and the VLANs (`kvmifup.core.vlans`). A vlan_mode that is never ours is a word
of its own after them. Then come NAME=VALUE, in order: what the switch's database says about whose port it is. " (…)"
at the end says why the switch does not have it.
"""

from __future__ import annotations

import re

from kvmifup.core.records import record

MAC, INTERFACE, INSTANCE = "attached-mac", "iface-id", "kvm-ifup-instance"  # external_ids of the interface
TRANSIENT = "transient"  # other_config of the port: it goes at the next start of the node
NAMES = (MAC, INTERFACE, INSTANCE, TRANSIENT)
_SPECIAL = r"[\s%()]"
_QUOTED = r"%([0-9a-f]+);"


@record
class Port:
    """What there is to say of a port; *ids* has what is set of `NAMES`."""

    bridge: str
    vlan: str = ""
    mode: str = ""
    ids: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The port as text, the same for equal ones."""
        ids = (f"{name}={re.sub(_SPECIAL, _quoted, value)}" for name, value in sorted(self.ids))
        return " ".join(filter(None, (self.bridge, self.vlan, self.mode, *ids)))

    def named(self, name: str) -> str | None:
        """The value of *name*, one of `NAMES`."""
        return dict(self.ids).get(name)


def _quoted(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):x};"


def _plain(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))


def parsed(text: str) -> Port:
    """The port that *text* is, whether the switch has it or not."""
    bridge, *words = text.partition(" (")[0].split(" ")
    ids = [word.partition("=") for word in words if "=" in word]
    plain = [word for word in words if "=" not in word]
    return Port(
        bridge,
        next((word for word in plain if word[0] in ".:"), ""),
        next((word for word in plain if word[0] not in ".:"), ""),
        tuple(sorted((name, re.sub(_QUOTED, _plain, value)) for name, _, value in ids)),
    )


def without(text: str, name: str, value: str) -> str:
    """*text*, without *name*, one of `NAMES`, if that is *value* there."""
    port = parsed(text)
    return Port(port.bridge, port.vlan, port.mode, tuple(one for one in port.ids if one != (name, value))).text
