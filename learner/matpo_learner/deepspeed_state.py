"""One way to reach a whole tensor, whatever DeepSpeed did with it: plain, sharded (ZeRO 1-3), offloaded to the CPU.

Rules kept here, each with a test in tests/learner/test_deepspeed_engine.py:
1. What `set` wrote, `get` gives back bit for bit, under another ZeRO stage or number of ranks too.
2. Both are collective: all ranks call them for the same parameter, in the same order.

What training reads in between (low-precision copies, gradients) is DeepSpeed's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state


class MasterState:
    """float32 masters and AdamW's state of a model that deepspeed.initialize has taken over."""

    def __init__(self, optimizer: Any, *, zero_stage: int) -> None:
        """`optimizer` is what deepspeed.initialize returned; `zero_stage` what it was given."""
        self._optimizer = optimizer
        self._base: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._zero_stage = zero_stage

    @property
    def is_sharded(self) -> bool:
        """True when DeepSpeed keeps float32 masters of its own (ZeRO 1-3, and so always for bfloat16)."""
        return self._optimizer is not self._base

    def gathered(self, *parameters: torch.nn.Parameter, write: bool = False) -> Any:
        """A context in which parameters are whole. With `write`, rank 0's content is everybody's afterwards."""
        if self._zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    def get(self, parameter: torch.nn.Parameter, key: str | None) -> Tensor:
        """The whole float32 master (key None) or moment (a key of MOMENTS) of a trained parameter."""
        if not self.is_sharded:
            return parameter if key is None else self._base.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, "DeepSpeed keeps no master of a trained parameter"
        return whole

    def set(self, parameter: torch.nn.Parameter, key: str | None, value: Tensor) -> None:
        """Write what `get` reads; every rank has the whole value."""
        if not self.is_sharded:
            target = parameter.data if key is None else self._base.state[parameter][key]
            target.copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is not None:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        safe_set_full_fp32_param(parameter, value)
        with self.gathered(parameter, write=True):
            parameter.data.copy_(value)

    @property
    def num_steps(self) -> int:
        """How many steps AdamW's bias correction has seen."""
        return max((int(state["step"]) for state in self._base.state.values()), default=0)

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for state in self._base.state.values():
            state["step"].fill_(value)

    def set_learning_rate(self, rate: float) -> None:
        """For the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
