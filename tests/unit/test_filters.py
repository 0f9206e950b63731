"""What a filter lets through: one text for the same facts, and the same facts out of what nftables has for them."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core import filters
from kvmifup.core.filters import Facts
from kvmifup.node import filter_shape
from kvmifup.node.filter_table import elements_of, entries_for, facts_of

from .strategies import macs, prefixes

MAC, OTHER = "aa:00:00:35:ac:01", "02:00:00:00:00:0b"
LOCAL = "fe80::a800:ff:fe35:ac01"

kinds = st.sampled_from(["mac", "address"])
every = st.builds(filters.facts, kinds, st.lists(macs, min_size=1, max_size=3), st.lists(prefixes, max_size=6))


@given(every)
def test_the_text_has_all_of_the_facts(facts: Facts) -> None:
    assert filters.parsed(facts.text) == facts


@given(every)
def test_the_elements_have_all_of_the_facts(facts: Facts) -> None:
    assert facts_of(filter_shape.elements(facts)) == facts
    assert elements_of(entries_for("tap0", facts)) == filter_shape.elements(facts)


@given(every)
def test_no_two_prefixes_of_a_nic_overlap(facts: Facts) -> None:
    """The kernel refuses a set with such elements."""
    for one in facts.prefixes:
        others = [other for other in facts.prefixes if other != one and other.version == one.version]
        assert not any(one.overlaps(other) for other in others)


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        (["192.0.2.9", "192.0.2.8"], "192.0.2.8,192.0.2.9"),
        (["192.0.2.8", "192.0.2.0/24"], "192.0.2.0/24"),
        (["192.0.2.0/25", "192.0.2.128/25"], "192.0.2.0/25,192.0.2.128/25"),
        (["2001:db8::8", LOCAL], "2001:db8::8"),
        ([LOCAL], LOCAL),
        (["2001:db8::/64", "2001:db8::8", "198.51.100.1"], "198.51.100.1,2001:db8::/64"),
    ],
)
def test_the_same_facts_have_one_text(given_: list[str], text: str) -> None:
    found = filters.facts("address", [OTHER, MAC, OTHER], map(ip_network, given_))
    assert found.text == f"address {OTHER},{MAC} {text}"


def test_only_addresses_matter_to_who_asks_for_them() -> None:
    assert filters.facts("mac", [MAC], [ip_network("192.0.2.8")]).text == f"mac {MAC}"


@pytest.mark.parametrize(
    ("tap", "chain"),
    [
        ("tap0", "nic-tap0"),
        ("vm-1.2_x", "nic-vm-1.2_x"),
        ("a@b", "nic-a/40b"),
        ("a;b", "nic-a/3bb"),
        ("aλ", "nic-a/ce/bb"),
    ],
)
def test_nft_can_read_the_name_of_a_chain(tap: str, chain: str) -> None:
    assert filter_shape.chain_of(tap) == chain
    assert filter_shape.tap_of(chain) == tap
