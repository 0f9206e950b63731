"""Two nodes with Ganeti as Debian ships it (3.0 of Debian 12, 3.1 of Debian 13), without a cluster around it.

A node is one of the lab's (network and mount namespaces, its own /run), and has besides its own process
namespace and its own /usr, /etc and /var: overlays over the machine's, so that packages can be installed
there with dpkg, and nothing of it is left when the node ends. Ganeti itself is unpacked once, in the cache,
from the packages that apt downloads.

What is asserted on comes from `ip` and `bridge`, never from kvmifup.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.addresses import GUEST_IP4, GUEST_MAC
from harness.tools import CLEAN
from harness.wire import readable
from lab import debian, guest
from lab.agent import scheduled
from lab.errors import LabError
from lab.nodes import NODE_IP4, Mode, Namespace, Network, end, guest_addresses, network

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("driver.py")

MACHINE_PACKAGES = {
    "OpenSSL": "python3-openssl",
    "psutil": "python3-psutil",
    "pyparsing": "python3-pyparsing",
    "pyroute2": "python3-pyroute2",
    "tomli": "python3-tomli",
}
TOOLS = {
    "apt-get": "apt",
    "dpkg": "dpkg",
    "dpkg-deb": "dpkg",
    "ovs-vsctl": "openvswitch-switch",
    "qemu-system-x86_64": "qemu-system-x86",
    "socat": "socat",
}

SECOND_MAC, SECOND_IP4 = "aa:00:00:35:ac:02", "192.0.2.9"
INSTANCE = "web1.example.com"

# Nothing here is expected to take long: this only turns a hang into a failure.
PATIENCE = 120.0


class GanetiError(Exception):
    """What Ganeti says when an operation fails."""


# --- Ganeti's packages --------------------------------------------------------------------------------


def require() -> None:
    """LabError when something is missing that must be on the machine; nothing is ever skipped."""
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=CLEAN["PATH"]) is None:
            raise LabError(f"{tool} is not installed", f"apt-get install {package}")
    for module, package in MACHINE_PACKAGES.items():
        found = subprocess.run(["/usr/bin/python3", "-I", "-c", f"import {module}"], capture_output=True)
        if found.returncode:
            raise LabError(f"Debian's Python has no {module}", f"apt-get install {package}")


# --- our packages -------------------------------------------------------------------------------------


def our_packages(directory: Path) -> list[Path]:
    """Our two packages: those in $KVM_IFUP_DEBS, else made in *directory* from the checkout.

    Made from the checkout, they have the same files and maintainer scripts at the same places, but were not
    through debhelper, which takes its time.
    """
    given = os.environ.get("KVM_IFUP_DEBS")
    if given:
        found = sorted(Path(given).glob("kvm-ifup*_all.deb"), key=lambda path: path.name.split("_"))
        if [one.name.split("_")[0] for one in found] != ["kvm-ifup", "kvm-ifup-ganeti"]:
            raise LabError(f"there is not one package of each in {given}", "./dev deb builds them")
        return found
    core, takeover = directory / "kvm-ifup", directory / "kvm-ifup-ganeti"
    share = core / "usr/share/kvm-ifup"
    shutil.copytree(ROOT / "kvmifup", share / "kvmifup", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", share / "scripts")
    (core / "usr/sbin").mkdir()
    for script in (share / "scripts").iterdir():
        (core / "usr/sbin" / script.name).symlink_to(f"../share/kvm-ifup/scripts/{script.name}")
    for line in (ROOT / "debian/kvm-ifup-ganeti.install").read_text().splitlines():
        source, target = line.split()
        (takeover / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, takeover / target)
    return [package(core), package(takeover)]


def package(tree: Path, version: str = "1") -> Path:
    """A package of the files in *tree*, with the maintainer scripts that debian/ has for its name."""
    control = tree / "DEBIAN"
    control.mkdir(exist_ok=True)
    (control / "control").write_text(
        f"Package: {tree.name}\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: made by a test\n"
    )
    for name in ("preinst", "postinst", "prerm", "postrm"):
        script = ROOT / "debian" / f"{tree.name}.{name}"
        if script.exists() and tree.name != "kvm-ifup":  # that one's are debhelper's business
            (control / name).write_text(script.read_text().replace("#DEBHELPER#", ""))
            (control / name).chmod(0o755)
    deb = tree.with_name(f"{tree.name}_{version}_all.deb")
    debian.tool(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(deb)], "see above")
    return deb


# --- instances ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nic:
    """A NIC as Ganeti's configuration has it."""

    mac: str
    mode: Mode
    link: str = ""
    ip: str | None = None
    vlan: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """For the driver."""
        # Ganeti names QEMU's devices after the first half of it.
        uuid = f"{self.mac.replace(':', '')[4:]}-0000-4000-8000-000000000000"
        nic = {"mac": self.mac, "mode": self.mode, "link": self.link, "ip": self.ip, "vlan": self.vlan}
        return {**nic, "uuid": uuid}

    @property
    def tap_mac(self) -> str:
        """What the tap has to have."""
        return "fe" + self.mac[2:]


