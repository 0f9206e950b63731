"""kvm-ifup-pre, kvm-ifup-post and kvm-ifdown."""

from __future__ import annotations

from functools import partial

from kvmifup.commands import names, running
from kvmifup.commands.call import Call
from kvmifup.commands.request import PHASES, Request, nic_of
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Nic, Phase
from kvmifup.core.text import printable
from kvmifup.inputs import values
from kvmifup.runs import managed
from kvmifup.runs.down import down, taps_of_instance
from kvmifup.runs.outcome import Outcome, Results
from kvmifup.runs.session import Session
from kvmifup.runs.up import up


def run(call: Call) -> int:
    """Do what the call's request asks for; returns 0. Raises KvmIfupError, or a group of them."""
    assert call.request is not None  # `main.execute` has made it
    return running.run(call, partial(carry_out, call, call.request))


def carry_out(call: Call, request: Request, session: Session) -> Results:
    """Do what *request* asks for; in a dry session, find out what it would take."""
    if request.phase is Phase.DOWN:
        return take_down(call, request, session)
    nics = [values.as_wired(nic, session.config) for nic in request.nics]
    return up(request.phase, nics, session, announce=call.options.announce), []


def take_down(call: Call, request: Request, session: Session) -> Results:
    """kvm-ifdown, each tap for itself: a failure on one does not stop the others."""

    def described(tap: str) -> Nic | None:
        """The NIC to withdraw when there is no journal; where its wiring would be takes the configuration."""
        if call.troubles:
            return None
        nic = nic_of(tap, call.run_dir, call.environ, needed=False)
        return nic and values.as_wired(nic, session.config)

    outcomes: list[Outcome] = []
    failures: list[KvmIfupError] = []
    for tap in taps_of(call, request, session):
        try:
            if not names.was_ever_known(tap, call.run_dir) and described(tap) is None:
                note(call, tap, tap=True)
                outcomes.append(Outcome(tap, None, tap, Phase.DOWN))
                continue
            why = managed.still_here(tap, request.owner) if call.environ.get("ACTION") == "down" else None
            if why is not None:
                outcomes.append(Outcome(f"{request.owner} ({tap})", None, tap, Phase.DOWN, remarks=(why,)))
                continue
            outcomes.append(down(tap, request.owner, partial(described, tap), session))
        except KvmIfupError as error:
            failures.append(error)
    return outcomes, failures


def taps_of(call: Call, request: Request, session: Session) -> list[str]:
    """The taps to take down. Raises UsageError for a guest that is none, NicError."""
    if request.tap:
        return [request.tap]
    assert request.instance is not None  # `request.of_hook` sees to it
    taps = taps_of_instance(request.instance, session)
    if not taps:
        if error := names.as_guest(request.instance, call.program, call.run_dir):
            raise error
        note(call, request.instance, tap=False)
    return taps


def note(call: Call, name: str, *, tap: bool) -> None:
    """Say to a person, and to who asks what would be done or for more (-v), that nobody knows *name*: a misspelt one?

    It is no error: managers call kvm-ifdown once more, and after all has been cleared up.
    """
    planned = call.options.plan or call.options.subcommand == "plan"
    if planned or call.options.verbose or call.err.isatty():
        wanted = tap if call.program in PHASES else None
        why = names.meant(name, call.program, call.run_dir, tap=wanted) or "no journal and no NIC file is about it"
        call.add([f"{call.program}: {printable(name)}: nobody knows it, so nothing is undone ({why})"])
