"""`kvm-ifup plan`: the hook's own plan, with the command for each op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from kvmifup.commands.call import Call
from kvmifup.commands.hooks import carry_out
from kvmifup.core.errors import raise_all
from kvmifup.diagnosis import by_hand
from kvmifup.runs.apply import Change, in_steps
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import opened
from kvmifup.tell import render


def run(call: Call) -> int:
    """Print what the hook of the phase would do, and do nothing; returns 0. Raises KvmIfupError."""
    assert call.request is not None  # `main.execute` has made it
    with opened(call.run_dir, call.config, dry=True) as session:
        found, failures = carry_out(call, call.request, session)
    commands = partial(by_hand.lines, made=set())
    # Each step has a command of its own.
    outcomes = [replace(one, undone=in_steps(one.undone), changes=in_steps(one.changes)) for one in found]
    if not call.options.json:
        call.say(render.plan_lines(outcomes, commands))
    elif not failures:
        call.say_json([plan_object(outcome, commands) for outcome in outcomes])
    if call.options.verbose:
        call.add(render.remark_lines(outcomes))
    raise_all(failures)
    return 0


def plan_object(outcome: Outcome, commands: Callable[[Change], list[str]]) -> dict[str, Any]:
    """The outcome, each op with its *commands*."""

    def with_command(change: Change) -> dict[str, Any]:
        words = "; ".join(commands(change)) if change.needed else ""
        return {**render.change_object(change), "command": words or None}

    return {
        **render.as_object(outcome),
        "undone": [with_command(change) for change in outcome.undone],
        "ops": [with_command(change) for change in outcome.changes],
    }
