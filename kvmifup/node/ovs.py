"""Ports of Open vSwitch bridges, read and changed with ovs-vsctl; each change is one transaction."""

from __future__ import annotations

import errno
import fcntl
import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvmifup.core import ovsport
from kvmifup.core.errors import NotReadyError, ProgramError
from kvmifup.core.records import record
from kvmifup.core.vlans import parts, tagged
from kvmifup.node import programs

TIMEOUT = 10  # seconds that ovs-vsctl waits for the switch
TAKEN = 1.0  # seconds until the switch has taken a port that is in its database, or has said why not
VLANS = "tag,trunks,vlan_mode"  # columns of a port
EXTERNAL = (ovsport.INSTANCE, ovsport.INTERFACE, ovsport.MAC)  # of an interface
DATABASE = "/run/openvswitch/db.sock"  # ovs-vsctl's default
DAEMON = "/run/openvswitch/ovs-vswitchd.pid"  # which ovs-vswitchd holds locked while it runs
FLOCK = struct.Struct("@hhqqi")  # struct flock: type, whence, start, length, pid


@record
class Switch:
    """What is in the switch's database at one moment.

    *bridges*: by name the bridge that it is and its VLAN, which is not 0 for a fake bridge: it stands for that VLAN
    of another bridge. *ports*: by name what `kvmifup.core.ovsport` says. A port of a fake bridge is one of the other.
    """

    bridges: Mapping[str, tuple[str, int]]
    ports: Mapping[str, str]


NONE = Switch({}, {})


def is_there() -> bool:
    """Whether this node has a switch: somebody listens at its database. This costs next to nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as database:
        database.settimeout(TIMEOUT)
        try:
            database.connect(DATABASE)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EACCES)
    return True


def is_alive() -> bool:
    """Whether ovs-vswitchd runs: it does what the database says."""
    try:
        with open(DAEMON, "rb") as file:
            lock = fcntl.fcntl(file, fcntl.F_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError:
        return False
    kind: int = FLOCK.unpack(lock)[0]
    return kind != fcntl.F_UNLCK


def read() -> Switch:
    """All bridges and ports, asked for in one transaction. Raises NotReadyError when the database does not answer."""
    found = answer(
        *("--format=json", "--columns=name,ports", "list", "Bridge"),
        *("--", f"--columns=_uuid,name,fake_bridge,other_config,{VLANS}", "list", "Port"),
        *("--", "--columns=name,ofport,error,external_ids", "list", "Interface"),
    )
    bridges, ports, interfaces = (json.loads(line)["data"] for line in found.output.splitlines())
    bridge_of = {port[1]: name for name, cell in bridges for port in members(cell)}
    problems = {name: problem(members(number), members(error)) for name, number, error, _ in interfaces}
    ids = {name: pairs(cell, EXTERNAL) for name, *_, cell in interfaces}
    fakes = {name: (bridge_of[uuid[1]], tag) for uuid, name, fake, _, tag, *_ in ports if fake and members(tag)}
    where = {}
    for uuid, name, _fake, config, *columns in ports:
        of_both = (*pairs(config, (ovsport.TRANSIENT,)), *ids.get(name, ()))
        where[name] = described(bridge_of[uuid[1]], columns, of_both) + problems.get(name, "")
    return Switch({name: (name, 0) for name, _ in bridges} | fakes, where)


def problem(number: list[Any], error: list[Any]) -> str:
    """Why the switch does not have an interface, as it stands after a port; *number* is its ofport."""
    if error:
        return f" ({error[0]})"
    return "" if number and number[0] > 0 else " (not taken by ovs-vswitchd)"


def described(bridge: str, columns: list[Any], ids: tuple[tuple[str, str], ...]) -> str:
    """What `Switch` says of a port of *bridge*; *columns* are its tag, trunks and vlan_mode (`VLANS`)."""
    tag, trunks, mode = map(members, columns)
    vlan = "".join(f".{one}" for one in tag) + (tagged(trunks) if trunks else "")
    # A mode that `put` would not set is part of the value, so that it is noticed, and put back by an undo.
    other = "" if not mode or mode == [vlan_mode(vlan)] else mode[0]
    return ovsport.Port(bridge, vlan, other, ids).text


def pairs(cell: Any, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What a column that is a map has for *names*."""
    return tuple((name, value) for name, value in cell[1] if name in names)


