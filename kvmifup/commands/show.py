"""`kvm-ifup show`: how NICs are described, their phase, and whether they are wired so."""

from __future__ import annotations

import time

from kvmifup.commands.call import Call
from kvmifup.commands.objects import nic_object
from kvmifup.core.text import printable
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import State, look, state_of
from kvmifup.tell import render

HEADINGS = ["INSTANCE", "NIC", "TAP", "MODE", "LINK", "ADDRESSES", "PHASE", "SINCE", "BY", "WIRED"]
ELASTIC = (0, 4, 5)  # columns that give way on a narrow terminal
GREEN, RED, YELLOW, BOLD, PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[1m", "\033[0m"
COLOURS = {"yes": GREEN, "no": RED, "armed": YELLOW, "pre": YELLOW}


def run(call: Call) -> int:
    """Print the table, or JSON; returns 0."""
    with look(call.options.name, call.run_dir, call.config) as seen:
        rows = [(one, seen.phase_word(one), state_of(one, seen)) for one in seen.nics]
    if call.options.json:
        call.say_json([nic_object(*row) for row in rows])
        return 0
    now = time.time()
    table = render.table([HEADINGS, *(cells(*row, now) for row in rows)], ELASTIC)
    colour = call.out.isatty() and not call.environ.get("NO_COLOR") and call.environ.get("TERM") != "dumb"
    for number, row in enumerate(table):
        printed = [printable(cell) for cell in row]
        if colour:
            printed = [f"{BOLD if number == 0 else COLOURS.get(cell.strip(), '')}{cell}{PLAIN}" for cell in printed]
        call.out.write("  ".join(printed).rstrip() + "\n")
    call.say(render.error_line(one.label, state.problem) for one, _, state in rows if state.problem)
    return 0


def cells(one: Known, phase: str, state: State, now: float) -> list[str]:
    """One line of the table."""
    nic, journal = one.nic, one.journal
    if nic is None:
        file = one.tap if "/" in one.tap else ""  # else it is a journal that cannot be read
        return [file or "?", "-", "-" if file else one.tap, "-", "-", "-", "?", "-", "-", "no"]
    first, *more = [render.short(prefix) for prefix in nic.ip] or [""]
    wired = {True: "yes", False: "no", None: "-"}[state.wired]
    return [
        nic.instance or "-",
        "-" if nic.index is None else str(nic.index),
        nic.tap,
        nic.mode,
        nic.link or "-",
        f"{first} +{len(more)}" if more else first or "-",
        phase,
        ago(now - journal.since) if journal and journal.since else "-",
        (journal.by if journal else "") or "-",
        wired,
    ]


def ago(seconds: float) -> str:
    """How long ago, in the largest unit that is full: "59s", "2h", "12d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"
