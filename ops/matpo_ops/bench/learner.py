"""`matpo bench learner`: the update against TRL's GRPOTrainer, the bare model, and our own plain form.

All sides train the same model on the same groups, played first by the tiny policy, in float32 on the same threads. They
take turns; each ratio is the median over rounds. Tokens per second are counted in tokens of the segments as they were
played, so that a side is not paid for padding, nor punished for computing a shared token once.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from matpo import Group, schema
from matpo.settings import LearnerSettings, RunFile
from matpo_learner import credit, records
from matpo_learner.attention import ATTENTION, PackedAttention
from matpo_learner.deepspeed_engine import LearnerEngine, StepReport
from matpo_learner.logprobs import Scorer, load_scorer
from matpo_learner.packing import MicroBatch, pack_update
from matpo_ops.bench import logprob_memory
from matpo_ops.bench.recorded import play_groups
from matpo_ops.bench.trl_update import TrlUpdate

NUM_PLAYED = 32
NUM_ROUNDS = 7
TRL_ROWS = (8, 16, 32, 64)
Advantages = list[NDArray[np.float64]]


def learner(run_file: RunFile) -> dict[str, Any]:
    """Every figure of the learner that needs no GPU."""
    settings = run_file.learner
    torch.set_num_threads(settings.num_threads or torch.get_num_threads())
    groups, advantages = _with_signal(play_groups(run_file, NUM_PLAYED), settings)
    plain_settings = settings.model_copy(update={"share_prefixes": False})
    shared, plain = (pack_update(groups, advantages, s, version=0) for s in (settings, plain_settings))
    num_tokens = sum(batch.num_tokens for batch in plain[0])
    engine = LearnerEngine(run_file.model_folder, settings)
    trl, rows = _best_trl(run_file, groups, advantages)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.step(shared),
        "plain": lambda: engine.step(plain),
        "trl": trl,
        "bare": _Bare(run_file, shared[0]),
        "bare_plain": _Bare(run_file, plain[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    overheads_s = []
    report = engine.step(shared)
    payloads = [[schema.encode(episode) for episode in group.episodes] for group in groups]
    for round_ in range(NUM_ROUNDS + 1):  # the first one warms up
        found = {name: _time(side) for name, side in sides.items()}
        overhead_s = _overhead(payloads, settings, report)
        if round_:
            overheads_s.append(overhead_s)
            for name, took_s in found.items():
                times[name].append(took_s)
    engine.close()
    larger_s = _larger_model_s(run_file, shared)

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 3)

    return {
        "tokens": num_tokens,
        "tokens_computed": sum(batch.num_tokens for batch in shared[0]),
        "segments": sum(len(batch.segment_lengths) for batch in plain[0]),
        "tokens_s": {name: round(num_tokens / statistics.median(took)) for name, took in times.items()},
        "ratio_to_trl": ratio("trl", "ours"),
        "ratio_to_trl_without_sharing": ratio("trl", "plain"),
        "trl_rows": rows,
        "ratio_to_bare_model": ratio("bare", "ours"),
        "ratio_to_bare_model_without_sharing": ratio("bare_plain", "plain"),
        "prefix_sharing_speedup": ratio("plain", "ours"),
        "overhead_fraction": _share(overheads_s, times["ours"]),
        "overhead_fraction_20m": _share(overheads_s, [larger_s] * len(overheads_s)),
        "logprob_memory_ratio": round(logprob_memory.ratio(), 1),
        "gradient": _gradients(run_file, groups[:2], advantages[:2]),
    }


def _share(parts_s: Sequence[float], rests_s: Sequence[float]) -> float:
    return round(statistics.median(part / (part + rest) for part, rest in zip(parts_s, rests_s, strict=True)), 4)


def _larger_model_s(run_file: RunFile, plan: list[list[MicroBatch]]) -> float:
    """Seconds of an update of the same groups with a model of 20 million weights: the better of two."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory(prefix="matpo-bench-") as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        engine = LearnerEngine(Path(folder), run_file.learner)
    took_s = min(_time(lambda: engine.step(plan)) for _ in range(2))
    engine.close()
    return took_s


def _with_signal(groups: Sequence[Group], settings: LearnerSettings) -> tuple[list[Group], Advantages]:
    """As many groups as one update has; others are dropped before they are packed, in a run as here."""
    credits = [(group, credit.advantages(group, settings)) for group in groups]
    chosen = [(group, found.advantages) for group, found in credits if found.has_signal][: settings.groups_per_update]
    return [group for group, _ in chosen], [advantages for _, advantages in chosen]


