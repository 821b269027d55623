"""Losses over sampled tokens: one protocol, exact sums.

Rules kept here, each with a test in tests/learner/test_loss.py:
1. A loss is a sum of weight * token loss, never a mean: the weights (1 / denominator) come from matpo_learner.packing.
2. When the policy is the behaviour policy, every loss has the on-policy gradient, sum weight * A * grad log pi.
3. Ratios are of log differences clamped to +-20, one per token; gspo's is their geometric mean over a segment. Never a
   product over a segment or a tree.
4. KL penalty and entropy bonus are added to any loss, per token, with the same weights. Off, they leave no trace.

Notation (docs/algorithm.md): mu behaviour policy, pi current policy, prox the policy before the update's first step,
ref the frozen reference, A advantage, C = tis_cap, sg = no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matpo.settings import LearnerSettings
from matpo_learner.diagnostics import Tally, cells_of
from matpo_learner.packing import MicroBatch

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """What a loss knows about the M sampled tokens of a micro-batch. All [M], unless noted."""

    mu: Tensor  # log-prob under the behaviour policy, nats
    advantages: Tensor
    weights: Tensor  # 1 / denominator
    lags: Tensor  # updates between the weights that sampled the token and the learner's (MicroBatch.lags)
    segments: Tensor  # int64, which of the micro-batch's segments; all sampled tokens of a segment are here
    num_segments: int
    cells: Tensor  # int64, of matpo_learner.diagnostics
    num_roles: int
    prox: Tensor | None = None  # log-prob before the update's first optimizer step, if it was computed
    reference: Tensor | None = None  # log-prob under the reference; with kl_beta only
    progress: float = 0.0  # share of the update's optimizer steps that are done, in [0, 1)

    @classmethod
    def of(
        cls,
        batch: MicroBatch,
        *,
        device: torch.device | str = "cpu",
        prox: NDArray[np.float32] | None = None,
        reference: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tokens:
        """The columns of a micro-batch as tensors."""
        return cls(
            mu=torch.as_tensor(batch.mu, device=device),
            advantages=torch.as_tensor(batch.advantages, device=device),
            weights=torch.as_tensor(batch.weights, device=device),
            lags=torch.as_tensor(batch.lags, device=device),
            segments=torch.as_tensor(batch.target_segments, device=device),
            num_segments=len(batch.segment_lengths),
            cells=torch.as_tensor(cells_of(batch.role_ids, batch.lags), device=device),
            num_roles=len(batch.roles),
            prox=None if prox is None else torch.as_tensor(prox, device=device),
            reference=reference,
            progress=progress,
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
) -> tuple[Tensor, Tally]:
    """(loss scalar, tally) of one micro-batch; both add over all of them.

    loss = sum weight * (token loss + kl_beta * k3 - entropy_beta * H). `logprobs` [M] is log pi with a gradient;
    `entropy` [M] is H, which needs one when entropy_beta > 0. `name` is a key of LOSSES.
    """
    result = LOSSES[name](logprobs, tokens, settings)
    reference_kl = k3_to_reference(logprobs, tokens) if settings.kl_beta else torch.zeros_like(logprobs)
    loss = result.loss
    if settings.kl_beta:
        loss = loss + settings.kl_beta * reference_kl
    if settings.entropy_beta:
        loss = loss - settings.entropy_beta * entropy
    return (tokens.weights * loss).sum(), _tally(logprobs.detach(), entropy, reference_kl, result, tokens)


def k3_to_reference(logprobs: Tensor, tokens: Tokens) -> Tensor:
    """k3 = ref / pi - 1 - log(ref / pi), [M], never negative; its mean over samples of pi is KL(pi || ref).

    Stale tokens are samples of mu, not of pi; as published, that is not corrected.
    Source: GRPO, arXiv 2402.03300, eq. 4.
    Raises ValueError without the reference's log-probs: a penalty is never silently left out.
    """
    if tokens.reference is None:
        raise ValueError("kl_beta > 0 needs the log-probs under the reference")
    log_ratio = clamped(tokens.reference - logprobs)
    return log_ratio.exp() - 1 - log_ratio


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
    surrogate, clipped = _clipped(ratio, tokens.advantages, settings.clip_low, settings.clip_high)
    floor = settings.dual_clip * tokens.advantages
    dual = (tokens.advantages < 0) & (surrogate.detach() < floor)
    return TokenLoss(
        loss=-torch.where(dual, floor, surrogate),
        importance=ratio.detach(),
        truncated=_outside(ratio.detach(), settings.clip_low, settings.clip_high),
        masked=clipped | dual,
    )


def decoupled_ppo(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Clip against the policy before the update (prox), correct for staleness separately.

    u = pi / prox; w = sg(min(prox / mu, C)); loss = -w min(u A, clip(u) A)
    Source: AReaL, arXiv 2505.24298, section 5.2, with w capped.
    """
    prox = _prox(logprobs, tokens, settings)
    ratio = clamped(logprobs - prox).exp()
    stale = clamped(prox - tokens.mu).exp()
    importance = stale.clamp(max=settings.tis_cap)
    surrogate, clipped = _clipped(ratio, tokens.advantages, settings.clip_low, settings.clip_high)
    return TokenLoss(
        loss=-importance * surrogate,
        importance=importance,
        truncated=stale > settings.tis_cap,
        masked=clipped,
    )


