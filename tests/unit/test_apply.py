"""All or nothing: the loop on a node in memory, with a failure at every step."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvmifup import phases
from kvmifup.core.errors import InterruptedRun, KernelError, NotReadyError, ProgramError, RollbackError, VanishedError
from kvmifup.core.model import Phase
from kvmifup.core.ops import (
    RTPROT_STATIC,
    Announce,
    BridgeAddress,
    Filter,
    LinkAddress,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Op,
    ProxyNeighbour,
    Route,
    Rule,
    Sources,
    Sysctl,
)
from kvmifup.runs.announcing import carry_out
from kvmifup.runs.apply import Job, apply, put_back, survey, survey_undo
from kvmifup.runs.journal import Entry, Journal
from kvmifup.runs.outcome import Outcome

from .nodes import FailingStore, MemoryNode, identity, on_disk
from .samples import BRIDGE, BRIDGED, CONFIG, DUAL, EXT, FACTS_BRIDGED, FACTS_EXT, FACTS_ROUTED, HERE, OVS, ROUTED

pytestmark = pytest.mark.usefixtures("quick_disk")

LEFTOVER = Rule(4, "tap0", 200, 7, RTPROT_STATIC, True)
PLANS: dict[str, tuple[Op, ...]] = {
    "bridged": phases.plan(
        Phase.POST, BRIDGED, CONFIG, replace(FACTS_BRIDGED, bridge=replace(BRIDGE, adopts=True), rules=(LEFTOVER,))
    ),
    "routed": phases.plan(Phase.POST, replace(DUAL, link="100"), CONFIG, replace(FACTS_ROUTED, table=100)),
    "openvswitch": phases.plan(Phase.POST, OVS, CONFIG, FACTS_BRIDGED),
    "ext": phases.plan(Phase.POST, EXT, CONFIG, FACTS_EXT),
    "removal": (
        ProxyNeighbour("eth0", "192.0.2.8", False),
        Route("192.0.2.8/32", "tap0", 254, False),
        LinkMaster("tap0", None),
        LinkMtu("tap0", 1500),
        LEFTOVER.turned(False),
    ),
    "one": (LinkMtu("tap0", 9000),),
}
OUTCOME = Outcome("tap0", ROUTED, "tap0", Phase.POST)
every_plan = pytest.mark.parametrize("shape", PLANS)


def fresh_node() -> MemoryNode:
    """A node that was not fresh: there is something to come back to that is nobody's default."""
    node = MemoryNode()
    for op in (
        LEFTOVER,
        LinkAddress("tap0", "3e:00:00:00:00:99"),
        LinkMtu("tap0", 1400),
        LinkMaster("tap0", "br9"),
        ProxyNeighbour("eth0", "192.0.2.8", True),
        Route("192.0.2.8/32", "tap0", 254, True),
        Sysctl(4, "neigh", "eth0", "proxy_delay", True, "33"),
    ):
        node.put(op)
    return node


EARLIER = Journal(ROUTED, 7, Phase.PRE, (Entry(LinkMtu("tap0", 1400), 1300),), namespace=HERE)


def job_for(
    plan: Sequence[Op], node: MemoryNode, *, known: bool = False, forget: bool = False, tap: str = "tap0"
) -> Job:
    changes = survey(plan, node)
    nic = replace(ROUTED, tap=tap)
    before = replace(EARLIER, nic=nic) if known else Journal(nic, 7, namespace=HERE)
    entries = tuple(change.entry for change in changes if change.needed and change.op.undoable)
    return Job(changes, before, known, None if forget else replace(before, phase=Phase.POST, entries=entries))


class World:
    """A node, a store, and what both held before the run."""

    def __init__(self, run_dir: Path, *, known: bool) -> None:
        self.run_dir = run_dir
        self.node = fresh_node()
        self.store = FailingStore(run_dir)
        if known:
            self.store.save(EARLIER)
            self.store.changes = 0
        self.values = self.node.undoable()
        self.files = on_disk(run_dir)

    def is_as_before(self) -> bool:
        return self.node.undoable() == self.values and on_disk(self.run_dir) == self.files


@pytest.fixture
def worlds(tmp_path: Path) -> Callable[..., World]:
    numbers = iter(range(1000))
    return lambda *, known=False: World(tmp_path / str(next(numbers)), known=known)


def fail_at(step: int, error: BaseException) -> Callable[[int], None]:
    def fail(number: int) -> None:
        if number == step:
            raise error

    return fail


