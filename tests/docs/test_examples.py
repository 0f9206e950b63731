"""Every example of the man pages and of the README does what the text around it says, as printed.

A test runs an example's blocks as they are; what it sets up before is what the text takes for granted.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.docs import pages
from tests.docs.machine import CLEAN, Machine, cable, machine
from tests.docs.pages import PAGES, readme

BRIDGED = ("kvm-ifup-pre.8", "A bridged guest, started by hand")
MIGRATION = ("kvm-ifup-pre.8", "A guest that arrives by live migration")
ROUTED = ("kvm-ifup-post.8", "A routed guest")
TAP_MAC = "fe:00:00:35:ac:01"

Test = Callable[["Machines", list[str]], None]
TESTS: dict[tuple[str, str], Test] = {}


class Machines:
    """As many machines as a test needs; the first is the node."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.node = self.another()

    def another(self) -> Machine:
        """One more machine."""
        return self._stack.enter_context(machine())


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Machines that end with the test."""
    with ExitStack() as stack:
        yield Machines(stack)


def example(page: str, title: str) -> Callable[[Test], Test]:
    """Mark the test of the example *title* of *page*."""

    def mark(test: Test) -> Test:
        TESTS[page, title] = test
        return test

    return mark


def printed() -> list[tuple[str, str]]:
    """All examples that there are."""
    return [(page, title) for page in PAGES for title in pages.examples(page)]


@pytest.mark.parametrize(("page", "title"), printed())
def test_example(page: str, title: str, machines: Machines) -> None:
    assert (page, title) in TESTS, "no test says what this example is to do"
    TESTS[page, title](machines, pages.examples(page)[title])


def test_every_test_has_its_example() -> None:
    assert sorted(TESTS) == sorted(printed())


# --- what examples take for granted ----------------------------------------------------------------------


def bridge(node: Machine) -> None:
    """A bridge."""
    node.run("ip link add br0 type bridge; ip link set br0 up")


# Without somebody who holds the tap open it has no carrier, and does not forward. 0x400454ca is TUNSETIFF,
# 0x1002 is IFF_TAP | IFF_NO_PI (linux/if_tun.h). The child stays until the machine ends.
HOLD = """
import fcntl, os, signal, struct, sys
fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))
if os.fork() == 0:
    signal.pause()
