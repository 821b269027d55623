"""What an update says about its tokens: by role and by lag, as sums and peaks that add over micro-batches and ranks.

Rules kept here, each with a test in tests/learner/test_diagnostics.py:
1. A tally adds: parts of a step, in any order and on any rank, give the tally of the whole. Division comes last, once.
2. Every token is in one cell, its role and the bucket of its own lag. A cell without tokens is not reported.
3. At lag 0 the policy in training is the one that sampled. What is left of |log pi - mu| there is the difference
   between the actor's engine and the learner: the engine gap. Staleness has no part in it.

Which numbers a token has is the loss's affair (matpo_learner.loss).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LAG_BUCKETS = ("0", "1", "2", "3-4", "5-8", ">8")
_LAG_UPPER = (0, 1, 2, 4, 8)  # upper ends of all buckets but the last
FIELDS = (
    "tokens", "weight", "weight_squared", "ratio", "log_ratio", "kl", "truncated", "masked", "entropy",
    "advantage", "advantage_squared", "advantage_abs", "gap", "reference_kl",
)  # fmt: skip


def cells_of(role_ids: NDArray[np.int32], lags: NDArray[np.int32]) -> NDArray[np.int64]:
    """[M], role * len(LAG_BUCKETS) + lag bucket."""
    bucket = np.searchsorted(np.array(_LAG_UPPER), lags, side="left")
    return role_ids.astype(np.int64) * len(LAG_BUCKETS) + bucket


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tally:
    """Sums and peaks by cell. Two of them add to a third."""

    sums: Tensor  # [cells, FIELDS] float64
    peaks: Tensor  # [cells] float64, largest |log pi - mu|, nats

    @classmethod
    def empty(cls, num_roles: int, device: torch.device | str = "cpu") -> Tally:
        """No token yet."""
        size = num_roles * len(LAG_BUCKETS)
        return cls(
            sums=torch.zeros(size, len(FIELDS), dtype=torch.float64, device=device),
            peaks=torch.zeros(size, dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], cells: Tensor, num_roles: int) -> Tally:
        """From one value per token [M] of each of FIELDS but "tokens", and each token's cell [M]."""
        none = cls.empty(num_roles, cells.device)
        values = [columns[name].detach().double() for name in FIELDS[1:]]
        rows = torch.stack([torch.ones_like(values[0]), *values], dim=1)
        return cls(
            sums=none.sums.index_add_(0, cells, rows),
            peaks=none.peaks.scatter_reduce_(0, cells, columns["gap"].detach().double(), "amax"),
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(sums=self.sums + other.sums, peaks=torch.maximum(self.peaks, other.peaks))

    def cpu(self) -> Tally:
        """The same where Python reads it."""
        return Tally(sums=self.sums.cpu(), peaks=self.peaks.cpu())

    def overall(self) -> Diagnostics:
        """Of all tokens."""
        return Diagnostics.of(self.sums.sum(dim=0), self.peaks.max() if len(self.peaks) else torch.zeros(()))

    def by_role_and_lag(self, roles: tuple[str, ...]) -> dict[tuple[str, str], Diagnostics]:
        """Of each (role, lag bucket) that has tokens."""
        names = [(role, bucket) for role in roles for bucket in LAG_BUCKETS]
        cells = zip(names, self.sums, self.peaks, strict=True)
        return {name: Diagnostics.of(sums, peak) for name, sums, peak in cells if sums[0] > 0}

    def engine_gap(self) -> EngineGap | None:
        """Of the tokens at lag 0, whatever their role; None when there is none."""
        at_zero = slice(0, None, len(LAG_BUCKETS))
        whole = Tally(sums=self.sums[at_zero], peaks=self.peaks[at_zero]).overall()
        return EngineGap(num_tokens=whole.num_tokens, mean=whole.gap, max=whole.gap_max) if whole.num_tokens else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineGap:
    """|log pi - mu| where nothing is stale, nats."""

    num_tokens: int
    mean: float
    max: float


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
    advantage: float
    advantage_std: float
    advantage_abs: float
    gap: float  # mean |log pi - mu|, nats; before the update's first optimizer step where that is known
    gap_max: float
    reference_kl: float  # k3 estimate of KL(pi || reference), nats; 0 when learner.kl_beta is 0

    @classmethod
    def of(cls, sums: Tensor, peak: Tensor) -> Diagnostics:
        """From one row of a tally: sums [FIELDS] and its peak."""
        s = dict(zip(FIELDS, sums.tolist(), strict=True))
        n = max(s["tokens"], 1.0)
        same = ("ratio", "log_ratio", "kl", "truncated", "masked", "entropy", "advantage", "advantage_abs", "gap")
        means = {name: s[name] / n for name in (*same, "reference_kl")}
        return cls(
            num_tokens=int(s["tokens"]),
            ess=s["weight"] ** 2 / (n * s["weight_squared"]) if s["weight_squared"] > 0 else 1.0,
            advantage_std=math.sqrt(max(s["advantage_squared"] / n - means["advantage"] ** 2, 0.0)),
            gap_max=float(peak),
            **means,
        )
