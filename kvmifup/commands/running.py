"""Run a command that changes NICs, remember what it did, and print what its options ask for."""

from __future__ import annotations

from collections.abc import Callable

from kvmifup.commands.call import Call
from kvmifup.core.errors import raise_all
from kvmifup.runs.announcing import announce_later
from kvmifup.runs.outcome import Results
from kvmifup.runs.session import Session, opened
from kvmifup.tell import render, watchers


def run(call: Call, work: Callable[[Session], Results]) -> int:
    """Give *work* a session, and print what it has done; then raise what went wrong. Returns 0."""
    options = call.options
    timed = options.verbose > 1 or watchers.watched(call.run_dir)
    with opened(call.run_dir, call.config, dry=options.plan, by=call.by, timed=timed) as session:
        call.seconds = session.seconds
        outcomes, failures = work(session)
        failures = [*failures, *call.troubles]
        if not options.plan:
            call.done += outcomes
            announce_later(outcomes, session.store, call.background)
    if options.json and not failures:
        call.out.write(render.as_json(outcomes) + "\n")
    elif options.plan and not options.json:
        call.say(render.plan_lines(outcomes))
    if options.verbose:
        seconds = call.seconds if options.verbose > 1 else None
        call.add(render.remark_lines(outcomes) if options.plan else render.verbose_lines(outcomes, seconds))
        if not (outcomes or failures or options.plan):
            call.add(["nothing to do"])
    raise_all(failures)
    return 0
