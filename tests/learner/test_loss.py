"""Losses: by hand, by a plain loop, and equal to the on-policy gradient when nothing is stale."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matpo.settings import LearnerSettings
from matpo_learner import loss as losses

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "two_episodes.json").read_text())
SETTINGS = LearnerSettings()
POLICY_LOSSES = ["tis", "ppo_clip", "decoupled_ppo"]
LOGPROB = st.floats(-12, -1e-3)
TOKEN = st.tuples(LOGPROB, LOGPROB, LOGPROB, st.floats(-3, 3))  # log pi, mu, prox, A


def _tokens(mu, advantages, weights=None, prox=None, cells=None, num_roles=1):
    count = len(mu)
    column = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    return losses.Tokens(
        mu=column(mu),
        advantages=column(advantages),
        weights=column(weights if weights is not None else [1.0] * count),
        prox=column(prox if prox is not None else mu),
        cells=torch.tensor(cells if cells is not None else [0] * count),
        num_roles=num_roles,
    )


def _value_and_grad(name, logprobs, tokens, settings=SETTINGS):
    variable = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    value, sums = losses.weighted_sum(name, variable, torch.zeros(len(logprobs), dtype=torch.float64), tokens, settings)
    (grad,) = torch.autograd.grad(value, variable)
    return float(value), grad.numpy(), sums.numpy()


def _plain(name, log_pi, mu, prox, a, s=SETTINGS):
    """(loss, d loss / d log pi) of one token, written out without tensors."""
    clamp = lambda x: max(-20.0, min(20.0, x))  # noqa: E731
    pi, r = math.exp(log_pi), math.exp(clamp(log_pi - mu))
    if name == "tis":
        moved = pi - math.exp(mu)
        keep = not ((a > 0 and moved > s.tis_mask) or (a < 0 and moved < -s.tis_mask))
        w = min(r, s.tis_cap)
        log_r = clamp(log_pi - mu)
        return -keep * w * a * log_pi + s.tis_beta * log_r**2, -keep * w * a + 2 * s.tis_beta * log_r
    if name == "ppo_clip":
        ratio, w = r, 1.0
    else:
        ratio, w = math.exp(clamp(log_pi - prox)), min(math.exp(clamp(prox - mu)), s.tis_cap)
    bounded = min(max(ratio, 1 - s.clip_low), 1 + s.clip_high)
    best, slope = (ratio * a, ratio * a) if ratio * a <= bounded * a else (bounded * a, 0.0)
    if name == "ppo_clip" and a < 0 and best < s.dual_clip * a:
        best, slope = s.dual_clip * a, 0.0
    return -w * best, -w * slope


def test_token_losses_and_their_sum_equal_the_numbers_worked_by_hand():
    rows = GOLDEN["tokens"]
    episodes = [row["episode"] for row in rows]
    tokens = _tokens(
        [row["mu"] for row in rows],
        [GOLDEN["advantages"][e] for e in episodes],
        [GOLDEN["weights"][e] for e in episodes],
    )
    log_pi = [row["log_pi"] for row in rows]
    result = losses.tis(torch.tensor(log_pi, dtype=torch.float64), tokens, SETTINGS)
    assert result.loss.tolist() == pytest.approx([row["loss"] for row in rows], abs=1e-6)
    assert result.importance.tolist() == pytest.approx([row["w"] for row in rows], abs=1e-6)
    assert result.masked.tolist() == [row["masked"] for row in rows]
    assert _value_and_grad("tis", log_pi, tokens)[0] == pytest.approx(GOLDEN["loss"], abs=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@given(rows=st.lists(TOKEN, min_size=1, max_size=20))
def test_losses_and_gradients_equal_a_plain_loop(name, rows):
    log_pi, mu, prox, advantages = (list(column) for column in zip(*rows, strict=True))
    weights = [1 / (2 + i) for i in range(len(rows))]
    value, grad, _ = _value_and_grad(name, log_pi, _tokens(mu, advantages, weights, prox))
    want = [_plain(name, *row) for row in rows]
    assert value == pytest.approx(sum(w * loss for w, (loss, _) in zip(weights, want, strict=True)), rel=1e-9, abs=1e-9)
    assert grad.tolist() == pytest.approx(
        [w * slope for w, (_, slope) in zip(weights, want, strict=True)], rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize("name", POLICY_LOSSES)
@given(rows=st.lists(st.tuples(LOGPROB, st.floats(-3, 3)), min_size=1, max_size=20))
def test_every_loss_gives_the_on_policy_gradient_when_pi_equals_mu(name, rows):
    log_pi, advantages = (list(column) for column in zip(*rows, strict=True))
    weights = [1 / (1 + i) for i in range(len(rows))]
    _, grad, _ = _value_and_grad(name, log_pi, _tokens(log_pi, advantages, weights))
    assert grad.tolist() == pytest.approx([-w * a for w, a in zip(weights, advantages, strict=True)], abs=1e-6)


@pytest.mark.parametrize("name", [*POLICY_LOSSES, "sft"])
def test_no_loss_or_gradient_overflows_at_impossible_tokens(name):
    value, grad, sums = _value_and_grad(
        name, [-1e-6, -200.0, -200.0], _tokens([-200.0, -1e-6, -200.0], [1.0, -1.0, 2.0])
    )
    assert math.isfinite(value)
    assert np.isfinite(grad).all()
    assert np.isfinite(sums).all()


def test_weight_of_a_rare_token_is_capped_although_its_probability_hardly_moved():
    """mu = 1e-4, pi = 0.05: the difference is below the mask, the ratio is 500."""
    _, grad, sums = _value_and_grad("tis", [math.log(0.05)], _tokens([math.log(1e-4)], [1.0]))
    assert grad[0] == pytest.approx(-2.0 + 2e-3 * math.log(500))
    assert losses.Diagnostics.of(sums[0]).truncated == 1.0


def test_decoupled_ppo_without_prox_is_refused():
    tokens = _tokens([-1.0], [1.0])
    bare = losses.Tokens(
        mu=tokens.mu, advantages=tokens.advantages, weights=tokens.weights, prox=None, cells=tokens.cells, num_roles=1
    )
    with pytest.raises(ValueError, match="prox"):
        losses.decoupled_ppo(torch.tensor([-1.0]), bare, SETTINGS)


def test_supervised_loss_is_the_weighted_negative_log_likelihood():
    value, grad, _ = _value_and_grad("sft", [-1.0, -3.0], _tokens([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]))
    assert value == pytest.approx(2.0)
    assert grad.tolist() == [-0.5, -0.5]


@given(
    rows=st.lists(st.tuples(LOGPROB, LOGPROB, st.floats(-3, 3), st.integers(0, 11)), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_diagnostics_add_over_micro_batches_and_equal_a_plain_loop(rows, cut):
    def sums(part):
        if not part:
            return np.zeros((12, len(losses.FIELDS)))
        log_pi, mu, advantages, cells = (list(column) for column in zip(*part, strict=True))
        return _value_and_grad("tis", log_pi, _tokens(mu, advantages, cells=cells, num_roles=2))[2]

    total = sums(rows[:cut]) + sums(rows[cut:])
    for (role, bucket), found in losses.by_role_and_lag(total, ("planner", "worker")).items():
        cell = ("planner", "worker").index(role) * 6 + losses.LAG_BUCKETS.index(bucket)
        logs = [log_pi - mu for log_pi, mu, _, c in rows if c == cell]
        w = [min(math.exp(x), 2.0) for x in logs]
        assert found.num_tokens == len(logs)
        assert found.ess == pytest.approx(sum(w) ** 2 / (len(w) * sum(x * x for x in w)))
        assert found.kl == pytest.approx(sum(math.exp(x) - 1 - x for x in logs) / len(logs))
        assert found.log_ratio == pytest.approx(sum(logs) / len(logs))


@pytest.mark.parametrize(
    ("lag", "bucket"),
    [(0, "0"), (1, "1"), (2, "2"), (3, "3-4"), (4, "3-4"), (5, "5-8"), (8, "5-8"), (9, ">8"), (99, ">8")],
)
def test_lags_fall_into_their_buckets(make_segment, make_episode, lag, bucket):
    from matpo_learner.packing import pack_sft

    episode = make_episode("g", 0, [make_segment(0, "planner", token_ids=[1, 2], sampled=[1])], 0.0)
    (batch,) = pack_sft([episode], SETTINGS, version=lag)
    assert losses.LAG_BUCKETS[int(losses.Tokens.of(batch).cells[0])] == bucket
