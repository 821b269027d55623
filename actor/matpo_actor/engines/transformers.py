"""The embedded engine: a Hugging Face causal LM on a thread of its own, with continuous batching. Any device.

Rules kept here; each has a test in tests/actor/test_transformers_engine.py:
1. A token's log-prob is the float32 plain softmax that sampled it, and its version is that of the weights that did.
2. Weights change between two decode steps, all of them or none; everything is checked before the first is touched.
3. With kv_after_update = "recompute" no key or value of older weights is ever read again, so a re-score under the
   stamped version gives the recorded log-probs. "keep" leaves those of requests in flight as they are.
4. A new prompt reuses keys and values only of the same weights.
5. A cancelled request leaves the batch at the next step.

How it works: one table of keys and values, a row per request. Rows [0, n) are in the batch; the rows behind them keep
finished contexts, because an agent's next turn begins with its last one, and its siblings share its system prompt.
A prompt copies the row with the longest common prefix and computes only the rest, all but its last token; that token
is the first input of the decode loop. So one forward function serves prefill and decode, and no other logits are kept.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open

from matpo import logs
from matpo.errors import ConfigError, InfraError, SetupError, SnapshotError
from matpo.settings import RunFile
from matpo_actor.engines.base import ENGINE_DEAD, Sampled
from matpo_actor.engines.kv_table import Table, grouped_attention

PREFILL_TOKENS = (
    1024  # padded tokens of one prefill: bounds its memory, and lets later rows reuse what earlier ones made
)
IDLE_S = 1.0
ATTENTION = "matpo_grouped"
SMALL_MODEL = (
    50_000_000  # below this a second thread costs more than it brings, ten times as much beside other processes
)

log = logs.get()


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """One request: `tokens` is the prompt, then what was sampled; keys and values exist for all but the last."""

    tokens: list[int]
    num_prompt: int
    max_tokens: int
    stop_ids: frozenset[int]
    random: random.Random
    answer: Future[Sampled]
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def add(self, token: int, logprob: float, version: int) -> bool:
        """Append a sampled token. True when the turn is over."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        stopped = token in self.stop_ids
        if not stopped and len(self.logprobs) < self.max_tokens:
            return False
        if self.answer.set_running_or_notify_cancel():
            sampled = self.tokens[self.num_prompt :]
            finish: Literal["stop", "length"] = "stop" if stopped else "length"
            self.answer.set_result(
                Sampled(token_ids=sampled, logprobs=self.logprobs, versions=self.versions, finish=finish)
            )
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Checked weights on their way to the engine's thread."""

    tensors: dict[str, torch.Tensor]
    version: int
    answer: Future[float]


