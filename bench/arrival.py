"""From a guest's first frame to its announcement at the client: `python -m bench.arrival [--runs N] [--out DIR]`.

A node and a client in namespaces of their own. The guest's first frame, a RARP like QEMU's, is written into the tap;
the time is from there to the first gratuitous ARP, or unsolicited NA, that the client gets. Beside it, what a manager
gets that knows of the arrival at the same moment and runs kvm-ifup-post, with no agent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from bench import picture
from lab import output
from tests import netns, wire
from tests.netns import GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_MAC, Node

RARP = wire.ethernet(wire.BROADCAST, GUEST_MAC, 0x8035, bytes(46))
PATIENCE = 20.0  # seconds
PAUSE = 1.2  # seconds after which nothing of an arrival goes on any more: announcements, the second look
FAMILIES = {"IPv4": GUEST_IP4, "IPv6": GUEST_IP6}


def announced(frame: bytes) -> bool:
    """Whether *frame* says that the guest is at the node."""
    arp, na = wire.arp(frame), wire.advertisement(frame)
    return bool(
        (arp and (arp.sender, arp.mac) == (GUEST_IP4, NODE_MAC))
        or (na and (na.target, na.mac, na.override) == (GUEST_IP6, NODE_MAC, True))
    )


def arrival(node: Node, number: int, address: str, begin: Callable[[wire.Tap, str], None]) -> float:
    """One incoming guest on a new tap: ms from *begin* to the client's knowing."""
    tap = f"tap{number}"
    guest = node.guest(tap)
    netns.write_nic(tap, mode="routed", ip=[address], incoming=True)
    netns.check(netns.hook("kvm-ifup-pre", tap), 0)
    time.sleep(0.2)  # armed
    client = node.listen()
    start = time.perf_counter()
    begin(guest, tap)
    client.until(announced)
    taken = (time.perf_counter() - start) * 1000
    time.sleep(PAUSE)
    netns.ip(f"link del {tap}")
    netns.hook("kvm-ifdown", tap)
    guest.close()
    client.close()
    return taken


def first_frame(guest: wire.Tap, _tap: str) -> None:
    """The guest sends; the agent hears it."""
    guest.send(RARP)


def manager(_guest: wire.Tap, tap: str) -> None:
    """The manager runs post."""
    netns.start("kvm-ifup-post", tap)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(prog="bench.arrival", description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=output.directory, default="demo-out")
    options = parser.parse_args(argv)
    rows: dict[str, list[float]] = {}
    for family, address in FAMILIES.items():
        for label, begin in ((f"{family}, agent", first_frame), (f"{family}, kvm-ifup-post", manager)):
            with netns.fresh_node() as node:
                node.uplink()
                process = None
                if begin is first_frame:
                    process = subprocess.Popen(netns.command("kvm-ifupd"), env=netns.CLEAN, stderr=subprocess.PIPE)
                    assert process.stderr is not None
                    while b": ready" not in process.stderr.readline():
                        pass
                runs = options.runs if process else max(options.runs // 5, 3)
                rows[label] = [arrival(node, number, address, begin) for number in range(runs)]
                if process:
                    process.terminate()
                    process.communicate(timeout=PATIENCE)
    print(picture.table("ms", rows, "IPv4, kvm-ifup-post"))
    title = "From the guest's first frame (or the manager's call) to the announcement at the client"
    for path in picture.save("bench-arrival", title, "ms", rows, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
