"""`matpo bench learner --gpu`: model FLOPs utilisation of one update at 32k tokens, bfloat16, one GPU.

The model has the shape of Qwen3-0.6B and random weights. MFU counts what an update needs, not what is computed:
6 FLOPs per weight and token, and 6 * layers * heads * head_dim * length per token for causal attention (half of the
square). Recomputation is not counted. Source: the appendix on MFU of PaLM, arXiv 2204.02311, with causal attention.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from matpo import Episode, Segment, Task
from matpo.errors import SetupError
from matpo.settings import LearnerSettings
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.packing import MicroBatch, pack_sft

TOKENS = 32_768
LENGTHS = (8192, 4096, 4096, *[1024] * 8, *[512] * 16)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 of the vendors' data sheets, by a part of the device's name."""
NUM_UPDATES = 8


def learner_gpu() -> dict[str, Any]:
    """MFU and tokens per second. Raises SetupError without a GPU whose peak is known."""
    if not torch.cuda.is_available():
        raise SetupError(
            f"matpo bench learner --gpu: torch {torch.__version__} sees no GPU. Leave --gpu out for the CPU's figures."
        )
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak is None:
        raise SetupError(f"the peak of {name} is not known: add it to PEAK_FLOPS in {__name__}")
    settings = LearnerSettings(
        device="cuda", dtype="bfloat16", microbatch_tokens=TOKENS, activation_checkpointing=True, share_prefixes=False
    )
    (row,) = pack_sft([_episode()], settings)
    with tempfile.TemporaryDirectory(prefix="matpo-bench-") as folder:
        model = Qwen3ForCausalLM(_config())
        model.save_pretrained(folder)
        num_weights = sum(p.numel() for p in model.parameters())
        engine = LearnerEngine(Path(folder), settings)
    flops = needed_flops(row, num_weights, _config())
    seconds = []
    for number in range(NUM_UPDATES + 2):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        engine.step([[row]], loss="sft")
        torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - began_s)
    engine.close()
    took_s = statistics.median(seconds)
    return {
        "device": name,
        "mfu": round(flops / took_s / peak, 3),
        "tokens_s": round(row.num_tokens / took_s),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def needed_flops(row: MicroBatch, num_weights: int, config: Qwen3Config) -> float:
    """FLOPs of forward and backward of one row."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    squares = float((row.segment_lengths**2).sum())
    return 6.0 * num_weights * row.num_tokens + 6.0 * float(attention) * squares


def _config() -> Qwen3Config:
    """The shape of Qwen3-0.6B."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )


def _episode() -> Episode:
    """A few long segments and many short ones, every token but the first sampled, 32k tokens in all."""
    rng = np.random.default_rng(0)
    segments = []
    for index, length in enumerate(LENGTHS):
        sampled = np.arange(length + 1) > 0
        segments.append(
            Segment(
                index=index,
                parent=-1 if index == 0 else 0,
                role="planner" if index == 0 else "worker",
                token_ids=rng.integers(0, 150_000, length + 1, dtype=np.int32),
                sampled=sampled,
                logprobs=np.where(sampled, -12.0, 0.0).astype(np.float32),
                versions=np.where(sampled, 0, -1).astype(np.int32),
            )
        )
    task = Task(id="t", environment="bench", question="?")
    return Episode(
        id="g.0.0", group="g", member=0, attempt=0, task=task, segments=tuple(segments), answer="", reward=0.0
    )
