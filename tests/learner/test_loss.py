"""Losses: by hand, by a plain loop, and equal to the on-policy gradient when nothing is stale."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matpo.settings import LearnerSettings, Loss
from matpo_learner import loss as losses

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "two_episodes.json").read_text())
SETTINGS = LearnerSettings()
POLICY_LOSSES = {
    "tis": SETTINGS,
    "ppo_clip": LearnerSettings(loss="ppo_clip"),
    "decoupled_ppo": LearnerSettings(loss="decoupled_ppo"),
    "decoupled_ppo, loglinear": LearnerSettings(loss="decoupled_ppo", prox="loglinear"),
    "cispo": LearnerSettings(loss="cispo", cispo_cap=3.0),
    "gspo": LearnerSettings(loss="gspo"),
    "gspo, wide": LearnerSettings(loss="gspo", gspo_clip_low=0.5, gspo_clip_high=2.0),
    "reinforce": LearnerSettings(loss="reinforce"),
}
LOGPROB = st.floats(-12, -1e-3)
TOKEN = st.tuples(LOGPROB, LOGPROB, LOGPROB, st.floats(-3, 3), st.integers(0, 9), st.integers(0, 4))
"""log pi, mu, prox, A, lag, segment"""
PROGRESS = st.sampled_from([0.0, 0.25, 0.5, 0.75])


def _name(case):
    return case.split(",")[0]


def _tokens(mu, advantages, weights=None, *, prox=None, lags=None, segments=None, reference=None, progress=0.0):
    count = len(mu)
    column = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    whole = lambda values: torch.tensor(values if values is not None else [0] * count, dtype=torch.int64)  # noqa: E731
    return losses.Tokens(
        mu=column(mu),
        advantages=column(advantages),
        weights=column(weights if weights is not None else [1.0] * count),
        lags=whole(lags),
        segments=whole(segments),
        num_segments=1 + max(segments, default=0) if segments is not None else 1,
        cells=whole(None),
        num_roles=1,
        prox=column(prox if prox is not None else mu),
        reference=None if reference is None else column(reference),
        progress=progress,
    )


def _value_and_grad(name, logprobs, tokens, settings=SETTINGS):
    variable = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    entropy = torch.zeros(len(logprobs), dtype=torch.float64)
    value, tally = losses.weighted_sum(name, variable, entropy, tokens, settings)
    (grad,) = torch.autograd.grad(value, variable)
    return float(value), grad.numpy(), tally


def _clamp(x):
    return max(-20.0, min(20.0, x))


def _plain(name, row, segment_rows, s, progress):
    """(loss, d loss / d log pi) of one token, written out without tensors. `segment_rows`: the rows of its segment."""
    log_pi, mu, prox, a, lag, _ = row
    pi, log_r = math.exp(log_pi), _clamp(log_pi - mu)
    r = math.exp(log_r)
    if name == "tis":
        moved = pi - math.exp(mu)
        keep = not ((a > 0 and moved > s.tis_mask) or (a < 0 and moved < -s.tis_mask))
        w = min(r, s.tis_cap)
        return -keep * w * a * log_pi + s.tis_beta * log_r**2, -keep * w * a + 2 * s.tis_beta * log_r
    if name == "reinforce":
        return -a * log_pi, -a
    if name == "cispo":
        return -min(r, s.cispo_cap) * a * log_pi, -min(r, s.cispo_cap) * a
    low, high, w = s.clip_low, s.clip_high, 1.0
    if name == "ppo_clip":
        ratio = r
    elif name == "gspo":
        ratio = math.exp(sum(_clamp(p - m) for p, m, *_ in segment_rows) / len(segment_rows))
        low, high = s.gspo_clip_low, s.gspo_clip_high
    else:
        if s.prox == "loglinear":
            prox = log_pi if progress == 0 else mu + lag / (lag + progress) * (log_pi - mu)
        ratio, w = math.exp(_clamp(log_pi - prox)), min(math.exp(_clamp(prox - mu)), s.tis_cap)
    bounded = min(max(ratio, 1 - low), 1 + high)
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


@pytest.mark.parametrize("case", POLICY_LOSSES)
@given(rows=st.lists(TOKEN, min_size=1, max_size=20), progress=PROGRESS)
def test_losses_and_gradients_equal_a_plain_loop(case, rows, progress):
    name, settings = _name(case), POLICY_LOSSES[case]
    log_pi, mu, prox, advantages, lags, segments = (list(column) for column in zip(*rows, strict=True))
    weights = [1 / (2 + i) for i in range(len(rows))]
    tokens = _tokens(mu, advantages, weights, prox=prox, lags=lags, segments=segments, progress=progress)
    value, grad, _ = _value_and_grad(name, log_pi, tokens, settings)
    want = [_plain(name, row, [r for r in rows if r[-1] == row[-1]], settings, progress) for row in rows]
    assert value == pytest.approx(sum(w * loss for w, (loss, _) in zip(weights, want, strict=True)), rel=1e-9, abs=1e-9)
    assert grad.tolist() == pytest.approx(
        [w * slope for w, (_, slope) in zip(weights, want, strict=True)], rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize("case", POLICY_LOSSES)
@given(
    rows=st.lists(st.tuples(LOGPROB, st.floats(-3, 3), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=20),
    progress=PROGRESS,
)
def test_every_loss_gives_the_on_policy_gradient_when_pi_equals_mu(case, rows, progress):
    log_pi, advantages, lags, segments = (list(column) for column in zip(*rows, strict=True))
    weights = [1 / (1 + i) for i in range(len(rows))]
    tokens = _tokens(log_pi, advantages, weights, lags=lags, segments=segments, progress=progress)
    _, grad, _ = _value_and_grad(_name(case), log_pi, tokens, POLICY_LOSSES[case])
    assert grad.tolist() == pytest.approx([-w * a for w, a in zip(weights, advantages, strict=True)], abs=1e-6)


def test_every_loss_of_the_run_file_is_checked_here():
    assert {_name(case) for case in POLICY_LOSSES} == set(get_args(Loss)) == set(losses.LOSSES) - {"sft"}


@pytest.mark.parametrize("case", [*POLICY_LOSSES, "sft"])
def test_no_loss_or_gradient_overflows_at_impossible_tokens(case):
    log_pi, mu = [-1e-6, -200.0, -200.0], [-200.0, -1e-6, -200.0]
    tokens = _tokens(mu, [1.0, -1.0, 2.0], segments=[0, 1, 1], lags=[0, 1, 2], reference=mu, progress=0.5)
    settings = POLICY_LOSSES.get(case, SETTINGS).model_copy(update={"kl_beta": 0.1})
    value, grad, tally = _value_and_grad(_name(case), log_pi, tokens, settings)
    assert math.isfinite(value)
    assert np.isfinite(grad).all()
    assert torch.isfinite(tally.sums).all()


@given(rows=st.lists(st.tuples(LOGPROB, LOGPROB, st.integers(0, 4)), min_size=1, max_size=20))
def test_gspo_has_the_gradient_of_its_segment_form(rows):
    """The paper's objective, one term per segment, by autograd: length * weight * min(s A, clip(s) A)."""
    log_pi, mu, segments = (list(column) for column in zip(*rows, strict=True))
    settings = POLICY_LOSSES["gspo, wide"]
    of_segment = {i: (0.5 - i, 1 / (1 + i)) for i in range(5)}  # advantage and weight
    advantages, weights = ([of_segment[i][k] for i in segments] for k in (0, 1))
    tokens = _tokens(mu, advantages, weights, segments=segments)
    value, grad, _ = _value_and_grad("gspo", log_pi, tokens, settings)
    variable = torch.tensor(log_pi, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for i in set(segments):
        members = [t for t, segment in enumerate(segments) if segment == i]
        s = torch.stack([variable[t] - mu[t] for t in members]).mean().exp()
        a, w = of_segment[i]
        bounded = min(max(float(s), 0.5), 3.0)
        total = total - len(members) * w * (s * a if float(s) * a <= bounded * a else bounded * a)
    assert value == pytest.approx(float(total), rel=1e-9, abs=1e-9)
    want = torch.autograd.grad(total, variable, allow_unused=True)[0] if total.requires_grad else None
    assert grad.tolist() == pytest.approx([0.0] * len(rows) if want is None else want.tolist(), rel=1e-9, abs=1e-9)


@given(rows=st.lists(TOKEN, min_size=1, max_size=20))
def test_loglinear_prox_before_the_first_step_is_the_recomputed_one(rows):
    """Before the first optimizer step prox is pi itself."""
    log_pi, mu, _, advantages, lags, _ = (list(column) for column in zip(*rows, strict=True))
    tokens = _tokens(mu, advantages, prox=log_pi, lags=lags)
    recomputed = _value_and_grad("decoupled_ppo", log_pi, tokens, POLICY_LOSSES["decoupled_ppo"])
    loglinear = _value_and_grad("decoupled_ppo", log_pi, tokens, POLICY_LOSSES["decoupled_ppo, loglinear"])
    assert loglinear[0] == recomputed[0]
    assert loglinear[1].tolist() == recomputed[1].tolist()


@pytest.mark.parametrize("case", [*POLICY_LOSSES, "sft"])
@given(rows=st.lists(st.tuples(LOGPROB, LOGPROB, LOGPROB), min_size=1, max_size=20), beta=st.floats(0.01, 2.0))
def test_kl_to_the_reference_adds_k3_with_the_same_weights(case, rows, beta):
    log_pi, mu, reference = (list(column) for column in zip(*rows, strict=True))
    weights = [1 / (2 + i) for i in range(len(rows))]
    tokens = _tokens(mu, [1.0] * len(rows), weights, reference=reference)
    plain = POLICY_LOSSES.get(case, SETTINGS)
    without = _value_and_grad(_name(case), log_pi, tokens, plain)
    found = _value_and_grad(_name(case), log_pi, tokens, plain.model_copy(update={"kl_beta": beta}))
    logs = [ref - pi for ref, pi in zip(reference, log_pi, strict=True)]
    k3 = [math.exp(x) - 1 - x for x in logs]
    added = sum(w * x for w, x in zip(weights, k3, strict=True))
    slopes = [beta * w * (1 - math.exp(x)) for w, x in zip(weights, logs, strict=True)]
    assert found[0] - without[0] == pytest.approx(beta * added, rel=1e-6, abs=1e-6)
    assert (found[1] - without[1]).tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-6)
    assert found[2].overall().reference_kl == pytest.approx(sum(k3) / len(k3))
    assert without[2].overall().reference_kl == 0.0