def _time(side: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    side()
    return time.perf_counter() - began_s


def _best_trl(run_file: RunFile, groups: Sequence[Group], advantages: Advantages) -> tuple[TrlUpdate, int]:
    """TRL with the micro-batch size at which it is fastest here: the better of two updates after a first one."""
    best: tuple[float, TrlUpdate, int] | None = None
    for rows in TRL_ROWS:
        trl = TrlUpdate(run_file.model_folder, groups, advantages, rows=rows)
        trl()
        took_s = min(_time(trl), _time(trl))
        print(f"TRL with {rows} segments per micro-batch: {took_s:.3f} s", file=sys.stderr)
        if best is None or took_s < best[0]:
            best = took_s, trl, rows
    assert best is not None
    return best[1], best[2]


class _Bare:
    """Forward, backward and optimizer step of packed rows through the Hugging Face model, and nothing else.

    Full logits where a token is predicted, plain cross entropy, no importance weights, no diagnostics, no DeepSpeed.
    """

    def __init__(self, run_file: RunFile, rows: Sequence[MicroBatch]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            run_file.model_folder, dtype=torch.float32, attn_implementation=ATTENTION, local_files_only=True
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)
        self._rows = [self._prepared(row) for row in rows]

    def _prepared(self, row: MicroBatch) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        pairs = np.unique(np.stack([row.predict_from, row.target_ids]), axis=1)
        inputs = {
            "input_ids": torch.as_tensor(row.token_ids)[None],
            "position_ids": torch.as_tensor(row.position_ids)[None],
            "packing": PackedAttention(row.segment_lengths.tolist(), row.segment_rows),
            "use_cache": False,
        }
        return inputs, torch.as_tensor(pairs[0]), torch.as_tensor(pairs[1])

    def __call__(self) -> None:
        for inputs, places, targets in self._rows:
            hidden = self._model.base_model(**inputs).last_hidden_state[0, places]
            F.cross_entropy(self._model.get_output_embeddings()(hidden), targets, reduction="sum").backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _overhead(payloads: Sequence[Sequence[bytes]], settings: LearnerSettings, report: StepReport) -> float:
    """Seconds of everything of an update that is not the engine's step: decode, check, credit, pack, summarise."""
    began_s = time.perf_counter()
    groups = [
        Group(
            id=str(number),
            episodes=tuple(schema.decode(p, vocab_size=2**31 - 1, published_version=0) for p in of_group),
        )
        for number, of_group in enumerate(payloads)
    ]
    advantages = [credit.advantages(group, settings).advantages for group in groups]
    pack_update(groups, advantages, settings, version=0)
    records.summarise(groups, [], [0] * len(groups), report)
    return time.perf_counter() - began_s


def _gradients(run_file: RunFile, groups: Sequence[Group], advantages: Advantages) -> dict[str, dict[str, float]]:
    """Each efficient path against a plain loop: every segment alone, full logits, transformers' own attention."""
    want = _plain_gradient(run_file, groups, advantages)
    paths: dict[str, dict[str, Any]] = {
        "shared": {},
        "packed": {"share_prefixes": False},
        "small_rows": {"microbatch_tokens": 256},
        "small_chunks": {"logprob_chunk_tokens": 7},
        "recomputed": {"activation_checkpointing": True},
    }
    found = {}
    for name, changes in paths.items():
        settings = run_file.learner.model_copy(update=changes)
        scorer = load_scorer(
            run_file.model_folder,
            chunk_tokens=settings.logprob_chunk_tokens,
            activation_checkpointing=settings.activation_checkpointing,
        )
        for row in pack_update(groups, advantages, settings, version=0)[0]:
            weights = torch.as_tensor(row.weights * row.advantages)
            (score(scorer, row) * weights).sum().backward()
        got = torch.cat([p.grad.flatten().double() for _, p in sorted(scorer.model.named_parameters())])
        found[name] = {
            "cosine": float(torch.cosine_similarity(got, want, dim=0)),
            "relative_error": float((got - want).norm() / want.norm()),
        }
    return found


def score(scorer: Scorer, row: MicroBatch) -> torch.Tensor:
    """Log-probs of a row's targets."""
    t = torch.as_tensor
    packing = PackedAttention(row.segment_lengths.tolist(), row.segment_rows)
    return scorer(t(row.token_ids), t(row.position_ids), packing, t(row.predict_from), t(row.target_ids))[0]


def _plain_gradient(run_file: RunFile, groups: Sequence[Group], advantages: Advantages) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(run_file.model_folder, dtype=torch.float32, attn_implementation="sdpa")
    for group, of_group in zip(groups, advantages, strict=True):
        for episode, advantage in zip(group.episodes, of_group, strict=True):
            divisor = len(groups) * len(group.episodes) * episode.num_sampled  # learner.denominator = "episode"
            for segment in episode.segments:
                ids, at = torch.as_tensor(segment.token_ids).long(), np.flatnonzero(segment.sampled)
                if segment.trainable and len(at):
                    logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
                    (logs[at - 1, ids[at]].sum() * float(advantage) / divisor).backward()
    return torch.cat([p.grad.flatten().double() for _, p in sorted(model.named_parameters())])
