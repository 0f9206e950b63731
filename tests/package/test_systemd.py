"""The agent as systemd runs it: Debian 12 with the package, booted, with its own kernel."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import machine, roots
from harness.machine import Machine
from tests.package import wiring

# The tests are in this order: what a boot leaves comes first, the purge last. In between each leaves the
# network as it was.

SERVICE = "kvm-ifupd.service"
UPLINK_IP = "192.0.2.1"
GUEST_MAC = "aa:00:00:35:ac:01"
GUEST_IP = "192.0.2.8"
GUEST_IP6 = "2001:db8::8"
AGENT_RUNS = "pgrep -x kvm-ifupd"
MANY = 7  # more starts than systemd allows in ten seconds, if it is not told otherwise
EXPOSURE = 3.1  # measured, 0.3 of it is CAP_SYS_PTRACE; `systemd-analyze security` calls up to 4.9 "OK"

# Plays QEMU, which is too slow in there: makes a tap and holds it until it is killed, and lets the guest behind it
# send a frame, its RARP, for each byte that is written to /run/TAP.
_GUEST = r"""#!/usr/bin/python3 -I
import fcntl, os, struct, sys
tap, mac = sys.argv[1:]
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", tap.encode(), 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
os.mkfifo(f"/run/{tap}")
orders = os.open(f"/run/{tap}", os.O_RDWR)
child = os.fork()
if child:
    with open(f"/run/{tap}.pid", "w") as file:
        file.write(str(child))
    os._exit(0)
for stream in (1, 2):
    os.dup2(0, stream)
while os.read(orders, 1):
    os.write(tun, b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) + b"\x80\x35" + bytes(46))
"""

# As in kvm-ifup-nic(5): guests whose link is "quarantine" get a bridge of their own.
_QUARANTINE = """#!/bin/sh
set -eu
case $KVM_IFUP_PHASE in
    pre)
        ip link show "only-$INTERFACE" >/dev/null 2>&1 ||
            ip link add "only-$INTERFACE" type bridge
        ip link set "only-$INTERFACE" up
        ip link set "$INTERFACE" master "only-$INTERFACE" up
        ;;
    down)
        ip link show "only-$INTERFACE" >/dev/null 2>&1 || exit 0
        ip link del "only-$INTERFACE"
        ;;
esac
"""

_UPLINK6 = """
ip -6 address add 2001:db8::1/64 dev eth0
ip -6 route add default via 2001:db8::ffff dev eth0
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
"""

_NETWORK = """
for family in -4 -6; do
    ip $family route show table all
    ip $family rule
    ip $family neigh show proxy
