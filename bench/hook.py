"""How long a hook takes, beside what could be called instead: `python -m bench.hook [--runs N] [--out DIR]`.

Whole processes, from their start to their end, in turn in one run. Each wires a new tap, as a NIC of a guest that
starts, on a node where other guests run: Ganeti 3.0's own script; a shell script with the very commands that
`kvm-ifup plan` prints, and the same commands in batches; kvm-ifup-post with the agent and without it; and Python's
interpreter with nothing to do: no script in Python can be faster. Then post once more, when there is nothing to do, and
kvm-ifdown. Then the same among 100 and among 500 other routed NICs, 64 hooks at once, and the agent's memory.

Ganeti's script comes from Debian's package, and is run from a copy that finds its library beside itself instead of
below /usr. Without the agent the configuration is the one that is installed. To read one that sets anything takes a
tenth more: tomli is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import by_hand, picture, results
from bench.results import Rows
from harness import agents, hooks, manager, namespaces, nodes, tools
from harness.addresses import CLIENT_IP4
from lab import debian
from lab.agent import scheduled

PATIENCE = 60.0  # seconds
NOT_READY = 69
AT_ONCE = 64
TABLE = "100"
KINDS: Mapping[str, Mapping[str, str]] = {
    "bridged": {"MODE": "bridged", "LINK": "br0"},
    "bridged with a VLAN": {"MODE": "bridged", "LINK": "brv", "VLAN": ".100"},
    "bridged with a filter": {"MODE": "bridged", "LINK": "br0", "IP": "{4}", "TAGS": "kvm-ifup:filter:address"},
    "routed": {"MODE": "routed", "IP": "{4}"},
    "routed with a table": {"MODE": "routed", "LINK": TABLE, "IP": "{4}"},
    "routed, IPv6": {"MODE": "routed", "IP": "{6}"},
}
WITH_MORE = ("bridged with a VLAN", "bridged with a filter")
GANETIS = ("bridged", "routed", "routed with a table")  # the kinds that its script knows
BARE = "python3 -IS with nothing to do"
GANETI = "Ganeti's own script"
SHELL, BATCHES = "a shell script of what plan prints", "the same with ip -batch"
AGENT, ALONE = "kvm-ifup-post, agent", "kvm-ifup-post, no agent"
AGAIN, DOWN = "once more", "kvm-ifdown"  # what comes after post: there is nothing to do, or all is undone
SELDOM = 3  # it takes long without the agent, so only every so many runs


def environment(kind: str, number: int) -> dict[str, str]:
    """What Ganeti's node daemon says of NIC *number*."""
    told = {**tools.CLEAN, **manager.ganeti(f"tap{number}", **KINDS[kind])}
    told |= {"INSTANCE": f"web{number}.example.com", "MAC": f"aa:00:00:35:{number >> 8:02x}:{number & 255:02x}"}
    for mark, address in {"{4}": f"198.18.{number >> 8}.{number & 255}", "{6}": f"2001:db8:1::{number:x}"}.items():
        if told.get("IP") == mark:
            told["IP"] = address
    return told


def spawn(argv: list[str], environ: Mapping[str, str], silent: Sequence[int] = (0, 1)) -> int:
    """Start a program, with these descriptors leading nowhere; its process id."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in silent]
    return os.posix_spawn(argv[0], argv, environ, file_actions=null)


def succeed(pid: int) -> None:
    """Wait for a program, which must succeed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"exit code {code}"


def timed(argv: list[str], environ: Mapping[str, str], silent: Sequence[int] = (0, 1)) -> float:
    """Milliseconds from the start of a program, which must succeed, to its end."""
    started = time.perf_counter()
    succeed(spawn(argv, environ, silent))
    return (time.perf_counter() - started) * 1000


def script(name: str) -> str:
    """One of our scripts, started as a manager does: by its path."""
    return str(tools.SCRIPTS / name)


def ganetis() -> str:
    """Ganeti's script, where it finds its library."""
    source = debian.ganeti() / "usr/lib/ganeti/3.0/usr/lib/ganeti"
    here = Path("/run/ganeti-scripts")
    here.mkdir()
    for name in ("kvm-ifup", "net-common"):
        text = (source / name).read_text(encoding="utf-8")
        (here / name).write_text(text.replace("/usr/lib/ganeti/net-common", str(here / "net-common")))
        (here / name).chmod(0o755)
    return str(here / "kvm-ifup")


def add_taps(numbers: Iterable[int]) -> None:
    """New taps, down, as a process manager makes them."""
    batch = "".join(f"tuntap add tap{number} mode tap\n" for number in numbers)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


