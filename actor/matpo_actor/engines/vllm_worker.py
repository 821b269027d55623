"""What runs inside vLLM's own processes: read weights back after a load, and die with the actor.

vLLM imports this module by name (`worker_extension_cls`) in each worker process, and nothing else does. The import
itself starts the watch on the actor, so it covers most of the start-up. Seen with vLLM 0.32: after kill -9 of the actor
its EngineCore process lives on for ever, and so does the worker under it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

ACTOR_PID = "MATPO_ACTOR_PID"  # in the environment of vLLM's processes
WATCH_S = 0.5


def _die_with(actor: int) -> None:
    """End this process, and EngineCore if it stands between the actor and us, as soon as the actor is gone."""
    parent = multiprocessing.parent_process()
    try:
        process = psutil.Process(actor)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_S)
    except psutil.NoSuchProcess:
        pass
    try:
        if parent is not None and parent.pid not in (None, actor):
            psutil.Process(parent.pid).kill()
    except psutil.NoSuchProcess:
        pass
    os._exit(1)  # nothing to save; an orderly end would wait for a peer that is gone


if ACTOR_PID in os.environ:
    threading.Thread(target=_die_with, args=(int(os.environ[ACTOR_PID]),), name="matpo-watch", daemon=True).start()


class WorkerExtension:
    """Becomes a base class of vLLM's worker: the methods are called by `collective_rpc`."""

    model_runner: Any

    def matpo_compare(self, folder: str) -> tuple[list[str], list[str]]:
        """Compare this worker's weights with a snapshot's, element by element. Returns (different, not comparable).

        vLLM fuses some tensors (q, k and v are one), pads the vocabulary, and may split both over ranks.
        """
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        model = self.model_runner.get_model()
        fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        different, unknown = [], []
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(p, framework="pt")) for p in sorted(Path(folder).glob("*.safetensors"))
            ]
            where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
            for name, weight in model.named_parameters():
                sources = _sources(name, fused)
                parts = [where[n].get_tensor(n) for n in sources if n in where]
                layer = model.get_submodule(name.rpartition(".")[0])
                repacked = weight.numel() == 0 and hasattr(layer, "output_size_per_partition")
                shape = (layer.output_size_per_partition, layer.input_size_per_partition) if repacked else weight.shape
                expected = _expected(parts, torch.Size(shape), rank, size) if len(parts) == len(sources) else None
                if expected is None:
                    unknown.append(name)
                elif not (_acts_as(layer, expected) if repacked else _equals(weight, expected)):
                    different.append(name)
        return different, unknown


def _equals(weight: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.equal(weight[: len(expected)], expected.to(weight.device, weight.dtype)))


def _acts_as(layer: Any, expected: torch.Tensor) -> bool:
    """Whether a layer whose weight was packed for a CPU library multiplies by `expected`, up to rounding."""
    expected = expected.to(layer.weight.dtype)
    x = torch.randn(4, expected.shape[1], generator=torch.Generator().manual_seed(0)).to(expected.dtype)
    got, want = layer.quant_method.apply(layer, x, None), torch.nn.functional.linear(x, expected)
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def _sources(name: str, fused: dict[str, list[str]]) -> list[str]:
    """Names in the snapshot of what one of vLLM's parameters is made of, in order."""
    for whole, parts in fused.items():
        if f".{whole}." in name:
            return [name.replace(f".{whole}.", f".{part}.") for part in parts]
    return [name]


def _expected(parts: list[torch.Tensor], shape: torch.Size, rank: int, size: int) -> torch.Tensor | None:
    """The parts, this rank's share of each, one above the other. None if no split gives the shape."""
    for dim in (None, 0, 1):
        if dim is None:
            shares = parts
        elif any(p.dim() <= dim or p.shape[dim] % size for p in parts):
            continue
        else:
            shares = [p.chunk(size, dim)[rank] for p in parts]
        whole = torch.cat(shares) if len(shares) > 1 else shares[0]
        is_padded = len(parts) == 1 and size == 1 and len(shape) == 2 and whole.shape[0] < shape[0]
        if whole.shape == shape or (is_padded and whole.shape[1:] == shape[1:]):
            return whole
    return None
