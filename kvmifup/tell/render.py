"""What was done, or would be, as lines for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Nic, Prefix
from kvmifup.core.text import printable
from kvmifup.inputs.values import said_of
from kvmifup.runs.apply import Change
from kvmifup.runs.outcome import Outcome

GAP = "  "  # between two columns
HEAD = 4  # characters that stay of a name that is cut where it differs from others


def plan_lines(outcomes: Sequence[Outcome], commands: Callable[[Change], list[str]] | None = None) -> Iterator[str]:
    """Every op of every NIC, with the value now and the value wanted; below it the *commands* to do it by hand."""
    if not outcomes:
        yield "nothing to do"
    for outcome in outcomes:
        yield heading(outcome)
        undone = [("undo  ", change) for change in outcome.undone if change.needed]
        changes = [("do    " if change.needed else "right ", change) for change in outcome.changes]
        for verb, change in (*undone, *changes):
            yield f"  {verb} {transition(change)}"
            if commands and change.needed:
                yield from (f"           {line}" for one in commands(change) for line in one.split("\n"))
        if not outcome.undone and not outcome.changes:
            yield "  nothing to do"


def verbose_lines(
    outcomes: Sequence[Outcome], seconds: Mapping[tuple[object, ...], float] | None = None
) -> Iterator[str]:
    """What was really done, and remarks: what -v prints. With *seconds*, by op key: every op, and how long it took."""
    for outcome in outcomes:
        changes = (*outcome.undone, *outcome.changes)
        done = [change for change in changes if change.needed]
        yield f"{heading(outcome)}: {len(done)} changed"
        if seconds is None:
            yield from (f"  {transition(change)}" for change in done)
        else:
            for change in changes:
                milliseconds = 1000 * seconds.get(change.op.key, 0.0)
                yield f"  {milliseconds:7.2f} ms  {'' if change.needed else 'right  '}{transition(change)}"
        yield from remark_lines([outcome])


def remark_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The remarks: no errors, but worth knowing."""
    yield from (f"{outcome.label}: {remark}" for outcome in outcomes for remark in outcome.remarks)


def heading(outcome: Outcome) -> str:
    """Which NIC, how it is wired, which phase."""
    mode = f"{outcome.nic.mode}, " if outcome.nic else ""
    return f"{outcome.label}: {mode}{outcome.phase.name.lower()}"


def transition(change: Change) -> str:
    """One op: the value now, and the value wanted if it is another one."""
    op = change.op
    if op.after_change:
        return op.describe() if change.needed else f"{op.describe()} (only after a change)"
    if not change.needed:
        return op.describe()
    if change.now == op.wanted:
        return f"{op.describe()} (once more)"
    return f"{op.subject()}: {op.say(change.now)} -> {op.say(op.wanted)}"


