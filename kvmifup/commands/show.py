"""`kvm-ifup show`: how NICs are described, their phase, and whether they are wired so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from kvmifup.commands.call import Call
from kvmifup.commands.objects import nic_object
from kvmifup.core.text import printable
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import State, look, state_of
from kvmifup.runs import clock
from kvmifup.tell import render

HEADINGS = ["INSTANCE", "NIC", "TAP", "MODE", "LINK", "ADDRESSES", "PHASE", "SINCE", "BY", "WIRED"]
ELASTIC = {"INSTANCE": 16, "LINK": 6, "ADDRESSES": 12}  # columns that give way on a narrow terminal, and how far
DISPENSABLE = ("BY", "SINCE", "MODE", "ADDRESSES", "LINK", "NIC")  # those that are left out next
GREEN, RED, YELLOW, BOLD, PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[1m", "\033[0m"
COLOURS = {"yes": GREEN, "armed": YELLOW, "pre": YELLOW}

Row = tuple[Known, str, State]  # a NIC, its phase for people, and how it is


def run(call: Call) -> int:
    """Print the table, or JSON; returns 0."""
    with look(call.options.name, call.run_dir, call.config) as seen:
        every = [(one, seen.phase_word(one), state_of(one, seen)) for one in seen.nics]
    rows = [row for row in every if is_wrong(row[2])] if call.options.wrong else every
    if call.options.json:
        call.say_json([nic_object(*row) for row in rows])
    elif call.options.wrong and not rows:
        call.say([f"nothing is wrong with {len(every)} NIC{'s' * (len(every) != 1)}"])
    else:
        print_table(call, [row for row in rows if not row[0].told])
        call.say(line for one, _, state in rows if (line := what_is_wrong(one, state)))
        call.say(f"{one.label}: {what_was_dropped(state)}" for one, _, state in rows if state.dropped)
        call.say(who_is_expected([one for one, _, _ in rows if one.told]))
    return 0


def who_is_expected(coming: Sequence[Known]) -> Iterator[str]:
    """A line about each guest of whose NICs some are *coming*: they have no taps here yet."""
    guests: dict[str | None, list[Known]] = {}
    for one in coming:
        guests.setdefault(one.nic.instance if one.nic else None, []).append(one)
    for instance, nics in guests.items():
        addresses = [render.short(prefix) for one in nics if one.nic for prefix in one.nic.ip]
        what = f"expected with {', '.join(addresses)}" if addresses else "expected"
        since = ago(time.time() - (nics[0].told or 0))
        yield printable(f"{instance}: {what}, told {since} ago; its QEMU does not wait here yet")


def is_wrong(state: State) -> bool:
    """Whether a NIC is not wired as it is to be, or cannot work so."""
    return state.wired is False or (state.problem is not None and not state.tolerable)


def what_is_wrong(one: Known, state: State) -> str:
    """One line about a NIC with which something is wrong; empty for the others."""
    if state.problem:
        return render.sentence(state.problem.at(one.label))
    if not state.missing:
        return ""
    first, *more = [render.transition(change) for change in state.missing]
    rest = f", and {len(more)} more" if more else ""
    return printable(f"{one.label}: {first}{rest} (`kvm-ifup check {one.tap}` says why)")


def what_was_dropped(state: State) -> str:
    """How many packets of a guest were dropped, by reason."""
    return f"dropped of what it sent: {', '.join(f'{packets} ({why})' for why, packets in state.dropped)}"


def print_table(call: Call, rows: Sequence[Row]) -> None:
    """Print *rows*; on a terminal as wide as it is, and with colours."""
    every = [[printable(cell) for cell in row] for row in (HEADINGS, *(cells(*row) for row in rows))]
    colour = call.out.isatty() and not call.environ.get("NO_COLOR") and call.environ.get("TERM") != "dumb"
    for number, row in enumerate(render.table(every, call.columns, ELASTIC, DISPENSABLE)):
        line = render.GAP.join(row).rstrip()
        if colour and number == 0:
            line = f"{BOLD}{line}{PLAIN}"
        elif colour and is_wrong(rows[number - 1][2]):
            line = f"{BOLD}{RED}{line}{PLAIN}"
        elif colour:
            coloured = (f"{COLOURS[word]}{cell}{PLAIN}" if (word := cell.strip()) in COLOURS else cell for cell in row)
            line = render.GAP.join(coloured).rstrip()
        call.out.write(f"{line}\n")


def cells(one: Known, phase: str, state: State) -> list[str]:
    """One line of the table."""
    nic, journal = one.nic, one.journal
    if nic is None:
        file = one.tap if "/" in one.tap else ""  # else it is a journal that cannot be read
        return [file or "?", "-", "-" if file else one.tap, "-", "-", "-", "?", "-", "-", "NO"]
    first, *more = [render.short(prefix) for prefix in nic.ip] or [""]
    return [
        nic.instance or "-",
        "-" if nic.index is None else str(nic.index),
        nic.tap,
        nic.mode,
        nic.link or "-",
        f"{first} +{len(more)}" if more else first or "-",
        phase,
        ago(clock.age(journal)) if journal and journal.since else "-",
        (journal.by if journal else "") or "-",
        wired_word(state),
    ]


def wired_word(state: State) -> str:
    """Whether a NIC is wired, so that one with which something is wrong stands out also without colours."""
    if state.wired is False or (state.wired is None and is_wrong(state)):
        return "NO"
    if state.wired is None:
        return "-"
    return "yes, but" if is_wrong(state) else "yes"


def ago(seconds: float) -> str:
    """How long ago, in the largest unit that is full: "59s", "2h", "12d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"
