"""Log-probabilities of sampled tokens from packed rows, without leaks and without [T, V] logits.

Rules kept here, each with a test in tests/learner/test_logprobs.py:
1. No token sees another segment of its row: attention runs segment by segment (matpo_learner.attention).
2. Logits exist for at most `chunk_tokens` rows at a time, in the forward and in the backward pass, and only at
   positions that predict a sampled token. The backward pass makes them again.
3. Softmax and logits are float32 (float64 for a float64 model), whatever the weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from matpo.errors import ConfigError
from matpo_learner.attention import ATTENTION, PackedAttention

LAYERS_WITHOUT_LEAK = {"full_attention", "sliding_attention"}
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping")
"""Config keys of models that change logits after the head. We use the head's weight ourselves, so these are refused."""


class _ChunkedLogProbs(torch.autograd.Function):  # type: ignore[misc]
    """log softmax(hidden @ weight.T) at the targets, and the entropy, a chunk of rows at a time.

    d log p_y / d logits = onehot(y) - p and d H / d logits = -p (log p + H), so the backward pass needs only the
    log-normaliser and the entropy of each row. The entropy has a gradient if asked for; otherwise it costs none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, normaliser = (hidden.new_empty(len(targets), dtype=kind) for _ in range(3))
        for rows in _chunks(len(targets), chunk_tokens):
            logits = _logits(hidden[rows], weight)
            normaliser[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - normaliser[rows]
            mean_logit = torch.linalg.vecdot((logits - normaliser[rows, None]).exp_(), logits)
            entropy[rows] = normaliser[rows] - mean_logit
        ctx.save_for_backward(hidden, weight, targets, normaliser, *([entropy] if entropy_gradient else []))
        ctx.chunk_tokens = chunk_tokens
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, normaliser, *entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        trained = ctx.needs_input_grad[1]  # not with adapters: the head rests
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if trained else None
        for rows in _chunks(len(targets), ctx.chunk_tokens):
            grad = grad_logprobs[rows, None]
            grad_logits = _logits(hidden[rows], weight) - normaliser[rows, None]  # log p, so far
            if entropy:
                towards_uniform = (grad_logits + entropy[0][rows, None]).mul_(grad_entropy[rows, None]).add_(grad)
                grad_logits.exp_().mul_(towards_uniform.neg_())
            else:
                grad_logits.exp_().mul_(-grad)
            grad_logits.scatter_add_(-1, targets[rows, None], grad.to(grad_logits.dtype))
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(low, min(low + size, total)) for low in range(0, total, size)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[rows, V] in float32 at least. Low-precision inputs are multiplied exactly and summed in float32."""
    if hidden.dtype in (torch.bfloat16, torch.float16):
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T
    return hidden @ weight.T


class Head(nn.Module):  # type: ignore[misc]
    """The LM head. A module of its own, called once per row, so that ZeRO-3 gathers its weight once and in order."""

    def __init__(self, weight: nn.Parameter, chunk_tokens: int, *, entropy_gradient: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.chunk_tokens = chunk_tokens
        self.entropy_gradient = entropy_gradient

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [M, H], targets [M] -> log-probs [M] and entropies [M], in nats."""
        logprobs, entropy = _ChunkedLogProbs.apply(
            hidden, self.weight, targets, self.chunk_tokens, self.entropy_gradient
        )
        return logprobs, entropy


class Scorer(nn.Module):  # type: ignore[misc]
    """A Hugging Face causal LM that scores the sampled tokens of one packed row.

    The entropy has a gradient only with `entropy_gradient`.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int, entropy_gradient: bool = False) -> None:
        super().__init__()
        _check_supported(model)
        self.model = model
        self.head = Head(model.get_output_embeddings().weight, chunk_tokens, entropy_gradient=entropy_gradient)

    def forward(
        self,
        token_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        packing: PackedAttention,  # which segments the T tokens belong to
        predict_from: Tensor,  # [M]
        target_ids: Tensor,  # [M]
    ) -> tuple[Tensor, Tensor]:
        """log pi of each target and the entropy where it was sampled: [M], [M], nats. T is at least 1; M may be 0."""
        hidden = self.model.base_model(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            packing=packing,
            use_cache=False,
        ).last_hidden_state
        # Segments that share a prefix often predict the same token from it: one softmax does for all of them.
        pairs, place = torch.unique(predict_from << 32 | target_ids, return_inverse=True)
        logprobs, entropy = self.head(hidden[0].index_select(0, pairs >> 32), pairs & 0xFFFFFFFF)
        return logprobs[place], entropy[place]


def load_scorer(
    model_folder: Path, *, chunk_tokens: int, activation_checkpointing: bool = False, entropy_gradient: bool = False
) -> Scorer:
    """Read a model folder in float32, on the CPU.

    Raises ConfigError when weights are missing, or when the architecture does something that packing cannot follow.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
        local_files_only=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[:5])
        raise ConfigError(
            f"model.path={model_folder}: weights are missing or of another shape: {names}. Name a whole model."
        )
    _remove_dropout(model)  # mu was recorded without it
    model.train(activation_checkpointing)  # transformers checkpoints only in training mode
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Scorer(model, chunk_tokens=chunk_tokens, entropy_gradient=entropy_gradient)


def _remove_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _check_supported(model: nn.Module) -> None:
    config: Any = model.config
    if config._attn_implementation != ATTENTION:
        raise ValueError(
            f'attn_implementation is "{config._attn_implementation}", want "{ATTENTION}": segments would see each other'
        )
    found = {key: getattr(config, key, None) for key in LOGIT_TRANSFORMS}
    problems = [f"{key}={value}" for key, value in found.items() if value not in (None, 1)]
    problems += sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS_WITHOUT_LEAK)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        problems.append("an LM head with a bias")
    if problems:
        raise ConfigError(
            f"model.path: {config.model_type} has {', '.join(problems)}, which the packed forward does not do. "
            "Use a model with plain (or sliding-window) attention and a plain LM head, such as Qwen3."
        )
