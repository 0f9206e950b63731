"""The one planner: what is to be done for a NIC. Hooks, `--plan`, `show`, `check`, `plan` and the agent all ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvmifup import phases
from kvmifup.core import ovsport
from kvmifup.core.model import Config, Nic, NodeFacts, Phase, Uplink
from kvmifup.core.ops import EVERYWHERE, LinkMaster, Op, OvsPort, UplinkVlans, Value
from kvmifup.core.records import record
from kvmifup.runs.apply import Change, Job, survey, survey_undo
from kvmifup.runs.host import Host, Through
from kvmifup.runs.journal import Entry, Journal
from kvmifup.runs.leftovers import recover
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session, devices_of, followed
from kvmifup.runs.shared import before_all, claimed_elsewhere, given_up, unshared, with_claims


@record
class Plan:
    """What it takes to make *nic* right for *phase*, on the node as it was found.

    *dropped* undoes what an earlier run did and nothing wants any more; *changes* are the ops of the phase. *before*
    is the tap's journal, *known* whether it is on disk or an empty one made up for a new tap. *kept* are its entries
    that this phase does not ask for, and that stay all the same. *last* are uplinks that only the journal knows.
    """

    nic: Nic
    phase: Phase
    facts: NodeFacts
    last: tuple[Uplink, ...]
    before: Journal
    known: bool
    dropped: tuple[Change, ...]
    changes: tuple[Change, ...]
    kept: tuple[Entry, ...]

    @property
    def due(self) -> tuple[Change, ...]:
        """What is not as it is to be.

        Without what is only done once more, because something else disturbs it. That goes for an announcement as well.
        """
        return tuple(
            change
            for change in (*self.dropped, *self.changes)
            if change.needed and not change.op.after_change and change.now != change.op.wanted
        )


def plan(
    phase: Phase,
    nic: Nic,
    journal: Journal | None,
    session: Session,
    *,
    announce: bool = False,
    admitted: bool = False,
) -> Plan:
    """What is to be done for *nic* to be right for *phase*, if *journal* is that of its tap, with nothing pending.

    *announce* forces the announcement. *admitted*: the guest is on this node already, so an uplink that is not ready
    keeps nothing else from being done, and a bridge that forwards late is better than none.
    Raises what `phases.plan` and reading the node raise.
    """
    config = session.config
    # A copy: what is looked up in it by key goes with this plan, and the agent keeps thousands of journals.
    journal = journal and replace(followed(journal, session.kernel))
    facts = with_claims(session.kernel.facts(nic, config), nic, session)
    if journal and nic.mode == "ext":  # its program has made what there is
        facts = replace(facts, rules=(), port=None, filtered=False, judged=False)
    port = journal and journal.prior(LinkMaster(nic.tap, None).key)
    if facts.bridge and port and isinstance(port.op, LinkMaster) and port.op.vlans:
        facts = replace(facts, bridge=replace(facts.bridge, keeps=True))
    if journal and facts.port and journal.nic.iface_id and not nic.iface_id:  # it was ours, and is not wanted any more
        facts = replace(facts, port=ovsport.without(facts.port, ovsport.INTERFACE, journal.nic.iface_id))
    ours = journal and journal.prior(phases.ipv6_off(nic).key)
    if ours and ours.prior == "0" and nic.mode == "routed":  # off since the NIC was bridged; undone below
        facts = replace(facts, ipv6_mend=())
    lacking = phases.families_unseen(nic, config, facts)
    last = last_uplinks(nic, journal, lacking, session) if journal and lacking else ()
    uplinks = (*facts.uplinks, *(uplink for uplink in last if admitted or not uplink.mend))
    if admitted:
        uplinks = tuple(replace(uplink, mend=()) for uplink in uplinks if phases.usable(uplink))
        facts = replace(facts, bridge=facts.bridge and phases.as_far_as_usable(facts.bridge))
    known = replace(facts, uplinks=uplinks) if uplinks != facts.uplinks else facts
    guest = nic
    if nic.incoming and (admitted or has_arrived(nic, facts, journal, session)):
        guest = replace(nic, incoming=False)
    everything = phases.plan(Phase.POST, guest, config, known, announce=announce)
    ops = everything if phase is Phase.POST else phases.plan(phase, guest, config, known, announce=announce)
    assert facts.tap is not None  # phases.plan has refused a tap that is not there
    before = journal or Journal(nic, facts.tap.ifindex, namespace=session.store.namespace, cookie=session.store.cookie)
    same = set(ops)  # as nearly all entries are; to compare their keys would take longer
    others = [entry for entry in before.entries if entry.op not in same]
    planned = {op.key: op for op in ops} if others else {}
    later = {op.key for op in everything} if others else set()
    # One that is down, or was configured and has another name now, says nothing about what is on others.
    unusable = {uplink.family for uplink in facts.uplinks if admitted and not phases.usable(uplink)}
    kept: list[Entry] = []
    dropped: list[Entry] = []
    for entry in others:
        if entry.op.key in planned:  # with another value now
            dropped += given_up(entry, planned[entry.op.key])
            continue
        # pre, called once more after post, takes nothing away from a guest that runs here.
        uplink = phases.uplink_of(entry.op)
        stays = entry.op.key in later or (uplink is not None and uplink[1] in unusable)
        stays = stays or phases.unseen(entry.op, nic, lacking)
        (kept if stays else dropped).append(entry)
    changes = survey(ops, session.kernel, before)
    for change in changes:
        if change.needed and not before.noted(change.op.key):
            phases.refuse_others(change.op, change.now)
    return Plan(
        nic,
        phase,
        facts,
        last,
        before,
        known=journal is not None,
        dropped=survey_undo(unshared(before, dropped, session), session.kernel) if dropped else (),
        changes=changes,
        kept=tuple(kept),
    )


def has_arrived(nic: Nic, facts: NodeFacts, journal: Journal | None, session: Session) -> bool:
    """Whether the guest of an incoming *nic* runs here by now; looked into only where that makes a difference.

    Nobody changes the description of a guest that has arrived. A bridge that forwards late is no reason any more to
    leave it unplugged, or its post undone.
    """
    if not nic.incoming or facts.bridge is None or not phases.slow(facts.bridge, session.config):
        return False
    if journal and journal.phase is Phase.POST and not journal.left:
        return True
    return facts.tap is not None and bool(session.kernel.sign_of(nic.tap))


def last_uplinks(nic: Nic, journal: Journal, lacking: set[int], session: Session) -> tuple[Uplink, ...]:
    """The uplinks that *journal* knows of the address families *lacking*, of which none is seen now, if usable.

    A default route tells the uplink, and it may come back long after the device, or for one family later than for the
    other. Until then what was right stays right.
    """
    ops = [entry.op for entry in (*journal.entries, *journal.pending)]
    known = {uplink for op in ops if phases.unseen(op, nic, lacking) and (uplink := phases.uplink_of(op))}
    if not known:
        return ()
    names = tuple(dict.fromkeys(name for name, _ in sorted(known) if name != EVERYWHERE))
    named = replace(session.config, routed=replace(session.config.routed, uplinks=names))
    found = session.kernel.facts(nic, named).uplinks
    return tuple(one for one in found if (one.name, one.family) in known and phases.usable(one))


def prepare(
    phase: Phase, nic: Nic, journal: Journal | None, session: Session, *, announce: bool, admitted: bool = False
) -> tuple[Outcome, Job]:
    """Clear up after a dead or killed run on this tap, then find out what *nic* needs; in a dry run, what it would.

    *journal*: that of its tap, read since its lock was taken.
    """
    undone: tuple[Change, ...] = ()
    if journal is not None:
        journal, undone = recover(followed(journal, session.kernel), session, nic)
    if session.dry:
        session = replace(session, kernel=Foreseen(session.kernel, undone))
    found = plan(phase, nic, journal, session, announce=announce, admitted=admitted)
    changes = (*found.dropped, *found.changes)
    remarks = phases.remarks(
        found.phase, nic, session.config, replace(found.facts, uplinks=(*found.facts.uplinks, *found.last))
    )
    outcome = Outcome(nic.label, nic, nic.tap, found.phase, undone, changes, remarks)
    return outcome, Job(changes, found.before, found.known, journal_after(found, session))


def journal_after(found: Plan, session: Session) -> Journal:
    """The journal once *found* is done."""
    entries = (*remembered(found, session), *found.kept)
    if found.kept and set(entries) == set(found.before.entries):  # pre after post names those of post last
        entries = found.before.entries
    after = replace(
        found.before,
        nic=found.nic,
        phase=max(found.phase, found.before.phase),
        entries=entries,
        pending=(),
        # Only a hook, or post, says that the guest is to come back.
        left=found.before.left and found.phase is Phase.PRE and session.by == "agent",
    )
    after = replace(after, devices=devices_of(after, session.kernel))
    changed = any(change.needed and change.op.undoable for change in (*found.dropped, *found.changes))
    reached = (after.phase, after.left) != (found.before.phase, found.before.left)
    return session.dated(after) if changed or reached else after


def remembered(found: Plan, session: Session) -> list[Entry]:
    """What the journal must be able to undo of the changes in *found*.

    The value from before the first run counts, not the one from before this one. What was already so is remembered if
    it is to go with the guest. A removal is final: putting a dead NIC's rule back when this guest leaves would set a
    trap for the next one.
    """
    entries: list[Entry] = []
    for change in found.changes:
        op = change.op
        if not op.undoable or op.wanted is False or op.wanted in op.leaves:
            continue
        earlier = found.before.prior(op.key)
        if isinstance(op, UplinkVlans):
            entries.append(before_all(op, change.now, earlier, found.nic.tap, session))
            continue
        if earlier is None and op.shared:
            # Also from a dead NIC's journal that nobody has cleared up yet: what it found was before us, too.
            earlier = claimed_elsewhere(op, found.nic.tap, session, dead=True)
        prior = op.before_us(change.now)
        if earlier is not None:
            entries.append(Entry(op, earlier.prior))
        elif change.needed or prior != change.now:
            entries.append(Entry(op, prior))
    return entries


class Foreseen(Through):
    """The node as it will be once *undone* is undone: what a dry run plans on."""

    def __init__(self, host: Host, undone: Sequence[Change]) -> None:
        super().__init__(host)
        self._values = {change.op.key: change.op.wanted for change in undone}

    def write(self, op: Op) -> None:
        """Never: a dry run has nothing to write."""
        raise AssertionError(f"a dry run writes {op}")

    def read(self, op: Op) -> Value:
        """The value that will be there. Raises what the kernel raises."""
        return self._values[op.key] if op.key in self._values else self._host.read(op)

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """The facts, without the policy rules that will be gone."""
        facts = self._host.facts(nic, config)
        if OvsPort(nic.tap, None).key in self._values:
            facts = replace(facts, port=None)
        return replace(facts, rules=tuple(rule for rule in facts.rules if self._values.get(rule.key, True)))
