"""`kvm-ifup check`: what is wrong with NICs or with the node, why, and its repair."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from kvmifup.commands.call import Call
from kvmifup.commands.objects import finding_object, nic_object
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Phase
from kvmifup.diagnosis.findings import Finding
from kvmifup.diagnosis.nic import Diagnosis, diagnose
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.node import node_findings
from kvmifup.diagnosis.state import intended, look
from kvmifup.inputs import config
from kvmifup.runs.announcing import announce_later
from kvmifup.runs.outcome import Outcome, Results
from kvmifup.runs.session import opened
from kvmifup.runs.up import up
from kvmifup.tell import render

WRONG = 1  # the exit code of a check that has found something
WIRED = {"right": True, "wrong": False, "not wired": None}  # each verdict, as JSON says it


def wrong(findings: Sequence[Finding]) -> bool:
    """Whether anything is."""
    return any(finding.wrong for finding in findings)


def run(call: Call) -> int:
    """Check NICs, or the node; returns 1 if anything is wrong, also after a repair."""
    if call.options.node:
        return check_node(call)
    found = diagnoses(call)
    done: list[Outcome] = []
    failures: list[KvmIfupError] = []
    if call.options.repair and any(one.wrong for one in found):
        done, failures = repair(call, [one.one for one in found if one.wrong])
        found = diagnoses(call)
    if call.options.json:
        call.say_json(
            {
                "right": not any(one.wrong for one in found),
                "repaired": [render.as_object(outcome) for outcome in done],
                "failed": [render.error_object(error) for error in failures],
                "nics": [
                    {
                        **nic_object(one.one, one.phase, replace(one.state, wired=WIRED[one.verdict])),
                        "findings": [finding_object(finding) for finding in one.findings],
                    }
                    for one in found
                ],
            }
        )
    else:
        call.say(line for outcome in done for line in repaired_lines(outcome))
        call.say(render.error_line("not repaired", error) for error in failures)
        call.say(told(call, found, {outcome.label for outcome in done}))
    return WRONG if any(one.wrong for one in found) else 0


def diagnoses(call: Call) -> list[Diagnosis]:
    """What there is to say about each NIC that is asked about."""
    with look(call.options.name, call.run_dir, call.config) as seen:
        return [diagnose(one, seen, ask=call.options.probe) for one in seen.nics]


def repair(call: Call, nics: Sequence[Known]) -> Results:
    """Repeat for each of *nics* the phase that it has reached, and no later one."""
    done: list[Outcome] = []
    failures: list[KvmIfupError] = []
    with opened(call.run_dir, call.config, by=call.by) as session:
        for one in nics:
            if one.nic is None or one.phase is Phase.DOWN:  # also one whose guest is only expected
                continue
            try:
                done += up(one.phase, [intended(one, call.config)], session, announce=False)
            except KvmIfupError as error:
                failures.append(error.at(one.label))
        call.done += done
        announce_later(done, session.store, call.background)
    return done, failures


def repaired_lines(outcome: Outcome) -> Iterable[str]:
    """What a repair has changed."""
    for change in (*outcome.undone, *outcome.changes):
        if change.needed:
            yield f"repaired: {outcome.label}: {render.transition(change)}"


def told(call: Call, found: Sequence[Diagnosis], repaired: Collection[str]) -> Iterable[str]:
    """What is wrong first; then the others, if that is news, something is to be said, or it is asked for; the sum."""
    wrong_ones = [one for one in found if one.wrong]
    others = [one for one in found if not one.wrong]
    asked = call.options.name or call.options.verbose
    for one in wrong_ones:
        yield from check_lines(one)
    alike: dict[object, list[Diagnosis]] = {}  # what is to be said of many is said once
    for number, one in enumerate(others):
        if asked or one.one.told or one.one.label in repaired:
            alike[number] = [one]
        elif one.findings:
            alike.setdefault(one.findings, []).append(one)
    for first, *more in alike.values():
        yield from check_lines(first, len(more))
    if not found:
        yield f"nothing to check: there is no journal and no NIC file in {call.run_dir}"
    elif wrong_ones or not asked or len(found) > 1:
        counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in WIRED}
        numbers = [f"{count} {verdict}" for verdict, count in counts.items() if count or verdict != "not wired"]
        yield f"{', '.join(numbers)}{remedy(call, wrong_ones)}"


def remedy(call: Call, wrong_ones: Sequence[Diagnosis]) -> str:
    """What to do about *wrong_ones*: what the hooks would mend, --repair does."""
    drifted = [one for one in wrong_ones if one.drifted]
    mended = sum(not one.blocked for one in drifted)
    if not drifted or call.options.repair:
        return ""
    command = f"`kvm-ifup check{' ' + call.options.name if call.options.name else ''} --repair`"
    if not mended:
        return f'; do what "mend" says, then {command}'
    return f"; {command} repeats the hook{'' if mended == len(wrong_ones) else f' for {mended} of them'}"


def check_lines(diagnosis: Diagnosis, more: int = 0) -> Iterable[str]:
    """One NIC: how it is described, its phase, and what is to be said; with *more*, of that many others, too."""
    one = diagnosis.one
    mode = f"{one.nic.mode}, " if one.nic else ""
    how = f"{mode}{diagnosis.phase}"
    since, by = (one.journal.since, one.journal.by) if one.journal else (one.told, "hook")
    if since:
        how = f"{how} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))} ({by})"
    if more:
        yield f"{one.label} and {more} more: {diagnosis.verdict}"
    elif diagnosis.verdict == "not wired" and not one.told:
        yield f"{one.label}: {mode}{diagnosis.verdict}: there is no {one.tap}; its QEMU makes it when it starts"
    else:
        yield f"{one.label}: {how}: {diagnosis.verdict}"
    for finding in diagnosis.findings:
        yield from finding_lines(finding)


def finding_lines(finding: Finding) -> Iterable[str]:
    """One finding."""
    yield f"  {finding.what}"
    if finding.why:
        yield f"      {finding.why}"
    if finding.mend:
        yield f"      mend: {finding.mend}"


def check_node(call: Call) -> int:
    """`kvm-ifup check --node`."""
    place = call.options.config or config.DIRECTORY
    with look(call.options.name, call.run_dir, call.config) as seen:
        findings = list(node_findings(seen, place))
    if call.options.json:
        call.say_json({"ready": not wrong(findings), "findings": [finding_object(finding) for finding in findings]})
    else:
        call.say([f"node: {'not ready' if wrong(findings) else 'ready'}"])
        first = sorted(findings, key=lambda finding: not finding.wrong)
        call.say(line for finding in first for line in finding_lines(finding))
    return WRONG if wrong(findings) else 0
