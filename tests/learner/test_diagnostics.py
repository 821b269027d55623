"""Diagnostics: a plain loop, and the same whatever way the tokens are dealt out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matpo.settings import LearnerSettings
from matpo_learner import loss as losses
from matpo_learner.diagnostics import LAG_BUCKETS, Tally, cells_of
from matpo_learner.packing import pack_sft

SETTINGS = LearnerSettings()
ROLES = ("planner", "worker")
LOGPROB = st.floats(-12, -1e-3)
ROWS = st.lists(
    st.tuples(LOGPROB, LOGPROB, st.floats(-3, 3), st.integers(0, 11), st.floats(0, 5)), min_size=1, max_size=30
)
"""log pi, mu, A, cell, entropy"""


def _tally(rows):
    if not rows:
        return Tally.empty(2)
    log_pi, mu, advantages, cells, entropy = zip(*rows, strict=True)
    column = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    tokens = losses.Tokens(
        mu=column(mu),
        advantages=column(advantages),
        weights=torch.ones(len(rows), dtype=torch.float64),
        lags=torch.zeros(len(rows), dtype=torch.int64),
        segments=torch.zeros(len(rows), dtype=torch.int64),
        num_segments=1,
        cells=torch.tensor(cells),
        num_roles=2,
    )
    return losses.weighted_sum("tis", column(log_pi), column(entropy), tokens, SETTINGS)[1]


def _mean(values):
    return sum(values) / len(values)


def _check(found, rows):
    """Against a plain loop over the tokens of one cell, or of all."""
    logs = [log_pi - mu for log_pi, mu, *_ in rows]
    w = [min(math.exp(x), 2.0) for x in logs]
    moved = [math.exp(log_pi) - math.exp(mu) for log_pi, mu, *_ in rows]
    a = [row[2] for row in rows]
    want = {
        "num_tokens": len(rows),
        "ess": sum(w) ** 2 / (len(w) * sum(x * x for x in w)),
        "ratio": _mean([math.exp(x) for x in logs]),
        "log_ratio": _mean(logs),
        "kl": _mean([math.exp(x) - 1 - x for x in logs]),
        "truncated": _mean([math.exp(x) > 2.0 for x in logs]),
        "masked": _mean([m > 0.2 if x > 0 else x < 0 and m < -0.2 for m, x in zip(moved, a, strict=True)]),
        "entropy": _mean([row[4] for row in rows]),
        "advantage": _mean(a),
        "advantage_std": math.sqrt(_mean([(x - _mean(a)) ** 2 for x in a])),
        "advantage_abs": _mean([abs(x) for x in a]),
        "gap": _mean([abs(x) for x in logs]),
        "gap_max": max(abs(x) for x in logs),
    }
    for name, value in want.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-6), name


@given(rows=ROWS, cut=st.integers(0, 30))
def test_diagnostics_add_over_micro_batches_and_equal_a_plain_loop(rows, cut):
    tally = _tally(rows[:cut]) + _tally(rows[cut:])
    _check(tally.overall(), rows)
    found = tally.by_role_and_lag(ROLES)
    names = [(role, bucket) for role in ROLES for bucket in LAG_BUCKETS]
    assert set(found) == {names[cell] for *_, cell, _ in rows}
    for name, part in found.items():
        _check(part, [row for row in rows if names[row[3]] == name])


@given(rows=ROWS)
def test_engine_gap_is_that_of_the_tokens_without_lag_of_all_roles(rows):
    gaps = [abs(log_pi - mu) for log_pi, mu, _, cell, _ in rows if cell in (0, 6)]
    found = _tally(rows).engine_gap()
    if not gaps:
        assert found is None
    else:
        assert (found.num_tokens, found.mean, found.max) == pytest.approx((len(gaps), _mean(gaps), max(gaps)))


def test_engine_gap_is_measured_before_the_first_optimizer_step():
    """In a second minibatch pi has moved; prox, the policy that was published, has not."""
    tokens = losses.Tokens(
        mu=torch.tensor([-1.0]),
        advantages=torch.tensor([1.0]),
        weights=torch.tensor([1.0]),
        lags=torch.tensor([0]),
        segments=torch.tensor([0]),
        num_segments=1,
        cells=torch.tensor([0]),
        num_roles=1,
        prox=torch.tensor([-1.01]),
    )
    _, tally = losses.weighted_sum("decoupled_ppo", torch.tensor([-3.0]), torch.zeros(1), tokens, SETTINGS)
    assert tally.engine_gap().max == pytest.approx(0.01, abs=1e-6)


def test_update_without_tokens_has_diagnostics_of_nothing():
    tally = Tally.empty(0)
    assert tally.overall().num_tokens == 0
    assert tally.by_role_and_lag(()) == {}
    assert tally.engine_gap() is None


@pytest.mark.parametrize(
    ("lag", "bucket"),
    [(0, "0"), (1, "1"), (2, "2"), (3, "3-4"), (4, "3-4"), (5, "5-8"), (8, "5-8"), (9, ">8"), (99, ">8")],
)
def test_lags_fall_into_their_buckets(make_segment, make_episode, lag, bucket):
    episode = make_episode("g", 0, [make_segment(0, "planner", token_ids=[1, 2], sampled=[1])], 0.0)
    (batch,) = pack_sft([episode], SETTINGS, version=lag)
    assert LAG_BUCKETS[int(cells_of(batch.role_ids, batch.lags)[0])] == bucket
