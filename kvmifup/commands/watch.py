"""`kvm-ifup watch`: what hooks and the agent do, and what is dropped of guests' packets, until a signal comes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from typing import Any

from kvmifup.commands.call import Call
from kvmifup.commands.streams import Output
from kvmifup.core.errors import InterruptedRun
from kvmifup.diagnosis import live
from kvmifup.diagnosis.state import agent_lives
from kvmifup.tell import watchers


def run(call: Call) -> int:
    """A line for each event, and one for each op that changed something; returns 0."""
    if call.options.trace:
        return traced(call, call.options.trace)
    with suppress(InterruptedRun), watchers.watching(call.run_dir, live.Drops().news) as events:
        there = "what hooks and the agent do" if agent_lives(call.run_dir) else "what hooks do; the agent is not there"
        begin(call, f"watching {there}")
        for event in events:
            if call.options.json:
                call.out.write(json.dumps(event) + "\n")
            else:
                call.say(event_lines(event))
            call.out.flush()
            if isinstance(call.out, Output) and call.out.unread:
                break
    return 0


def traced(call: Call, tap: str) -> int:
    """Print what nft says of each packet that comes out of *tap*; returns 0."""
    with suppress(InterruptedRun), closing(live.trace(tap)) as lines:
        for number, line in enumerate(lines):
            if number == 0:
                begin(call, f"tracing {tap}: packets of its guest that meet a rule of nftables")
            if line:
                call.say([json.dumps({"at": time.time(), "nic": tap, "trace": line}) if call.options.json else line])
                call.out.flush()
            if isinstance(call.out, Output) and call.out.unread:
                break
    return 0


def begin(call: Call, what: str) -> None:
    """Tell a person that there is nothing yet, and not nothing at all."""
    if call.options.verbose or call.err.isatty():
        call.add([f"{what}; an interrupt ends it"])
        call.err.flush()


def event_lines(event: Mapping[str, Any]) -> Iterable[str]:
    """An event, for people."""
    at = float(event["at"])
    moment = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at * 1000) % 1000:03}"
    end = f" in {1000 * event['seconds']:.1f} ms, by {event['by']}" if "seconds" in event else ""
    if missed := event.get("missed"):
        yield f"{moment}  {missed} event{'s' * (missed != 1)} missed here: they came faster than they were read"
    yield f"{moment}  {event['program']}: {event['what']}{end}"
    for op in event.get("ops", ()):
        took = "" if op["seconds"] is None else f"{1000 * op['seconds']:.2f} ms"
        yield f"{took:>24}  {op['what']}"
    if more := event.get("more"):
        yield f"{'':>24}  and {more} more"
