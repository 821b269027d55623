"""Rows: every item once, within the capacity, even over rows and ranks."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from matpo_learner.balance import fill_rows, spread

SIZES = st.lists(st.integers(1, 50), max_size=40)


@given(sizes=SIZES, capacity=st.integers(1, 80), world_size=st.integers(1, 4))
def test_rows_hold_every_item_once_within_the_capacity(sizes, capacity, world_size):
    rows = fill_rows(sizes, sizes, capacity, world_size)
    assert sorted(i for members in rows for i in members) == list(range(len(sizes)))
    assert all(len(members) == 1 or sum(sizes[i] for i in members) <= capacity for members in rows)


@given(sizes=SIZES, capacity=st.integers(1, 80), world_size=st.integers(1, 4))
def test_every_rank_gets_the_same_number_of_rows_and_at_least_one(sizes, capacity, world_size):
    rows = fill_rows(sizes, sizes, capacity, world_size)
    assert rows
    assert len(rows) % world_size == 0


@given(sizes=SIZES)
def test_plan_depends_only_on_the_arguments(sizes):
    assert fill_rows(sizes, sizes, 60, 2) == fill_rows(list(sizes), list(sizes), 60, 2)


def test_rows_are_as_even_as_whole_items_allow():
    costs = [30, 20, 10, 10, 5, 5]
    assert [sum(costs[i] for i in members) for members in fill_rows(costs, costs, 100, 2)] == [40, 40]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7))
def test_spread_over_two_rows_is_within_a_sixth_of_the_best_by_trial_of_all(costs):
    """7/6 of the best largest sum: the bound of largest differencing for two rows (Fischetti and Martello 1987)."""
    found = max(sum(costs[i] for i in members) for members in spread(costs, 2))
    subsets = itertools.product([False, True], repeat=len(costs))
    best = min(max(sum(itertools.compress(costs, s)), sum(costs) - sum(itertools.compress(costs, s))) for s in subsets)
    assert found * 6 <= best * 7


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_no_two_rows_differ_by_more_than_the_largest_item(costs, num_rows):
    sums = [sum(costs[i] for i in members) for members in spread(costs, num_rows)]
    assert len(sums) == num_rows
    assert max(sums) - min(sums) <= max(costs, default=0)