def memory(pid: int) -> float:
    """The most that a process has had in memory, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


@contextlib.contextmanager
def node(*, agent: bool) -> Iterator[list[str]]:
    """A node on which guests of each kind run already; the kinds that can be done there."""
    with nodes.fresh_node() as here, namespaces.private_etc():
        here.uplink()
        nodes.add_bridge()
        tools.ip(f"route add default via {CLIENT_IP4} table {TABLE}")
        shutil.rmtree("/etc/kvm-ifup", ignore_errors=True)
        Path("/etc/kvm-ifup").mkdir()
        shutil.copy(tools.ROOT / "etc/config.toml", "/etc/kvm-ifup")
        nodes.add_bridge("brv")
        nodes.add_port("brv")
        # Not every kernel can keep VLANs on a bridge apart.
        subprocess.run(["ip", "link", "set", "brv", "type", "bridge", "vlan_filtering", "1"], capture_output=True)
        with agents.running(within=scheduled()) if agent else contextlib.nullcontext():
            yield [kind for number, kind in enumerate(KINDS) if resident(kind, number)]


def resident(kind: str, number: int) -> bool:
    """Wire a NIC that stays. False if the node is not ready for one of this kind, and says so."""
    add_taps([number])
    wired = hooks.hook("kvm-ifup-post", f"tap{number}", environ=environment(kind, number))
    assert wired.code in (0, NOT_READY), wired.err
    return wired.code == 0


def one(who: str, kind: str, number: int, argv: Sequence[str]) -> dict[str, float]:
    """A new NIC wired by *argv*: milliseconds, of a hook of ours also those of what follows. Nothing of it is left."""
    add_taps([number])
    environ, tap = environment(kind, number), f"tap{number}"
    label = f"{kind}: {who}"
    if who in (SHELL, BATCHES):
        lines = (by_hand.one_by_one if who == SHELL else by_hand.in_batches)(by_hand.commands(tap, environ))
        argv = [by_hand.script(lines)]
    if who in (AGENT, ALONE):
        taken = {label: timed([*argv, tap], environ)}
        taken[f"{label}, {AGAIN}"] = timed([*argv, tap], environ)
        taken[f"{label}, {DOWN}"] = timed([script("kvm-ifdown"), tap], environ)
    else:
        taken = {label: timed([*argv, tap], environ, silent=(0, 1, 2))}  # some tell what they do, or what was not there
        clean(environ)
    tools.ip(f"link del {tap}")
    return taken


def clean(environ: Mapping[str, str]) -> None:
    """Remove what outlives the tap of a NIC that no hook of ours has wired."""
    family = 6 if ":" in environ.get("IP", "") else 4
    for words in (["rule", "del", "iif", environ["INTERFACE"]],
                  ["neigh", "del", "proxy", environ.get("IP", ""), "dev", "eth0"]):  # fmt: skip
        subprocess.run(["ip", f"-{family}", *words], capture_output=True)  # it may not be there


def compare(runs: int) -> dict[str, list[float]]:
    """All kinds, wired in all ways, in turn."""
    rows: dict[str, list[float]] = {BARE: []}
    without = Peer(0)
    with node(agent=True) as kinds:
        bare = by_hand.script([])
        Path(bare).write_text("#!/usr/bin/python3 -IS\n")
        bare = str(Path(bare).rename("/run/bare"))
        ways = {GANETI: [ganetis()], SHELL: [], BATCHES: [], AGENT: [script("kvm-ifup-post")]}
        numbers = itertools.count(4000)
        for run in range(runs):
            rows[BARE].append(timed([bare], tools.CLEAN))
            for kind in kinds:
                # Taking turns in being first.
                for who, argv in [*ways.items()][:: 1 if run % 2 else -1]:
                    if who == GANETI and kind not in GANETIS:
                        continue
                    for label, taken in one(who, kind, next(numbers), argv).items():
                        rows.setdefault(label, []).append(taken)
                if run % SELDOM == 0:
                    for label, taken in without.ask(kind).items():
                        rows.setdefault(label, []).append(taken)
    without.close()
    ordered = [BARE, *(f"{kind}: {who}" for kind in KINDS for who in (*ways, ALONE))]
    labels = [label for first in ordered for label in (first, f"{first}, {AGAIN}", f"{first}, {DOWN}")]
    return {label: rows[label] for label in labels if label in rows}


def fill(numbers: range) -> None:
    """Wire that many NICs, every other one with a table."""
    add_taps(numbers)
    for number in numbers:
        kind = "routed with a table" if number % 2 else "routed"
        timed([script("kvm-ifup-post"), f"tap{number}"], environment(kind, number))


class Peer:
    """Another node, in a process of its own: with an agent and *many* routed NICs, or, if there are none, without.

    What it is for is up to the *part* of the bench that it is asked by.
    """

    def __init__(self, many: int, part: str = "hook") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{part}", "--peer", str(many)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def ask(self, what: str) -> dict[str, float]:
        """What `alone` or `crowd` answers."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{what}\n")
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Let the node end."""
        self._process.communicate(timeout=PATIENCE)


def alone() -> None:
    """What is at the other end of a Peer without an agent: it wires a NIC of the kind that it is told."""
    with node(agent=False):
        numbers = itertools.count(4000)
        for kind in map(str.strip, sys.stdin):
            print(json.dumps(one(ALONE, kind, next(numbers), [script("kvm-ifup-post")])), flush=True)


def crowd(many: int) -> None:
    """What is at the other end of a Peer with that many NICs."""
    with nodes.fresh_node() as here:
        here.uplink()
        tools.ip(f"route add default via {CLIENT_IP4} table {TABLE}")
        with agents.running(within=scheduled()) as agent:
            fill(range(many))
            numbers = itertools.count(4000)
            label, kind = f"{AGENT}, among {many} NICs", "routed with a table"
            argv = [script("kvm-ifup-post")]
            answers: Mapping[str, Callable[[], dict[str, float]]] = {
                "one": lambda: {label: one(AGENT, kind, next(numbers), argv)[f"{kind}: {AGENT}"]},
                "at once": lambda: {f"{AT_ONCE} at once, {AT_ONCE + many} NICs": at_once()},
                "memory": lambda: {f"MB of memory of the agent, {AT_ONCE + many} NICs": memory(agent.process.pid)},
            }
            for line in sys.stdin:
                print(json.dumps(answers[line.strip()]()), flush=True)


def at_once() -> float:
    """Milliseconds until that many hooks, started together, have all succeeded."""
    numbers = range(3000, 3000 + AT_ONCE)
    add_taps(numbers)
    started = time.perf_counter()
    for pid in [spawn([script("kvm-ifup-post"), f"tap{n}"], environment("routed", n)) for n in numbers]:
        succeed(pid)
    return (time.perf_counter() - started) * 1000


def ratios(rows: Rows, who: str, reference: str) -> str:
    """How *who* is to *reference*, by their medians: the best kind and the worst one, as far as both know it."""
    found = []
    for kind in KINDS:
        base = rows.get(reference) or rows.get(f"{kind}: {reference}")
        if base and (mine := rows.get(f"{kind}: {who}")):
            found.append(picture.median(mine) / picture.median(base))
    return f"{min(found):.2g} to {max(found):.2g}"


def beside(rows: Rows, reference: str) -> str:
    """How long hooks take with the agent, and how long without it."""
    agent, alone = (ratios(rows, who, reference) for who in (AGENT, ALONE))
    return f"{agent} times as long as {reference} with the agent, {alone} without"


def title(rows: Rows) -> str:
    """What the picture says in one sentence."""
    return f"A hook takes {beside(rows, GANETI)}"


def note(rows: Rows) -> str:
    """What is to be said below the picture: the same beside all else, and what a NIC costs that wants more."""
    plain = picture.median(rows[f"bridged: {AGENT}"])
    more = {kind: rows[f"{kind}: {AGENT}"] for kind in WITH_MORE if f"{kind}: {AGENT}" in rows}
    lines = [beside(rows, reference) for reference in (BARE, SHELL, BATCHES)]
    lines += [
        f"{kind}: {picture.median(values) / plain:.2f} times as long as without, with the agent"
        for kind, values in more.items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    parser = results.parser("hook", __doc__, runs=30)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)  # for Peer
    options = parser.parse_args(argv)
    if options.peer is not None:
        crowd(options.peer) if options.peer else alone()
        return 0
    rows = compare(options.runs)
    few, full = Peer(100), Peer(500)
    among: dict[str, list[float]] = {}
    for _ in range(options.runs):
        for label, taken in (few.ask("one") | full.ask("one")).items():
            among.setdefault(label, []).append(taken)
    once = {label: [value] for what in ("at once", "memory") for label, value in full.ask(what).items()}
    few.close()
    full.close()
    for kind in KINDS:
        if found := {label: values for label, values in rows.items() if label.startswith(f"{kind}: ")}:
            print(picture.table("ms", {BARE: rows[BARE], **found}, f"{kind}: {GANETI if kind in GANETIS else SHELL}"))
        else:
            print(f"{kind}: it cannot be done here")
    print(picture.table("ms", among, f"{AGENT}, among 100 NICs"))
    print("".join(f"{label}: {values[0]:.1f}\n" for label, values in once.items()), title(rows), note(rows), sep="\n")
    results.write(options.json, {**rows, **among, **once})
    drawn = {label: values for label, values in rows.items() if not label.endswith((AGAIN, DOWN))}
    for path in picture.save("bench-hook", title(rows), "ms", {**drawn, **among}, options.out, note(rows)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