class TransformersEngine:
    """See the module. `generate` and `load` may be called from one event loop at a time."""

    def __init__(
        self,
        model_folder: Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        num_threads: int = 0,
        kv_after_update: Literal["recompute", "keep"] = "recompute",
        kept_rows: int = 32,
    ) -> None:
        self.version = -1
        self._folder, self._dtype, self._num_threads = model_folder, getattr(torch, dtype), num_threads
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._recompute = kv_after_update == "recompute"
        self._kept_rows = kept_rows
        self._inbox: queue.SimpleQueue[Row | Load | None] = queue.SimpleQueue()
        self._batch: list[Row] = []
        self._waiting: list[Row] = []
        self._broken: str | None = "it was not started"
        self._thread = threading.Thread(target=self._run, name="matpo-engine", daemon=True)

    @classmethod
    def from_run_file(cls, run_file: RunFile) -> TransformersEngine:
        """The engine that a run file asks for."""
        actor = run_file.actor
        return cls(
            run_file.model_folder,
            dtype=run_file.model.dtype,
            device=actor.device,
            num_threads=actor.num_threads,
            kv_after_update=actor.kv_after_update,
            kept_rows=actor.num_members,
        )

    async def start(self) -> None:
        """Load the model and start the thread. Raises SetupError."""
        self._model = await asyncio.to_thread(_load_model, self._folder, self._dtype, self._device)
        self._slots: dict[str, torch.Tensor] = dict(self._model.state_dict())
        self._num_parameters = self._model.num_parameters()
        config = self._model.config.get_text_config()
        self._vocab_size, self._max_context = int(config.vocab_size), int(config.max_position_embeddings)
        self._table = Table(int(config.num_hidden_layers))
        self._broken = None
        self._thread.start()

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Collection[int], seed: int | None = None
    ) -> Sampled:
        """Sample one turn. The same seed and weights give the same turn (up to the rounding of a different batch)."""
        if not prompt_ids or max_tokens < 1 or not all(0 <= i < self._vocab_size for i in prompt_ids):
            raise ValueError(f"want a prompt of ids in [0, {self._vocab_size}) and max_tokens >= 1, got {max_tokens}")
        if len(prompt_ids) + max_tokens > self._max_context:
            raise ConfigError(
                f"{len(prompt_ids)} prompt and {max_tokens} new tokens do not fit the model's context of "
                f"{self._max_context}. Lower roles.*.max_context_tokens."
            )
        row = Row(
            tokens=list(prompt_ids),
            num_prompt=len(prompt_ids),
            max_tokens=max_tokens,
            stop_ids=frozenset(stop_ids),
            random=random.Random(seed),
            answer=Future(),
        )
        self._put(row)
        return await asyncio.wrap_future(row.answer)  # cancelling it cancels row.answer, which the thread looks at

    async def load(self, folder: Path, version: int) -> float:
        """Load a snapshot between two steps; see matpo_actor.engines.base."""
        tensors = await asyncio.to_thread(read_tensors, folder, self._slots)
        load = Load(tensors=tensors, version=version, answer=Future())
        self._put(load)
        return await asyncio.wrap_future(load.answer)

    async def close(self) -> None:
        """Stop the thread; requests in flight fail with InfraError."""
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join, 60)

    def _put(self, item: Row | Load) -> None:
        self._inbox.put(item)
        if self._broken is not None:  # looked at after the put: the thread answers what it finds when it ends
            raise InfraError(f"the transformers engine takes no requests: {self._broken}", reason=ENGINE_DEAD)

    # ---- the engine's thread

    def _run(self) -> None:
        if self._num_threads or self._num_parameters < SMALL_MODEL:
            torch.set_num_threads(self._num_threads or 1)
        try:
            with torch.inference_mode():
                while self._take():
                    self._join()
                    if self._batch:
                        self._step()
            self._broken = "it was closed"
        except Exception as error:  # noqa: BLE001 - outermost loop of the thread: whoever waits has to hear of it
            self._broken = f"{type(error).__name__}: {error}"
            log.error("engine.broken", engine="transformers", error=self._broken)
        for item in [*self._batch, *self._waiting, *iter_queue(self._inbox)]:
            if item is not None and item.answer.set_running_or_notify_cancel():
                item.answer.set_exception(
                    InfraError(f"the transformers engine stopped: {self._broken}", reason=ENGINE_DEAD)
                )

    def _take(self) -> bool:
        """Take what has arrived, wait if there is nothing to do. False: close."""
        idle = not self._batch and not self._waiting
        try:
            item = self._inbox.get(block=idle, timeout=IDLE_S)
            while item is not None:
                if isinstance(item, Load):
                    self._swap_weights(item)
                else:
                    self._waiting.append(item)
                item = self._inbox.get_nowait()
            return False
        except queue.Empty:
            return True

    def _swap_weights(self, load: Load) -> None:
        began = time.monotonic()
        for name, tensor in load.tensors.items():
            self._slots[name].copy_(tensor)
        self.version = load.version
        self._table.forget()
        if self._recompute:
            self._batch, running = [], self._batch
            self._waiting[:0] = running
            self._join()
        if self._device != "cpu":
            torch.cuda.synchronize()
        if load.answer.set_running_or_notify_cancel():
            load.answer.set_result(time.monotonic() - began)

    def _join(self) -> None:
        """Prefill the requests that wait and put them into the batch, similar lengths together."""
        waiting = sorted((r for r in self._waiting if not r.answer.cancelled()), key=lambda r: len(r.tokens))
        self._waiting = []
        if not waiting:
            return
        self._table.reserve(len(self._batch) + len(waiting) + self._kept_rows, len(waiting[-1].tokens))
        while waiting:
            known: list[int] = []
            first, longest = len(self._batch), 0
            while waiting and max(longest, 1) * len(known) < PREFILL_TOKENS:
                row = waiting.pop()
                known.append(self._table.prepare(len(self._batch), row.tokens[:-1]))
                longest = max(longest, len(row.tokens) - 1 - known[-1])
                self._batch.append(row)
            rest = [r.tokens[k:-1] for r, k in zip(self._batch[first:], known, strict=True)]
            if longest:
                self._forward(first, [r + [0] * (longest - len(r)) for r in rest], known)
            for index, row in enumerate(self._batch[first:], first):  # only now may others reuse them
                self._table.ids[index, : len(row.tokens) - 1] = row.tokens[:-1]

    def _forward(self, first: int, ids: list[list[int]], start: list[int]) -> torch.Tensor:
        """Run `ids` [rows, tokens] for the rows from `first`, each from its `start`. Logits of the last column.

        Padding behind a row's ids is written too, and never read: the real token of that position comes first.
        """
        num_tokens = len(ids[0])
        reach = max(start) + num_tokens
        self._table.reserve(0, reach)
        position = torch.tensor(start, device=self._device)[:, None] + torch.arange(num_tokens, device=self._device)
        self._table.aim(first, position, reach)
        unseen = torch.arange(reach, device=self._device) > position[:, None, :, None]
        mask = torch.zeros(unseen.shape, dtype=self._dtype, device=self._device).masked_fill_(unseen, -torch.inf)
        out = self._model(
            input_ids=torch.tensor(ids, device=self._device),
            position_ids=position,
            attention_mask=mask,
            past_key_values=self._table.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _step(self) -> None:
        """Sample one token for each row of the batch; drop the rows that are done."""
        batch, table = self._batch, self._table
        last = [r.tokens[-1] for r in batch]
        start = [len(r.tokens) - 1 for r in batch]
        logits = self._forward(0, [[token] for token in last], start)
        table.ids[np.arange(len(batch)), start] = last
        tokens, logprobs = sample(logits, [r.random.random() for r in batch])
        done = [
            row
            for row, (r, token, logprob) in enumerate(zip(batch, tokens, logprobs, strict=True))
            if r.add(token, logprob, self.version) or r.answer.cancelled()
        ]
        for row in reversed(done):
            table.swap(row, len(batch) - 1)
            batch[row] = batch[-1]
            batch.pop()


def sample(logits: torch.Tensor, uniform: list[float]) -> tuple[list[int], list[float]]:
    """Draw one token a row from softmax(logits) by inverting its distribution function; and log-probs, float32.

    The sums are in float64, so that a large vocabulary's rounding moves no probability.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    sums = logprobs.double().exp_().cumsum_(-1)
    wanted = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * sums[:, -1:]
    tokens = torch.searchsorted(sums, wanted, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0].tolist(), logprobs.gather(-1, tokens)[:, 0].tolist()


def read_tensors(folder: Path, slots: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a snapshot's tensors; they must have exactly the names and shapes of `slots`. Raises SnapshotError."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"snapshot {folder} cannot be read: {error}", reason="torn") from error
    problems = [f"{name}: missing" for name in slots.keys() - tensors.keys()]
    problems += [f"{name}: not in the model" for name in tensors.keys() - slots.keys()]
    problems += [
        f"{name}: {list(tensor.shape)}, model has {list(slots[name].shape)}"
        for name, tensor in tensors.items()
        if name in slots and tensor.shape != slots[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SnapshotError(
            f"snapshot {folder} does not fit the model: {'; '.join(sorted(problems)[:3])}{more}. "
            "Learner and actors must have the same model.path.",
            reason="tensors",
        )
    return tensors


def iter_queue(inbox: queue.SimpleQueue[Row | Load | None]) -> list[Row | Load | None]:
    """What is in the queue now."""
    return [inbox.get_nowait() for _ in range(inbox.qsize())]


def _load_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    transformers.AttentionInterface.register(ATTENTION, grouped_attention)
    transformers.utils.logging.disable_progress_bar()  # our own logs say what is loaded
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
        model.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupError(
            f"cannot load the model in {folder} on {device}: {error}. Check [model] and actor.device."
        ) from error
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    if getattr(config, "sliding_window", None):
        layer_types.add("sliding window")
    if layer_types - {"full_attention"}:
        raise SetupError(
            f"the transformers engine knows full attention only, and {folder} has {', '.join(sorted(layer_types))}. "
            'Set actor.engine = "vllm".'
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:  # snapshots carry the head on its own
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model.eval().requires_grad_(False)