def test_kl_without_the_log_probs_of_the_reference_is_refused():
    with pytest.raises(ValueError, match="under the reference"):
        _value_and_grad("tis", [-1.0], _tokens([-1.0], [1.0]), SETTINGS.model_copy(update={"kl_beta": 0.1}))


def test_entropy_bonus_lowers_the_loss_with_the_same_weights():
    entropy = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    tokens = _tokens([-1.0, -1.0], [0.0, 0.0], [0.5, 0.25])
    settings = SETTINGS.model_copy(update={"entropy_beta": 0.1})
    value, _ = losses.weighted_sum("tis", torch.tensor([-1.0, -1.0], dtype=torch.float64), entropy, tokens, settings)
    (grad,) = torch.autograd.grad(value, entropy)
    assert float(value) == pytest.approx(-0.1 * (0.5 * 0.5 + 0.25 * 2.0))
    assert grad.tolist() == pytest.approx([-0.05, -0.025])


def test_weight_of_a_rare_token_is_capped_although_its_probability_hardly_moved():
    """mu = 1e-4, pi = 0.05: the difference is below the mask, the ratio is 500."""
    _, grad, tally = _value_and_grad("tis", [math.log(0.05)], _tokens([math.log(1e-4)], [1.0]))
    assert grad[0] == pytest.approx(-2.0 + 2e-3 * math.log(500))
    assert tally.overall().truncated == 1.0


def test_decoupled_ppo_without_prox_is_refused():
    bare = dataclasses.replace(_tokens([-1.0], [1.0]), prox=None)
    with pytest.raises(ValueError, match="prox"):
        losses.decoupled_ppo(torch.tensor([-1.0]), bare, SETTINGS)


def test_supervised_loss_is_the_weighted_negative_log_likelihood():
    value, grad, _ = _value_and_grad("sft", [-1.0, -3.0], _tokens([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]))
    assert value == pytest.approx(2.0)
    assert grad.tolist() == [-0.5, -0.5]
