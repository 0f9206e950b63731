"""What is on disk: it comes back as it was, or is refused as a whole."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core.errors import (
    ForeignJournalError,
    JournalError,
    KernelError,
    NamespaceError,
    NotReadyError,
    PrivilegeError,
)
from kvmifup.core.model import Phase
from kvmifup.core.ops import LinkMtu, ProxyNeighbour, Rule
from kvmifup.inputs import trust
from kvmifup.runs import index, journal, locks
from kvmifup.runs import store as stores
from kvmifup.runs.index import Index
from kvmifup.runs.journal import HEAD, Entry, Journal, Mark, marked
from kvmifup.runs.store import Store

from .samples import DUAL, HERE, ROUTED
from .strategies import journals

SAMPLE = Journal(
    DUAL,
    7,
    Phase.POST,
    (Entry(LinkMtu("tap0", 9000), 1500), Entry(Rule(4, "tap0", 100, 10000, 3, True), False)),
    (Entry(LinkMtu("tap0", 9000), 1400),),
    namespace=HERE,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


@given(journals)
def test_any_journal_comes_back(one: Journal) -> None:
    assert journal.decode(json.loads(json.dumps(journal.encode(one)))) == one


def test_on_disk(store: Store) -> None:
    assert store.load("tap0") is None
    store.save(SAMPLE)
    assert store.load("tap0") == SAMPLE
    assert store.taps() == ["tap0"]
    store.delete("tap0")
    assert store.load("tap0") is None
    store.delete("tap0")


def test_only_root_can_read_it_and_nothing_else_is_left(store: Store) -> None:
    store.save(SAMPLE)
    assert [path.name for path in store.directory.iterdir()] == ["tap0.json"]
    assert store.path("tap0").stat().st_mode & 0o777 == 0o600


def test_the_format_that_the_docstring_promises(store: Store) -> None:
    store.save(SAMPLE)
    data = json.loads(store.path("tap0").read_text())
    assert data.keys() == {
        "mark",
        "version",
        "namespace",
        "cookie",
        "nic",
        "ifindex",
        "phase",
        "since",
        "uptime",
        "boot",
        "by",
        "reason",
        "left",
        "devices",
        "entries",
        "pending",
    }
    assert data["entries"][0] == {"op": "link-mtu", "dev": "tap0", "want": 9000, "prior": 1500}
    assert (data["version"], data["namespace"], data["ifindex"], data["phase"]) == (2, HERE, 7, "post")


def test_a_dotted_tap_has_its_own_files(store: Store) -> None:
    """tap0.1 and tap0.2 must not share a temporary file."""
    names = ("tap0", "tap0.1", "tap0.2")
    for tap in names:
        store.save(Journal(DUAL.__class__(tap, DUAL.mac, "bridged", "br0"), 7, namespace=HERE))
    assert store.taps() == sorted(names)
    assert [(found.nic.tap if (found := store.load(tap)) else None) for tap in names] == list(names)


def test_the_leftover_of_a_killed_run_is_overwritten(store: Store) -> None:
    store.save(SAMPLE)
    store.path("tap0").with_suffix(".new").write_text("{half")
    assert store.load("tap0") == SAMPLE
    assert store.taps() == ["tap0"]
    store.save(SAMPLE)
    assert [path.name for path in store.directory.iterdir()] == ["tap0.json"]


def test_nobody_is_led_elsewhere_by_a_symlink(store: Store, tmp_path: Path) -> None:
    store.directory.mkdir(parents=True)
    store.path("tap0").with_suffix(".new").symlink_to(tmp_path / "victim")
    with pytest.raises(KernelError):
        store.save(SAMPLE)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("error", "expected"), [(PermissionError(13, "no"), PrivilegeError), (OSError(28, "full"), KernelError)]
)
def test_a_disk_that_refuses(
    error: OSError, expected: type[Exception], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(SAMPLE)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(expected):
        store.save(Journal(DUAL, 8, namespace=HERE))
    monkeypatch.undo()
    assert store.load("tap0") == SAMPLE


def test_the_content_is_on_disk_before_it_has_its_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut could leave an empty journal."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def spy_rename(source: str, target: Path) -> None:
        calls.append(f"rename {Path(source).name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    store.save(SAMPLE)
    assert calls == ["fsync tap0.new", "rename tap0.new tap0.json", "fsync state"]


# --- unreadable ones ----------------------------------------------------------------------------------


def load(store: Store, content: bytes) -> Journal | None:
    store.directory.mkdir(parents=True, exist_ok=True)
    store.path("tap0").write_bytes(content)
    return store.load("tap0")


def refuse(store: Store, content: bytes) -> None:
    with pytest.raises(JournalError) as caught:
        load(store, content)
    assert caught.value.code == 70
    assert "kvm-ifup gc" in caught.value.hint
    assert str(store.path("tap0")) in str(caught.value)


def test_a_truncated_journal_never_passes_for_a_whole_one(store: Store) -> None:
    whole = json.dumps(journal.encode(SAMPLE)).encode()
    assert load(store, whole) == SAMPLE
    for length in range(0, len(whole), 7):
        refuse(store, whole[:length])


@pytest.mark.parametrize(
    "content",
    [
        *(b"\xff\xfe", b"null", b"7", b'"x"', b"[1]", b"{}"),
        pytest.param(b"[" * 100_000, id="deep nesting"),
        pytest.param(b"1" * 5000, id="huge number"),
    ],
)
def test_what_is_no_journal(content: bytes, store: Store) -> None:
    refuse(store, content)


def changed(path: list[str | int], value: object) -> bytes:
    data: Any = json.loads(json.dumps(journal.encode(SAMPLE)))
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], None),
        (["namespace"], None),
        (["namespace"], "net"),
        (["nic"], None),
        (["nic"], []),
        (["nic", "ip"], ["nonsense"]),
        (["nic", "ip"], 5),
        (["nic", "tap"], None),
        (["nic", "tap"], "tap1"),
        (["ifindex"], "x"),
        (["ifindex"], None),
        (["ifindex"], float("inf")),
        (["phase"], "mid"),
        (["phase"], 1),
        (["entries"], 5),
        (["entries"], [5]),
        (["entries", 0, "op"], []),
        (["entries", 0, "dev"], ["tap0"]),
        (["entries", 1, "selectors"], 5),
        (["entries", 1, "selectors"], [["src", "192.0.2.0"]]),
        (["pending"], None),
    ],
)
def test_a_journal_with_a_wrong_part(path: list[str | int], value: object, store: Store) -> None:
    refuse(store, changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 3),
        (["version"], 0),
        (["nic", "extra"], 1),
        (["entries", 0, "op"], "no-such-op"),
        (["entries", 0, "extra"], 1),
    ],
)
def test_a_journal_of_another_version_is_refused_and_kept(path: list[str | int], value: object, store: Store) -> None:
    """Who wrote it can undo what it is about; to set it aside would leave that for good."""
    with pytest.raises(ForeignJournalError, match="another version") as caught:
        load(store, changed(path, value))
    assert caught.value.code == 70
    assert "kvm-ifup gc" not in caught.value.hint


def test_a_journal_of_version_1_is_read(store: Store) -> None:
    data = journal.encode(SAMPLE)
    for name in ("mark", "cookie", "uptime", "boot"):
        del data[name]
    assert load(store, json.dumps(data | {"version": 1}).encode()) == SAMPLE


@pytest.mark.parametrize("part", ["namespace", "nic", "ifindex", "phase", "entries", "pending"])
def test_a_journal_without_a_part(part: str, store: Store) -> None:
    data = journal.encode(SAMPLE)
    del data[part]
    refuse(store, json.dumps(data).encode())


def test_a_journal_that_is_a_directory(store: Store) -> None:
    store.path("tap0").mkdir(parents=True)
    with pytest.raises(JournalError):
        store.load("tap0")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
whole_sample = journal.encode(SAMPLE)


@given(st.dictionaries(st.sampled_from(sorted(whole_sample)), anything, max_size=3))
def test_any_json_is_a_journal_or_an_error(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    store = Store(tmp_path_factory.getbasetemp())
    with suppress(JournalError, NamespaceError):
        # None: of an earlier network namespace with the number of this one.
        assert isinstance(load(store, json.dumps(whole_sample | changes).encode()), Journal | None)


def test_a_journal_that_others_can_write(store: Store) -> None:
    """Or anybody could have root undo what was never done."""
    store.save(SAMPLE)
    store.path("tap0").chmod(0o602)
    with pytest.raises(ForeignJournalError, match="written to by others"):
        store.load("tap0")
    assert list(store.others("tap9", "tap0")) == []


@pytest.mark.parametrize("place", ["state", "."])
def test_a_directory_that_others_can_write_is_refused_and_no_journal_is_blamed(place: str, store: Store) -> None:
    store.save(SAMPLE)
    path = store.run_dir / place
    path.chmod(path.stat().st_mode | 0o002)
    actions: list[Callable[[], object]] = [
        lambda: store.load("tap0"),
        lambda: store.save(SAMPLE),
        lambda: list(store.others("tap9", "tap0")),
    ]
    for action in actions:
        with pytest.raises(NotReadyError, match="written to by others") as caught:
            action()
        assert "kvm-ifup gc" not in caught.value.hint
        assert "what others have put there" in caught.value.hint
        store.refresh()


def test_set_aside(store: Store) -> None:
    refuse(store, b"{")
    assert store.set_aside("tap0").read_bytes() == b"{"
    assert store.taps() == []
    assert store.load("tap0") is None


def test_a_journal_of_another_network_namespace(store: Store) -> None:
    store.save(replace(SAMPLE, namespace=HERE + 1))
    with pytest.raises(NamespaceError, match=f"{HERE + 1}.*{HERE}") as caught:
        store.load("tap0")
    assert caught.value.code == 69
    assert str(store.path("tap0")) in caught.value.hint
    with pytest.raises(NamespaceError):
        store.nic_of_live("tap0")
    assert not store.has_here("tap0", {"192.0.2.8"})
    store.save(replace(SAMPLE, nic=replace(DUAL, tap="tap1")))
    assert seen(store, "192.0.2.8/32") == seen(store, DUAL.instance) == ["tap1"]
    assert store.elsewhere() == {HERE + 1: 1}


# --- what cannot be read now ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES])
def test_a_look_that_failed_says_nothing_about_a_journal(
    number: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not broken, nor is there none, nor is what it shares free."""
    store.save(SAMPLE)
    store = Store(store.run_dir)
    plain = os.open

    def fail(path: str | Path, *more: Any, **others: Any) -> int:
        if str(path).endswith(".json"):
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *more, **others)

    actions: list[Callable[[], object]] = [lambda: store.load("tap0"), lambda: seen(store, "192.0.2.8/32")]
    monkeypatch.setattr(index, "index_of", None)
    store._index = Index()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        for action in actions:
            with pytest.raises((KernelError, PrivilegeError), match="cannot read the journal"):
                action()
    assert store.load("tap0") == SAMPLE
    assert seen(store, "192.0.2.8/32") == ["tap0"], "and nobody has remembered that it could not be read"


