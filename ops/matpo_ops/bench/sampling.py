"""`matpo bench sampling`: the embedded engine against transformers' own generate()."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matpo.settings import RunFile
from matpo_actor import engines

NUM_REQUESTS = 64
PROMPT_TOKENS = 96
NEW_TOKENS = 64
NUM_PAIRS = 5


def sampling(run_file: RunFile) -> dict[str, Any]:
    """Tokens per second of the embedded engine against `generate()` of transformers, in turn, same model and sizes.

    64 requests at once, 96 prompt tokens, 64 new tokens each, no stop token. The ratio is the median over pairs.
    """
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 250) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]
    ours, peer = [], []
    generate = _generate_of(run_file.model_folder, run_file.actor.num_threads)

    async def measure() -> None:
        engine = engines.make(run_file)
        await engine.start()
        try:
            for pair in range(NUM_PAIRS + 1):  # the first pair warms up
                began_s = time.perf_counter()
                turns = await asyncio.gather(
                    *(engine.generate(p, max_tokens=NEW_TOKENS, stop_ids=(), seed=i) for i, p in enumerate(prompts))
                )
                took_s = time.perf_counter() - began_s
                num_tokens = sum(len(turn.token_ids) for turn in turns)
                peer_rate = await asyncio.to_thread(generate, prompts)
                if pair:
                    ours.append(num_tokens / took_s)
                    peer.append(peer_rate)
        finally:
            await engine.close()

    asyncio.run(measure())
    return {
        "tokens_s": round(statistics.median(ours)),
        "generate_tokens_s": round(statistics.median(peer)),
        "ratio_to_generate": round(statistics.median(a / b for a, b in zip(ours, peer, strict=True)), 3),
    }


def _generate_of(folder: Path, num_threads: int) -> Callable[[list[list[int]]], float]:
    """A function that samples all prompts with transformers' own generate() and returns tokens per second."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def generate(prompts: list[list[int]]) -> float:
        if num_threads:
            torch.set_num_threads(num_threads)  # counts for the calling thread: both sides get the same
        ids = torch.tensor(prompts)
        began_s = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        return float(out.numel() - ids.numel()) / (time.perf_counter() - began_s)

    return generate