FIRST = {"bridged": Nic(GUEST_MAC, "bridged", "br0"), "routed": Nic(GUEST_MAC, "routed", ip=GUEST_IP4)}
SECOND = {"bridged": Nic(SECOND_MAC, "bridged", "br0"), "routed": Nic(SECOND_MAC, "routed", ip=SECOND_IP4)}


@dataclass(frozen=True)
class Instance:
    """A guest as Ganeti's configuration has it; with *image*, one that runs and answers."""

    nics: tuple[Nic, ...]
    image: guest.Image | None = None
    name: str = INSTANCE
    firmware: Path | None = None  # without an image: what runs instead of QEMU's own

    @property
    def given(self) -> dict[str, Any]:
        """For the driver. Ganeti's own defaults, but for the missing disk, VNC and virtualisation."""
        hvparams: dict[str, Any] = {
            "kvm_path": "/usr/bin/qemu-system-x86_64",
            "kvm_flag": "disabled",
            "cpu_type": "max",
            "vhost_net": False,
            "vnc_bind_address": "",
            "acpi": True,
        }
        if self.image is None:
            hvparams |= {"kernel_path": "", "boot_order": "network"}
            if self.firmware:
                hvparams["kvm_extra"] = f"-bios {self.firmware}"
        else:
            mode = self.nics[0].mode
            hvparams |= {
                "kernel_path": str(self.image.kernel),
                "initrd_path": str(self.image.initrd),
                "kernel_args": guest.command_line(guest_addresses(mode)),
                "root_path": "",
                # A busy guest whose memory is a round number crashes when it moves: see lab.guest.
                "kvm_extra": f"--m {guest.MEMORY_KIB}k",  # Ganeti looks for -m, and cannot read that
            }
        return {
            "name": self.name,
            "uuid": "00000000-0000-4000-8000-000000000001",
            "nics": [nic.given for nic in self.nics],
            "hvparams": hvparams,
            "beparams": {"maxmem": 128, "minmem": 128},
        }


# --- nodes --------------------------------------------------------------------------------------------