@pytest.mark.parametrize("where", ["listdir", "scandir", "lstat"])
def test_a_directory_that_cannot_be_read_is_not_empty(
    where: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(SAMPLE)

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "no descriptors")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        if where == "listdir":
            with pytest.raises(OSError, match="descriptors"):
                trust.listed(store.directory)
        else:
            with pytest.raises(KernelError, match="descriptors"):
                seen(store, "192.0.2.8/32")
    assert seen(store, "192.0.2.8/32") == ["tap0"]


# --- marks ------------------------------------------------------------------------------------------------

PROXIED = Entry(ProxyNeighbour("eth0", "192.0.2.8", True), False)
WIRED = replace(SAMPLE, entries=(*SAMPLE.entries, PROXIED), pending=())


@pytest.mark.parametrize("mark", list(Mark))
@pytest.mark.parametrize("before", list(Mark))
def test_what_a_mark_says_is_what_is_read_again(before: Mark, mark: Mark, store: Store) -> None:
    """Also over another one, and also for a process that has not seen it being made."""
    store.save(WIRED)
    first = store.mark(WIRED, before)
    size = store.path("tap0").stat().st_size
    after = store.mark(first, mark)
    fresh = Store(store.run_dir)
    fresh._index = Index()
    assert (found := fresh.load("tap0"))
    assert found == store.load("tap0")
    if before is Mark.NONE:
        assert found == after == marked(WIRED, mark)
    if mark is Mark.UNDO:
        assert set(after.pending) <= set(found.pending) == set(WIRED.entries)
        assert found.phase is Phase.DOWN
    assert store.path("tap0").stat().st_size == size
    assert [path.name for path in store.directory.iterdir()] == ["tap0.json"]


