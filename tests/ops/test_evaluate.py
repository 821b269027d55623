"""The interval of `matpo eval`."""

import math

import pytest

from matpo_ops.evaluate import wilson


def test_the_interval_agrees_with_a_published_example() -> None:
    # 81 of 263 at 95 %: Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson): 0.2553 to 0.3662.
    score = wilson([1.0] * 81 + [0.0] * (263 - 81))
    assert (round(score.low, 4), round(score.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("rewards", "low", "high"), [([0.0] * 20, 0.0, 0.1611), ([1.0] * 20, 0.8389, 1.0)])
def test_the_interval_of_all_or_nothing_stays_inside_zero_and_one(rewards, low, high) -> None:
    score = wilson(rewards)
    assert math.isclose(score.low, low, abs_tol=1e-4)
    assert math.isclose(score.high, high, abs_tol=1e-4)


def test_no_rewards_are_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was evaluated"):
        wilson([])
