"""The frozen policy that a KL penalty is measured against.

Rules kept here, each with a test in tests/learner/test_reference.py:
1. It scores the same packed rows as the policy, with the same code and precision: of the same weights the penalty is 0.
2. It has no gradient and never changes.
3. A model with another vocabulary is refused: its log-probs would be of other tokens.

Each rank holds a whole copy of its own, outside DeepSpeed, so a rank needs no other to use it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from matpo.errors import ConfigError
from matpo.settings import LearnerSettings
from matpo_learner.attention import PackedAttention
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import MicroBatch


class Reference:
    """A causal LM that only scores."""

    def __init__(self, folder: Path, settings: LearnerSettings, *, vocab_size: int, device: torch.device) -> None:
        """Load a model folder or one version of a snapshots folder. Raises ConfigError when it does not fit."""
        scorer = load_scorer(folder, chunk_tokens=settings.logprob_chunk_tokens)
        found = len(scorer.head.weight)
        if found != vocab_size:
            raise ConfigError(
                f"learner.reference={folder} has {found} token ids, the policy has {vocab_size}. "
                "Name a model with the same tokenizer, such as the one that model.path was made from."
            )
        for parameter in scorer.parameters():  # not Module.to: rotary frequencies stay float32, as in the policy
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(getattr(torch, settings.dtype))
        self._scorer = scorer.eval().to(device)
        self._device = device

    def log_probs(self, batch: MicroBatch) -> Tensor:
        """Log-prob of each of the batch's M targets, nats; float32, [M]."""
        if not batch.num_targets:
            return torch.zeros(0, device=self._device)
        names = ("token_ids", "position_ids", "predict_from", "target_ids")
        tokens, positions, predict_from, targets = (
            torch.as_tensor(getattr(batch, name), device=self._device) for name in names
        )
        packing = PackedAttention(batch.segment_lengths.tolist(), batch.segment_rows, self._device)
        with torch.no_grad():
            logprobs, _ = self._scorer(tokens, positions, packing, predict_from, targets)
        return torch.as_tensor(logprobs, dtype=torch.float32)