done
ip -o -br link
ovs-vsctl show
grep -rs '' /proc/sys/net/ipv[46]/conf/eth0 /proc/sys/net/ipv[46]/neigh/eth0 || true  # a few cannot be read
"""


@pytest.fixture(scope="module")
def node(built: Path) -> Iterator[Machine]:
    """A node that has just been booted, with an uplink and bridges."""
    machine.require()
    needed = roots.versionless(roots.field(roots.deb(built, "kvm-ifup"), "Depends"))
    system = roots.archive("bookworm", sorted({*machine.INSTALLED, "openvswitch-switch", *needed}), machine.FETCHED)
    with roots.root(system) as root:
        root.install(roots.deb(built, "kvm-ifup"))
        for path, content in (("usr/local/sbin/guest", _GUEST), ("etc/kvm-ifup/ext/quarantine", _QUARANTINE)):
            (root.path / path).write_text(content)
            (root.path / path).chmod(0o755)
        shutil.copy(roots.deb(built, "kvm-ifup"), root.path / "root")
        with machine.boot(root) as booted:
            yield booted


@pytest.fixture(autouse=True)
def _nothing_fails(node: Machine) -> Iterator[None]:
    """No unit is in a failed state, before and after each test."""
    yield
    assert failed(node) == []


def failed(node: Machine) -> list[str]:
    """The units that have failed."""
    return node.shell("systemctl --failed --plain --no-legend").splitlines()


def unit(node: Machine, name: str, what: str) -> str:
    """A property of a unit."""
    return node.shell(f"systemctl show --value -p {what} {name}").strip()


def log(node: Machine) -> str:
    """What the agent has said."""
    return node.shell("journalctl -u kvm-ifupd.service -o cat")


def heard(node: Machine, text: str, times: int = 1) -> None:
    """Wait until the agent has said *text* so often."""
    node.until(f"[ $(journalctl -u kvm-ifupd.service -o cat | grep -cF '{text}') -ge {times} ]")


def said(node: Machine, text: str) -> int:
    """How often it has said it."""
    return log(node).count(text)


@contextmanager
def guest(node: Machine, mode: str, *, tap: str = "tap0", **keys: object) -> Iterator[None]:
    """A tap with a guest behind it, and its NIC file. At the end its QEMU is killed, and nothing is left of it."""
    before = network(node)
    node.shell(f"guest {tap} {GUEST_MAC}")
    values = {"tap": tap, "mac": GUEST_MAC, "mode": mode, **keys}
    spelled = {True: "true", False: "false"}
    lines = "\n".join(
        f"{key} = {spelled[value] if isinstance(value, bool) else repr(value)}" for key, value in values.items()
    )
    node.shell(f"mkdir -p -m 755 /run/kvm-ifup/nic/{tap} && cat > /run/kvm-ifup/nic/{tap}/0.toml <<'END'\n{lines}\nEND")
    try:
        yield
    finally:
        node.shell(f"kill $(cat /run/{tap}.pid) && rm -f /run/{tap} /run/kvm-ifup/nic/{tap}/0.toml")
    node.until(f"[ ! -e /run/kvm-ifup/state/{tap}.json ]")
    assert network(node) == before


def network(node: Machine) -> list[str]:
    """All that wiring could change. A bridge that has lost its last port says so up to a second later (linkwatch)."""
    node.until("! ip -br link show type bridge | grep -v NO-CARRIER")
    return node.shell(_NETWORK).splitlines()


def hook(node: Machine, command: str) -> str:
    """Run a hook; returns what it says."""
    return node.run(f"{command} -v").err


def through(node: Machine, command: str) -> str:
    """Run a hook that the agent does. One that is just being started takes longer in there than a hook waits."""
    node.until(f"systemctl is-active {SERVICE}")
    text = hook(node, command)
    assert "without the agent" not in text
    return text


def starts(node: Machine, command: str) -> None:
    """Run a hook, which starts the agent."""
    assert unit(node, SERVICE, "ActiveState") == "inactive"
    hook(node, command)
    node.until(f"systemctl is-active {SERVICE}")


def test_after_the_boot(node: Machine) -> None:
    """The socket is there, for root alone, and the agent waits for the first hook."""
    assert node.shell("systemctl is-system-running") == "running\n"
    assert node.shell("systemctl is-enabled kvm-ifupd.socket") == "enabled\n"
    assert unit(node, "kvm-ifupd.socket", "SubState") == "listening"
    assert unit(node, SERVICE, "ActiveState") == "inactive"
    assert node.shell("stat -c '%F %U:%G %a' /run/kvm-ifup /run/kvm-ifup/agent.sock") == (
        "directory root:root 755\nsocket root:root 600\n"
    )


def test_units(node: Machine) -> None:
    """systemd finds nothing wrong with them, and the service is shut in as much as it was."""
    done = node.run("systemd-analyze verify --man=no kvm-ifupd.service kvm-ifupd.socket")
    assert (done.out, done.err) == ("", "")
    node.run(f"systemd-analyze security --no-pager --threshold={EXPOSURE * 10:.0f} {SERVICE}")


def test_the_first_hook_starts_it(node: Machine) -> None:
    """Before it, the node gets its network."""
    node.shell(wiring.NODE)
    node.shell(_UPLINK6)
    node.shell("ovs-vsctl add-br ovs0")
    with guest(node, "bridged", link="br0"):
        starts(node, "kvm-ifup-post tap0")
        assert unit(node, SERVICE, "Type") == "notify"
        assert unit(node, SERVICE, "NRestarts") == "0"
        assert "0 changed" in through(node, "kvm-ifup-post tap0")


def test_bridged(node: Machine) -> None:
    """A fresh start; and the bridge keeps its MAC when the tap goes."""
    with guest(node, "bridged", link="br0"):
        through(node, "kvm-ifup-post tap0")
        (link,) = node.json("ip -j link show tap0")
        assert link["master"] == "br0"


@pytest.mark.parametrize(
    ("ips", "link"),
    [([GUEST_IP], None), ([GUEST_IP, GUEST_IP6], None), ([GUEST_IP, GUEST_IP6], "100")],
    ids=["IPv4", "IPv6", "a table"],
)
def test_arrival(node: Machine, ips: list[str], link: str | None) -> None:
    """Armed by pre, wired at the guest's first frame, cleared up when its tap disappears."""
    arrivals = said(node, "(tap0): arrived")
    if link:
        node.shell(f"ip route add default via 192.0.2.254 table {link}")
        node.shell(f"ip -6 route add default via 2001:db8::ffff dev eth0 table {link}")
    armed = said(node, "(tap0): armed")
    with guest(node, "routed", ip=ips, incoming=True, **({"link": link} if link else {})):
        through(node, "kvm-ifup-pre tap0")
        heard(node, "(tap0): armed", armed + 1)
        assert routes(node) == set()
        assert proxies(node) == set()
        node.shell("printf . > /run/tap0")
        heard(node, "(tap0): arrived", arrivals + 1)
        assert routes(node) == {(ip, link or "main") for ip in ips}
        assert proxies(node) == {(ip, "eth0") for ip in ips}
        assert rules(node) == ({(family, link) for family in (4, 6)} if link else set())
        assert "0 changed" in through(node, "kvm-ifup-post tap0")


