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
                        **nic_object(one.one, one.phase, replace(one.state, wired=not one.wrong)),
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
            if one.nic is None or one.phase is Phase.DOWN:
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
    """What is wrong first; then who is right, if that is news, something is to be said, or it is asked for; the sum."""
    wrong_ones = [one for one in found if one.wrong]
    right = [one for one in found if not one.wrong]
    asked = call.options.name or call.options.verbose
    for one in (*wrong_ones, *(one for one in right if asked or one.findings or one.one.label in repaired)):
        yield from check_lines(one)
    if not found:
        yield f"nothing to check: there is no journal and no NIC file in {call.run_dir}"
    elif wrong_ones or not asked or len(found) > 1:
        yield f"{len(right)} right, {len(wrong_ones)} wrong{remedy(call, wrong_ones)}"


def remedy(call: Call, wrong_ones: Sequence[Diagnosis]) -> str:
    """What to do about *wrong_ones*: what the hooks would mend, --repair does."""
    drifted = sum(any(finding.drift and finding.wrong for finding in one.findings) for one in wrong_ones)
    if not drifted or call.options.repair:
        return ""
    name = f" {call.options.name}" if call.options.name else ""
    which = "repeats the hook" if drifted == len(wrong_ones) else f"repeats the hook for {drifted} of them"
    return f"; `kvm-ifup check{name} --repair` {which}"


def check_lines(diagnosis: Diagnosis) -> Iterable[str]:
    """One NIC: how it is described, its phase, and what is wrong with it."""
    one = diagnosis.one
    mode = f"{one.nic.mode}, " if one.nic else ""
    since = ""
    if one.journal and one.journal.since:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.journal.since))
        since = f" since {moment} ({one.journal.by})"
    yield f"{one.label}: {mode}{diagnosis.phase}{since}: {'wrong' if diagnosis.wrong else 'right'}"
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