"""


def tap(node: Machine, name: str = "tap0") -> None:
    """A tap with somebody behind it who is not QEMU."""
    node.run(f"ip tuntap add {name} mode tap; python3 -I -c '{HOLD}' {name} >/dev/null 2>&1")


def running(node: Machine) -> None:
    """A guest on tap0, described and wired."""
    bridge(node)
    tap(node)
    node.run(nic_file())
    node.run("kvm-ifup-post tap0")


def uplink(node: Machine, neighbour: Machine, device: str = "eth0", net: int = 0) -> None:
    """An uplink with the default routes, and a neighbour at its other end."""
    cable(node, neighbour, device)
    for each, host in ((node, 11), (neighbour, 1)):
        each.run(f"ip addr add 192.0.{2 + net}.{host}/24 dev {device}")
        each.run(f"ip addr add 2001:db8:{net}::{host}/64 dev {device} nodad")
    if net == 0:
        node.run(f"ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:0::1 dev {device}")


def blocks_of(which: tuple[str, str]) -> list[str]:
    """The blocks of another example, one that this one goes on from."""
    page, title = which
    return pages.examples(page)[title]


def follow(node: Machine, which: tuple[str, str]) -> None:
    """Do as another example says."""
    for block in blocks_of(which):
        node.run(block)


def journals(node: Machine) -> list[str]:
    """The taps that something is remembered about."""
    return node.run("cd /run/kvm-ifup/state 2>/dev/null && ls || true").stdout.split()


def wired(node: Machine, device: str = "tap0") -> None:
    """The tap is a forwarding port of br0, with the MAC that it has to have."""
    assert node.ports() == {device: "forwarding"}
    (link,) = node.ask(f"ip -j link show dev {device}")
    assert link["address"] == TAP_MAC
    assert "UP" in link["flags"]


def until(node: Machine, condition: str) -> None:
    """Wait until a shell condition holds."""
    node.run(f"until {condition}; do sleep 0.05; done")


def quit_in_order(node: Machine, pidfile: str = "/run/web1.pid") -> None:
    """End a daemon by its process id, so that it can clear up, and wait for its end."""
    node.run(f"pid=$(cat {pidfile}); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.05; done")


# --- kvm-ifup-post(8) -------------------------------------------------------------------------------------


@example("kvm-ifupd.8", "Without systemd")
def _agent(machines: Machines, blocks: list[str]) -> None:
    node = machines.node
    bridge(node)
    tap(node)
    node.run(blocks[0])
    until(node, "grep -q ready /run/kvm-ifupd.log")
    done = node.run("INTERFACE=tap0 MODE=bridged LINK=br0 MAC=aa:00:00:35:ac:01 kvm-ifup-post -v")
    assert "without the agent" not in done.stderr
    wired(node)


@example(*BRIDGED)
def _bridged(machines: Machines, blocks: list[str]) -> None:
    (start,) = blocks
    node = machines.node
    node.run(start)
    wired(node)
    assert journals(node) == ["tap0.json"]
    # And downscript=: there is nothing left.
    quit_in_order(node)
    assert not node.has("tap0")
    assert journals(node) == []


@example(*ROUTED)
def _routed(machines: Machines, blocks: list[str]) -> None:
    (start,) = blocks
    node, client = machines.node, machines.another()
    uplink(node, client)
    said = node.run(start).stderr
    assert "web2/0 (tap1)" in said
    assert node.routes("tap1") == {"192.0.2.8", "2001:db8::8", "198.51.100.0/29"}
    assert node.rules("tap1") == ["100", "100"]
    assert node.proxies() == {("eth0", "192.0.2.8"), ("eth0", "2001:db8::8")}
    # The neighbour learns who answers for the guest.
    (eth0,) = node.ask("ip -j link show dev eth0")
    client.run("bash -c 'echo > /dev/udp/192.0.2.8/9'")
    until(client, f"ip neigh show 192.0.2.8 | grep -q {eth0['address']}")


@example("kvm-ifup-post.8", "Without a NIC file")
def _environment(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    bridge(node)
    tap(node)
    done = node.run(block)
    assert done.stdout + done.stderr == ""
    wired(node)


@example("kvm-ifup-post.8", "Is this NIC as it should be?")
def _right(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    follow(node, BRIDGED)
    first, *lines = node.run(block).stdout.splitlines()
    assert first == "web1/0 (tap0): bridged, post"
    assert lines
    assert all(line.startswith("  right ") for line in lines)
    # And when it is not, a line says so.
    node.run("ip link set tap0 nomaster")
    assert [line for line in node.run(block).stdout.splitlines() if line.startswith("  do ") and "br0" in line]


# --- kvm-ifup-pre(8) --------------------------------------------------------------------------------------


@example(*MIGRATION)
def _migration(machines: Machines, blocks: list[str]) -> None:
    _on_target, on_source, afterwards = blocks
    source, target = before_migration(machines)
    wired(target)  # before the guest moves

    assert source.run(on_source).stdout.endswith("web1 has moved\n")
    until(source, "! kill -0 $(cat /run/web1.pid) 2>/dev/null")
    assert not source.has("tap0")
    assert journals(source) == []

    done = target.run(afterwards)
    assert done.stdout + done.stderr == ""
    wired(target)
    state = target.run("echo info status | socat - UNIX-CONNECT:/run/web1.monitor").stdout
    assert "running" in state
    quit_in_order(target)
    assert journals(target) == []


def before_migration(machines: Machines) -> tuple[Machine, Machine]:
    """web1 runs on the first machine, and the second one is prepared for it as the example says."""
    source, target = machines.node, machines.another()
    cable(source, target)
    source.run("ip addr add 192.0.2.11/24 dev eth0")
    target.run("ip addr add 192.0.2.12/24 dev eth0")
    follow(source, BRIDGED)
    target.run(blocks_of(MIGRATION)[0])
    return source, target


@pytest.mark.parametrize("fault", ["nobody listens", "cancelled", "ended"])
def test_the_loop_of_the_example_ends_when_the_guest_does_not_move(fault: str, machines: Machines) -> None:
    source, target = before_migration(machines)
    _on_target, on_source, _afterwards = blocks_of(MIGRATION)
    monitor = "socat - UNIX-CONNECT:/run/web1.monitor"
    order, loop = on_source.split("\n", 1)
    if fault == "nobody listens":
        target.end("/run/web1.pid")
        source.run(order)
    else:
        source.run(f"echo migrate_set_parameter max-bandwidth 1k | {monitor}")
        source.run(order)
        if fault == "cancelled":
            source.run(f"echo migrate_cancel | {monitor}")
        else:
            source.end("/run/web1.pid")
    assert source.run(loop).stdout == "web1 has not moved\n"
    if fault != "ended":
        assert "running" in source.run(f"echo info status | {monitor}").stdout
        wired(source)


@example("kvm-ifup-pre.8", "What would be done")
def _plan(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    bridge(node)
    tap(node)
    node.run(nic_file("incoming = true"))
    first, *lines = node.run(block).stdout.splitlines()
    assert first == "web1/0 (tap0): bridged, pre"
    assert [line for line in lines if line.startswith("  do ") and "br0" in line]
    assert node.ports() == {}
    assert journals(node) == []


def nic_file(more: str = "", index: int = 0) -> str:
    """A command that writes the NIC file of a bridged NIC of web1."""
    return f"""
