"""The model in training: the only module that knows DeepSpeed.

Rules kept here, each with a test in tests/learner/test_deepspeed_engine.py:
1. The gradient of an optimizer step is the sum over all micro-batches of all ranks. DeepSpeed averages over ranks and
   accumulation steps; both are undone here, so packing and the number of ranks never change an update.
2. Each minibatch is exactly one optimizer step, whatever the number of micro-batches.
3. A loss or gradient that is not finite ends the update with an error; a loss does so before it reaches the weights.
4. A checkpoint holds whole tensors by name, no pickle; it resumes under another ZeRO stage or number of ranks.

Every method but the properties is collective: all ranks call it, in the same order, with the same plan.
deepspeed is imported late: it picks its device at import, and other modules read this one for types only.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from matpo.errors import CheckpointError, ConfigError, MatpoError, SetupError
from matpo.settings import LearnerSettings
from matpo_learner import engine_state
from matpo_learner import loss as losses
from matpo_learner.attention import PackedAttention
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import MicroBatch, pack_sft

COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank that is silent this long is dead. Ranks wait for rank 0 while it waits for groups, so this is generous."""
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state
OWNED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16",
}  # fmt: skip
"""Parts of the DeepSpeed config that would change what an update is; learner.* sets them."""


_EMPTY = pack_sft([], LearnerSettings())[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one update did, over all ranks. With several minibatches: mean loss and gradient norm, all tokens."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    num_steps: int  # optimizer steps of this update
    num_tokens: int  # sampled tokens in the loss
    overall: losses.Diagnostics
    by_role_and_lag: Mapping[tuple[str, str], losses.Diagnostics]  # ("planner", "3-4") -> ...


class LearnerEngine:
    """A causal LM under DeepSpeed. One per process; RANK, LOCAL_RANK and WORLD_SIZE come from DeepSpeed's launcher."""

    def __init__(self, model_folder: Path, settings: LearnerSettings, *, seed: int = 0) -> None:
        """Load the model and start DeepSpeed. Raises ConfigError or SetupError when it cannot be trained here."""
        self.settings = settings
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = _pick_device(settings)
        self.num_updates = 0
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        torch.manual_seed(seed)
        _start_process_group(self.device, self.rank, self.world_size)
        scorer = load_scorer(
            model_folder,
            chunk_tokens=settings.logprob_chunk_tokens,
            activation_checkpointing=settings.activation_checkpointing,
        )
        optimizer = torch.optim.AdamW(
            scorer.parameters(),
            lr=0.0,  # set before each step
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        import deepspeed

        num_parameters = sum(p.numel() for p in scorer.parameters())
        self._deepspeed = deepspeed
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=scorer,
            optimizer=optimizer,
            config=make_config(settings, num_parameters),
            dist_init_required=False,
        )
        self._scorer = scorer
        self._create_optimizer_state()

    # ---- training

    def step(self, minibatches: Sequence[Sequence[MicroBatch]], *, loss: str | None = None) -> StepReport:
        """One update: an optimizer step per minibatch, on this rank's micro-batches of a plan of matpo_learner.packing.

        `loss` is a key of loss.LOSSES; default: learner.loss. Raises MatpoError(not_finite).
        """
        name = loss or self.settings.loss
        roles = next((batch.roles for minibatch in minibatches for batch in minibatch), ())
        prox = [self.log_probs(minibatch) for minibatch in minibatches] if name == "decoupled_ppo" else None
        learning_rate = self._set_learning_rate()
        sums = np.zeros((len(roles) * len(losses.LAG_BUCKETS), len(losses.FIELDS)))
        total_loss = total_norm = 0.0
        for index, minibatch in enumerate(minibatches):
            step_loss, step_sums = self._accumulate(name, minibatch, None if prox is None else prox[index])
            if not np.isfinite(step_loss):
                raise MatpoError(
                    f"update {self.num_updates}: the {name} loss is {step_loss}. The weights were not changed "
                    "by it; resume from the last checkpoint with a lower learner.learning_rate.",
                    reason="not_finite",
                )
            total_loss += step_loss
            total_norm += self._apply()
            sums += step_sums
        self.num_updates += 1
        overall = losses.Diagnostics.of(sums.sum(axis=0))
        return StepReport(
            loss=total_loss / max(len(minibatches), 1),
            grad_norm=total_norm / max(len(minibatches), 1),
            learning_rate=learning_rate,
            num_steps=len(minibatches),
            num_tokens=overall.num_tokens,
            overall=overall,
            by_role_and_lag=losses.by_role_and_lag(sums, roles),
        )

    def log_probs(self, microbatches: Sequence[MicroBatch]) -> list[NDArray[np.float32]]:
        """log pi of each micro-batch's targets, in the order given; no gradient."""
        with torch.no_grad():
            return [self._score(batch)[0].float().cpu().numpy()[: batch.num_targets] for batch in microbatches]

    def _accumulate(
        self, name: str, minibatch: Sequence[MicroBatch], prox: Sequence[NDArray[np.float32]] | None
    ) -> tuple[float, NDArray[np.float64]]:
        """Backward through a minibatch. Returns loss and diagnostic sums over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums: Tensor | None = None
        for index, batch in enumerate(minibatch):
            self._engine.set_gradient_accumulation_boundary(index == len(minibatch) - 1)
            logprobs, entropy = self._score(batch)
            tokens = losses.Tokens.of(batch, device=self.device, prox=None if prox is None else prox[index])
            loss, row = losses.weighted_sum(name, logprobs, entropy, tokens, self.settings)
            # DeepSpeed divides the gradient by the number of ranks; our weights already count all ranks.
            self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
            total += loss.detach().double()
            sums = row if sums is None else sums + row
        if sums is None:
            raise ValueError("a minibatch without micro-batches: packing gives every rank at least one")
        if self.world_size > 1:
            packed = torch.cat([total.reshape(1), sums.flatten()])
            dist.all_reduce(packed)
            total, sums = packed[0], packed[1:].reshape(sums.shape)
        return float(total), sums.cpu().numpy()

    def _score(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        empty = batch.num_tokens == 0  # still a forward pass: under ZeRO-3 the other ranks wait for it
        token_ids = np.zeros(1, dtype=np.int64) if empty else batch.token_ids
        position_ids = np.zeros(1, dtype=np.int64) if empty else batch.position_ids
        columns = (torch.as_tensor(c, device=self.device) for c in (token_ids, position_ids))
        targets = (torch.as_tensor(c, device=self.device) for c in (batch.predict_from, batch.target_ids))
        lengths, rows = ([1], token_ids) if empty else (batch.segment_lengths.tolist(), batch.segment_rows)
        logprobs, entropy = self._engine(*columns, PackedAttention(lengths, rows, self.device), *targets)
        return logprobs, entropy

    def _apply(self) -> float:
        """The optimizer step. Returns the gradient norm before clipping."""
        norm = None
        if not self._sharded:  # DeepSpeed keeps no norm for plain float32
            grads = [p.grad for p in self._scorer.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            _check_norm(norm, self.num_updates)
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            _check_norm(norm, self.num_updates)
        return norm

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant: a function of the number of updates, so there is nothing to save."""
        warmup = self.settings.warmup_updates
        rate = self.settings.learning_rate * min(1.0, (self.num_updates + 1) / (warmup + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _create_optimizer_state(self) -> None:
        """An empty step at rate 0: ZeRO stages make AdamW's state at different times, and some count it as a step."""
        self._accumulate("sft", [_EMPTY], None)
        self._engine.step()
        self._set_num_steps(0)

    # ---- weights out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, CPU tensor) of every weight, one at a time, whole. A tied head comes under its own name.

        Collective: every rank must run the iterator to its end.
        """
        model = self._scorer.model
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with self._gathered(parameter):
                whole = parameter.detach().to("cpu", copy=True)
            yield name, whole

    # ---- checkpoint

    def save(self, folder: Path) -> None:
        """Write master weights, moments, counters and random state into an existing folder; rank 0 does, with fsync."""
        state: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
        for name, parameter in self._scorer.named_parameters():
            for key in (None, *MOMENTS):
                whole = self._get(parameter, key)
                if self.rank == 0:
                    state[f"{key or 'weight'}/{name}"] = whole.detach().float().cpu().clone().contiguous()
        if self.rank == 0:
            engine_state.write(folder, state, num_updates=self.num_updates, num_steps=self._get_num_steps())
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote. Raises CheckpointError (missing, hash, format, model) before any change."""
        state, counters = engine_state.read(folder)
        parameters = dict(self._scorer.named_parameters())
        want = {f"{key}/{name}" for name in parameters for key in ("weight", *MOMENTS)} | {"rng/cpu"}
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        wrong = sorted(want ^ set(state)) or [n for n, s in shapes.items() if tuple(state[f"weight/{n}"].shape) != s]
        if wrong:
            raise CheckpointError(
                f"{folder}: of another model (first difference: {wrong[0]}). Resume with the run's model.",
                reason="model",
            )
        for name, parameter in parameters.items():
            for key in (None, *MOMENTS):
                self._set(parameter, key, state[f"{key or 'weight'}/{name}"].to(self.device))
        self._set_num_steps(counters["num_steps"])
        self.num_updates = counters["num_updates"]
        torch.set_rng_state(state["rng/cpu"])
        dist.barrier()

    # ---- ranks

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank; the others pass None."""
        if self.world_size == 1:
            return data or b""
        size = torch.tensor([len(data or b"")], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0)
        content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0 and data:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, src=0)
        return bytes(content.cpu().numpy())

    def close(self) -> None:
        """Free the model. The process group stays for the next engine of this process, until it exits."""
        self._engine.destroy()

    # ---- one way to reach a whole tensor under each ZeRO stage

    @property
    def _sharded(self) -> bool:
        """True when DeepSpeed keeps float32 masters of its own (ZeRO 1-3, or bfloat16)."""
        return self._optimizer is not self._base_optimizer

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner

    def _gathered(self, parameter: torch.nn.Parameter) -> Any:
        if self.settings.zero_stage == 3:
            return self._deepspeed.zero.GatheredParameters([parameter])
        return nullcontext()

    def _get(self, parameter: torch.nn.Parameter, key: str | None) -> Tensor:
        if not self._sharded:
            return parameter if key is None else self._base_optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, "DeepSpeed keeps no master of a trained parameter"
        return whole

    def _set(self, parameter: torch.nn.Parameter, key: str | None, value: Tensor) -> None:
        if self._sharded:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if key is None:
                safe_set_full_fp32_param(parameter, value)
                with self._gathered_for_write(parameter):
                    parameter.data.copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        elif key is None:
            parameter.data.copy_(value)
        else:
            self._base_optimizer.state[parameter][key].copy_(value)

    def _gathered_for_write(self, parameter: torch.nn.Parameter) -> Any:
        if self.settings.zero_stage == 3:
            return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        return nullcontext()

    def _get_num_steps(self) -> int:
        return max((int(state["step"]) for state in self._base_optimizer.state.values()), default=0)

    def _set_num_steps(self, num_steps: int) -> None:
        for state in self._base_optimizer.state.values():
            state["step"].fill_(num_steps)


def make_config(settings: LearnerSettings, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed config, with learner.deepspeed merged over it. Raises ConfigError for keys that learner.* owns."""
    taken = sorted(OWNED_KEYS & set(settings.deepspeed))
    if taken:
        raise ConfigError(
            f"learner.deepspeed may not set {', '.join(taken)}: it would change what an update is. "
            "Use the keys of [learner]."
        )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
        "zero_optimization": {
            # Stage 0 keeps no float32 masters for bfloat16 weights; stage 1 on one rank is the same and does.
            "stage": max(settings.zero_stage, 1 if settings.dtype == "bfloat16" else 0),
            # Buckets are allocated whole: the default of 500M numbers is 2 GB for a model of any size.
            "reduce_bucket_size": min(max(num_parameters, 1 << 16), 500_000_000),
            "allgather_bucket_size": min(max(num_parameters, 1 << 16), 500_000_000),
        },
        "bf16": {"enabled": settings.dtype == "bfloat16"},
    }
    return _merged(config, settings.deepspeed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _pick_device(settings: LearnerSettings) -> torch.device:
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SetupError(
            f'learner.device="{settings.device}", but torch {torch.__version__} sees no GPU. '
            'Set learner.device = "cpu".'
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _start_process_group(device: torch.device, rank: int, world_size: int) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when deepspeed is imported
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for one rank without its launcher
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's own calls, on every collective.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*deprecated", category=FutureWarning)
    import deepspeed

    if device.type == "cpu":
        # A C++ extension that only speeds up inference collectives; compiling it takes a compiler and 25 s.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        # One rank needs no port: a store in memory.
        where = {"store": dist.HashStore()} if world_size == 1 else {"init_method": "env://"}
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            **where,
        )
        atexit.register(dist.destroy_process_group)
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), dist_init_required=False, auto_mpi_discovery=False, verbose=False
    )


def _check_norm(norm: float, update: int) -> None:
    if not np.isfinite(norm):
        raise MatpoError(
            f"update {update}: the gradient norm is {norm}. Resume from the last checkpoint with a lower "
            "learner.learning_rate.",
            reason="not_finite",
        )
