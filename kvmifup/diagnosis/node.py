"""Is this node ready for guests that arrive? What is not, what that leads to in a migration, and what mends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from kvmifup import phases
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import RUNTIME, Config, Nic, Phase, Uplink
from kvmifup.diagnosis.bridged import no_trunk, without_uplink
from kvmifup.diagnosis.findings import Finding, of_error
from kvmifup.diagnosis.firewall import filtered
from kvmifup.diagnosis.routed import surroundings
from kvmifup.diagnosis.state import UPLINK_HINT, Look
from kvmifup.inputs import trust
from kvmifup.inputs.values import as_wired
from kvmifup.node.overview import Overview

# The oldest that are supported. Before Linux 4.20 a question about one table is answered with all of them.
OLDEST = {"Python": (3, 11), "pyroute2": (0, 7, 2), "Linux": (4, 20)}


def node_findings(look: Look, settings: Path) -> Iterator[Finding]:
    """What is to be said about the node; *settings* is where its configuration is."""
    config, kernel, run_dir = look.session.config, look.overview, look.session.run_dir
    nics = []
    for one in look.nics:
        if one.trouble:
            ganetis = one.trouble.where.endswith(RUNTIME)  # its hooks get the NIC in the environment
            why = "nobody can wire it by hand" if ganetis else "a hook for this NIC fails, and QEMU does not start"
            yield of_error(one.trouble, why)
        elif one.nic:
            try:
                nics.append((as_wired(one.nic, config), one.phase))
            except KvmIfupError as error:
                yield of_error(error, "a hook for this NIC fails, and QEMU does not start")
    yield from bridges([nic for nic, _ in nics], look)
    yield from uplinks(nics, config, kernel)
    said: set[tuple[str, str]] = set()
    for nic, _ in nics:
        for finding in filtered(nic, look):
            if (finding.why, finding.mend) not in said:
                said.add((finding.why, finding.mend))
                yield finding
    if not look.agent:
        yield no_agent(needed=any(nic.mode == "routed" for nic, _ in nics))
    yield from permissions(run_dir, "NIC files and journals")
    yield from permissions(settings, "the configuration")
    yield from versions({"Python": sys.version, "pyroute2": version("pyroute2"), "Linux": os.uname().release})


def bridges(nics: Sequence[Nic], look: Look) -> Iterator[Finding]:
    """The bridges of the NICs that this node knows."""
    config, kernel = look.session.config, look.overview
    for nic in {nic.link: nic for nic in nics if nic.mode == "bridged"}.values():
        bridge, name = kernel.facts(nic, config).bridge, nic.link or ""
        if bridge is None or not bridge.is_bridge:
            what = f"{name} is no bridge" if bridge else f"there is no bridge {name}"
            lead = f"no guest on {name} can start or arrive here: code 69"
            yield Finding(what, lead, f"`{phases.bridge_made(name)}`")
            continue
        if not bridge.up:
            yield Finding(f"{name} is down", "no guest can start or arrive here: code 69", f"`ip link set {name} up`")
        if bridge.stp:
            late = 2 * bridge.forward_delay
            refused = late > config.bridged.forwarding_timeout
            yield Finding(
                f"{name} runs STP: a port forwards after {late:g} s",
                "QEMU's announcements would be lost, so no guest is let in: code 69"
                if refused
                else "kvm-ifup-pre waits that long before QEMU starts",
                phases.faster(name, config) if refused else "",
                wrong=refused,
            )
        yield from without_uplink(name, look)
        known = phases.said("multicast_router", config.of_link(name), config.bridged)
        if known is False and look.bridges.querier(name):
            yield Finding(
                f"{name} snoops multicast, and somebody asks who listens",
                "IPv6 neighbour solicitations reach a guest that arrives only when it has answered a querier",
                f"remove multicast_router = false, or `ip link set {name} type bridge mcast_snooping 0`",
            )
        yield from vlans(name, [nic for nic in nics if (nic.mode, nic.link) == ("bridged", name)], look)


def vlans(name: str, nics: Sequence[Nic], look: Look) -> Iterator[Finding]:
    """Whether the bridge *name* can take the VLANs of *nics*, which are on it."""
    filtering, pvid = look.overview.vlans(name)
    with_vlan = [nic for nic in nics if nic.vlan]
    without = len(with_vlan) < len(nics)
    if with_vlan and not filtering:
        yield Finding(
            f"{name} does not filter VLANs",
            "no guest with a VLAN can start or arrive here: code 69",
            f"`{phases.filtering(name)}`; what passes with a tag now no longer does then",
        )
    elif filtering and pvid and without:
        yield Finding(f"{name} filters VLANs: a guest without one is in VLAN {pvid}, untagged", wrong=False)
    elif filtering and without:
        # No command: what gives new ports a VLAN gives it to ports that are there, too.
        yield Finding(
            f"{name} filters VLANs, and a new port is in none: vlan_default_pvid is 0",
            "a guest without a vlan has no network there, and no hook complains",
            "a vlan in its NIC file, another bridge, or mode openvswitch",
        )
    if with_vlan and filtering:
        yield from no_trunk(with_vlan[0], look)


def uplinks(nics: Sequence[tuple[Nic, Phase]], config: Config, kernel: Overview) -> Iterator[Finding]:
    """Where this node answers for its routed guests."""
    routed = [(nic, phase) for nic, phase in nics if nic.mode == "routed"]
    if not routed:
        for name in config.routed.uplinks or ():
            if kernel.ifindex(name) is None:
                yield no_uplink(name)
        yield Finding("no routed NIC is known here, so forwarding on uplinks was not looked at", wrong=False)
    found: dict[tuple[str, int], tuple[Uplink, bool]] = {}  # with whether a guest is answered for there
    lacking: set[int] = set()
    for nic, phase in routed:
        ups = kernel.facts(nic, config).uplinks
        lacking |= {prefix.version for prefix in nic.ip} - {uplink.family for uplink in ups}
        for uplink in ups:
            key = (uplink.name, uplink.family)
            found[key] = uplink, phase is Phase.POST or (key in found and found[key][1])
    each = (uplink_findings(uplink, kernel, answering=answering) for uplink, answering in found.values())
    yield from dict.fromkeys(chain.from_iterable(each))  # one that is down is so for both families
    yield from surroundings([nic for nic, _ in routed], [uplink for uplink, _ in found.values()], kernel, config)
    for family in sorted(lacking):
        yield Finding(
            f"no IPv{family} uplink",
            "nothing answers for routed guests, and their arrival is not announced",
            UPLINK_HINT,
        )


REFUSED = "no routed guest can start or arrive here: code 69"


def no_uplink(name: str) -> Finding:
    """One that the configuration names."""
    return Finding(f"there is no uplink {name}", REFUSED, "name one that is there in [routed] uplinks")


def uplink_findings(uplink: Uplink, kernel: Overview, *, answering: bool) -> Iterator[Finding]:
    """One uplink, for one family; *answering*: it answers for guests already."""
    if not uplink.present:
        yield no_uplink(uplink.name)
    elif not uplink.up:
        yield Finding(f"uplink {uplink.name} is down", REFUSED, f"`ip link set {uplink.name} up`")
    elif uplink.mend:
        yield Finding(
            f"IPv{uplink.family} forwarding is off on uplink {uplink.name}",
            f"{REFUSED}; and guests that are here are cut off",
            f"`sysctl -w {' '.join(uplink.mend)}`",
        )
    place = f"net/ipv{uplink.family}/neigh/{uplink.name}/proxy_delay"
    delay = kernel.setting(place)
    if answering and delay not in (None, "0"):  # before the first guest, post sees to it
        yield Finding(
            f"IPv{uplink.family} proxy_delay on {uplink.name} is {delay}",
            f"who asks for a guest here waits for up to {int(delay or 0) / 100:g} s",
            f"`sysctl -w {place}=0`",
        )


def no_agent(*, needed: bool) -> Finding:
    """Nobody notices arrivals: *needed* for routed guests, which post wires."""
    return Finding(
        "the agent is not there",
        "a routed guest that arrives is cut off until its manager calls kvm-ifup-post",
        "`systemctl enable --now kvm-ifupd.socket`; from a checkout: `scripts/kvm-ifupd &`",
        wrong=needed,
    )


def permissions(directory: Path, what: str) -> Iterator[Finding]:
    """Whether anybody but root could have written in *directory*."""
    for path in (directory, *sorted(directory.rglob("*"))) if directory.is_dir() else ():
        if (path.parent.name in ("lock", "state") and path.suffix != ".json") or path.suffix == ".sock":
            continue
        try:
            trust.check(path, directory)
        except trust.Untrusted as error:
            yield Finding(
                f"{path} is not to be trusted: {error}",
                f"{what} there are refused: code 65, 70 or 78",
                error.mend,
            )
        except OSError:
            continue  # a symlink that leads nowhere, or gone by now


def versions(found: dict[str, str]) -> Iterator[Finding]:
    """What we run on."""
    yield Finding(", ".join(f"{name} {text.split()[0]}" for name, text in found.items()), wrong=False)
    for name, text in found.items():
        digits = [part for part in text.split()[0].replace("-", ".").replace("+", ".").split(".")[:3] if part.isdigit()]
        if tuple(map(int, digits)) < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            yield Finding(f"{name} is older than {oldest}", "hooks may fail in any way", f"upgrade to {oldest}")