def test_the_marks_of_a_guest_that_leaves(store: Store) -> None:
    assert marked(WIRED, Mark.LEAVING).pending == (PROXIED,)
    assert marked(WIRED, Mark.LEFT).pending == ()
    for mark in (Mark.LEAVING, Mark.LEFT):
        assert marked(WIRED, mark).entries == SAMPLE.entries
        assert marked(WIRED, mark).phase is Phase.PRE


def test_a_mark_is_written_over_the_old_one_and_nothing_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(WIRED)
    before = store.path("tap0").read_bytes()
    monkeypatch.setattr(os, "rename", None)
    monkeypatch.setattr(os, "write", None)
    store.mark(WIRED, Mark.UNDO)
    after = store.path("tap0").read_bytes()
    assert [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new] == [len(HEAD)]


def test_a_mark_on_a_journal_of_version_1_rewrites_it(store: Store) -> None:
    data = journal.encode(WIRED)
    del data["mark"]
    one = load(store, json.dumps(data | {"version": 1}).encode())
    assert one == WIRED
    assert store.mark(one, Mark.UNDO) == store.load("tap0") == marked(WIRED, Mark.UNDO)


# --- looking through all of them ----------------------------------------------------------------------


def test_others(store: Store) -> None:
    store.save(SAMPLE)
    store.save(Journal(ROUTED.__class__("tap1", ROUTED.mac, "routed", ip=ROUTED.ip), 8, namespace=HERE))
    (store.directory / "tap2.json").write_text('"192.0.2.8/32"')

    def found(tap: str, text: str) -> list[str]:
        return sorted(one.nic.tap for one in store.others(tap, text))

    assert found("tap9", "192.0.2.8/32") == ["tap0", "tap1"]
    assert found("tap0", "192.0.2.8/32") == ["tap1"]
    assert found("tap9", "2001:db8::8/128") == ["tap0"]
    assert found("tap9", "192.0.2.8/3") == []
    assert list(Store(store.directory / "missing").others("tap0", "x")) == []