def as_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as one JSON array."""
    return json.dumps([as_object(outcome) for outcome in outcomes], indent=2)


def as_object(outcome: Outcome) -> dict[str, Any]:
    """One outcome; `now` and `want` are null where absence is meant, and for what cannot be read."""
    nic = outcome.nic
    return {
        "tap": outcome.tap,
        "instance": nic.instance if nic else None,
        "index": nic.index if nic else None,
        "mode": nic.mode if nic else None,
        "phase": outcome.phase.name.lower(),
        "undone": [change_object(change) for change in outcome.undone],
        "ops": [change_object(change) for change in outcome.changes],
        "remarks": list(outcome.remarks),
    }


def change_object(change: Change) -> dict[str, Any]:
    """One op."""
    return {
        "op": change.op.kind,
        "about": change.op.subject(),
        "now": change.now,
        "want": change.op.wanted,
        "needed": change.needed,
    }


KEYS = ("instance", "index", "tap", "mac", "mode", "link", "ip", "vlan", "iface_id", "incoming")


def described(nic: Nic) -> dict[str, Any]:
    """How a NIC is described, for JSON."""
    return {key: getattr(nic, key) for key in KEYS} | {"ip": [*map(short, nic.ip)]} | said_of(nic)


def table(
    rows: Sequence[Sequence[str]], width: int | None, elastic: Mapping[str, int], dispensable: Sequence[str] = ()
) -> list[list[str]]:
    """*rows*, the first being the headings, with every cell padded, to fit into *width*; None cuts nothing.

    First the *elastic* columns give way, the widest first, each down to the width given here. Then the *dispensable*
    ones are left out, in this order. At last the elastic ones give way as far as their headings. What room is left
    then is for the elastic ones again, the first one first.
    """
    columns = {heading: [row[number] for row in rows] for number, heading in enumerate(rows[0])}
    sizes = {heading: max(map(len, column)) for heading, column in columns.items()}
    if width is not None:
        fit(sizes, width, elastic, list(dispensable))
    cut = [clipped(columns[heading], size) for heading, size in sizes.items()]
    return [
        [cell.ljust(size) for cell, size in zip(row, sizes.values(), strict=True)] for row in zip(*cut, strict=True)
    ]


def fit(sizes: dict[str, int], width: int, elastic: Mapping[str, int], spare: list[str]) -> None:
    """Make the *sizes* of columns fit into *width*, as `table` says."""
    full = dict(sizes)
    while (room := width - sum(sizes.values()) - len(GAP) * (len(sizes) - 1)) < 0:
        least = elastic if spare else {heading: len(heading) for heading in elastic}
        wide = [heading for heading in least if heading in sizes and sizes[heading] > least[heading]]
        if wide:
            sizes[max(wide, key=sizes.__getitem__)] -= 1
        elif spare:
            sizes.pop(spare.pop(0), None)
        else:
            return
    for heading in filter(sizes.__contains__, elastic):
        more = min(room, full[heading] - sizes[heading])
        sizes[heading] += more
        room -= more


def short(prefix: Prefix) -> str:
    """A single address without its prefix length; another prefix as it is."""
    text = str(prefix)
    return text.rpartition("/")[0] if prefix.prefixlen == prefix.max_prefixlen else text


def clipped(column: Sequence[str], size: int) -> list[str]:
    """The cells of *column*, cut to *size* characters so that as many as possible can still be told apart."""
    kept = min(HEAD, size - 2)
    alike: dict[str, list[str]] = {}
    for cell in column:
        if len(cell) > size:
            alike.setdefault(cell[:kept], []).append(cell)
    differ = {head: agreement(min(cells), max(cells)) for head, cells in alike.items()}

    def beginning(cell: str) -> str:
        return cell if len(cell) <= size else f"{cell[: size - 2]}.."

    def both_ends(cell: str) -> str:
        end = (size - 2) // 2
        return beginning(cell) if " " in cell else f"{cell[: size - 2 - end]}..{cell[len(cell) - end :]}"

    def where_they_differ(cell: str) -> str:
        start = min(differ[cell[:kept]], len(cell) - (size - kept - 2))
        return beginning(f"{cell[:kept]}..{cell[start:]}" if start > kept + 2 else cell)

    ways = (beginning, both_ends, where_they_differ)
    cut = ([way(cell) if len(cell) > size else cell for cell in column] for way in ways)
    return max(cut, key=lambda cells: len(set(cells)))


def agreement(one: str, other: str) -> int:
    """How many characters *one* and *other* begin with that are the same."""
    return next((number for number, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def error_line(program: str, error: KvmIfupError) -> str:
    """The one line that stderr gets: who, which NIC, why, what to do about it."""
    return f"{printable(program)}: {sentence(error)}"


def sentence(error: KvmIfupError) -> str:
    """The same line without the program, for a log that names it already."""
    where = f"{error.where}: " if error.where else ""
    hint = f" ({error.hint})" if error.hint else ""
    return printable(f"{where}{error}{hint}")


def error_object(error: KvmIfupError) -> dict[str, Any]:
    """The error, for JSON."""
    return {
        "error": type(error).__name__,
        "code": error.code,
        "where": error.where,
        "cause": str(error),
        "hint": error.hint,
    }


def errors_object(errors: Sequence[KvmIfupError]) -> str:
    """*errors* as one JSON object: the first, which gives the exit code, and with it the *others*, if any."""
    first, *others = map(error_object, errors)
    return json.dumps({**first, "others": others} if others else first, indent=2)