FAILURES = {
    "refused": KernelError("no", errno=errno.EINVAL),
    "not ready": NotReadyError("does not forward"),
    "vanished": VanishedError("gone", errno=errno.ENODEV),
    "a program": ProgramError("late"),
    "a bug": ZeroDivisionError("oops"),
    "interrupted": KeyboardInterrupt(),
}


def to_write(job: Job) -> list[Op]:
    """What `apply` writes: a tap leaves the bridge that it is on first, and an announcement comes after it."""
    wanted = [change.op for change in job.needed if not change.op.after_change]
    left: list[Op] = [op.turned(None) for op in wanted if op.moves]
    return [*left, *(op for op in wanted if op not in left)]


@every_plan
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_error_at_any_write_leaves_everything_as_it_was(
    shape: str, known: bool, moment: str, worlds: Callable[..., World]
) -> None:
    total = len(to_write(job_for(PLANS[shape], fresh_node())))
    assert total
    kinds = list(FAILURES.values())
    for step in range(total):
        error = kinds[step % len(kinds)]
        world = worlds(known=known)
        setattr(world.node, moment, fail_at(step, error))
        with pytest.raises(type(error)) as caught:
            apply([job_for(PLANS[shape], world.node, known=known)], world.node, world.store)
        assert caught.value is error
        assert world.is_as_before(), f"step {step}"


def several(node: MemoryNode) -> list[Job]:
    """Two guests who are to be restricted, and one who is not any more."""
    plans = {
        "tap0": (LinkMtu("tap0", 9000), Filter("tap0", "mac aa:00:00:35:ac:01"), LinkUp("tap0", True)),
        "tap1": (LinkMtu("tap1", 9000), Sources("tap1", "strict 2001:db8::8"), LinkUp("tap1", True)),
        "tap2": (LinkMtu("tap2", 9000), Filter("tap2", None), LinkUp("tap2", True)),
    }
    node.put(Filter("tap2", "mac aa:00:00:35:ac:02"))
    return [job_for(plan, node, tap=tap) for tap, plan in plans.items()]


def test_what_restricts_guests_comes_first_for_all_of_them_at_once(worlds: Callable[..., World]) -> None:
    world = worlds()
    jobs = several(world.node)
    apply(jobs, world.node, world.store)
    restricting = [Filter("tap0", "mac aa:00:00:35:ac:01"), Sources("tap1", "strict 2001:db8::8")]
    assert world.node.together == [restricting]
    assert world.node.writes[:2] == restricting
    assert sorted(map(repr, world.node.writes)) == sorted(repr(change.op) for job in jobs for change in job.needed)
    assert world.node.writes.index(Filter("tap2", None)) > world.node.writes.index(LinkMtu("tap2", 9000))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_error_while_several_guests_are_restricted_leaves_them_as_they_were(
    moment: str, worlds: Callable[..., World]
) -> None:
    for step in range(len([change for job in several(fresh_node()) for change in job.needed])):
        world = worlds()
        jobs = several(world.node)
        world.values = world.node.undoable()
        setattr(world.node, moment, fail_at(step, KernelError("no", errno=errno.EINVAL)))
        with pytest.raises(KernelError, match="no"):
            apply(jobs, world.node, world.store)
        assert world.is_as_before(), f"step {step}"


def test_who_moves_leaves_before_it_is_restricted_in_another_way(worlds: Callable[..., World]) -> None:
    world = worlds()
    node, less = world.node, "mac aa:00:00:35:ac:03"
    for tap, now in (("tap3", "address aa:00:00:35:ac:03 192.0.2.8"), ("tap4", None)):
        node.put(LinkMaster(tap, "br0"))
        node.put(Filter(tap, now))
    moving = [job_for((Filter(tap, less), LinkMaster(tap, "br1")), node, tap=tap) for tap in ("tap3", "tap4")]
    apply([*several(node), *moving], node, world.store)
    assert Filter("tap4", less) in node.together[0], "nothing restricts it where it is"
    assert Filter("tap3", less) not in node.together[0]
    assert node.writes.index(LinkMaster("tap3", None)) < node.writes.index(Filter("tap3", less))


def test_one_guest_is_restricted_in_its_turn(worlds: Callable[..., World]) -> None:
    world = worlds()
    apply(several(world.node)[:1], world.node, world.store)
    assert world.node.together == []
    assert world.node.writes.index(Filter("tap0", "mac aa:00:00:35:ac:01")) == 1


