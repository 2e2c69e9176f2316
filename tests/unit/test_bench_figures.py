"""The arithmetic of the benchmark: nobody would notice a wrong percentile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import growth, percentile, steepest, summary
from bench.rent import steps
from bench.snapshots import longest_each
from bench.strangers import open_from


def test_a_percentile_is_the_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.5) == 7
    assert percentile([1.0, 2.0, 3.0], 0.99) == 3


def test_of_few_values_the_99th_percentile_is_the_worst() -> None:
    assert summary([1.0] * 39 + [900.0]).p99 == 900


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(0.01, 1))
def test_at_least_the_given_share_of_values_is_not_above_a_percentile(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) * (1 - 1e-9)


def test_an_empty_list_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


SIZES = [100, 1000, 10_000, 100_000]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_growth_finds_the_power(power: float) -> None:
    assert growth(SIZES, [3 * size**power for size in SIZES]) == pytest.approx(power)


def test_growth_needs_two_sizes_and_positive_costs() -> None:
    for sizes, costs in (([100], [1.0]), ([100, 100], [1.0, 2.0]), ([100, 1000], [0.0, 1.0]), ([100, 1000], [1.0])):
        with pytest.raises(ValueError, match=r"sizes|positive"):
            growth(sizes, costs)


def test_a_cost_that_explodes_late_is_not_excused_by_its_flat_beginning() -> None:
    costs = [10.0, 10.0, 10.0, 1000.0]
    assert growth(SIZES, costs) < 1
    assert steepest(SIZES, costs) == pytest.approx(2)


def test_the_steps_of_a_rent_add_up_to_its_time() -> None:
    events = [
        {"kind": "rental.queued", "at": "1970-01-01T00:01:40.010000+00:00"},
        {"kind": "rental.placed", "at": "1970-01-01T00:01:40.020000+00:00"},
        {"kind": "placement.reserved", "at": "1970-01-01T00:01:40.020100+00:00"},
        {"kind": "rental.activated", "at": "1970-01-01T00:01:40.080000+00:00"},
    ]
    found = steps(100.0, 100.1, events)
    assert list(found) == [
        "the request -> rental.queued",
        "rental.queued -> placement.reserved",
        "placement.reserved -> rental.activated",
        "rental.activated -> the answer",
    ]
    assert sum(found.values()) == pytest.approx(0.1)


def test_of_each_round_the_longest_gap_that_began_in_it_counts() -> None:
    gaps = [(1.0, 0.02), (1.5, 0.05), (3.0, 0.01), (9.0, 1.0)]
    assert longest_each(gaps, [3.0, 1.0, 4.0, 5.0]) == [0.05, 0.01, 0.0]
    assert longest_each(gaps, [1.0]) == []


def test_the_connections_of_strangers_are_those_that_are_established() -> None:
    """The address is a number in this machine's byte order, and 01 is an established connection (proc(5))."""
    table = """  sl  local_address rem_address   st tx_queue rx_queue
   0: 00000000:0050 00000000:0000 0A 00000000:00000000
   1: 0200000A:0050 010112C6:C350 01 00000000:00000000
   2: 0200000A:0050 010112C6:C351 03 00000000:00000000
   3: 0200000A:0050 020112C6:C350 01 00000000:00000000
   4: 0200000A:0050 0100000A:C350 01 00000000:00000000
"""
    assert open_from(["198.18.1.1"], table) == 1
    assert open_from(["198.18.1.1", "198.18.1.2"], table) == 2
    assert open_from([], table) == 0