def _prox(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> Tensor:
    """log prox, [M], without gradient: as computed before the update, or interpolated between mu and pi.

    A token that was sampled `lag` updates before prox, with the policy now `progress` of an update after it:
        log prox = log mu + lag / (lag + progress) (log pi - log mu)
    Before the first optimizer step (progress 0) this is log pi, which is exact; at lag 0 it is log mu.
    Source: the log-linear form in AReaL's documentation ("Proximal Log-Probability Approximation"), which takes
    progress = 1; counting the steps makes the first one exact.
    Raises ValueError without prox where it should have been computed: w is never silently left out.
    """
    if settings.prox == "loglinear":
        lags = tokens.lags.to(logprobs.dtype)
        after = tokens.progress / (lags + tokens.progress) if tokens.progress else torch.zeros_like(lags)
        return (logprobs - after * (logprobs - tokens.mu)).detach()
    if tokens.prox is None:
        raise ValueError("decoupled_ppo needs the log-probs before the update's first step (prox)")
    return tokens.prox


def cispo(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Clip the weight, not the token: every token keeps a gradient.

    w = sg(min(r, cispo_cap)); loss = -w A log pi. No lower bound, as the paper trains it.
    Source: MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.
    """
    ratio = clamped(logprobs.detach() - tokens.mu).exp()
    importance = ratio.clamp(max=settings.cispo_cap)
    return TokenLoss(
        loss=-importance * tokens.advantages * logprobs,
        importance=importance,
        truncated=ratio > settings.cispo_cap,
        masked=torch.zeros_like(ratio, dtype=torch.bool),
    )


def gspo(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Clip whole segments, on the geometric mean of their tokens' ratios.

    log s = mean of log r over the sampled tokens of one segment (one context, never the tree)
    s_t = sg(s) pi / sg(pi); loss = -min(s_t A, clip(s_t, 1 - gspo_clip_low, 1 + gspo_clip_high) A)
    All tokens of a segment have one advantage and one weight, so that the sum has the gradient of the segment form.
    Source: GSPO, arXiv 2507.18071, eq. 5 and 7, in its token form (section 4.3).
    """
    log_ratio = clamped(logprobs.detach() - tokens.mu)
    nothing = log_ratio.new_zeros(tokens.num_segments)
    total = nothing.index_add(0, tokens.segments, log_ratio)
    count = nothing.index_add(0, tokens.segments, torch.ones_like(log_ratio))
    of_segment = (total / count)[tokens.segments].exp()  # 0 / 0 of a segment without targets is not looked up
    ratio = of_segment * (logprobs - logprobs.detach()).exp()
    low, high = settings.gspo_clip_low, settings.gspo_clip_high
    surrogate, clipped = _clipped(ratio, tokens.advantages, low, high)
    return TokenLoss(
        loss=-surrogate,
        importance=of_segment,
        truncated=_outside(of_segment, low, high),
        masked=clipped,
    )


def reinforce(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """loss = -A log pi, uncorrected: right without lag, and the measure of what correction is worth with it.

    Its effective sample size is that of the weights r that it leaves out.
    Source: Williams, 1992 (REINFORCE); for language models, arXiv 2402.14740.
    """
    nothing = torch.zeros_like(logprobs, dtype=torch.bool)
    return TokenLoss(
        loss=-tokens.advantages * logprobs,
        importance=clamped(logprobs.detach() - tokens.mu).exp(),
        truncated=nothing,
        masked=nothing,
    )


def sft(logprobs: Tensor, tokens: Tokens, settings: LearnerSettings) -> TokenLoss:
    """Negative log-likelihood of the sampled tokens, for warm starts."""
    nothing = torch.zeros_like(logprobs, dtype=torch.bool)
    return TokenLoss(loss=-logprobs, importance=torch.ones_like(logprobs), truncated=nothing, masked=nothing)


LOSSES: Mapping[str, Callable[[Tensor, Tokens, LearnerSettings], TokenLoss]] = {
    "tis": tis,
    "ppo_clip": ppo_clip,
    "decoupled_ppo": decoupled_ppo,
    "cispo": cispo,
    "gspo": gspo,
    "reinforce": reinforce,
    "sft": sft,
}


def clamped(log_ratio: Tensor) -> Tensor:
    """Keep exp() finite."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clipped term won (no gradient)."""
    plain = ratio * advantages
    bounded = ratio.clamp(1 - low, 1 + high) * advantages
    clipped = bounded.detach() < plain.detach()
    # Not torch.minimum: at a tie (ratio inside the clip) it would split the gradient between two equal branches.
    return torch.where(clipped, bounded, plain), clipped


def _outside(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio < 1 - low) | (ratio > 1 + high)


def _tally(logprobs: Tensor, entropy: Tensor, reference_kl: Tensor, result: TokenLoss, tokens: Tokens) -> Tally:
    log_ratio = clamped(logprobs - tokens.mu).double()
    ratio = log_ratio.exp()
    importance = result.importance.double()
    # With several optimizer steps pi has moved since the first; prox has not.
    before = logprobs if tokens.prox is None else tokens.prox
    columns = {
        "weight": importance,
        "weight_squared": importance.square(),
        "ratio": ratio,
        "log_ratio": log_ratio,
        "kl": ratio - 1 - log_ratio,  # k3: its mean under mu is KL(mu || pi)
        "truncated": result.truncated,
        "masked": result.masked,
        "entropy": entropy,
        "advantage": tokens.advantages,
        "advantage_squared": tokens.advantages.double().square(),
        "advantage_abs": tokens.advantages.abs(),
        "gap": (before - tokens.mu).abs(),
        "reference_kl": reference_kl,
    }
    return Tally.of(columns, tokens.cells, tokens.num_roles)
