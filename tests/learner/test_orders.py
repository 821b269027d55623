"""matpo_learner.orders: which task comes next, and how many orders are open."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matpo.episode import Task
from matpo.errors import ConfigError
from matpo.settings import LearnerSettings
from matpo_learner.orders import Book, OrderStream, group_id


def stream(num_tasks: int = 5, seed: int = 0) -> OrderStream:
    tasks = [Task(id=f"t{i}", environment="toy", question=f"{i}?", data={"i": i}) for i in range(num_tasks)]
    return OrderStream(tasks, seed=seed, group_size=4)


def learner(**changes: int) -> LearnerSettings:
    return LearnerSettings(**{"groups_per_update": 3, "max_lag_versions": 1, **changes})


def test_an_order_is_the_same_whenever_and_in_whatever_order_it_is_asked_for() -> None:
    forwards = [stream().order(i) for i in range(30)]
    one = stream()
    assert [one.order(i) for i in reversed(range(30))] == forwards[::-1]


def test_an_order_is_the_same_when_another_thread_asks_for_another_pass_between_any_two_lines() -> None:
    one, want = stream(), [stream().task(i).id for i in range(10)]
    interrupted: set[int] = set()

    def interrupt(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code is not OrderStream.task.__code__:
            return None
        if event == "line":
            interrupted.add(frame.f_lineno)
            assert one.task(9).id == want[9]  # a trace function is not traced itself
        return interrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        found = [one.task(index).id for index in (0, 1, 2, 6, 3, 4)]
    finally:
        sys.settrace(before)
    assert found == [want[index] for index in (0, 1, 2, 6, 3, 4)]
    assert len(interrupted) >= 4


def test_each_pass_has_every_task_once() -> None:
    one = stream()
    for number in range(4):
        assert Counter(one.task(5 * number + i).id for i in range(5)) == dict.fromkeys(
            ["t0", "t1", "t2", "t3", "t4"], 1
        )


def test_passes_and_seeds_are_shuffled_differently() -> None:
    def ids(seed: int, number: int) -> list[str]:
        one = stream(20, seed)
        return [one.task(20 * number + i).id for i in range(20)]

    assert len({tuple(ids(seed, number)) for seed in range(2) for number in range(3)}) == 6


def test_an_order_carries_the_whole_task() -> None:
    order = stream(1).order(7)
    assert (order.group, order.index, order.group_size) == ("g-00000007", 7, 4)
    assert (order.task.id, order.task.question, order.task.data) == ("t0", "0?", {"i": 0})


def test_an_environment_without_tasks_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no task"):
        stream(0)


def test_group_ids_sort_as_their_indices() -> None:
    assert group_id(99) < group_id(100)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_one_plus_max_lag_batches_are_open(lag: int) -> None:
    assert len(Book().place(learner(max_lag_versions=lag), updates_left=100)) == 3 * (1 + lag)


def test_a_dropped_group_is_replaced_at_once() -> None:
    book = Book()
    book.place(learner(), updates_left=100)
    book.consume(4)
    assert book.place(learner(), updates_left=100) == [6]


def test_nothing_is_ordered_that_no_update_can_use() -> None:
    book = Book()
    assert len(book.place(learner(), updates_left=1)) == 3
    assert book.place(learner(), updates_left=0) == []


def test_a_group_is_consumed_once_and_only_if_it_was_ordered() -> None:
    book = Book()
    book.place(learner(), updates_left=100)
    book.consume(0)
    for index in (0, 6):
        with pytest.raises(ValueError, match="consumed already or was never placed"):
            book.consume(index)


@given(st.permutations(range(24)), st.integers(0, 24))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_book_agrees_with_a_plain_set(order: list[int], num_consumed: int) -> None:
    book = Book(cursor=24)
    for index in order[:num_consumed]:
        book.consume(index)
    done = set(order[:num_consumed])
    assert [book.is_consumed(i) for i in range(24)] == [i in done for i in range(24)]
    assert book.open() == [i for i in range(24) if i not in done]
    assert book.num_open == len(book.open())
    assert book.consumed_below == next((i for i in range(25) if i not in done), 0)
    assert all(i > book.consumed_below for i in book.consumed)