def put(name: str, value: str | None, now: str | None) -> None:
    """Make *name* the port that *value* describes, as `Switch` has it; None for no port. *now* is what there is.

    Raises ProgramError, also if the switch does not take the port:
    the database has it then.
    """
    # A daemon that is dead finds it when it starts.
    wait = ("--no-wait",) if value is None and not is_alive() else ()
    try:
        done(*wait, *transaction(name, value, now))
    except ProgramError as error:
        # It was stopped while it waited for ovs-vswitchd: the database may have been changed.
        if error.untouched or value is not None or name in read().ports:
            raise
    if value is not None and " (" not in value:
        await_taken(name)


def await_taken(name: str) -> None:
    """Wait until the switch has the port *name*: ovs-vsctl succeeds also if it cannot. Raises ProgramError."""
    deadline = time.monotonic() + TAKEN
    while True:
        _, _, why = read().ports.get(name, " (it is gone").partition(" (")
        if not why:
            return
        if time.monotonic() >= deadline:
            raise ProgramError(f"Open vSwitch has not taken {name}: {why.removesuffix(')')}")
        time.sleep(TAKEN / 20)


def transaction(name: str, value: str | None, now: str | None = None) -> tuple[str, ...]:
    """The arguments of ovs-vsctl for `put`.

    A port that is the same NIC's is changed: it stays in the switch, and keeps what others have set. One that the
    switch does not have, that is on another bridge or another guest's is replaced.
    """
    remove = ("--", "--if-exists", "del-port", name)
    if value is None:
        return remove
    port, there = ovsport.parsed(value), ovsport.parsed(now) if now else None
    columns = []
    for column, sign in (("tag", "."), ("trunks", ":")):
        found = [(first, last) for one, first, last in parts(port.vlan) if one == sign]
        if found:
            texts = (f"{first}-{last}" if first < last else str(first) for first, last in found)
            columns.append(f"{column}={','.join(texts)}")
    if port.vlan or port.mode:
        columns.append(f"vlan_mode={port.mode or vlan_mode(port.vlan)}")
    if port.named(ovsport.TRANSIENT):
        columns.append(f"other_config:{ovsport.TRANSIENT}={port.named(ovsport.TRANSIENT)}")
    ids = [f"external_ids:{one}={quoted(given)}" for one, given in port.ids if one in EXTERNAL]
    macs = {one.named(ovsport.MAC) for one in (port, there) if one} - {None}
    if there is None or there.bridge != port.bridge or len(macs) > 1 or " (" in (now or ""):
        words: tuple[str, ...] = (*remove, "--", "add-port", port.bridge, name, *columns)
    else:
        gone = [one for one in EXTERNAL if there.named(one) and not port.named(one)]
        words = ("--", "clear", "Port", name, *VLANS.split(","))
        words += ("--", "set", "Port", name, *columns) if columns else ()
        words += ("--", "remove", "Interface", name, "external_ids", *gone) if gone else ()
        if there.named(ovsport.TRANSIENT) and not port.named(ovsport.TRANSIENT):
            words += ("--", "remove", "Port", name, "other_config", ovsport.TRANSIENT)
    return (*words, "--", "set", "Interface", name, *ids) if ids else words


def quoted(text: str) -> str:
    """A string as ovs-vsctl takes it: as in JSON, if it is more than a word."""
    return json.dumps(text, ensure_ascii=False)


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


def answer(*arguments: str) -> programs.Result:
    """What ovs-vsctl answers to a question. Raises NotReadyError if there is no answer."""
    try:
        result = vsctl(*arguments)
    except ProgramError as error:
        raise NotReadyError(f"Open vSwitch: {error}", hint="install openvswitch-switch") from None
    if result.code:
        raise NotReadyError(f"Open vSwitch: {result.complaint}", hint="`systemctl start openvswitch-switch`")
    return result


def done(*arguments: str) -> str:
    """The output of ovs-vsctl with *arguments*. Raises ProgramError when it fails."""
    result = vsctl(*arguments)
    if result.code:
        # A signal (below 0) ends it when its time is up, and then the database may have been changed.
        cause = f"ovs-vsctl failed: {result.complaint or f'exit code {result.code}'}"
        raise ProgramError(cause, untouched=result.code > 0)
    return result.output


def vsctl(*arguments: str) -> programs.Result:
    """Run ovs-vsctl with *arguments*. Raises ProgramError if it cannot be started or does not end."""
    return programs.run(("ovs-vsctl", f"--timeout={TIMEOUT}", *arguments), {}, TIMEOUT + 5)
