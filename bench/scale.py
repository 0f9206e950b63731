"""A node with very many NICs beside one with few: `python -m bench.scale [--runs N] [--out DIR]`.

Two nodes, each with an agent, and with guests of all kinds, some of which have yet to arrive: 100 NICs, and 2,000. They
take turns. Whole hooks, from their start to their end: post for a new NIC, the same once more, kvm-ifdown; and the
processor's time that the agent takes for all three, with what it does afterwards. Then `kvm-ifup show`, the agent's
memory, and the processor's time that it takes while nothing happens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import hook, picture, results
from bench.results import Rows
from harness import agents, hooks, manager, nodes, tools
from lab.agent import scheduled

FEW, FULL = 100, 2000
OF_A_GUEST = 100  # NICs that are wired in one run, so that the node is soon full
ARMED = 20  # every so many NICs one whose guest is yet to arrive
KINDS = ("bridged", "routed", "routed, IPv6")
MINE = 5000  # the number of the first NIC that is measured
SETTLED, AT_REST, PATIENCE = 1.0, 20.0, 120.0  # seconds: between two looks, of one that counts, until it is quiet
QUIET = 0.05  # of a processor, that an agent takes that has nothing more to do
POST, AGAIN, DOWN, AGENT = "post", "post once more", "kvm-ifdown", "the agent's own time for these"


def among(what: str, many: int) -> str:
    """The label of *what* on a node with that many NICs."""
    return f"{what}, {many} NICs"


def fill(many: int) -> None:
    """Wire that many NICs."""
    hook.add_taps(range(many))
    for first in range(0, many, OF_A_GUEST):
        guest = f"full{first}.example.com"
        for number in range(first, first + OF_A_GUEST):
            told = hook.environment(KINDS[number % len(KINDS)], number)
            keys: dict[str, Any] = {"mode": told["MODE"], "mac": told["MAC"], "link": told.get("LINK")}
            ip = [told["IP"]] if "IP" in told else []
            armed = told["MODE"] == "routed" and number % ARMED == 0
            manager.write_nic(f"tap{number}", guest, number - first, **keys, ip=ip, incoming=armed)
        hooks.check(hooks.hook("kvm-ifup-pre", "--instance", guest), 0)


def rest(agent: agents.Agent) -> None:
    """Wait until the agent has nothing more to do."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        before = agent.taken()
        time.sleep(SETTLED)
        if agent.taken() - before < QUIET * SETTLED * 1000:
            return
    raise SystemExit(f"the agent is not at rest after {PATIENCE:g} s")


def one(number: int, agent: agents.Agent, many: int) -> dict[str, float]:
    """A new NIC of each kind: wired, once more, and taken down."""
    found: dict[str, float] = {}
    for kind in KINDS:
        hook.add_taps([number])
        environ, tap = hook.environment(kind, number), f"tap{number}"
        before = agent.taken()
        for what, script in ((POST, "kvm-ifup-post"), (AGAIN, "kvm-ifup-post"), (DOWN, "kvm-ifdown")):
            found[among(f"{kind}: {what}", many)] = hook.timed([hook.script(script), tap], environ)
        rest(agent)
        found[among(f"{kind}: {AGENT}", many)] = agent.taken() - before
        tools.ip(f"link del {tap}")
    return found


def at_rest(agent: agents.Agent, many: int) -> dict[str, float]:
    """How much of a processor the agent takes while nothing happens."""
    rest(agent)
    before = agent.taken()
    time.sleep(AT_REST)
    return {among("the agent at rest, % of a processor", many): (agent.taken() - before) / AT_REST / 10}


def peer(many: int) -> None:
    """What is at the other end of a `hook.Peer`: a node with that many NICs."""
    with nodes.fresh_node() as here:
        here.uplink()
        nodes.add_bridge()
        with agents.running(within=scheduled()) as agent:
            fill(many)
            rest(agent)
            numbers = itertools.count(MINE)
            plain = tools.CLEAN
            answers: Mapping[str, Callable[[], dict[str, float]]] = {
                "one": lambda: one(next(numbers), agent, many),
                "at rest": lambda: at_rest(agent, many),
                "memory": lambda: {among("MB of memory of the agent", many): hook.memory(agent.process.pid)},
                "show": lambda: {among("kvm-ifup show", many): hook.timed([hook.script("kvm-ifup"), "show"], plain)},
            }
            for line in sys.stdin:
                print(json.dumps(answers[line.strip()]()), flush=True)


def ratios(rows: Rows, what: str) -> list[float]:
    """How *what* is on the full node, in times of what it is on the other, for each kind of NIC."""
    return [
        picture.median(rows[among(f"{kind}: {what}", FULL)]) / picture.median(rows[among(f"{kind}: {what}", FEW)])
        for kind in KINDS
    ]


def title(rows: Rows) -> str:
    """What the picture says, honest for the worst kind."""
    worst = max(max(ratios(rows, what)) for what in (POST, AGAIN, DOWN))
    return f"A hook among {FULL} NICs takes at most {worst:.2f} times as long as among {FEW}"


def note(rows: Rows, once: Rows) -> str:
    """What is to be said below it."""
    show, few = once[among("kvm-ifup show", FULL)][0], once[among("kvm-ifup show", FEW)][0]
    post = picture.median(rows[among(f"{KINDS[0]}: {POST}", FULL)])
    return "\n".join(
        [
            f"the agent's own time for a hook, and for what it does then: {max(ratios(rows, AGENT)):.2f} times",
            f"kvm-ifup show: {show / few:.1f} times as long for {FULL / FEW:g} times as many: {show / post:.0f} hooks",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    parser = results.parser("scale", __doc__, runs=10)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)  # for hook.Peer
    options = parser.parse_args(argv)
    if options.peer is not None:
        peer(options.peer)
        return 0
    few, full = hook.Peer(FEW, "scale"), hook.Peer(FULL, "scale")
    rows: dict[str, list[float]] = {}
    for run in range(options.runs):
        for node in (few, full)[:: 1 if run % 2 else -1]:
            for label, value in node.ask("one").items():
                rows.setdefault(label, []).append(value)
    # The first time that somebody asks for all of them, the agent reads what it has not needed yet.
    once = {label: [value] for what in ("memory", "at rest", "show", "show") for node in (few, full)
            for label, value in node.ask(what).items()}  # fmt: skip
    for node in (few, full):
        node.close()
    ordered = {label: rows[label] for kind in KINDS for what in (POST, AGAIN, DOWN, AGENT) for many in (FEW, FULL)
               if (label := among(f"{kind}: {what}", many)) in rows}  # fmt: skip
    print(picture.table("ms", ordered, next(iter(ordered))))
    print("".join(f"{label}: {values[0]:.2f}\n" for label, values in once.items()))
    print(title(ordered), note(ordered, once), sep="\n")
    results.write(options.json, {**ordered, **once})
    drawn = {label: values for label, values in ordered.items() if AGENT not in label}
    for path in picture.save("bench-scale", title(ordered), "ms", drawn, options.out, note(ordered, once)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