def routes(node: Machine) -> set[tuple[str, str]]:
    """What of the guest is routed to the tap: destination and table."""
    found = [one for family in (4, 6) for one in node.json(f"ip -{family} -j route show table all dev tap0")]
    return {(one["dst"], str(one.get("table", "main"))) for one in found if one["dst"] in (GUEST_IP, GUEST_IP6)}


def proxies(node: Machine) -> set[tuple[str, str]]:
    """For whom the node answers, and where."""
    found = [one for family in (4, 6) for one in node.json(f"ip -{family} -j neigh show proxy")]
    return {(one["dst"], one["dev"]) for one in found}


def rules(node: Machine) -> set[tuple[int, str]]:
    """The policy rules of the tap: family and table."""
    return {
        (family, one["table"])
        for family in (4, 6)
        for one in node.json(f"ip -{family} -j rule")
        if one.get("iif") == "tap0"
    }


def test_ext(node: Machine) -> None:
    """A program of the administrator's, held to what the service may do."""
    with guest(node, "ext", link="quarantine"):
        through(node, "kvm-ifup-post tap0")
        (link,) = node.json("ip -j link show tap0")
        assert link["master"] == "only-tap0"
        through(node, "kvm-ifdown tap0")
        assert node.json("ip -j link show master ovs-system") == []


def test_openvswitch(node: Machine) -> None:
    """A port with a VLAN."""
    with guest(node, "openvswitch", link="ovs0", vlan=".100"):
        through(node, "kvm-ifup-post tap0")
        assert node.shell("ovs-vsctl port-to-br tap0; ovs-vsctl get Port tap0 tag") == "ovs0\n100\n"


def test_a_bridge_that_filters_vlans(node: Machine) -> None:
    """`check --node` says which VLAN a guest there is in, and the kernel agrees."""
    node.shell("ip link add br1 type bridge vlan_filtering 1 && echo 1 > /proc/sys/net/ipv6/conf/br1/disable_ipv6")
    node.shell("ip link set br1 up")
    for pvid, vlans, finding in (
        (1, [1], ("br1 filters VLANs: a guest without one is in VLAN 1, untagged", False)),
        (0, [], ("br1 filters VLANs, and a new port is in none: vlan_default_pvid is 0", True)),
    ):
        node.shell(f"ip link set br1 type bridge vlan_default_pvid {pvid}")
        with guest(node, "bridged", link="br1"):
            through(node, "kvm-ifup-post tap0")
            ports = node.json("bridge -j vlan show dev tap0")
            assert [one["vlan"] for port in ports for one in port["vlans"]] == vlans
            found = json.loads(node.run("kvm-ifup check --node --json", check=False).out)["findings"]
            assert finding in [(one["what"], one["wrong"]) for one in found]
    node.shell("ip link del br1")


