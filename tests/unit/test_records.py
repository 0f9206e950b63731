"""Records behave as frozen dataclasses do."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from unittest.mock import ANY

import pytest

from kvmifup.core.model import AgentConfig, BridgedConfig, LinkConfig, Nic, Phase, Tap
from kvmifup.core.ops import Address, LinkAddress, LinkMtu, Neighbour, Op, ProxyNeighbour, UplinkVlans
from kvmifup.core.records import field_names
from kvmifup.core.vlans import tagged
from kvmifup.runs.journal import Entry, Journal

NIC = Nic("tap0", "aa:00:00:35:00:01", "bridged", "br0")
JOURNAL = Journal(NIC, 7, Phase.PRE, (Entry(LinkMtu("tap0", 9000), 1500),), namespace=1)
RECORDS = [NIC, JOURNAL, LinkMtu("tap0", 9000), BridgedConfig(isolated=True), AgentConfig(mend=False), Tap(7, True)]


def changed(op: LinkMtu) -> None:
    """mypy --strict fails here when it does not see any more that a record is changed."""
    op.want = 1  # type: ignore[misc]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_equals_another_one_with_the_same_values(record: Op) -> None:
    again = replace(record)
    assert again is not record
    assert again == record
    assert hash(again) == hash(record)
    assert {again: 1}[record] == 1
    assert record == ANY


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LinkMtu("tap0", 9000), LinkMtu("tap0", 1500)),
        (NIC, replace(NIC, iface_id="port1")),
        (JOURNAL, replace(JOURNAL, namespace=2)),  # it is given by its name alone
        (BridgedConfig(isolated=True), BridgedConfig(isolated=False)),  # so is this, and it is the base's
        (Address("tap0", "fe80::1", True), ProxyNeighbour("tap0", "fe80::1", True)),  # only their classes differ
        (LinkAddress("tap0", "x"), Neighbour("tap0", "x", None)),
        (BridgedConfig(), LinkConfig()),
        (Tap(7, True), (7, True, 1500, (), False)),
    ],
)
def test_a_record_differs_from_all_others(one: object, other: object) -> None:
    assert one != other
    assert other != one


def test_what_has_been_computed_of_a_record_is_no_part_of_it() -> None:
    first, second = (UplinkVlans("br0", "eth0", tagged([7]), "") for _ in range(2))
    assert first.vids == {7}
    assert vars(first) != vars(second)
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_printed_as_it_is_made(record: Op) -> None:
    names = {cls.__name__: cls for cls in (*map(type, RECORDS), Entry)} | {"IntEnum": Phase}
    assert eval(repr(record).replace("<Phase.PRE: 1>", "1"), names) == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_the_fields_of_a_record_are_those_of_the_dataclass(record: Op) -> None:
    assert field_names(record) == tuple(field.name for field in dataclasses.fields(record))
