"""Ports of an Open vSwitch bridge, through ovs-vsctl: one transaction for each change."""

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
    """Where the port *name* is and which VLANs it has: "ovs0" or "ovs0 .100:200"; None if there is no such port.

    Raises ProgramError.
    """
    rows = json.loads(done("--format=json", f"--columns={VLANS}", "find", "Port", f'name="{name}"'))["data"]
    return described(done("port-to-br", name).strip(), rows[0]) if rows else None


def everything() -> tuple[frozenset[str], dict[str, str]]:
    """The names of all bridges, and of all ports what `port` says, with one question. Raises NotReadyError
    when the switch does not answer.

    A port of a bridge that Open vSwitch makes up for a VLAN counts as its parent's.
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
    """A port of *bridge* with these columns (`VLANS`), as `port` says it."""
    tag, trunks, mode = map(members, columns)
    vlan = "".join(f".{one}" for one in tag) + "".join(f":{one}" for one in sorted(trunks))
    # A mode that is not the one we would set makes it another value.
    other = "" if not mode or mode == [vlan_mode(vlan)] else f" {mode[0]}"
    return f"{bridge} {vlan}{other}".strip() if vlan or other else bridge


def put(name: str, value: str | None) -> None:
    """Make *name* the port that *value* says, or no port; whatever port it was is replaced. Raises ProgramError."""
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
    """Open vSwitch's word for ".VID", ":VID:VID" and ".VID:VID"."""
    if ":" not in vlan:
        return "access"
    return "native-untagged" if vlan.startswith(".") else "trunk"


def members(cell: Any) -> list[Any]:
    """What is in a column that holds at most one value, or a set (RFC 7047, section 5.1)."""
    if isinstance(cell, list) and cell and cell[0] == "set":
        return list(cell[1])
    return [cell]


def answer(*arguments: str, no: int = 0) -> programs.Result:
    """What ovs-vsctl says to a question; the exit code *no* is an answer, too. Raises NotReadyError for none."""
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
    """Run ovs-vsctl."""
    return programs.run(("ovs-vsctl", f"--timeout={TIMEOUT}", *arguments), {}, TIMEOUT + 5)
