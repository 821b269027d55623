"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: the base weights rest, A and B are trained.

    y = W x + (alpha / rank) B A x        W frozen; A random, B zero at the start, so a run begins at the base model

Rules kept here, each with a test in tests/learner/test_lora.py:
1. Only A and B have a gradient; embeddings and the LM head are never adapted (the head's weight is used directly).
2. What comes out has the base model's names and shapes: W + (alpha / rank) B A, merged in float32.

Adapters are put into the model itself, without peft's wrapper around it: names, the packed attention and the head
stay where they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from matpo.errors import ConfigError
from matpo.settings import LoraSettings

ADAPTER = "default"  # peft's name for the only one
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One weight of the base model, under its Hugging Face name, with what is added to it."""

    name: str
    base: nn.Parameter
    a: nn.Parameter | None = None  # [rank, in]
    b: nn.Parameter | None = None  # [out, rank]
    scale: float = 0.0  # alpha / rank

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What `merged` reads. Under ZeRO-3 all of them have to be gathered."""
        return [p for p in (self.base, self.a, self.b) if p is not None]

    def merged(self) -> Tensor:
        """The weight as the model behaves, on the CPU; a copy."""
        whole = self.base.detach().to("cpu", copy=True)
        if self.a is None or self.b is None:
            return whole
        a, b = (p.detach().cpu().float() for p in (self.a, self.b))
        return whole.float().add_(b @ a, alpha=self.scale)


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Put adapters into a Hugging Face causal LM and freeze the rest.

    Raises ConfigError when target_modules names no linear layer, or the head or embeddings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        bias="none",
    )
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    named = f"learner.lora.target_modules={settings.target_modules}"
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"{named}: {error} Linear layers of this model: {', '.join(linear)}.") from None
    kept: Any = model
    for what, module in (("the LM head", kept.get_output_embeddings()), ("embeddings", kept.get_input_embeddings())):
        if hasattr(module, "base_layer"):
            raise ConfigError(f"{named} adapts {what}, which stays as it is. Linear layers: {', '.join(linear)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))


def weights(model: nn.Module) -> Iterator[Weight]:
    """Every weight of the base model; a tied head comes under its own name too. Works with and without adapters."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _is_adapter(name):
            continue
        owner, is_base, leaf = name.rpartition(".base_layer.")
        layer: Any = layers.get(owner) if is_base else None
        if layer is None or leaf != "weight":
            yield Weight(name=f"{owner}.{leaf}" if is_base else name, base=parameter)
            continue
        yield Weight(
            name=f"{owner}.{leaf}",
            base=parameter,
            a=layer.lora_A[ADAPTER].weight,
            b=layer.lora_B[ADAPTER].weight,
            scale=layer.scaling[ADAPTER],
        )


def base_digest(model_folder: Path) -> str:
    """BLAKE2b-128 of name, length, first and last MiB of each weight file: adapters belong to one base model.

    A sample, so that a large model is not read twice at each start: it tells models apart, not a flipped bit.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(model_folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, max(0, size - _SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
