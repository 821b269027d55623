"""TRL's GRPOTrainer, given the same segments: its own training step and optimizer step, without its generation.

What it is given: plain float32, no gradient checkpointing (its default would recompute), no KL, each segment as prompt
(before the first sampled token) and completion with `tool_mask` over what was not sampled, `old_per_token_logps` as
recorded, micro-batches of segments of like length, padded to the longest. What it is spared: generation, rewards, logs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matpo import Group, Segment


class TrlUpdate:
    """One optimizer step of GRPOTrainer on a fixed batch, to be called again and again."""

    def __init__(
        self, model_folder: Path, groups: Sequence[Group], advantages: Sequence[np.ndarray[Any, Any]], *, rows: int
    ) -> None:
        """`rows` segments per micro-batch."""
        pairs = [
            (segment, float(advantage))
            for group, of_group in zip(groups, advantages, strict=True)
            for episode, advantage in zip(group.episodes, of_group, strict=True)
            for segment in episode.segments
            if segment.trainable and segment.num_sampled
        ]
        pairs.sort(key=lambda pair: pair[0].num_tokens)
        num_sampled = torch.tensor(sum(segment.num_sampled for segment, _ in pairs))
        self._batches = [_batch(pairs[i : i + rows], num_sampled) for i in range(0, len(pairs), rows)]
        self._trainer = _trainer(model_folder, rows, len(self._batches))
        self._parameters = [p for p in self._trainer.model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        """One update."""
        trainer = self._trainer
        for batch in self._batches:
            trainer.training_step(trainer.model, batch, None)
        trainer.accelerator.clip_grad_norm_(self._parameters, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()


def _trainer(model_folder: Path, rows: int, num_batches: int) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    group_size = 8
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=num_batches,
        num_generations=group_size,
        generation_batch_size=rows * num_batches,
        report_to=[],
        seed=0,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, local_files_only=True),
        args=config,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # never called
        train_dataset=Dataset.from_list([{"prompt": "?"}] * group_size),
        processing_class=AutoTokenizer.from_pretrained(model_folder, local_files_only=True),
    )
    trainer._prepare_inputs = lambda inputs: inputs  # its only other job is to generate
    trainer.current_gradient_accumulation_steps = num_batches
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def _batch(pairs: Sequence[tuple[Segment, float]], num_sampled: Tensor) -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right, as GRPOTrainer prepares them."""
    prompts, completions = [], []
    for segment, _ in pairs:
        sampled = np.flatnonzero(segment.sampled)
        prompts.append(slice(0, int(sampled[0])))
        completions.append(slice(int(sampled[0]), int(sampled[-1]) + 1))
    segments = [segment for segment, _ in pairs]

    def column(name: str, parts: Sequence[slice], *, left: bool = False) -> Tensor:
        width = max(part.stop - part.start for part in parts)
        rows = [getattr(segment, name)[part] for segment, part in zip(segments, parts, strict=True)]
        padded = [np.pad(row, (width - len(row), 0) if left else (0, width - len(row))) for row in rows]
        return torch.as_tensor(np.stack(padded))

    def mask(parts: Sequence[slice], *, left: bool = False) -> Tensor:
        width = max(part.stop - part.start for part in parts)
        lengths = np.array([[part.stop - part.start] for part in parts])
        places = np.arange(width)[::-1] if left else np.arange(width)
        return torch.as_tensor(places < lengths).long()

    return {
        "prompt_ids": column("token_ids", prompts, left=True).long(),
        "prompt_mask": mask(prompts, left=True),
        "completion_ids": column("token_ids", completions).long(),
        "completion_mask": mask(completions),
        "tool_mask": column("sampled", completions).long(),
        "old_per_token_logps": column("logprobs", completions),
        "advantages": torch.tensor([advantage for _, advantage in pairs], dtype=torch.float32),
        "num_items_in_batch": num_sampled,
    }
