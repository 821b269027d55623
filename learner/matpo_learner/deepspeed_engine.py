"""The model in training under DeepSpeed.

Rules kept here, each with a test in tests/learner/test_deepspeed_engine.py:
1. The gradient of an optimizer step is the sum over all micro-batches of all ranks. DeepSpeed averages over ranks and
   accumulation steps; both are undone here, so packing and the number of ranks never change an update.
2. Each minibatch is exactly one optimizer step, whatever the number of micro-batches.
3. A step whose loss or gradient is not finite is not taken, on any rank: weights and moments stay as they were.
4. A checkpoint holds whole tensors by name, no pickle; it resumes under another ZeRO stage or number of ranks. Rank 0
   alone reads it and gives the others their part, one tensor at a time.
5. With learner.deterministic the same plans give the same bits.

Every method but the properties is collective: all ranks call it, in the same order, with the same plan.
deepspeed is imported late: it picks its device at import, and other modules read this one for types only. The modules
deepspeed_*.py are the only ones that know it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matpo.errors import CheckpointError
from matpo.settings import LearnerSettings
from matpo_learner import diagnostics, engine_state, lora
from matpo_learner import loss as losses
from matpo_learner.attention import PackedAttention
from matpo_learner.deepspeed_config import effective_stage, make_config
from matpo_learner.deepspeed_ranks import Ranks
from matpo_learner.deepspeed_state import MOMENTS, MasterState
from matpo_learner.engine_state import Counters, StateFile
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import MicroBatch, pack_sft
from matpo_learner.reference import Reference

_EMPTY = pack_sft([], LearnerSettings())[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one update did, over all ranks: mean loss and gradient norm, and all tokens, of the steps that it took."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    num_steps: int  # optimizer steps of this update
    num_tokens: int  # sampled tokens in the loss
    overall: diagnostics.Diagnostics
    by_role_and_lag: Mapping[tuple[str, str], diagnostics.Diagnostics]  # ("planner", "3-4") -> ...
    engine_gap: diagnostics.EngineGap | None  # None: no token at lag 0
    skipped: Mapping[int, str]  # minibatches that were not finite, with what was not; no weight moved for them


class LearnerEngine:
    """A causal LM under DeepSpeed. One per process; RANK, LOCAL_RANK and WORLD_SIZE come from who started it."""

    def __init__(self, model_folder: Path, settings: LearnerSettings, *, seed: int = 0) -> None:
        """Load the model and start DeepSpeed. Raises ConfigError or SetupError when it cannot be trained here."""
        self.settings = settings
        self.num_updates = 0
        if settings.num_threads or settings.deterministic:
            torch.set_num_threads(settings.num_threads or 1)
        torch.use_deterministic_algorithms(settings.deterministic)
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.manual_seed(seed)
        self._ranks = Ranks(settings)
        self._scorer = load_scorer(
            model_folder,
            chunk_tokens=settings.logprob_chunk_tokens,
            activation_checkpointing=settings.activation_checkpointing,
            entropy_gradient=settings.entropy_beta > 0,
        )
        self._reference = None
        if settings.kl_beta:
            self._reference = Reference(
                settings.reference or model_folder,
                settings,
                vocab_size=len(self._scorer.head.weight),
                device=self._ranks.device,
            )
        self._trains = "all weights"
        if settings.lora:
            lora.add_adapters(self._scorer.model, settings.lora)
            self._trains = f"{settings.lora} of base {lora.base_digest(model_folder)}"
        self._trained = {name: p for name, p in self._scorer.named_parameters() if p.requires_grad}
        self._start_deepspeed()
        self._create_optimizer_state()

    @property
    def rank(self) -> int:
        """0 is the one that talks to broker and disk."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._ranks.world_size

    def _start_deepspeed(self) -> None:
        optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=0.0,  # set before each step
            betas=self.settings.adam_betas,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        import deepspeed

        self._engine, wrapped, _, _ = deepspeed.initialize(
            model=self._scorer,
            optimizer=optimizer,
            config=make_config(self.settings, sum(p.numel() for p in self._trained.values())),
            dist_init_required=False,
        )
        self._state = MasterState(wrapped, zero_stage=effective_stage(self.settings))

    # ---- training

    def step(self, minibatches: Sequence[Sequence[MicroBatch]], *, loss: str | None = None) -> StepReport:
        """One update: an optimizer step per minibatch, on this rank's micro-batches of a plan of matpo_learner.packing.

        `loss` is a key of loss.LOSSES; default: learner.loss. A minibatch that is not finite is left out and named in
        the report; if all are, the weights did not move and num_updates stays.
        """
        name = loss or self.settings.loss
        roles = next((batch.roles for minibatch in minibatches for batch in minibatch), ())
        need_prox = name == "decoupled_ppo" and self.settings.prox == "recompute"
        prox = [self.log_probs(minibatch) for minibatch in minibatches] if need_prox else None
        learning_rate = self._set_learning_rate()
        tally = diagnostics.Tally.empty(len(roles))
        taken: list[tuple[float, float]] = []  # loss, gradient norm
        skipped: dict[int, str] = {}
        for index, minibatch in enumerate(minibatches):
            step_loss, step_tally = self._accumulate(
                name, minibatch, None if prox is None else prox[index], progress=index / len(minibatches)
            )
            norm = self._apply()
            if not np.isfinite(step_loss):
                skipped[index] = f"the {name} loss is {step_loss}"
            elif not np.isfinite(norm):
                skipped[index] = "the gradient is not finite"
            else:
                taken.append((step_loss, norm))
                tally += step_tally
        self.num_updates += bool(taken)
        overall = tally.overall()
        mean_loss, mean_norm = np.mean(taken, axis=0).tolist() if taken else (0.0, 0.0)
        return StepReport(
            loss=mean_loss,
            grad_norm=mean_norm,
            learning_rate=learning_rate,
            num_steps=len(taken),
            num_tokens=overall.num_tokens,
            overall=overall,
            by_role_and_lag=tally.by_role_and_lag(roles),
            engine_gap=tally.engine_gap(),
            skipped=skipped,
        )

    def log_probs(self, microbatches: Sequence[MicroBatch]) -> list[NDArray[np.float32]]:
        """log pi of each micro-batch's targets, in the order given; no gradient."""
        with torch.no_grad():
            return [self._score(batch)[0].float().cpu().numpy()[: batch.num_targets] for batch in microbatches]

    def _accumulate(
        self,
        name: str,
        minibatch: Sequence[MicroBatch],
        prox: Sequence[NDArray[np.float32]] | None,
        *,
        progress: float = 0.0,
    ) -> tuple[float, diagnostics.Tally]:
        """Backward through a minibatch. Returns loss and tally over all ranks.

        When the loss is not finite, the gradient is not either, on all ranks alike.
        """
        if not minibatch:
            raise ValueError("a minibatch without micro-batches: packing gives every rank at least one")
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        tally: diagnostics.Tally | None = None
        for index, batch in enumerate(minibatch):
            is_last = index == len(minibatch) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            logprobs, entropy = self._score(batch)
            tokens = losses.Tokens.of(
                batch,
                device=self._ranks.device,
                prox=None if prox is None else prox[index],
                reference=None if self._reference is None else self._reference.log_probs(batch),
                progress=progress,
            )
            count = batch.num_targets
            loss, row = losses.weighted_sum(name, logprobs[:count], entropy[:count], tokens, self.settings)
            total += loss.detach().double()
            tally = row if tally is None else tally + row
            if is_last:
                total, tally = self._over_ranks(total, tally)
                if not torch.isfinite(total):  # a loss may be infinite and its gradient not: -log 0
                    loss = logprobs.sum() * float("nan")
            # DeepSpeed divides the gradient by the number of ranks; our weights already count all ranks.
            self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        assert tally is not None
        return float(total), tally.cpu()

    def _over_ranks(self, loss: Tensor, tally: diagnostics.Tally) -> tuple[Tensor, diagnostics.Tally]:
        packed = self._ranks.add_up(torch.cat([loss.reshape(1), tally.sums.flatten()]))
        sums = packed[1:].reshape(tally.sums.shape)
        return packed[0], diagnostics.Tally(sums=sums, peaks=self._ranks.largest(tally.peaks))

    def _score(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the targets; of an empty batch, one that stands for nothing."""
        empty = batch.num_tokens == 0  # still a forward pass: under ZeRO-3 the other ranks wait for it
        one = np.zeros(1, dtype=np.int64)
        names = ("token_ids", "position_ids", "predict_from", "target_ids")
        token_ids, position_ids, predict_from, target_ids = (
            torch.as_tensor(one if empty else getattr(batch, name), device=self._ranks.device) for name in names
        )
        lengths, rows = ([1], one) if empty else (batch.segment_lengths.tolist(), batch.segment_rows)
        packing = PackedAttention(lengths, rows, self._ranks.device)
        logprobs, entropy = self._engine(token_ids, position_ids, packing, predict_from, target_ids)
        return logprobs, entropy

    def _apply(self) -> float:
        """The optimizer step, if the gradient is finite. Returns the gradient's norm before clipping."""
        if self._state.is_sharded:
            self._engine.step()  # leaves out a gradient that is not finite itself, and says so by an infinite norm
            return float(self._engine.get_global_grad_norm() or 0.0)
        # DeepSpeed neither keeps a norm of plain float32 gradients nor looks at them.
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None]))
        if np.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant: a function of the number of updates, so there is nothing to save."""
        warmup = self.settings.warmup_updates
        rate = self.settings.learning_rate * min(1.0, (self.num_updates + 1) / (warmup + 1))
        self._state.set_learning_rate(rate)
        return rate

    def _create_optimizer_state(self) -> None:
        """An empty step at rate 0: ZeRO stages make AdamW's state at different times, and some count it as a step."""
        self._accumulate("sft", [_EMPTY], None)
        self._engine.step()
        self._state.num_steps = 0

    # ---- weights out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, CPU tensor) of every weight, one at a time, whole. A tied head comes under its own name.

        With adapters: merged, under the base model's names. Collective: every rank must run the iterator to its end.
        """
        for weight in lora.weights(self._scorer.model):
            with self._state.gathered(*weight.parameters):
                whole = weight.merged()
            yield weight.name, whole

    # ---- checkpoint

    def save(self, folder: Path) -> None:
        """Write master weights, moments, counters and random state into an existing folder; rank 0 does, with fsync."""
        state: dict[str, Tensor] = self._get_random_state()
        for name, parameter in self._trained.items():
            for key in (None, *MOMENTS):
                whole = self._state.get(parameter, key)
                if self.rank == 0:
                    state[f"{key or 'weight'}/{name}"] = whole.detach().float().cpu().clone().contiguous()
        if self.rank == 0:
            counters = Counters(num_updates=self.num_updates, num_steps=self._state.num_steps, trains=self._trains)
            engine_state.write(folder, state, counters)
        self._ranks.barrier()

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; only rank 0 looks into the folder.

        Raises CheckpointError (missing, hash, format, model), on all ranks and before any change.
        """
        file, refusal = None, None
        if self.rank == 0:
            try:
                file = self._read(folder)
            except CheckpointError as error:
                refusal = error
        if self._ranks.broadcast_bytes(b"refused" if refusal else b"sound") == b"refused":
            raise refusal or CheckpointError("rank 0 refused the checkpoint; its own message says why.")
        for name, parameter in self._trained.items():
            for key in (None, *MOMENTS):
                found = file.tensor(f"{key or 'weight'}/{name}") if file else None
                self._state.set(parameter, key, self._ranks.broadcast(found, _shape(parameter)))
        text = self._ranks.broadcast_bytes(file.counters.model_dump_json().encode() if file else None)
        counters = Counters.model_validate_json(text)
        self._state.num_steps = counters.num_steps
        self.num_updates = counters.num_updates
        self._set_random_state(file)
        self._ranks.barrier()

    def _read(self, folder: Path) -> StateFile:
        """The state in a folder, if it is of this model and of what is trained."""
        file = engine_state.read(folder)
        if file.counters.trains != self._trains:
            raise CheckpointError(
                f"{folder} is of a run that trains {file.counters.trains}, this one trains {self._trains}. "
                "Use the [learner.lora] that it was made with, or a new run.folder.",
                reason="model",
            )
        want = {f"{key}/{name}": _shape(p) for name, p in self._trained.items() for key in ("weight", *MOMENTS)}
        found = {name: shape for name, shape in file.shapes.items() if not name.startswith("rng/")}
        if wrong := sorted(name for name, _ in want.items() ^ found.items()):
            raise CheckpointError(
                f"{folder}: of another model (first difference: {wrong[0]}). Resume with the run's model.",
                reason="model",
            )
        return file

    def _get_random_state(self) -> dict[str, Tensor]:
        state = {"rng/cpu": torch.get_rng_state()}
        if self._ranks.device.type == "cuda":
            state["rng/cuda"] = torch.cuda.get_rng_state(self._ranks.device)
        return state

    def _set_random_state(self, file: StateFile | None) -> None:
        """Rank 0's generators, on every rank: as at the start, where all are seeded alike."""
        for name in self._get_random_state():
            mine = file.tensor(name).numpy().tobytes() if file and name in file.shapes else b""
            if saved := self._ranks.broadcast_bytes(mine if file else None):
                state = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
                if name == "rng/cpu":
                    torch.set_rng_state(state)
                else:
                    torch.cuda.set_rng_state(state, self._ranks.device)

    # ---- ranks

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank; the others pass None."""
        return self._ranks.broadcast_bytes(data)

    def close(self) -> None:
        """Free the model. The process group stays for the next engine of this process, until it exits."""
        self._engine.destroy()


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's, also where ZeRO-3 keeps only a part here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
