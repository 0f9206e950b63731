"""Ports of Open vSwitch bridges, read and changed with ovs-vsctl; each change is one transaction."""

from __future__ import annotations

import json
from typing import Any

from kvmifup.core.errors import NotReadyError, ProgramError
from kvmifup.node import programs

TIMEOUT = 10  # seconds that ovs-vsctl waits for the switch
VLANS = "tag,trunks,vlan_mode"  # columns of a port


def has_bridge(name: str) -> bool:
    """Whether the switch has a bridge *name*. Raises NotReadyError when it does not answer."""
    return answer("br-exists", name, no=2).code == 0


def port(name: str) -> str | None:
    """The bridge and the VLANs of the port *name*: "ovs0" or "ovs0 .100:200"; None if there is no such port.

    VLANs are in Ganeti's notation. Raises ProgramError.
    """
    rows = json.loads(done("--format=json", f"--columns={VLANS}", "find", "Port", f'name="{name}"'))["data"]
    return described(done("port-to-br", name).strip(), rows[0]) if rows else None


def everything() -> tuple[frozenset[str], dict[str, str]]:
    """The names of all bridges, and by name what `port` says of every port; asked for in one transaction.

    A port of a fake bridge (one that stands for a VLAN of another) counts as a port of that other bridge.
    Raises NotReadyError when the switch does not answer.
    """
    found = answer(
        *("--format=json", "list-br"),
        *("--", "--columns=name,ports", "list", "Bridge"),
        *("--", f"--columns=_uuid,name,{VLANS}", "list", "Port"),
    )
    *names, bridges, ports = found.output.split("\n")[:-1]
    bridge_of = {port[1]: name for name, cell in json.loads(bridges)["data"] for port in members(cell)}
    where = {name: described(bridge_of[uuid[1]], vlans) for uuid, name, *vlans in json.loads(ports)["data"]}
    return frozenset(names), where


def described(bridge: str, columns: list[Any]) -> str:
    """What `port` says of a port of *bridge*; *columns* are its tag, trunks and vlan_mode (`VLANS`)."""
    tag, trunks, mode = map(members, columns)
    vlan = "".join(f".{one}" for one in tag) + "".join(f":{one}" for one in sorted(trunks))
    # A mode that `put` would not set is part of the value, so that it is noticed, and put back by an undo.
    other = "" if not mode or mode == [vlan_mode(vlan)] else f" {mode[0]}"
    return f"{bridge} {vlan}{other}".strip() if vlan or other else bridge


def put(name: str, value: str | None) -> None:
    """Make *name* the port that *value*, as `port` says it, describes; None for no port. Raises ProgramError.

    Whatever port of that name there was is replaced.
    """
    done(*transaction(name, value))


def transaction(name: str, value: str | None) -> tuple[str, ...]:
    """The arguments of ovs-vsctl for `put`."""
    remove = ("--", "--if-exists", "del-port", name)
    if value is None:
        return remove
    bridge, vlan, mode, *_ = (*value.split(" "), "", "")
    access, *trunks = vlan.split(":") if vlan else ("",)
    columns = [f"tag={access[1:]}"] if access else []
    if trunks:
        columns.append(f"trunks={','.join(trunks)}")
    if vlan or mode:
        columns.append(f"vlan_mode={mode or vlan_mode(vlan)}")
    return (*remove, "--", "add-port", bridge, name, *columns)


def vlan_mode(vlan: str) -> str:
    """The vlan_mode for *vlan*: access for ".VID", trunk for ":VID:VID", native-untagged for ".VID:VID"."""
    if ":" not in vlan:
        return "access"
    return "native-untagged" if vlan.startswith(".") else "trunk"


def members(cell: Any) -> list[Any]:
    """The values in a column, which is one value or a set of them (RFC 7047, section 5.1)."""
    if isinstance(cell, list) and cell and cell[0] == "set":
        return list(cell[1])
    return [cell]


def answer(*arguments: str, no: int = 0) -> programs.Result:
    """What ovs-vsctl answers to a question; the exit code *no* also counts as an answer.

    Raises NotReadyError if there is no answer.
    """
    try:
        result = vsctl(*arguments)
    except ProgramError as error:
        raise NotReadyError(f"Open vSwitch: {error}", hint="install openvswitch-switch") from None
    if result.code not in (0, no):
        raise NotReadyError(f"Open vSwitch: {result.complaint}", hint="`systemctl start openvswitch-switch`")
    return result


def done(*arguments: str) -> str:
    """The output of ovs-vsctl with *arguments*. Raises ProgramError when it fails."""
    result = vsctl(*arguments)
    if result.code:
        raise ProgramError(f"ovs-vsctl failed: {result.complaint or f'exit code {result.code}'}", untouched=True)
    return result.output


def vsctl(*arguments: str) -> programs.Result:
    """Run ovs-vsctl with *arguments*. Raises ProgramError if it cannot be started or does not end."""
    return programs.run(("ovs-vsctl", f"--timeout={TIMEOUT}", *arguments), {}, TIMEOUT + 5)
