"""A node of the tests' own: the test process in fresh namespaces, a client on its uplink, guests on its taps.

    client namespace                 this process's namespace: "the node"
        eth0 ───────── veth ──────────── eth0        tap0 ── a descriptor held by the test: the guest

`isolate` takes the whole process out of the host's namespaces, for good. `fresh_node` gives each test a
network namespace, a /sys and a /run that nothing has been in.

What is asserted on comes from `ip`, `bridge` and /proc/sys, never from kvmifup or pyroute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.wire import Tap, Wire, attach, packet_socket

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
RUN_DIR = Path("/run/kvm-ifup")
TUN = "/dev/net/tun"
SYSCTL = Path("/proc/sys/net")

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # linux/mount.h
MNT_DETACH = 2
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

TOOLS = ("ip", "bridge", "ping", "unshare", "setpriv")
# What a process manager hands down; a developer's own INTERFACE must not reach the scripts.
CLEAN: Mapping[str, str] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# Nothing here is expected to take long: this only turns a hang into a failure.
PATIENCE = 60

NODE_MAC, CLIENT_MAC, GUEST_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:01", "aa:00:00:35:ac:01"
NODE_IP4, CLIENT_IP4, GUEST_IP4 = "192.0.2.11", "192.0.2.1", "192.0.2.8"
NODE_IP6, CLIENT_IP6, GUEST_IP6 = "2001:db8::11", "2001:db8::1", "2001:db8::8"
TAP_MAC = "fe" + GUEST_MAC[2:]  # what a tap of that guest has to have

_libc = ctypes.CDLL(None, use_errno=True)


# --- namespaces ---------------------------------------------------------------------------------------


def netns_id() -> str:
    """Which network namespace this process is in."""
    return str(Path("/proc/self/ns/net").readlink())


_started_in = netns_id()
_isolated = False


def isolate() -> None:
    """Take this process into network and mount namespaces of its own, and a user namespace if it is not root.

    There is no way back, and a run that cannot be isolated ends here: the tests would rewire the host.
    """
    global _isolated
    if _isolated:
        return
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=CLEAN["PATH"])]
    if missing:
        pytest.exit(f"these tools are missing: {', '.join(missing)} (iproute2, iputils-ping, util-linux)", returncode=3)
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(CLONE_NEWNET | CLONE_NEWNS | (CLONE_NEWUSER if uid else 0))
        if uid:
            for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                Path("/proc/self", name).write_text(content)
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
        _mount("tmpfs", "/run", "tmpfs", data="mode=755")
        _mount("sysfs", "/sys", "sysfs")
    except OSError as error:
        pytest.exit(f"these tests need namespaces of their own: {error}", returncode=3)
    # The hooks' background children come back to us, so that none survives its test.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["PATH"] = CLEAN["PATH"]
    _isolated = True
    guard()


def guard() -> None:
    """End the run at once if a test could touch the network that the run was started in."""
    if not _isolated or netns_id() == _started_in:
        pytest.exit("still in the network namespace of the host: not one test may run here", returncode=3)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def _mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    raw = [None if text is None else text.encode() for text in (source, target, kind, data)]
    if _libc.mount(raw[0], raw[1], raw[2], flags, raw[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount on {target}: {os.strerror(ctypes.get_errno())}")


def bind_mount(source: Path, target: Path) -> None:
    """Show *source* in the place of *target*, for this process and its children."""
    _mount(str(source), str(target), None, 0x1000)  # MS_BIND


def unmount(target: Path) -> None:
    """Undo the last mount on *target*."""
    if _libc.umount2(str(target).encode(), MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), f"umount {target}: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def private_etc() -> Iterator[None]:
    """An /etc that can be written to, seen by this process and its children only; forgotten with the block."""
    upper, work = Path("/run/etc-upper"), Path("/run/etc-work")
    upper.mkdir()
    work.mkdir()
    _mount("overlay", "/etc", "overlay", data=f"lowerdir=/etc,upperdir={upper},workdir={work}")
    try:
        yield
    finally:
        unmount(Path("/etc"))


class Namespace:
    """A network namespace without a name. A descriptor holds it, so it ends with this process, however that ends.

    `with namespace:` enters it; sockets opened and programs started inside belong to it.
    """

    def __init__(self) -> None:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _unshare(CLONE_NEWNET)
        self.descriptor = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _setns(home)
        os.close(home)
        self._homes: list[int] = []

    @property
    def path(self) -> str:
        """For `ip link … netns PATH`."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def __enter__(self) -> None:
        self._homes.append(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        _setns(self.descriptor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        home = self._homes.pop()
        _setns(home)
        os.close(home)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


# --- programs -----------------------------------------------------------------------------------------


def run(*argv: str) -> str:
    """The output of a program that has to succeed."""
    done = subprocess.run(argv, env=CLEAN, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr or done.stdout}"
    return done.stdout


def ip(arguments: str) -> str:
    """`ip` with blank-separated *arguments*."""
    return run("ip", *arguments.split())


def ask(arguments: str) -> list[dict[str, Any]]:
    """What `ip -j` (or `bridge -j`, given in full) answers."""
    words = arguments.split()
    found: list[dict[str, Any]] = json.loads(run(*(words if words[0] == "bridge" else ["ip", "-j", *words])) or "[]")
    return [one for one in found if one]  # `ip` prints {} for what its filter left out


@dataclass(frozen=True)
class Result:
    """What a hook gave back."""

    code: int
    out: str
    err: str

    def __bool__(self) -> bool:
        return self.code == 0

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """The parsed output of --json."""
        found: list[dict[str, Any]] = json.loads(self.out)
        return found

    @property
    def needed(self) -> list[tuple[Any, ...]]:
        """Of the output of --json: the ops that (would) write, and the undone ones before them."""
        return [
            (outcome["tap"], op["about"], op["want"])
            for outcome in self.outcomes
            for op in (*outcome["undone"], *outcome["ops"])
            if op["needed"]
        ]


def command(program: str, *argv: str) -> list[str]:
    """A hook as a command line, under the interpreter that runs the tests."""
    return [sys.executable, "-I", str(SCRIPTS / program), *argv]


def start(program: str, *argv: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a hook; the caller waits for it."""
    return subprocess.Popen(
        command(program, *argv),
        env={**CLEAN, **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a started hook."""
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out, err)


def hook(program: str, *argv: str, environ: Mapping[str, str] | None = None) -> Result:
    """Run the real script to its end."""
    return finish(start(program, *argv, environ=environ))


def call(program: str, *argv: str, environ: Mapping[str, str] | None = None) -> Result:
    """Run the same code in this process: pyroute2 is imported once, not once per run. Nothing is repeated later."""
    from kvmifup.commands import main

    out, err = io.StringIO(), io.StringIO()
    code = main.main(program, argv, environ or {}, out, err)
    return Result(code, out.getvalue(), err.getvalue())


def call_in_child(program: str, *argv: str) -> int:
    """Like `call`, in a forked child that may die on the way: its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 113
        try:
            code = call(program, *argv).code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reap() -> None:
    """End every child of this process that is left: background announcers of hooks that have exited."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := [int(pid) for pid in children.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_for_children() -> None:
    """Wait until every background announcer has come to its own end."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


# --- the node -----------------------------------------------------------------------------------------

# What differs from one look to the next whatever anybody does, or cannot be put back by anyone.
VOLATILE = frozenset(
    {
        # A tap that the test deletes and makes again gets another index; no two devices share a name.
        "ifindex", "link_index", "if_index",
        # A tap has no queue discipline until it is up for the first time, and keeps it from then on.
        "qdisc", "txqlen",
        # A bridge's clocks, and what they lead to.
        "hello_timer", "tcn_timer", "topology_change_timer", "gc_timer", "topology_change", "topology_change_detected",
        "message_age_timer", "forward_delay_timer", "hold_timer",
        # Addresses that it has learnt; a newer `ip` counts them.
        "fdb_n_learned",
    }
)  # fmt: skip
# A bridge has a carrier exactly while it has a live port, except that one which never had a port does not say so.
BRIDGE_CARRIER = frozenset({"NO-CARRIER", "LOWER_UP"})

Snapshot = Counter[str]


def _lines(kind: str, value: Any, path: str = "") -> Iterator[str]:
    """*value* flattened, one line per leaf: a difference then names what differs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in VOLATILE:
                yield from _lines(kind, inner, f"{path}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _lines(kind, inner, path)
    else:
        yield f"{kind}{path}={value}"


def _links(found: list[dict[str, Any]]) -> Iterator[str]:
    for link in found:
        if link.get("linkinfo", {}).get("info_kind") == "bridge":
            link["flags"] = [flag for flag in link["flags"] if flag not in BRIDGE_CARRIER]
            # And it takes its segmentation limits over from its first port, for good.
            for name in ("operstate", "tso_max_size", "tso_max_segs", "gso_max_size", "gso_max_segs"):
                link.pop(name, None)
        yield from _lines("link", link, f"/{link['ifname']}")


def _sysctls() -> Iterator[str]:
    for place in (f"{SYSCTL}/ipv{family}/{group}" for family in (4, 6) for group in ("conf", "neigh")):
        for dev in os.listdir(place):
            for name in os.listdir(f"{place}/{dev}"):
                try:
                    descriptor = os.open(f"{place}/{dev}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        yield f"{place}/{dev}/{name}:{os.read(descriptor, 4096).decode().strip()}"
                    finally:
                        os.close(descriptor)
                except OSError:
                    # One that nobody has set cannot be read; and one that only root may write cannot either.
                    assert name in ("stable_secret", "retrans_time", "base_reachable_time"), f"{place}/{dev}/{name}"


def _files() -> Iterator[str]:
    for path in sorted(RUN_DIR.rglob("*")):
        # Lock files stay: removing one that another run has just opened would give both the lock. And the agent's
        # counts go on.
        if path.name in ("metrics.prom", "metrics.new"):
            continue
        if path.is_symlink():
            yield f"{path} -> {path.readlink()}"
        elif path.is_file() and path.parent.name != "lock":
            # When a phase was reached, and by whom, differs between two ways to the same.
            content = re.sub(rb'"(since|by|frame)": [^,]*, ?', b"", path.read_bytes())
            yield f"{path}: {content!r}"


# One process answers several: it costs more than what it says.
BATCHES = {
    "ip -j -d -batch -": ("link", "addr", "neigh", "neigh show proxy"),
    "ip -4 -j -d -batch -": ("route show table all", "rule"),
    "ip -6 -j -d -batch -": ("route show table all", "rule"),
    "bridge -j -batch -": ("link",),
}


def _answers() -> Iterator[list[dict[str, Any]]]:
    script = "".join(f"{program} <<.\n" + "\n".join(lines) + "\n.\n" for program, lines in BATCHES.items())
    for line in run("sh", "-ec", script).splitlines():
        yield [one for one in json.loads(line) if one]


def snapshot() -> Snapshot:
    """All that the node has that a hook could change."""
    return snapshot_of_kernel() + Counter(_files())


def snapshot_of_kernel() -> Snapshot:
    """The same without files: what `ip`, `bridge` and /proc/sys tell."""
    links, addresses, neighs, proxied, routes4, rules4, routes6, rules6, ports = _answers()
    found = Counter([*_links(links), *_sysctls()])
    for port in ports:
        found.update(_lines("port", port, f"/{port['ifname']}"))
    for address in addresses:
        for info in address["addr_info"]:
            info.pop("tentative", None)  # for a moment, even where nothing is asked before an address is used
            found[f"addr {address['ifname']} {json.dumps(info, sort_keys=True)}"] += 1
    # The others come and go with traffic, and nobody could put them back.
    permanent = [one for one in neighs if "PERMANENT" in one["state"]]
    tables = {
        "neigh": permanent, "proxy": proxied, "route4": routes4, "rule4": rules4, "route6": routes6, "rule6": rules6,
    }  # fmt: skip
    for what, many in tables.items():
        found.update(f"{what} {json.dumps(one, sort_keys=True)}" for one in many)
    return found


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What differs, one line each; empty when nothing does."""
    return [f"- {line}" for line in sorted(before - after)] + [f"+ {line}" for line in sorted(after - before)]


def sysctl(path: str, value: object | None = None) -> str:
    """The value of net/*path*; sets it first when there is one to set."""
    if value is not None:
        (SYSCTL / path).write_text(str(value))
    return (SYSCTL / path).read_text().strip()


def scratch() -> Path:
    """An empty directory that ends with the test. (pytest's own belongs to whoever "root" was before.)"""
    place = Path("/run/scratch")
    place.mkdir()
    return place


def add_tap(name: str = "tap0") -> None:
    """A tap as a process manager makes it: down, with an address of the kernel's choosing (here: always the same)."""
    if not os.access(TUN, os.R_OK | os.W_OK):
        pytest.fail(f"{TUN} cannot be opened: unprivileged runs need a device node there that everybody may open")
    ip(f"tuntap add {name} mode tap")
    ip(f"link set {name} address 02:00:00:00:{name.encode()[-2]:02x}:{name.encode()[-1]:02x}")


def add_bridge(name: str = "br0", mtu: int = 1500, options: str = "") -> None:
    """A bridge that is up, with an address of its own."""
    ip(f"link add name {name} address 02:00:00:00:b0:{name.encode()[-1]:02x} type bridge {options}")
    ip(f"link set {name} mtu {mtu} up")


def link(name: str) -> dict[str, Any]:
    """One device as `ip -d link` shows it."""
    (found,) = ask(f"-d link show dev {name}")
    return found


def settle(name: str) -> None:
    """Wait until a device that is up has noticed that its other end is."""
    while link(name)["operstate"] != "UP":
        pass


def routes(dev: str, table: str | None = None) -> set[str]:
    """Destinations of the unicast routes out of *dev* that somebody put there; in one table, or in any."""
    named = {"254": "main"}.get(table or "", table)
    return {
        route["dst"]
        for family in (4, 6)
        for route in ask(f"-{family} route show table all dev {dev}")
        if route.get("protocol") != "kernel" and named in (None, route.get("table", "main"))
    }


def proxies(dev: str | None = None) -> set[str]:
    """The addresses that the node answers for."""
    return {one["dst"] for one in ask("neigh show proxy") if dev in (None, one["dev"])}


def rules(iif: str = "tap0") -> list[tuple[int, int, str]]:
    """(family, priority, table) of the policy rules that name *iif*."""
    return [
        (family, rule["priority"], rule.get("table", ""))
        for family in (4, 6)
        for rule in ask(f"-{family} rule")
        if rule.get("iif") == iif
    ]


def neighbours(dev: str = "tap0") -> dict[str, str]:
    """The permanent neighbour entries on *dev*."""
    return {one["dst"]: one["lladdr"] for one in ask(f"neigh show dev {dev}") if "PERMANENT" in one["state"]}


def write_nic(
    tap: str = "tap0", instance: str = "web1.example.com", index: int = 0, *, run_dir: Path = RUN_DIR, **keys: object
) -> Path:
    """A NIC file as a process manager writes it, with the symlink that finds it by its tap."""
    values = {"tap": tap, "mac": GUEST_MAC, **{key: value for key, value in keys.items() if value is not None}}
    file = run_dir / "nic" / instance / f"{index}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    # JSON's strings, lists and booleans are TOML's.
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    shortcut = run_dir / "tap" / tap
    shortcut.parent.mkdir(exist_ok=True)
    shortcut.unlink(missing_ok=True)
    shortcut.symlink_to(f"../nic/{instance}/{index}.toml")
    return file


def ganeti(tap: str = "tap0", **more: str) -> dict[str, str]:
    """The environment of a hook, as Ganeti's node daemon makes it."""
    return {
        "INSTANCE": "web1.example.com",
        "MAC": GUEST_MAC,
        "INTERFACE": tap,
        "INTERFACE_INDEX": "0",
        "INTERFACE_UUID": "1f0b7c5e-6f86-4f19-8d0c-6a7c1c3c7a51",
        "TAGS": "",
        "VLAN": "",
        **more,
    }


def configuration(**settings: object) -> str:
    """`--config=FILE` for *settings*; a dictionary is a section."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    for name, section in settings.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    file = Path("/run/etc/config.toml")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return f"--config={file}"


@dataclass
class Node:
    """A fresh node, and what the test opened on it."""

    client: Namespace
    taps: list[Tap] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)

    def uplink(self, name: str = "eth0", *, addresses: bool = True, master: str | None = None) -> None:
        """An uplink to the client: addressed, forwarding, with the default routes; or a port of *master*."""
        ip(f"link add {name} address {NODE_MAC} type veth peer name eth0 address {CLIENT_MAC} netns {self.client.path}")
        with self.client:
            quieten()
            ip("link set lo up")
            ip("link set eth0 up")
            ip(f"addr add {CLIENT_IP4}/24 dev eth0")
            ip(f"addr add {CLIENT_IP6}/64 dev eth0")
        ip(f"link set {name} up")
        settle(name)
        if master:
            ip(f"link set {name} master {master}")
        elif addresses:
            ip(f"addr add {NODE_IP4}/24 dev {name}")
            ip(f"addr add {NODE_IP6}/64 dev {name}")
            ip(f"route add default via {CLIENT_IP4}")
            ip(f"-6 route add default via {CLIENT_IP6}")
            for family in (4, 6):
                sysctl(f"ipv{family}/conf/all/forwarding", 1)
                # So that a new tap does not forward by itself, and the hook has something to do.
                sysctl(f"ipv{family}/conf/default/forwarding", 0)
        while any("tentative" in info for one in ask(f"addr show dev {name}") for info in one["addr_info"]):
            pass  # soon over: nobody is asked

    def guest(self, tap: str = "tap0") -> Tap:
        """A new tap with a guest behind it, whose frames the test reads and writes."""
        add_tap(tap)
        self.taps.append(attach(tap))
        return self.taps[-1]

    def listen(self, dev: str = "eth0") -> Wire:
        """What arrives at the client from now on."""
        with self.client:
            self.wires.append(Wire(packet_socket(dev), dev))
        return self.wires[-1]

    def fence(self, wire: Wire, dev: str = "eth0") -> list[bytes]:
        """Send a frame of a kind that nobody else sends from *dev*; returns what reached *wire* before it."""
        with packet_socket(dev) as sender:
            return wire.up_to_fence(sender)


def quieten() -> None:
    """No address is tentative, nobody solicits routers: what is on the wire is the test's or the hook's."""
    for which in ("all", "default"):
        for name in ("accept_dad", "dad_transmits", "router_solicitations"):
            sysctl(f"ipv6/conf/{which}/{name}", 0)


@contextlib.contextmanager
def fresh_node() -> Iterator[Node]:
    """A network namespace, /sys and /run that nothing has been in; what the test left running ends with it."""
    isolate()
    unmount(Path("/sys"))
    unmount(Path("/run"))
    _unshare(CLONE_NEWNET)
    _mount("sysfs", "/sys", "sysfs")
    _mount("tmpfs", "/run", "tmpfs", data="mode=755")
    guard()
    quieten()
    ip("link set lo up")
    node = Node(Namespace())
    try:
        yield node
    finally:
        reap()
        for tap in node.taps:
            tap.close()
        for wire in node.wires:
            wire.close()
        node.client.close()


# --- watching and disturbing ----------------------------------------------------------------------------


class Monitor:
    """`ip monitor all`, and where in its output a stretch of time begins and ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["ip", "monitor", "all"], env=CLEAN, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        )
        self._text = b""
        self._numbers = itertools.count(7001)
        # Until it has subscribed it misses what happens: repeat until something has been seen.
        while not self._fenced(wait=0.05):
            pass
        self.events()

    def events(self) -> list[str]:
        """What has happened since the last call; neighbour entries that the kernel keeps for itself left out."""
        while not self._fenced(wait=PATIENCE):
            pytest.fail("ip monitor does not show what happens")
        lines = [line for line in self._text.decode().splitlines() if "lookup 70" not in line]
        self._text = b""
        return [line for line in lines if not line.startswith("[NEIGH]") or "PERMANENT" in line or "proxy" in line]

    def _fenced(self, wait: float) -> bool:
        table = next(self._numbers)
        ip(f"rule add priority 31999 table {table}")
        ip(f"rule del priority 31999 table {table}")
        end = f"[RULE]Deleted 31999:\tfrom all lookup {table}".encode()
        assert self._process.stdout is not None
        while end not in self._text:
            if not select.select([self._process.stdout], [], [], wait)[0]:
                return False
            self._text += os.read(self._process.stdout.fileno(), 65536)
        return True

    def close(self) -> None:
        """Stop watching."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def monitored() -> Iterator[Monitor]:
    """A Monitor that ends with the block."""
    monitor = Monitor()
    try:
        yield monitor
    finally:
        monitor.close()


Disturbance = Callable[[int, Any], None]


def nothing(_number: int, _op: Any) -> None:
    """No disturbance."""


@contextlib.contextmanager
def disturbed(before: Disturbance = nothing, after: Disturbance = nothing) -> Iterator[list[Any]]:
    """Around every write of a run in this process call *before* and *after* with its number, from 1, and its op.

    Yields the list of the ops written so far, undoing ones included.
    """
    from kvmifup.node.kernel import Kernel
    from kvmifup.runs import session

    written: list[Any] = []

    class Disturbed(Kernel):
        def write(self, op: Any) -> None:
            written.append(op)
            number = len(written)
            before(number, op)
            super().write(op)
            after(number, op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Kernel", Disturbed)
        yield written


def refuse(number: int) -> Disturbance:
    """A disturbance: the kernel says no, at write *number*."""

    def disturb(at: int, op: Any) -> None:
        from kvmifup.core.errors import KernelError

        if at == number:
            raise KernelError(f"injected at write {number}: {op.describe()}", errno=5)

    return disturb


def kill(number: int) -> Disturbance:
    """A disturbance: the run is killed, at write *number* (before the first, if put before it and 1)."""

    def disturb(at: int, _op: Any) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return disturb


def check(result: Result, code: int, *words: str) -> None:
    """The hook ended with *code*, and said *words*: one line on stderr on failure, silence on success."""
    assert result.code == code, f"{result.code}, not {code}: {result.err}"
    if code == 0:
        assert result.err == ""
        return
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n"), result.err
    for word in words:
        assert word in result.err


def taps(names: Sequence[str]) -> None:
    """Several taps."""
    for name in names:
        add_tap(name)
