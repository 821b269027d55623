"""Losses over sampled tokens: one protocol, exact sums.

Rules kept here, each with a test in tests/learner/test_loss.py:
1. A loss is a sum of weight * token loss, never a mean: the weights (1 / denominator) come from matpo_learner.packing.
2. When the policy is the behaviour policy, every loss has the on-policy gradient, sum weight * A * grad log pi.
3. Ratios are per token, of log differences clamped to +-20; never a product over a segment or a tree.
4. Diagnostics are sums by role and lag bucket: they add over micro-batches and ranks, and are divided once, at the end.

Notation (docs/algorithm.md): mu behaviour policy, pi current policy, prox the policy before the update's first step,
A advantage, C = tis_cap, sg = no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matpo.settings import LearnerSettings
from matpo_learner.packing import MicroBatch

LOG_RATIO_LIMIT = 20.0
LAG_BUCKETS = ("0", "1", "2", "3-4", "5-8", ">8")
_LAG_UPPER = (0, 1, 2, 4, 8)  # upper ends of all buckets but the last
FIELDS = ("tokens", "weight", "weight_squared", "ratio", "log_ratio", "kl", "truncated", "masked", "entropy")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """What a loss knows about the M sampled tokens of a micro-batch. All [M]."""

    mu: Tensor  # log-prob under the behaviour policy, nats
    advantages: Tensor
    weights: Tensor  # 1 / denominator
    prox: Tensor | None  # log-prob before the update's first optimizer step; decoupled_ppo only
    cells: Tensor  # int64, role * len(LAG_BUCKETS) + lag bucket
    num_roles: int

    @classmethod
    def of(
        cls, batch: MicroBatch, *, device: torch.device | str = "cpu", prox: NDArray[np.float32] | None = None
    ) -> Tokens:
        """The columns of a micro-batch as tensors."""
        bucket = np.searchsorted(np.array(_LAG_UPPER), batch.lags, side="left")
        return cls(
            mu=torch.as_tensor(batch.mu, device=device),
            advantages=torch.as_tensor(batch.advantages, device=device),
            weights=torch.as_tensor(batch.weights, device=device),
            prox=None if prox is None else torch.as_tensor(prox, device=device),
            cells=torch.as_tensor(batch.role_ids.astype(np.int64) * len(LAG_BUCKETS) + bucket, device=device),
            num_roles=len(batch.roles),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenLoss:
    """What a loss says about each token. All [M]; only `loss` has a gradient."""

    loss: Tensor  # before the weight
    importance: Tensor  # w of the effective sample size
    truncated: Tensor  # bool: the weight hit its cap, or the ratio left its clip
    masked: Tensor  # bool: no gradient from this token's policy term


def weighted_sum(
    name: str, logprobs: Tensor, entropy: Tensor, tokens: Tokens, settings: LearnerSettings
) -> tuple[Tensor, Tensor]:
    """(loss scalar, diagnostics [roles * lag buckets, FIELDS] float64) of one micro-batch; both add over all of them.

    `logprobs` [M] is log pi with a gradient. `name` is a key of LOSSES.
    """
    result = LOSSES[name](logprobs, tokens, settings)
    return (tokens.weights * result.loss).sum(), _diagnostics(logprobs.detach(), entropy.detach(), result, tokens)


def tis(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Truncated importance sampling with a mask.

    w = sg(min(r, C)); keep = not[(A > 0 and pi - mu > tis_mask) or (A < 0 and pi - mu < -tis_mask)]
    loss = -keep w A log pi + tis_beta (log r)^2
    The mask alone does not bound the weight (mu 1e-4 -> pi 0.05 is r = 500), so: cap and mask.
    Source: IMPALA, arXiv 1802.01561, eq. 1 (the cap); the rest as docs/algorithm.md, section 3.
    """
    log_ratio = clamped(logprobs - tokens.mu)
    ratio = log_ratio.detach().exp()
    importance = ratio.clamp(max=settings.tis_cap)
    moved = logprobs.detach().exp() - tokens.mu.exp()
    up, down = tokens.advantages > 0, tokens.advantages < 0
    masked = (up & (moved > settings.tis_mask)) | (down & (moved < -settings.tis_mask))
    policy = -torch.where(masked, 0.0, importance * tokens.advantages) * logprobs
    return TokenLoss(
        loss=policy + settings.tis_beta * log_ratio.square(),
        importance=importance,
        truncated=ratio > settings.tis_cap,
        masked=masked,
    )


