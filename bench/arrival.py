"""From a guest's first frame to its announcement at the client: `python -m bench.arrival [--runs N] [--out DIR]`.

A node and a client in namespaces of their own. The guest's first frame, a RARP like QEMU's, is written into the tap;
the time is from there to the first gratuitous ARP, or unsolicited NA, that the client gets. Beside it, what a manager
gets that knows of the arrival at the same moment and runs kvm-ifup-post, with no agent.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import picture, results
from harness import agents, guests, hooks, manager, nodes, tools, wire
from harness.addresses import GUEST_IP4, GUEST_IP6, NODE_MAC
from harness.nodes import Node
from lab import output

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
    manager.write_nic(tap, mode="routed", ip=[address], incoming=True)
    hooks.check(hooks.hook("kvm-ifup-pre", tap), 0)
    time.sleep(0.2)  # armed
    client = node.listen()
    start = time.perf_counter()
    begin(guest, tap)
    client.until(announced)
    taken = (time.perf_counter() - start) * 1000
    time.sleep(PAUSE)
    tools.ip(f"link del {tap}")
    hooks.hook("kvm-ifdown", tap)
    guest.close()
    client.close()
    return taken


def first_frame(guest: wire.Tap, _tap: str) -> None:
    """The guest sends; the agent hears it."""
    guest.send(guests.rarp())


def by_manager(_guest: wire.Tap, tap: str) -> None:
    """The manager runs post."""
    hooks.start("kvm-ifup-post", tap)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(prog="bench.arrival", description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=output.directory, default="demo-out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all values, in ms")
    options = parser.parse_args(argv)
    rows: dict[str, list[float]] = {}
    for family, address in FAMILIES.items():
        for label, begin in ((f"{family}, agent", first_frame), (f"{family}, kvm-ifup-post", by_manager)):
            with nodes.fresh_node() as node:
                node.uplink()
                heard = begin is first_frame
                runs = options.runs if heard else max(options.runs // 5, 3)
                with agents.running() if heard else contextlib.nullcontext():
                    rows[label] = [arrival(node, number, address, begin) for number in range(runs)]
    print(picture.table("ms", rows, "IPv4, kvm-ifup-post"))
    results.write(options.json, rows)
    title = "From the guest's first frame (or the manager's call) to the announcement at the client"
    for path in picture.save("bench-arrival", title, "ms", rows, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