@pytest.mark.parametrize("kind", FAILURES)
def test_whatever_the_error_it_comes_through(kind: str, worlds: Callable[..., World]) -> None:
    world = worlds()
    world.node.after = fail_at(3, FAILURES[kind])
    with pytest.raises(type(FAILURES[kind])):
        apply([job_for(PLANS["routed"], world.node)], world.node, world.store)
    assert world.is_as_before()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_error_at_any_change_of_the_disk_leaves_everything_as_it_was(
    known: bool, forget: bool, moment: str, worlds: Callable[..., World]
) -> None:
    for step in range(2):  # what is pending; what is done
        world = worlds(known=known)
        setattr(world.store, moment, fail_at(step, KernelError("disk full", errno=errno.ENOSPC)))
        with pytest.raises(KernelError, match="disk full"):
            apply([job_for(PLANS["routed"], world.node, known=known, forget=forget)], world.node, world.store)
        assert world.is_as_before(), f"change {step}"


@every_plan
def test_success(shape: str, worlds: Callable[..., World]) -> None:
    world = worlds()
    job = job_for(PLANS[shape], world.node)
    apply([job], world.node, world.store)
    values = world.node.values
    found = {op: world.node.read(op) if op.readable else values.get(op.key) for op in PLANS[shape] if op.undoable}
    assert not [op for op, value in found.items() if value != op.wanted]
    assert world.store.load("tap0") == job.after
    assert world.node.writes == to_write(job)


@every_plan
def test_the_second_run_writes_nothing(shape: str, worlds: Callable[..., World]) -> None:
    world = worlds()
    first = job_for(PLANS[shape], world.node)
    apply([first], world.node, world.store)
    files, writes = identity(world.run_dir), len(world.node.writes)
    assert first.after is not None
    apply([Job(survey(PLANS[shape], world.node, first.after), first.after, True, first.after)], world.node, world.store)
    assert len(world.node.writes) == writes
    assert identity(world.run_dir) == files


def test_forgetting(worlds: Callable[..., World]) -> None:
    world = worlds(known=True)
    apply([job_for(PLANS["removal"], world.node, known=True, forget=True)], world.node, world.store)
    assert world.store.load("tap0") is None


def test_even_a_nic_that_needed_nothing_is_remembered(worlds: Callable[..., World]) -> None:
    """Its journal is what gives it its addresses, and lets kvm-ifdown know it."""
    world = worlds()
    job = job_for((LinkMtu("tap0", 1400),), world.node)
    assert not job.needed
    apply([job], world.node, world.store)
    assert world.store.load("tap0") == job.after


@every_plan
def test_what_will_be_done_is_on_disk_before_the_first_write(shape: str, worlds: Callable[..., World]) -> None:
    world = worlds(known=True)
    job = job_for(PLANS[shape], world.node, known=True)
    seen: list[Journal | None] = []
    world.node.before = lambda _number: seen.append(world.store.load("tap0"))
    apply([job], world.node, world.store)
    pending = tuple(change.entry for change in job.needed if change.op.undoable)
    assert seen[0] == replace(EARLIER, pending=pending)
    assert set(map(repr, seen)) == {repr(seen[0])}


def test_with_nothing_to_undo_nothing_is_pending(worlds: Callable[..., World]) -> None:
    world = worlds(known=True)
    files = identity(world.run_dir)
    job = replace(job_for((BridgeAddress("br0", "02:00:00:00:00:01"),), world.node, known=True), after=EARLIER)
    apply([job], world.node, world.store)
    assert world.node.writes
    assert identity(world.run_dir) == files


# --- undo ---------------------------------------------------------------------------------------------


def test_undo_goes_backwards_to_what_was_read(worlds: Callable[..., World]) -> None:
    world = worlds()
    plan = PLANS["routed"]
    job = job_for(plan, world.node)
    total = len(to_write(job))
    world.node.after = fail_at(total - 1, KernelError("no", errno=errno.EINVAL))
    with pytest.raises(KernelError):
        apply([job], world.node, world.store)
    undone = world.node.writes[total:]
    (moved,) = [change for change in job.needed if change.op.moves]
    rest = [change for change in reversed(job.needed) if change.op.undoable and change != moved]
    assert undone == [change.entry.undo for change in (*rest, moved)]  # it comes back when all else is as it was


@every_plan
def test_what_is_put_back_is_told_as_it_was_foreseen(shape: str, worlds: Callable[..., World]) -> None:
    world = worlds()
    job = job_for(PLANS[shape], world.node)
    apply([job], world.node, world.store)
    assert job.after is not None
    foreseen = survey_undo(job.after.entries, world.node)
    changes, problems = put_back(job.after.entries, world.node)
    # On a node in memory nothing goes by itself with what else is undone.
    assert [one for one in changes if not one.op.gone_with] == [one for one in foreseen if not one.op.gone_with]
    assert [one.op for one in changes] == [one.op for one in foreseen]
    assert problems == []
    assert world.node.undoable() == world.values
    again, problems = put_back(job.after.entries, world.node)
    assert [change for change in again if change.needed and change.op.readable] == []
    assert problems == []