def seen(store: Store, name: Hashable, tap: str = "tap9") -> list[str]:
    """The taps that a run which begins now finds by *name*."""
    store.refresh()
    return [one.nic.tap for one in store.others(tap, name)]


PROXY = ProxyNeighbour("eth0", "192.0.2.8", True)


def test_others_are_found_by_shared_ops_and_instances(store: Store) -> None:
    store.save(Journal(DUAL, 7, Phase.POST, (Entry(PROXY, False), Entry(LinkMtu("tap0", 9000), 1500)), namespace=HERE))
    assert seen(store, PROXY.key) == seen(store, DUAL.instance) == ["tap0"]
    assert seen(store, LinkMtu("tap0", 0).key) == [], "no two taps share that"
    store.save(Journal(DUAL, 7, Phase.DOWN, (), (Entry(PROXY, False),), namespace=HERE))
    assert seen(store, PROXY.key) == ["tap0"], "a killed run's counts as well"


def by_other_hands(store: Store, one: Journal, how: str) -> None:
    """What another process does to a journal, behind the back of what is remembered."""
    path = store.path(one.nic.tap)
    content = json.dumps(journal.encode(one)).encode()
    if how == "in place":
        path.write_bytes(content)
    else:
        new = path.with_suffix(".other")
        new.write_bytes(content)
        new.chmod(0o600)
        new.rename(path)


@pytest.mark.parametrize("how", ["in place", "renamed"])
@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_others_are_read_again_when_somebody_else_has_written_them(how: str, pause: float, store: Store) -> None:
    """Also within the time that two changes of a file can share."""
    store.save(SAMPLE)
    for number in range(20):
        prefix = f"198.51.100.{number}/32"
        by_other_hands(store, replace(SAMPLE, nic=replace(DUAL, ip=(ipaddress.ip_network(prefix),))), how)
        assert seen(store, prefix) == ["tap0"]
        assert seen(store, f"198.51.100.{number - 1}/32") == []
        time.sleep(pause)
    store.path("tap0").unlink()
    assert seen(store, prefix) == []


def test_others_are_not_believed_once_somebody_else_could_write_them(store: Store) -> None:
    store.save(SAMPLE)
    time.sleep(0.03)
    assert seen(store, "192.0.2.8/32") == ["tap0"]
    store.path("tap0").chmod(0o666)
    assert seen(store, "192.0.2.8/32") == []
    store.path("tap0").chmod(0o600)
    assert seen(store, "192.0.2.8/32") == ["tap0"]
    store.directory.chmod(0o777)
    with pytest.raises(NotReadyError):
        seen(store, "192.0.2.8/32")