def test_killed(node: Machine) -> None:
    """systemd starts it again, and it watches what it watched."""
    armed = said(node, "(tap0): armed")
    arrivals = said(node, "(tap0): arrived")
    with guest(node, "routed", ip=[GUEST_IP], incoming=True):
        through(node, "kvm-ifup-pre tap0")
        heard(node, "(tap0): armed", armed + 1)
        node.shell(f"systemctl kill --kill-who=main --signal=KILL {SERVICE}")
        heard(node, "(tap0): armed", armed + 2)
        assert unit(node, SERVICE, "NRestarts") == "1"
        node.shell("printf . > /run/tap0")
        heard(node, "(tap0): arrived", arrivals + 1)
        assert routes(node) == {(GUEST_IP, "main")}
        through(node, "kvm-ifup-post tap0")


def test_in_the_journal(node: Machine) -> None:
    """The name is there once, and what went wrong can be told from the rest."""
    wrong = "/etc/kvm-ifup/conf.d/wrong.toml"
    node.until(f"systemctl is-active {SERVICE}")
    node.shell(f"echo nonsense > {wrong} && systemctl reload {SERVICE}")
    heard(node, "configuration not read")
    node.shell(f"rm {wrong} && systemctl reload {SERVICE}")
    heard(node, "configuration read")
    fields = "--output=json --output-fields=MESSAGE,PRIORITY"
    lines = node.shell(f"journalctl -u {SERVICE} -t kvm-ifupd {fields}").splitlines()
    said = [(int(line["PRIORITY"]), line["MESSAGE"]) for line in map(json.loads, lines)]
    assert {(6, "ready"), (6, "configuration read")} <= set(said)
    assert [text.split(":")[0] for priority, text in said if priority == 3] == [
        "configuration not read; the agent goes on with the one it has"
    ]
    assert [text for _, text in said if text.startswith(("kvm-ifupd", "<"))] == []


def test_reload_and_stop(node: Machine) -> None:
    """Settings are read again; stopped by hand, it is started by the next hook."""
    node.shell(f"systemctl reload {SERVICE}")
    before = unit(node, SERVICE, "MainPID")
    with guest(node, "bridged", link="br0"):
        through(node, "kvm-ifup-post tap0")
        assert unit(node, SERVICE, "MainPID") == before
        node.shell(f"systemctl stop {SERVICE}")
        assert unit(node, "kvm-ifupd.socket", "SubState") == "listening"
        starts(node, "kvm-ifup-post tap0")
    assert unit(node, SERVICE, "Result") == "success"


@contextmanager
def changed(node: Machine, section: str, *lines: str) -> Iterator[None]:
    """The service with other settings."""
    directory = f"/run/systemd/system/{SERVICE}.d"
    text = "\n".join((f"[{section}]", *lines))
    node.shell(f"mkdir {directory} && cat > {directory}/test.conf <<'END'\n{text}\nEND\nsystemctl daemon-reload")
    try:
        yield
    finally:
        node.shell(f"rm -r {directory} && systemctl daemon-reload")


def test_watchdog(node: Machine) -> None:
    """It is fed; and an agent that is stuck is replaced."""
    with changed(node, "Service", "WatchdogSec=10"):
        node.shell(f"systemctl restart {SERVICE}")
        fed = f"systemctl show --value -p WatchdogTimestampMonotonic {SERVICE}"
        first = node.shell(fed).strip()
        node.until(f"[ $({fed}) != {first} ]")
        stuck = unit(node, SERVICE, "MainPID")
        node.shell(f"systemctl kill --kill-who=main --signal=STOP {SERVICE}")
        node.until(f"[ $(systemctl show --value -p NRestarts {SERVICE}) = 1 ]")
        node.until(f"systemctl is-active {SERVICE}")
        assert unit(node, SERVICE, "MainPID") != stuck