def test_what_could_not_be_put_back_is_not_told_as_done(worlds: Callable[..., World]) -> None:
    world = worlds()
    job = job_for(PLANS["routed"], world.node)
    apply([job], world.node, world.store)
    assert job.after is not None
    failure = KernelError("no", errno=errno.EINVAL)
    world.node.before = fail_at(len(world.node.writes) + 3, failure)
    changes, problems = put_back(job.after.entries, world.node)
    (failed,) = problems
    assert failed[1] is failure
    assert failed[0].undo not in [change.op for change in changes]
    assert len(changes) == len(job.after.entries) - 1


def test_undo_writes_only_what_was_changed(worlds: Callable[..., World]) -> None:
    """A write that failed before its effect has nothing to put back."""
    world = worlds()
    world.node.before = fail_at(0, KernelError("no", errno=errno.EINVAL))
    with pytest.raises(KernelError):
        apply([job_for(PLANS["routed"], world.node)], world.node, world.store)
    assert len(world.node.writes) == 1


@pytest.mark.parametrize("untouched", [True, False])
def test_a_program_that_ended_by_itself_is_not_undone(untouched: bool, worlds: Callable[..., World]) -> None:
    """One that was killed is: it may have got half-way."""
    world = worlds()
    world.node.before = fail_at(1, ProgramError("exit code 1", untouched=untouched))
    with pytest.raises(ProgramError, match="exit code 1"):
        apply([job_for(PLANS["ext"], world.node)], world.node, world.store)
    pre, post = PLANS["ext"]
    assert world.node.writes == [pre, post, *([] if untouched else [post.turned(False)]), pre.turned(False)]


def failing_undo(node: MemoryNode, kind: type[Op], error: Exception) -> None:
    """From the failure on, every attempt to put back an op of *kind* fails with *error*."""
    forward: set[Op] = set()

    def fail(_number: int) -> None:
        op = node.writes[-1]
        if isinstance(op, kind) and op.key in {earlier.key for earlier in forward}:
            raise error
        forward.add(op)

    node.before = fail


def test_a_failing_rollback_tells_both_causes_and_remembers(worlds: Callable[..., World]) -> None:
    world = worlds(known=True)
    job = job_for(PLANS["bridged"], world.node, known=True)
    failing_undo(world.node, LinkMtu, KernelError("the MTU stays", errno=errno.EBUSY))
    first = KernelError("no master", errno=errno.ELOOP)
    world.node.after = fail_at([isinstance(c.op, LinkMaster) for c in job.needed].index(True), first)
    with pytest.raises(RollbackError, match=r"no master.*the MTU stays") as caught:
        apply([job], world.node, world.store)
    assert caught.value.code == 70
    assert caught.value.__cause__ is first
    assert "gc" in caught.value.hint

    journal = world.store.load("tap0")
    assert journal is not None
    assert journal.entries == EARLIER.entries
    assert [entry for entry in journal.pending if isinstance(entry.op, LinkMtu)] == [Entry(LinkMtu("tap0", 9000), 1400)]

    mtu = LinkMtu("tap0", 0).key
    assert world.node.undoable() == world.values | {mtu: 9000}, "all else was put back"


def test_what_vanished_needs_no_undoing(worlds: Callable[..., World]) -> None:
    world = worlds()

    def unplug(number: int) -> None:
        if number == 4:
            world.node.absent.add("tap0")
            raise VanishedError("tap0 is gone", errno=errno.ENODEV)

    world.node.after = unplug
    with pytest.raises(VanishedError):
        apply([job_for(PLANS["bridged"], world.node)], world.node, world.store)
    assert on_disk(world.run_dir) == {}
    assert world.node.read(LEFTOVER) is True, "what does not need the tap was put back"


# --- signals ------------------------------------------------------------------------------------------


def signal_at(step: int, number: signal.Signals) -> Callable[[int], None]:
    def send(found: int) -> None:
        if found == step:
            signal.raise_signal(number)

    return send


@pytest.mark.usefixtures("caught_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_stops_the_run_between_two_writes(
    number: signal.Signals, moment: str, worlds: Callable[..., World]
) -> None:
    world = worlds(known=True)
    setattr(world.node, moment, signal_at(2, number))
    with pytest.raises(InterruptedRun, match=number.name) as caught:
        apply([job_for(PLANS["routed"], world.node, known=True)], world.node, world.store)
    assert caught.value.code == 75
    assert world.is_as_before()
    assert world.node.writes[2] == [c.op for c in job_for(PLANS["routed"], fresh_node()).needed][2]
    assert len([op for op in world.node.writes if op in PLANS["routed"]]) == 3, "the one begun was finished, no other"