def test_a_journal_is_decoded_once_for_the_same_text(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(SAMPLE)
    monkeypatch.setattr(stores, "decode", None)
    assert store.load("tap0") == SAMPLE
    assert seen(store, "192.0.2.8/32") == ["tap0"]
    monkeypatch.undo()
    store.path("tap0").write_text(store.path("tap0").read_text().replace('"ifindex": 7', '"ifindex": 8'))
    assert (found := store.load("tap0"))
    assert found.ifindex == 8


def test_threads_see_what_was_there_when_their_run_began(store: Store) -> None:
    """Each on its own: the agent's share one store."""
    store.save(SAMPLE)
    assert seen(store, "192.0.2.8/32") == ["tap0"]
    by_other_hands(store, Journal(replace(DUAL, tap="tap1"), 8, namespace=HERE), "renamed")
    fresh: list[set[str]] = []
    thread = threading.Thread(target=lambda: fresh.append({one.nic.tap for one in store.others("", "192.0.2.8/32")}))
    thread.start()
    thread.join()
    assert fresh == [{"tap0", "tap1"}]


@contextmanager
def no_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody looks at the files of others in here."""
    with monkeypatch.context() as patch:
        patch.setattr(Index, "update", None)
        yield


def begin(store: Store) -> None:
    """A run begins that holds the lock of what taps share."""
    store.refresh()
    with locks.hold(store.run_dir, [locks.UPLINK], 0.0):
        store.begin(locks.path(store.run_dir, locks.UPLINK))


def held(store: Store, name: Hashable) -> list[str]:
    """The taps that such a run finds by *name*."""
    begin(store)
    return [one.nic.tap for one in store.others("tap9", name)]


HOST = "192.0.2.8/32"


def test_runs_of_one_process_after_one_another_need_not_look(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert held(store, HOST) == []
    with no_look(monkeypatch):
        store.save(SAMPLE)
        assert held(store, HOST) == held(Store(store.run_dir), HOST) == ["tap0"]
        store.delete("tap0")
        assert held(store, HOST) == []
        store.save(SAMPLE)
        store.set_aside("tap0")
        assert held(store, HOST) == []


def test_another_process_that_held_the_lock_in_between_is_noticed(store: Store) -> None:
    """Even if it was killed before it was through."""
    assert held(store, HOST) == []
    locks.path(store.run_dir, locks.UPLINK).write_bytes(b"its own token...")
    store.directory.mkdir(parents=True)
    by_other_hands(store, SAMPLE, "renamed")
    assert held(store, HOST) == ["tap0"]


def test_a_change_that_failed_half_way_is_looked_at(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(SAMPLE)
    assert held(store, HOST) == ["tap0"]

    def refuse(_directory: Path) -> None:
        raise OSError(5, "sick disk")

    changes: list[Callable[[], None]] = [lambda: store.delete("tap0"), lambda: store.save(SAMPLE)]
    for change in changes:
        with monkeypatch.context() as patch:
            patch.setattr(stores, "sync", refuse)
            with pytest.raises((OSError, KernelError)):
                change()
        assert held(store, HOST) == [path.stem for path in store.directory.glob("*.json")]


def test_what_a_person_has_changed_is_noticed_after_a_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(SAMPLE)
    assert held(store, HOST) == ["tap0"]
    store.path("tap0").unlink()
    monkeypatch.setattr(index, "TRUSTED", 0.0)
    assert held(store, HOST) == []


def test_many_threads_at_once(store: Store) -> None:
    """Writing, looking and removing; nobody finds anything broken."""
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        mine = Store(store.run_dir)
        one = Journal(
            replace(DUAL, tap=f"tap{number}", ip=(ipaddress.ip_network(f"198.51.100.{number}"),)),
            number + 2,
            namespace=HERE,
        )
        try:
            for _ in range(20):
                mine.save(one)
                assert seen(mine, f"198.51.100.{number}/32", "") == [f"tap{number}"]
                mine.delete(f"tap{number}")
                assert seen(mine, f"198.51.100.{number}/32", "") == []
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_nic_of_a_live_tap(store: Store) -> None:
    """lo is the one device whose index is known everywhere."""
    nic = DUAL.__class__("lo", DUAL.mac, "bridged", "br0")
    assert store.nic_of_live("lo") is None
    store.save(Journal(nic, 1, namespace=HERE))
    assert store.nic_of_live("lo") == nic
    store.save(Journal(nic, 2, namespace=HERE))
    assert store.nic_of_live("lo") is None
    store.save(SAMPLE)
    assert store.nic_of_live("tap0") is None, "there is no such device, or another one"