def ppo_clip(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Clipped surrogate on r = pi / mu, with a dual clip.

    loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and for A < 0 at most -dual_clip A.
    Source: PPO, arXiv 1707.06347, eq. 7; two-sided clip, DAPO 2503.14476; dual clip, arXiv 1912.09729, eq. 5.
    """
    ratio = clamped(logprobs - tokens.mu).exp()
    surrogate, clipped = _clipped(ratio, tokens.advantages, settings)
    floor = settings.dual_clip * tokens.advantages
    dual = (tokens.advantages < 0) & (surrogate.detach() < floor)
    return TokenLoss(
        loss=-torch.where(dual, floor, surrogate),
        importance=ratio.detach(),
        truncated=_outside(ratio.detach(), settings),
        masked=clipped | dual,
    )


def decoupled_ppo(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Clip against the policy before the update (prox), correct for staleness separately.

    u = pi / prox; w = sg(min(prox / mu, C)); loss = -w min(u A, clip(u) A)
    Source: AReaL, arXiv 2505.24298, section 5.2, with w capped.
    Raises ValueError without prox: w is never silently left out.
    """
    if tokens.prox is None:
        raise ValueError("decoupled_ppo needs the log-probs before the update's first step (prox)")
    ratio = clamped(logprobs - tokens.prox).exp()
    stale = clamped(tokens.prox - tokens.mu).exp()
    importance = stale.clamp(max=settings.tis_cap)
    surrogate, clipped = _clipped(ratio, tokens.advantages, settings)
    return TokenLoss(
        loss=-importance * surrogate,
        importance=importance,
        truncated=stale > settings.tis_cap,
        masked=clipped,
    )


def sft(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Negative log-likelihood of the sampled tokens, for warm starts."""
    nothing = torch.zeros_like(logprobs, dtype=torch.bool)
    return TokenLoss(loss=-logprobs, importance=torch.ones_like(logprobs), truncated=nothing, masked=nothing)


LOSSES: Mapping[str, Callable[[Tensor, Tokens, LearnerSettings], TokenLoss]] = {
    "tis": tis,
    "ppo_clip": ppo_clip,
    "decoupled_ppo": decoupled_ppo,
    "sft": sft,
}


def clamped(log_ratio: Tensor) -> Tensor:
    """Keep exp() finite."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _clipped(ratio: Tensor, advantages: Tensor, settings: LearnerSettings) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clipped term won (no gradient)."""
    plain = ratio * advantages
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    clipped = bounded.detach() < plain.detach()
    # Not torch.minimum: at a tie (ratio inside the clip) it would split the gradient between two equal branches.
    return torch.where(clipped, bounded, plain), clipped


def _outside(ratio: Tensor, settings: LearnerSettings) -> Tensor:
    return (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)


def _diagnostics(logprobs: Tensor, entropy: Tensor, result: TokenLoss, tokens: Tokens) -> Tensor:
    log_ratio = clamped(logprobs - tokens.mu).double()
    ratio = log_ratio.exp()
    importance = result.importance.double()
    columns = {
        "tokens": torch.ones_like(ratio),
        "weight": importance,
        "weight_squared": importance.square(),
        "ratio": ratio,
        "log_ratio": log_ratio,
        "kl": ratio - 1 - log_ratio,  # k3: its mean under mu is KL(mu || pi)
        "truncated": result.truncated.double(),
        "masked": result.masked.double(),
        "entropy": entropy.double(),
    }
    sums = ratio.new_zeros(tokens.num_roles * len(LAG_BUCKETS), len(FIELDS))
    return sums.index_add_(0, tokens.cells, torch.stack([columns[name] for name in FIELDS], dim=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """Means over some tokens: of one role and lag bucket, or of all."""

    num_tokens: int
    ess: float  # effective sample size / tokens = (sum w)^2 / (N sum w^2); 1 is on-policy
    ratio: float  # mean pi / mu
    log_ratio: float  # nats
    kl: float  # k3 estimate of KL(mu || pi), nats
    truncated: float  # share
    masked: float  # share
    entropy: float  # nats

    @classmethod
    def of(cls, sums: NDArray[np.float64]) -> Diagnostics:
        """From one row of sums [FIELDS]."""
        s = dict(zip(FIELDS, sums.tolist(), strict=True))
        n = max(s["tokens"], 1.0)
        means = {name: s[name] / n for name in ("ratio", "log_ratio", "kl", "truncated", "masked", "entropy")}
        ess = s["weight"] ** 2 / (n * s["weight_squared"]) if s["weight_squared"] > 0 else 1.0
        return cls(num_tokens=int(s["tokens"]), ess=ess, **means)


def by_role_and_lag(sums: NDArray[np.float64], roles: tuple[str, ...]) -> dict[tuple[str, str], Diagnostics]:
    """Diagnostics of each (role, lag bucket) that has tokens."""
    names = [(role, bucket) for role in roles for bucket in LAG_BUCKETS]
    return {name: Diagnostics.of(row) for name, row in zip(names, sums, strict=True) if row[0] > 0}
