"""The screens in docs/: run as they stand there, on machines of their own. `python -m tests.docs.screens` renews them.

A screen is a fenced block below a comment `<!-- screen: NODE -->`, or `<!-- screen: NODE; SHELL -->`, where NODE is one
of `NODES` and SHELL is run before, unseen: the fault that it is about. Its lines that begin with "# " are typed,
the others are what is printed then. Times differ from run to run, and so do MACs of virtual devices and durations.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.docs.machine import ROOT, Machine, cable, machine

PAGES = sorted((ROOT / "docs").glob("*.md"))
SCREEN = re.compile(
    r"^<!-- screen: (?P<node>[\w-]+)(?:; (?P<fault>[^\n]+))? -->\n```console\n(?P<text>.*?)^```$", re.M | re.S
)

# Holds taps open, as QEMU does: without that they have no carrier. 0x400454ca is TUNSETIFF (linux/if_tun.h).
HOLD = """
import fcntl, os, struct, sys, time
held = [os.open("/dev/net/tun", os.O_RDWR) for _ in sys.argv[1:]]
for descriptor, name in zip(held, sys.argv[1:]):
    fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
time.sleep(1000000)
"""
NIC = """
mkdir -p -m 755 /run/kvm-ifup/nic/{instance} /run/kvm-ifup/tap
printf '%s\\n' {lines} > /run/kvm-ifup/nic/{instance}/0.toml
ln -sfn ../nic/{instance}/0.toml /run/kvm-ifup/tap/{tap}
"""


@dataclass(frozen=True)
class Screen:
    """One screen, and where it is: its page, number, and the span of its text."""

    page: Path
    number: int
    span: tuple[int, int]
    node: str
    fault: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.number}"

    @property
    def typed(self) -> list[str]:
        """The commands."""
        return [line.removeprefix("# ") for line in self.text.splitlines() if line.startswith("# ")]


def screens(page: Path) -> Iterator[Screen]:
    """All of a page."""
    for number, found in enumerate(SCREEN.finditer(page.read_text(encoding="utf-8")), 1):
        yield Screen(page, number, found.span("text"), found["node"], found["fault"], found["text"])


def shown(screen: Screen) -> str:
    """What the screen is when it is run now."""
    with ExitStack() as stack:
        node = NODES[screen.node](stack)
        if screen.fault:
            node.run(screen.fault)
        text = ""
        for command in screen.typed:
            done = node.attempt(command)
            text += f"# {command}\n{done.stdout}{done.stderr}"
    return re.sub(r"\bLinux \S+", "Linux ...", text)  # the reader's is another one


def comparable(text: str) -> str:
    """*text* without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\d+(\.\d+)? ?(ms|s)\b", "DURATION", text)
    text = re.sub(r"Python \S+, pyroute2 \S+,", "VERSIONS,", text)
    text = re.sub(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC", text)
    return re.sub(r" +", " ", text)


# --- the machines --------------------------------------------------------------------------------------------


def nic(node: Machine, tap: str, instance: str, **keys: str) -> None:
    """A NIC file, as a process manager writes it; values as TOML."""
    lines = " ".join(f"'{key} = {value}'" for key, value in {"tap": f'"{tap}"', **keys}.items())
    node.run(NIC.format(instance=instance, tap=tap, lines=lines))


def hold(node: Machine, *taps: str) -> None:
    """Taps with somebody behind them."""
    names = " ".join(taps)
    node.run(
        f"for tap in {names}; do ip tuntap add $tap mode tap; done\n"
        f"python3 -I -c '{HOLD}' {names} >/dev/null 2>&1 &\n"
        f"for tap in {names}; do\n"
        "    until ip link set $tap up && ip link show $tap | grep -q LOWER_UP; do sleep 0.05; done\n"
        "    ip link set $tap down\n"
        "done"
    )


def bare(stack: ExitStack) -> Machine:
    """A bridge, an uplink that forwards with a neighbour behind it, two taps, and nothing wired."""
    node, neighbour = stack.enter_context(machine()), stack.enter_context(machine())
    cable(node, neighbour)
    for each, host in ((node, 11), (neighbour, 1)):
        each.run(f"ip addr add 192.0.2.{host}/24 dev eth0; ip addr add 2001:db8::{host}/64 dev eth0 nodad")
    node.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
    node.run("ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8::1 dev eth0")
    node.run("ip link add br0 type bridge stp_state 0; ip link set br0 up")
    node.run("ip link add br0-up type veth peer name br0-far; ip link set br0-far up; ip link set br0-up master br0 up")
    hold(node, "tap0", "tap1")
    nic(node, "tap0", "web1", mac='"aa:00:00:35:ac:01"', mode='"bridged"', link='"br0"')
    nic(node, "tap1", "db1", mac='"aa:00:00:35:ac:02"', mode='"routed"', ip='["192.0.2.8", "2001:db8::8"]')
    return node


def described(stack: ExitStack) -> Machine:
    """A NIC file for web1's tap0, as `bare` has it, and nothing that it names."""
    node = stack.enter_context(machine())
    nic(node, "tap0", "web1", mac='"aa:00:00:35:ac:01"', mode='"bridged"', link='"br0"')
    return node


def wired(stack: ExitStack) -> Machine:
    """The same, with both guests running: web1 bridged on tap0, db1 routed on tap1."""
    node = bare(stack)
    node.run("kvm-ifup-post tap0; kvm-ifup-post tap1")
    return node


def expecting(stack: ExitStack) -> Machine:
    """An agent, and a routed guest on tap1 that is on its way."""
    node = bare(stack)
    node.run("kvm-ifupd >/run/kvm-ifupd.log 2>&1 & until grep -q ready /run/kvm-ifupd.log; do sleep 0.1; done")
    node.run("echo incoming = true >> /run/kvm-ifup/nic/db1/0.toml; kvm-ifup-post tap0; kvm-ifup-pre tap1")
    node.run("until grep -q armed /run/kvm-ifupd.log; do sleep 0.1; done")
    return node


# A guest that forges, when it is told to: ARP for the address of another, from an address of another, as a router.
FORGE = """
import fcntl, os, signal, struct
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x1002))
mac, other = bytes.fromhex("aa000035ac01"), bytes.fromhex("02000000002a")
def arp(source, sender, address):
    body = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, sender, bytes(address), bytes(6), bytes([192, 0, 2, 1]))
    os.write(tap, b"\\xff" * 6 + source + b"\\x08\\x06" + body)
def forge(*_):
    arp(other, other, [192, 0, 2, 8])
    for _ in range(2):
        arp(mac, mac, [192, 0, 2, 9])
    arp(mac, mac, [192, 0, 2, 8])
signal.signal(signal.SIGUSR1, forge)
while True:
    signal.pause()
"""


def filtered(stack: ExitStack) -> Machine:
    """A bridge, and web1 on tap0 with a filter; `kill -USR1 $(cat /run/guest)` makes it forge three frames."""
    node = stack.enter_context(machine())
    node.run("ip link add br0 type bridge stp_state 0; ip link set br0 up")
    node.run(f"ip tuntap add tap0 mode tap\npython3 -I -c '{FORGE}' >/dev/null 2>&1 & echo $! >/run/guest")
    node.run("until ip link set tap0 up && ip link show tap0 | grep -q LOWER_UP; do sleep 0.05; done")
    node.run("ip link set tap0 down")
    ip = '["192.0.2.8", "192.0.2.48/28", "2001:db8::8"]'
    nic(node, "tap0", "web1", mac='"aa:00:00:35:ac:01"', mode='"bridged"', link='"br0"', ip=ip, filter='"address"')
    node.run("kvm-ifup-post tap0")
    return node


NODES: dict[str, Callable[[ExitStack], Machine]] = {
    "bare": bare,
    "described": described,
    "wired": wired,
    "expecting": expecting,
    "filtered": filtered,
}


def main() -> int:
    """Renew every screen of every page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for screen in reversed(list(screens(page))):  # from the end: the spans of those before stay right
            now = shown(screen)
            if comparable(now) != comparable(screen.text):
                print(f"{screen}: renewed")
                text = text[: screen.span[0]] + now + text[screen.span[1] :]
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