def test_one_that_cannot_start(node: Machine) -> None:
    """Hooks do not wait for it, however many there are; mended, the next one starts it. See kvm-ifupd(8)."""
    wrong = "/etc/kvm-ifup/conf.d/wrong.toml"
    with guest(node, "bridged", link="br0"):
        node.shell(f"systemctl stop {SERVICE} && echo nonsense > {wrong}")
        assert node.run("kvm-ifup-post tap0", check=False).code == 78
        node.until(f"systemctl is-failed {SERVICE}")
        assert (unit(node, SERVICE, "ExecMainStatus"), unit(node, SERVICE, "NRestarts")) == ("78", "0")
        node.shell(f"rm {wrong}")

        # It takes longer to fail in there than a hook waits; this does not.
        with changed(node, "Service", "ExecStart=", "ExecStart=/bin/sh -c 'exit 78'"):
            for _ in range(MANY):
                assert "without the agent: it ended" in hook(node, "kvm-ifup-post tap0")
        assert [line.split()[0] for line in failed(node)] == [SERVICE]
        assert unit(node, "kvm-ifupd.socket", "SubState") == "listening"
        hook(node, "kvm-ifup-post tap0")
        node.until(f"systemctl is-active {SERVICE}")
        through(node, "kvm-ifup-post tap0")


def test_one_that_crashes_again_and_again(node: Machine) -> None:
    """It is tried once in a second, for as long as it takes; then it is there, without anybody's help."""
    with changed(node, "Service", "ExecStart=", "ExecStart=/bin/sh -c 'kill -SEGV $$'"):
        begun = time.monotonic()
        node.run(f"systemctl restart {SERVICE}", check=False)
        node.until(f"[ $(systemctl show --value -p NRestarts {SERVICE}) -ge {MANY} ]")
        assert time.monotonic() - begun >= MANY - 1
    node.until(f"systemctl is-active {SERVICE}")
    assert unit(node, "kvm-ifupd.socket", "SubState") == "running"


def test_idle_exit(node: Machine) -> None:
    """With nothing to look after it ends; the socket stays, and the next hook starts it."""
    node.shell("printf '[agent]\nidle_exit = 1.0\n' > /etc/kvm-ifup/conf.d/idle.toml")
    try:
        node.shell(f"systemctl restart {SERVICE}")
        node.until(f"[ $(systemctl show --value -p ActiveState {SERVICE}) = inactive ]")
        assert "good-bye" in log(node)
        assert unit(node, SERVICE, "Result") == "success"
        assert unit(node, "kvm-ifupd.socket", "SubState") == "listening"
        with guest(node, "bridged", link="br0"):
            starts(node, "kvm-ifup-post tap0")
            through(node, "kvm-ifup-post tap0")
    finally:
        node.shell(f"rm /etc/kvm-ifup/conf.d/idle.toml && systemctl restart {SERVICE}")


def test_upgrade(node: Machine) -> None:
    """The agent is another one afterwards, and watches what it watched."""
    armed = said(node, "(tap0): armed")
    with guest(node, "routed", ip=[GUEST_IP], incoming=True):
        through(node, "kvm-ifup-pre tap0")
        heard(node, "(tap0): armed", armed + 1)
        before = unit(node, SERVICE, "MainPID")
        node.shell("dpkg -i /root/kvm-ifup_*.deb")
        assert unit(node, "kvm-ifupd.socket", "SubState") in ("listening", "running")
        assert unit(node, SERVICE, "MainPID") not in (before, "0")
        heard(node, "(tap0): armed", armed + 2)
        through(node, "kvm-ifup-pre tap0")


def test_purge_and_install(node: Machine) -> None:
    """With a guest plugged in, which does not notice; nothing of the package is left, nor of its units."""
    with guest(node, "bridged", link="br0"):
        through(node, "kvm-ifup-post tap0")
        node.shell(AGENT_RUNS)
        node.shell("rm /etc/kvm-ifup/ext/quarantine")  # the administrator's own
        node.shell("mv /run/kvm-ifup/nic /run/nic && apt-get purge -y kvm-ifup")
        (link,) = node.json("ip -j link show tap0")
        assert link["master"] == "br0"
        for name in (SERVICE, "kvm-ifupd.socket"):
            assert unit(node, name, "LoadState") == "not-found"
            assert unit(node, name, "ActiveState") == "inactive"
        assert node.run(AGENT_RUNS, check=False).code == 1
        assert node.shell("find /etc /run /usr /var/lib/systemd -path '*kvm-ifup*'") == ""

        # Installed on a system that runs, the socket is there at once.
        node.shell("dpkg -i /root/kvm-ifup_*.deb && mv /run/nic /run/kvm-ifup/nic")
        assert node.shell("systemctl is-enabled kvm-ifupd.socket") == "enabled\n"
        assert unit(node, "kvm-ifupd.socket", "SubState") == "listening"
        starts(node, "kvm-ifup-post tap0")
