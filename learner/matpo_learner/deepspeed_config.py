"""The DeepSpeed config of a run: ours, with the user's file and table merged over it. Pure: DeepSpeed is not loaded.

Rules kept here, each with a test in tests/learner/test_deepspeed_config.py:
1. learner.deepspeed_config (a JSON file, as DeepSpeed's own documentation has them) is merged over our config, and
   learner.deepspeed (the table of the run file) over both.
2. What [learner] decides stays decided there. A key that says the same, or "auto", is taken as agreement; one that
   says something else is refused, with both values named.
3. Offload goes to the CPU. What cannot be read back whole for snapshots and checkpoints is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from matpo.errors import ConfigError
from matpo.settings import LearnerSettings

AUTO = "auto"
MAX_BUCKET_SIZE = 500_000_000  # numbers; DeepSpeed's default
_MISSING = object()


def make_config(settings: LearnerSettings, num_parameters: int) -> dict[str, Any]:
    """The whole config. Raises ConfigError with everything in it that contradicts [learner]."""
    bucket_size = min(max(num_parameters, 1 << 16), MAX_BUCKET_SIZE)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": effective_stage(settings),
            # Buckets are allocated whole: the default of 500M numbers is 2 GB for a model of any size.
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
        },
        "zero_force_ds_cpu_optimizer": False,  # our AdamW also where the optimizer is offloaded
        "bf16": {"enabled": settings.dtype == "bfloat16"},
    }
    theirs = _merged(_read(settings), settings.deepspeed)
    problems = list(_contradictions(theirs, settings))
    if problems:
        raise ConfigError("\n".join(problems))
    return _merged(ours, theirs)


def effective_stage(settings: LearnerSettings) -> int:
    """The ZeRO stage that DeepSpeed is given."""
    # Stage 0 keeps no float32 masters for bfloat16 weights; stage 1 on one rank is the same and does.
    return max(settings.zero_stage, 1 if settings.dtype == "bfloat16" else 0)


def _read(settings: LearnerSettings) -> dict[str, Any]:
    path = settings.deepspeed_config
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"learner.deepspeed_config={path}: {error}. Name a JSON file.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"learner.deepspeed_config={path} holds no JSON object. Name a DeepSpeed config.")
    return content


def _contradictions(theirs: Mapping[str, Any], settings: LearnerSettings) -> Iterator[str]:
    """A sentence for each key that would change what an update is, and says something else than [learner]."""
    stage = effective_stage(settings)
    for key, ours, where in (
        ("gradient_clipping", settings.max_grad_norm, f"learner.max_grad_norm is {settings.max_grad_norm:g}"),
        ("zero_optimization.stage", stage, f"learner.zero_stage is {settings.zero_stage}"),
        ("bf16.enabled", settings.dtype == "bfloat16", f'learner.dtype is "{settings.dtype}"'),
        ("bf16.check_grad_overflow", True, "a gradient that is not finite is never applied"),
        ("fp16.enabled", False, f'learner.dtype is "{settings.dtype}"'),
        ("torch_autocast.enabled", False, f'learner.dtype is "{settings.dtype}"'),
        ("gradient_accumulation_steps", 1, "learner.microbatch_tokens decides how a step is cut, and the sum is exact"),
        ("train_micro_batch_size_per_gpu", 1, "a micro-batch is one packed row of learner.microbatch_tokens"),
    ):
        value = _find(theirs, key)
        if value not in (_MISSING, AUTO, ours):
            yield f"DeepSpeed config: {key} is {json.dumps(value)}, but {where}. Remove one of them."
    for key, where in (
        ("train_batch_size", "learner.groups_per_update and learner.group_size decide what an update holds"),
        ("optimizer", "the optimizer is AdamW with learner.learning_rate, adam_betas and weight_decay"),
        ("scheduler", "learner.learning_rate and warmup_updates decide the rate"),
    ):
        value = _find(theirs, key)
        if value not in (_MISSING, AUTO):
            yield f"DeepSpeed config: {key} is {json.dumps(value)}, but {where}. Remove it."
    for key in ("offload_optimizer", "offload_param"):
        device = _find(theirs, f"zero_optimization.{key}.device")
        if device not in (_MISSING, "none", "cpu"):
            yield f"DeepSpeed config: zero_optimization.{key}.device is {json.dumps(device)}: offload to the CPU only."
        needed = 1 if key == "offload_optimizer" else 3
        if device == "cpu" and stage < needed:
            yield (
                f"DeepSpeed config: zero_optimization.{key}.device is {json.dumps(device)}, but learner.zero_stage is "
                f"{settings.zero_stage}. Set learner.zero_stage >= {needed}."
            )


def _find(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; "auto" leaves to us what it stands for."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = result.get(key)
            result[key] = _merged(below if isinstance(below, Mapping) else {}, value)
        elif value != AUTO:
            result[key] = value
    return result