mkdir -p -m 755 /run/kvm-ifup/nic/web1
cat > /run/kvm-ifup/nic/web1/{index}.toml <<'END'
tap  = "tap{index}"
mac  = "aa:00:00:35:ac:0{index + 1}"
mode = "bridged"
link = "br0"
{more}
END
"""


# --- kvm-ifdown(8), kvm-ifup(8) ---------------------------------------------------------------------------


@example("kvm-ifdown.8", "The guest left, and QEMU did not say so")
def _killed(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    follow(node, BRIDGED)
    node.end("/run/web1.pid")
    assert journals(node) == ["tap0.json"]
    node.run(block)
    assert journals(node) == []


@example("kvm-ifdown.8", "All NICs of a guest")
def _all_nics(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    bridge(node)
    for index in (0, 1):
        tap(node, f"tap{index}")
        node.run(nic_file(index=index))
    node.run("kvm-ifup-post --instance web1")
    assert node.ports() == {"tap0": "forwarding", "tap1": "forwarding"}
    said = node.run(block).stderr
    assert "tap0" in said
    assert "tap1" in said
    assert node.ports() == {}
    assert journals(node) == []


@example("kvm-ifup.8", "After QEMU was killed")
def _gc(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    uplink(node, machines.another())
    follow(node, ROUTED)
    node.run("ip tuntap del tap1 mode tap")
    assert node.rules("tap1") == ["100", "100"]
    done = node.run(block)
    assert "rule" in done.stdout  # the plan
    assert "rule" in done.stderr  # what was done
    assert node.rules("tap1") == []
    assert node.proxies() == set()
    assert journals(node) == []


@example("kvm-ifup.8", "What is on this node, and is it right?")
def _show(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    running(node)
    node.run("ip link add br0-up type veth peer name br0-far; ip link set br0-far up; ip link set br0-up master br0 up")
    headings, row, verdict = node.run(block).stdout.splitlines()
    assert headings.split()[:2] == ["INSTANCE", "NIC"]
    assert row.split()[:5] == ["web1", "0", "tap0", "bridged", "br0"]
    assert row.split()[-1] == "yes"
    assert verdict == "1 right, 0 wrong"


@example("kvm-ifup.8", "After networking was restarted")
def _check(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    running(node)
    node.run("ip link set tap0 nomaster")
    said = node.run(block).stdout
    assert "restarting the network" in said
    assert "repaired: web1/0 (tap0): tap0 bridge: none -> br0" in said
    wired(node)


@example("kvm-ifup.8", "By hand")
def _by_hand(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    bridge(node)
    tap(node)
    node.run(nic_file())
    commands = [line for line in node.run(block).stdout.splitlines() if line.startswith(" " * 11)]
    assert node.ports() == {}
    node.run("\n".join(commands))
    wired(node)


@example("kvm-ifup.8", "A NIC file")
def _nic_put(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    listed = node.run(block).stdout.splitlines()
    assert listed[1].split() == ["web1", "0", "tap0", "bridged", "br0", "-", "no"]
    bridge(node)
    tap(node)
    node.run("kvm-ifup-post tap0")
    wired(node)


@example("kvm-ifup.8", "Before a guest is migrated to this node")
def _node(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    node.run(nic_file())
    done = node.attempt(block)
    assert done.returncode == 1
    assert "there is no bridge br0" in done.stdout
    bridge(node)
    node.run("kvm-ifupd > /dev/null 2>&1 &")
    until(node, "test -S /run/kvm-ifup/agent.sock")
    assert node.run(block).stdout.startswith("node: ready\n")


# --- kvm-ifup.toml(5), kvm-ifup-nic(5) --------------------------------------------------------------------


@example("kvm-ifup.toml.5", "Two uplinks, and a bridge for Ganeti's ext NICs")
def _configuration(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node, client = machines.node, machines.another()
    bridge(node)
    tap(node)
    shown = node.run(block).stdout.splitlines()
    assert shown[0] == "tap0: bridged, post"
    assert [line for line in shown if "br0" in line]
    # The uplinks: the guest is answered for on both.
    uplink(node, client)
    uplink(node, client, "eth1", net=1)
    follow(node, ROUTED)
    assert {device for device, _ in node.proxies()} == {"eth0", "eth1"}
    assert node.run("cat /proc/sys/net/ipv4/conf/tap1/rp_filter").stdout == "2\n"


@example("kvm-ifup-nic.5", "A NIC file, written so that nobody reads half of it")
def _nic_file(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    bridge(node)
    tap(node)
    assert node.run(block).stdout.startswith("web1/0 (tap0): bridged, post\n")
    assert node.run("readlink -e /run/kvm-ifup/tap/tap0").stdout == "/run/kvm-ifup/nic/web1/0.toml\n"
    assert node.run("ls -A /run/kvm-ifup/nic/web1").stdout == "0.toml\n"


@example("kvm-ifup-nic.5", "A routed NIC that arrives by live migration")
def _routed_incoming(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    uplink(node, machines.another())
    node.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
    tap(node, "tap1")
    node.run(block)
    assert node.rules("tap1") == ["100", "100"]
    # What must not be on two nodes at once is not there yet.
    assert node.routes("tap1") == set()
    assert node.proxies() == set()
    node.run("kvm-ifup-post tap1")
    assert node.routes("tap1") == {"192.0.2.8", "2001:db8::8", "198.51.100.0/29"}
    assert node.proxies() == {("eth0", "192.0.2.8"), ("eth0", "2001:db8::8")}


@example("kvm-ifup-nic.5", "A program for ext NICs")
def _program(machines: Machines, blocks: list[str]) -> None:
    (block,) = blocks
    node = machines.node
    tap(node)
    node.run(block)
    assert node.ports("only-tap0") == {"tap0": "forwarding"}
    node.run("INTERFACE=tap0 MODE=ext LINK=quarantine MAC=aa:00:00:35:ac:01 kvm-ifup-post")  # it bears repetition
    node.run("kvm-ifdown tap0")
    assert not node.has("only-tap0")
    assert journals(node) == []


# --- the README -------------------------------------------------------------------------------------------


def test_the_readme_names_the_packages() -> None:
    """They are not installed here: tests need them all the time."""
    install, _start = readme("A guest by hand").blocks
    (line,) = install.splitlines()
    assert line.startswith("apt-get install -y ")
    packages = set(line.split()[3:])
    for package in packages:
        subprocess.run(["dpkg-query", "--status", package], env=CLEAN, check=True, stdout=subprocess.DEVNULL)
    control = (pages.ROOT / "debian/control").read_text(encoding="utf-8")
    (depends,) = re.findall(r"^Package: kvm-ifup\n(?:.+\n)*?Depends:\n((?: .+\n)+)", control, re.MULTILINE)
    needed = set(re.findall(r"^ ([a-z][a-z0-9-]+)", depends, re.MULTILINE))
    # Python comes along with its modules.
    assert packages == needed - {"python3"} | {"qemu-system-x86"}


def test_the_readme_starts_a_guest(machines: Machines) -> None:
    _install, start = readme("A guest by hand").blocks
    node = machines.node
    assert "tap0" in node.run(start).stdout
    wired(node)
    quit_in_order(node)
    assert journals(node) == []


def test_the_qemu_page_starts_and_migrates_a_guest(machines: Machines) -> None:
    """As printed, with the changes for the target that the text names."""
    text = (pages.ROOT / "docs/qemu.md").read_text(encoding="utf-8")
    (start,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (migrate,) = re.findall(r"^    (echo 'migrate .*)$", text, re.MULTILINE)
    (leave,) = re.findall(r"`(echo quit .*?)`", text)
    (more,) = re.findall(r"`(-incoming \S+)`", text)
    assert "`incoming = true`" in text
    source, target = machines.node, machines.another()
    cable(source, target)
    source.run("ip addr add 192.0.2.11/24 dev eth0")
    target.run("ip addr add 192.0.2.12/24 dev eth0")
    source.run(start)
    wired(source)
    target.run(start.replace("\nEND", "\nincoming = true\nEND").replace(" \\\n", f" \\\n    {more} \\\n", 1))
    wired(target)
    source.run(migrate.replace("TARGET", "192.0.2.12"))
    until(source, "echo info migrate | socat - UNIX-CONNECT:/run/web1.monitor | grep -q completed")
    source.run(leave)
    until(source, "! ip link show tap0 2>/dev/null")
    assert journals(source) == []
    target.run("kvm-ifup-post tap0")
    quit_in_order(target)
    assert journals(target) == []


def test_the_readme_migrates_a_guest(machines: Machines) -> None:
    """The incoming form is the plain one with the changes that the text names; the commands are as printed."""
    section = readme("A guest by hand")
    _install, start = section.blocks
    for words in ("`incoming = true`", "`-incoming …`"):
        assert words in section.text
    incoming = start.replace("\nEND", "\nincoming = true\nEND")
    incoming = incoming.replace(" \\\n", " \\\n    -incoming tcp:192.0.2.12:4444 \\\n", 1)
    on_source, on_target = re.findall(r"^    (scripts/kvm-\S+ tap0) ", section.text, re.MULTILINE)
    source, target = machines.node, machines.another()
    cable(source, target)
    source.run("ip addr add 192.0.2.11/24 dev eth0")
    target.run("ip addr add 192.0.2.12/24 dev eth0")
    source.run(start.replace("-daemonize", "-daemonize -monitor unix:/run/m,server=on,wait=off"))
    target.run(incoming)
    wired(target)
    source.run("echo migrate -d tcp:192.0.2.12:4444 | socat - UNIX-CONNECT:/run/m")
    until(source, "echo info migrate | socat - UNIX-CONNECT:/run/m | grep -q completed")
    source.end("/run/web1.pid")
    source.run(on_source)
    assert journals(source) == []
    target.run(on_target)
    wired(target)
    quit_in_order(target)
    assert journals(target) == []