@pytest.mark.usefixtures("caught_signals")
def test_a_signal_that_comes_too_late_changes_nothing(worlds: Callable[..., World]) -> None:
    world = worlds()
    job = job_for(PLANS["routed"], world.node)
    world.node.after = signal_at(len(to_write(job)), signal.SIGTERM)
    carry_out([(OUTCOME, job)], world.node, world.store)
    assert len(world.node.writes) == len(job.needed)
    assert world.store.load("tap0") == job.after


# --- ops that depend on the others --------------------------------------------------------------------


def test_an_announcement_follows_a_change() -> None:
    node = fresh_node()
    quiet = Announce((("eth0", "192.0.2.8", "192.0.2.8"),), force=False)
    changing, right = LinkMtu("tap0", 9000), LinkMtu("tap0", 1400)

    def due(*plan: Op) -> bool:
        return survey(plan, node)[-1].needed

    assert due(changing, quiet)
    assert not due(right, quiet)
    assert not due(quiet)
    assert due(right, replace(quiet, force=True))


def test_an_announcement_is_never_read() -> None:
    node = fresh_node()
    survey(PLANS["routed"], node)
    assert not [op for op in node.reads if op.after_change]


def test_an_announcement_that_fails_undoes_nothing_and_is_told(worlds: Callable[..., World]) -> None:
    world = worlds()
    job = job_for(PLANS["routed"], world.node)
    assert isinstance(job.needed[-1].op, Announce)
    world.node.before = fail_at(len(job.needed) - 1, KernelError("no buffer", errno=errno.ENOBUFS))
    (outcome,) = carry_out([(OUTCOME, job)], world.node, world.store)
    assert outcome.remarks == ("no buffer",)
    assert world.store.load("tap0") == job.after


def test_it_is_announced_when_the_journal_says_what_is_true(worlds: Callable[..., World]) -> None:
    world = worlds()
    job = job_for(PLANS["routed"], world.node)
    then: list[Journal | None] = []
    world.node.before = lambda number: then.append(world.store.load("tap0"))
    carry_out([(OUTCOME, job)], world.node, world.store)
    assert then[-1] == job.after != then[-2]


# --- several NICs -------------------------------------------------------------------------------------


def two_jobs(world: World) -> Iterator[Job]:
    yield job_for((LinkMtu("tap0", 9000), LinkUp("tap0", True)), world.node, known=True)
    yield job_for((LinkMtu("tap1", 9000), LinkUp("tap1", True)), world.node, tap="tap1")


def test_several_jobs_all_or_none(worlds: Callable[..., World]) -> None:
    world = worlds(known=True)
    apply(list(two_jobs(world)), world.node, world.store)
    assert on_disk(world.run_dir).keys() == {"tap0.json", "tap1.json"}
    for step in range(4):
        world = worlds(known=True)
        world.node.after = fail_at(step, KernelError("no", errno=errno.EINVAL))
        with pytest.raises(KernelError):
            apply(list(two_jobs(world)), world.node, world.store)
        assert world.is_as_before(), f"step {step}"
    for change in range(4):
        world = worlds(known=True)
        world.store.before = fail_at(change, KernelError("disk full", errno=errno.ENOSPC))
        with pytest.raises(KernelError):
            apply(list(two_jobs(world)), world.node, world.store)
        assert world.is_as_before(), f"change {change} of the disk"


def test_every_job_is_pending_before_the_first_write(worlds: Callable[..., World]) -> None:
    world = worlds()
    seen: list[list[str]] = []
    world.node.before = lambda _number: seen.append(sorted(on_disk(world.run_dir)))
    apply(list(two_jobs(world)), world.node, world.store)
    assert seen[0] == ["tap0.json", "tap1.json"]


def test_after_a_failed_rollback_every_job_is_still_pending(worlds: Callable[..., World]) -> None:
    """Also one whose journal had already been written anew, or nobody would try again to put it back."""
    world = worlds(known=True)
    jobs = list(two_jobs(world))
    failing_undo(world.node, LinkMtu, KernelError("stays", errno=errno.EBUSY))
    world.store.before = fail_at(3, KernelError("disk full", errno=errno.ENOSPC))  # tap0 has been committed
    with pytest.raises(RollbackError):
        apply(jobs, world.node, world.store)
    for job in jobs:
        journal = world.store.load(job.before.nic.tap)
        assert journal is not None
        assert LinkMtu(journal.nic.tap, 9000) in [entry.op for entry in journal.pending]
