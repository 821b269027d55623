"""Supervised warm start: train on the sampled tokens of recorded episodes, with the same packing and engine.

The result is a folder that transformers loads: config, tokenizer and weights, tied as they were. It is written beside
its place and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from matpo import logs, schema, snapshot
from matpo.episode import Episode
from matpo.errors import ConfigError, MatpoError
from matpo.settings import RunFile
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.judge import vocab_size
from matpo_learner.packing import pack_sft

LOG_EVERY_S = 10.0
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class SftOptions:
    """What the command line says about one warm start."""

    episodes: Path  # written by matpo.schema.write_episodes
    out: Path  # must not exist
    num_steps: int
    segments_per_step: int
    learning_rate: float


def run(run_file: RunFile, options: SftOptions) -> None:
    """Train model.path on recorded episodes and write the result. One call per rank.

    Raises ConfigError (no episodes, `out` exists), EpisodeError (a damaged file), MatpoError (not_finite).
    """
    if options.out.exists():
        raise ConfigError(f"--out {options.out} exists already. Name a new folder.")
    if not options.episodes.is_file():
        raise ConfigError(f"--episodes {options.episodes} does not exist. Name a file of recorded episodes.")
    recorded = schema.read_episodes(options.episodes, vocab_size=vocab_size(run_file.model_folder))
    segments = single_segments(recorded)
    if not segments:
        raise ConfigError(f"--episodes {options.episodes} holds no sampled token of a trainable role.")
    plain = {"learning_rate": options.learning_rate, "kl_beta": 0.0, "entropy_beta": 0.0}
    settings = run_file.learner.model_copy(update=plain)
    with closing(LearnerEngine(run_file.model_folder, settings, seed=run_file.run.seed)) as engine:
        began_s, logged_s, num_tokens, loss_sum, num_logged = time.monotonic(), 0.0, 0, 0.0, 0
        for step, batch in enumerate(batches(segments, options, seed=run_file.run.seed), start=1):
            plan = pack_sft(batch, settings, rank=engine.rank, world_size=engine.world_size)
            report = engine.step([plan], loss="sft")
            if report.skipped:
                raise MatpoError(
                    f"step {step}: {report.skipped[0]}. Nothing was written; use a lower --lr than "
                    f"{options.learning_rate:g}.",
                    reason="not_finite",
                )
            num_tokens += report.num_tokens
            loss_sum, num_logged = loss_sum + report.loss, num_logged + 1
            took_s = time.monotonic() - began_s
            if engine.rank == 0 and (took_s - logged_s > LOG_EVERY_S or step in (1, options.num_steps)):
                log.info(
                    "sft.progress",
                    step=step,
                    num_steps=options.num_steps,
                    loss=round(loss_sum / num_logged, 4),
                    tokens_per_s=round(num_tokens / took_s),
                )
                logged_s, loss_sum, num_logged = took_s, 0.0, 0
        tensors = dict(engine.tensors())
        if engine.rank == 0:
            write_model(options.out, tensors, model_folder=run_file.model_folder, dtype=run_file.model.dtype)
            log.info("sft.done", folder=str(options.out), num_tokens=num_tokens, took_s=round(took_s, 1))


def single_segments(episodes: Iterator[Episode] | Sequence[Episode]) -> list[Episode]:
    """Each trainable segment with sampled tokens, as an episode of its own: the unit of a supervised batch."""
    return [
        replace(episode, segments=(segment,))
        for episode in episodes
        for segment in episode.segments
        if segment.trainable and segment.num_sampled
    ]


def batches(segments: Sequence[Episode], options: SftOptions, *, seed: int) -> Iterator[list[Episode]]:
    """`num_steps` batches of `segments_per_step`, passes over the data shuffled anew. The same on every rank."""
    shuffled = random.Random(seed)
    left: list[Episode] = []
    for _ in range(options.num_steps):
        while len(left) < options.segments_per_step:
            again = list(segments)
            shuffled.shuffle(again)
            left += again
        yield left[: options.segments_per_step]
        left = left[options.segments_per_step :]


def write_model(out: Path, tensors: Mapping[str, torch.Tensor], *, model_folder: Path, dtype: str) -> None:
    """Write a Hugging Face folder. A model that ties its LM head stays tied: the head is left out."""
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    # The file may leave the flag out; the default is the architecture's.
    tied = bool(AutoConfig.from_pretrained(model_folder, local_files_only=True).tie_word_embeddings)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    kind = getattr(torch, dtype)
    kept = {
        name: tensor.to(kind, copy=True).contiguous()
        for name, tensor in tensors.items()
        if not (tied and name == snapshot.LM_HEAD)
    }
    save_file(kept, temporary / snapshot.WEIGHTS, metadata={"format": "pt"})
    config.pop("torch_dtype", None)
    (temporary / "config.json").write_text(
        json.dumps({**config, "dtype": dtype, "tie_word_embeddings": tied}, indent=2), encoding="utf-8"
    )
    for name in snapshot.TOKENIZER_FILES:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, temporary / name)
    for path in temporary.iterdir():
        snapshot.fsync(path)
    temporary.rename(out)
    snapshot.fsync(out.parent)