# Run on a node of the lab, in a process namespace of its own. Its last command is that namespace's first
# process: it has to collect the QEMUs that end, or Ganeti would take them for living ones.
SETUP = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
over() {
    mkdir -p /mnt/upper/$1 /mnt/work/$1
    mount -t overlay -o "lowerdir=$2/$1,upperdir=/mnt/upper/$1,workdir=/mnt/work/$1" overlay "/$1"
}
over usr "$1/usr:"
over etc "$1/etc:"
over var ""
# An index of all the machine's manual pages takes longer than everything else that installing a package does.
rm -f /var/lib/man-db/auto-update
mkdir -p /etc/ganeti
ln -s "/usr/lib/ganeti/$3" /etc/ganeti/lib
ln -s "/usr/share/ganeti/$3" /etc/ganeti/share
mkdir -p /var/lib/ganeti /var/log/ganeti/kvm /run/ganeti
# Ganeti asks for its node's whole name, and there is no name server.
echo "$2" >/proc/sys/kernel/hostname
echo "127.0.1.1 $2" >>/etc/hosts
echo ready
sleep infinity &
wait
"""


@dataclass
class Node:
    """A node: *lab* is the lab's, *init* the first process of its own process namespace."""

    lab: Namespace
    init: int
    before: dict[str, Any] = field(default_factory=dict)
    driver: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        """a or b."""
        return self.lab.name

    @property
    def address(self) -> str:
        """Where other nodes reach it."""
        return NODE_IP4[self.name]

    def inside(self, *argv: str) -> list[str]:
        """A command as it is run from outside."""
        enter = ["nsenter", "--target", str(self.init), "--net", "--mount", "--pid", "--uts", "--"]
        return ["setpriv", "--pdeathsig", "KILL", *enter, *argv]

    def run(self, *argv: str, stdin: str = "", env: Mapping[str, str] = CLEAN) -> str:
        """Run a command here to its end; returns what it said. LabError when it fails."""
        done = subprocess.run(
            self.inside(*argv),
            env={**CLEAN, **env},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if done.returncode:
            said = " / ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise LabError(f"`{' '.join(argv)}` on {self.name} exited with {done.returncode}: {said}", "see above")
        return done.stdout + done.stderr

    def json(self, *argv: str) -> list[dict[str, Any]]:
        """The output of `ip -j …` or `bridge -j …`."""
        found: list[dict[str, Any]] = json.loads(self.run(*argv) or "[]")
        return found

    def ganeti(self, operation: str, instance: Instance, **arguments: object) -> Any:
        """One request to Ganeti's code on this node. Raises GanetiError with its words."""
        request = {"operation": operation, "instance": instance.given, "arguments": arguments}
        answer = json.loads(self._answer(json.dumps(request)))
        if "error" in answer:
            raise GanetiError(answer["error"])
        return answer["answer"]

    def _answer(self, request: str) -> str:
        """The driver's answer; it is started for the first request."""
        if self.driver is None:
            argv = self.inside("/usr/bin/python3", str(DRIVER))
            self.driver = subprocess.Popen(argv, env=CLEAN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.driver.stdin
        assert self.driver.stdout
        self.driver.stdin.write(request + "\n")
        self.driver.stdin.flush()
        if not readable(self.driver.stdout.fileno(), PATIENCE):
            raise LabError(f"Ganeti does not answer {request}", "is this machine overloaded?")
        answer = self.driver.stdout.readline()
        if not answer:
            raise LabError(f"Ganeti has failed: {request}", "see above")
        return answer

    def hooks(self, operation: str, instance: Instance) -> None:
        """Ganeti runs its post hooks of *operation* here: ours must be among them, and be content."""
        found = self.ganeti("hooks", instance, after=operation)
        assert [one[1:] for one in found if "50-kvm-ifup" in one[0]] == [["success", ""]], found

    def before_move(self, operation: str, instance: Instance, **more: str) -> None:
        """Ganeti runs its pre hooks of *operation* on this node, the target: ours must be among them.

        Raises GanetiError with its words.
        """
        to = {"OLD_PRIMARY": "other.example.com", "NEW_PRIMARY": f"{self.name}.example.com", **more}
        found = self.ganeti("pre_hooks", instance, before=operation, more=to)
        assert [one[1:] for one in found if "50-kvm-ifup" in one[0]] == [["success", ""]], found

    def start_agent(self) -> None:
        """The agent, as systemd would run it."""
        agent = " ".join((*scheduled(), "kvm-ifupd"))
        self.run("sh", "-c", f"{agent} </dev/null >/run/agent.log 2>&1 & until grep ready /run/agent.log; do :; done")

    def install(self, packages: Sequence[Path]) -> None:
        """Install packages with dpkg, on this node only."""
        self.run("dpkg", "-i", *map(str, packages), env={"DEBIAN_FRONTEND": "noninteractive"})

    def remove(self, *names: str) -> None:
        """Remove packages with dpkg, on this node only."""
        self.run("dpkg", "-r", *names, env={"DEBIAN_FRONTEND": "noninteractive"})

    # --- what is true here, by ip and bridge ------------------------------------------------------------

    def taps(self) -> list[str]:
        """The guests' taps, in the order of their indexes."""
        links = self.json("ip", "-j", "-d", "link", "show", "type", "tun")
        taps = [link for link in links if link["ifname"].startswith("tap")]
        return [link["ifname"] for link in sorted(taps, key=lambda link: int(link["ifindex"]))]

    def link(self, name: str) -> dict[str, Any]:
        """What `ip` says of one device."""
        (found,) = self.json("ip", "-j", "-d", "link", "show", "dev", name)
        return found

    def ports(self) -> dict[str, tuple[str, str]]:
        """Each bridge port, with its bridge and its state."""
        return {one["ifname"]: (one["master"], one["state"]) for one in self.json("bridge", "-j", "link")}

    def routes(self) -> dict[str, str]:
        """Each route out of a tap, in any table, with the tap."""
        found = self.json("ip", "-j", "-4", "route", "show", "table", "all")
        return {r["dst"]: r["dev"] for r in found if r.get("dev", "").startswith("tap") and r.get("table") != "local"}

    def proxies(self) -> set[tuple[str, str]]:
        """Each proxy neighbour: address and device."""
        return {(one["dst"], one["dev"]) for one in self.json("ip", "-j", "neigh", "show", "proxy")}

    def rules(self) -> list[tuple[str, str]]:
        """Each policy rule that names an incoming device: device and table."""
        found = self.json("ip", "-j", "rule") + self.json("ip", "-j", "-6", "rule")
        return [(rule["iif"], rule["table"]) for rule in found if "iif" in rule]

    def remembered(self) -> list[str]:
        """The taps that kvm-ifup remembers something about."""
        return self.run("sh", "-c", "ls /run/kvm-ifup/state 2>/dev/null || true").split()

    def snapshot(self) -> dict[str, Any]:
        """All that wiring a guest may change on this node."""
        delay = self.run(
            "cat", "/proc/sys/net/ipv4/neigh/eth0/proxy_delay", "/proc/sys/net/ipv6/neigh/eth0/proxy_delay"
        )
        links = self.json("ip", "-j", "-d", "link")
        return {
            "links": sorted((one["ifname"], one.get("master", ""), one["mtu"], one["address"]) for one in links),
            "ports": self.ports(),
            "routes": self.routes(),
            "proxies": self.proxies(),
            "rules": self.rules(),
            "proxy_delay": delay.split(),
            "remembered": self.remembered(),
        }

    def must_be_as_before(self) -> None:
        """Fail unless nothing of any guest is left here."""
        assert self.snapshot() == self.before

    def must_be_wired(self, *nics: Nic) -> None:
        """Fail unless exactly *nics* are wired here, in the order of their taps, as for guests that run here."""
        taps = self.taps()
        assert len(taps) == len(nics), f"taps on {self.name}: {taps}"
        for tap, nic in zip(taps, nics, strict=True):
            link = self.link(tap)
            assert link["address"] == nic.tap_mac
            assert "UP" in link["flags"]
        wired = list(zip(taps, nics, strict=True))
        bridged = {tap: (nic.link, "forwarding") for tap, nic in wired if nic.mode == "bridged"}
        ports = {tap: state for tap, state in self.ports().items() if tap in taps}
        assert ports == bridged
        routed = {nic.ip: tap for tap, nic in wired if nic.mode == "routed"}
        assert self.routes() == routed
        assert self.proxies() == {(ip, "eth0") for ip in routed}
        if routed:
            assert self.run("cat", "/proc/sys/net/ipv4/neigh/eth0/proxy_delay").strip() == "0"
        assert sorted(self.rules()) == sorted(
            (tap, nic.link) for tap, nic in wired if nic.mode == "routed" and nic.link for _ in (4, 6)
        )

    def must_not_announce_or_route(self) -> None:
        """Fail if anything here would draw a routed guest's traffic."""
        assert self.routes() == {}
        assert self.proxies() == set()


@contextlib.contextmanager
def _node(lab: Namespace, version: str, files: Path) -> Iterator[Node]:
    setup = ["sh", "-c", SETUP, "sh", str(files), f"{lab.name}.example.com", version]
    unshare = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    holder = lab.popen([*unshare, *setup], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "ready\n":
            raise LabError(f"cannot make the node {lab.name}: {holder.stderr.read().strip()}", "overlay file systems?")
        (init,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        node = Node(lab, int(init))
        try:
            yield node
        finally:
            if node.driver:
                end(node.driver)
                for pipe in (node.driver.stdin, node.driver.stdout):
                    assert pipe
                    pipe.close()
    finally:
        end(holder)
        holder.stdout.close()
        holder.stderr.close()


@dataclass
class Cluster:
    """Two nodes and a client on one switch."""

    net: Network
    a: Node
    b: Node

    @property
    def mode(self) -> Mode:
        """What NICs it is for."""
        return self.net.mode

    @property
    def client(self) -> Namespace:
        """Who reaches guests."""
        return self.net.client

    @property
    def nodes(self) -> tuple[Node, Node]:
        """Both."""
        return self.a, self.b

    def must_reach_guest(self) -> None:
        """Fail unless the client gets answers from the guest, before long."""
        deadline = time.monotonic() + PATIENCE
        while self.client.try_run("ping", "-n", "-c", "1", "-W", "1", GUEST_IP4).returncode:
            assert time.monotonic() < deadline, "the client never got an answer from the guest"

    def migrate(self, instance: Instance, source: Node, target: Node, info: str) -> None:
        """Order the migration to a target that has accepted the guest, and wait until all of it is there."""
        source.ganeti("migrate", instance, target=target.address)
        deadline = time.monotonic() + PATIENCE
        while (status := source.ganeti("migration_status", instance)) != "completed":
            assert status == "active", f"the migration is {status}"
            assert time.monotonic() < deadline, "the migration never ended"


@contextlib.contextmanager
def cluster(mode: Mode, packages: Sequence[Path], version: str = "3.0", files: Path | None = None) -> Iterator[Cluster]:
    """Two nodes for guests of one mode, with *packages* installed, and that *version* of Ganeti.

    Its *files* are those that are on this machine, or else come from Debian's archive.
    """
    if files is None:
        require()
        files = debian.ganeti(version)
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network(mode))
        a, b = (stack.enter_context(_node(lab, version, files)) for lab in (net.a, net.b))
        for node in (a, b):
            if mode == "bridged":  # for the migration itself; a routed node has its address on eth0
                node.run("ip", "addr", "add", f"{node.address}/24", "dev", "br0")
            if packages:
                node.install(packages)
            node.before = copy.deepcopy(node.snapshot())
        yield Cluster(net, a, b)
