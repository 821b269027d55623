"""Time that the broker slept through does not count."""

from __future__ import annotations

import pytest

from matpo_broker.clock import MAX_STEP_S, PatientClock


class Source:
    """A clock that is told what time it is."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def source() -> Source:
    return Source()


def test_small_steps_count_in_full(source: Source) -> None:
    clock = PatientClock(source)
    for _ in range(10):
        source.now_s += 0.75
        clock()
    assert clock() == pytest.approx(7.5)


def test_a_jump_of_hours_counts_as_one_step(source: Source) -> None:
    clock = PatientClock(source)
    source.now_s += 7200.0
    assert clock() == MAX_STEP_S


def test_it_never_falls(source: Source) -> None:
    clock = PatientClock(source)
    source.now_s += 1.0
    before = clock()
    source.now_s -= 500.0
    assert clock() == before
    source.now_s += 1.0
    assert clock() == before + 1.0
