"""The ranks of one learner: which device this one has, how they find each other, what rank 0 tells the others.

Rules kept here, each with a test in tests/learner/test_deepspeed_engine.py or tests/flow/test_learner_process.py:
1. Ranks that we start on one machine meet in a file and talk over loopback: nothing listens for other machines.
2. Ranks that somebody else started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set: DeepSpeed's launcher,
   torchrun, Slurm) meet where MASTER_ADDR says.
3. One rank needs neither.

deepspeed is imported late: it picks its device at import.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from matpo.errors import SetupError
from matpo.settings import LearnerSettings

COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank that is silent this long is dead. While rank 0 waits for the broker it says so to the others, well within."""
RENDEZVOUS_FILE = "MATPO_LEARNER_RENDEZVOUS"
"""Environment variable: the file in which the ranks of one machine meet."""


class Ranks:
    """This process among the ranks. Every method is collective."""

    def __init__(self, settings: LearnerSettings) -> None:
        """Meet the others. Raises SetupError when the device that is asked for is not here."""
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = _pick_device(settings)
        _start_process_group(self.device, self.rank, self.world_size)

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

    def broadcast(self, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Rank 0's float32 tensor, on every rank's device; the others pass None."""
        if tensor is None:
            tensor = torch.empty(shape, dtype=torch.float32, device=self.device)
        tensor = tensor.to(self.device).contiguous()
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks, number by number."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()


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
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            **_meeting_place(world_size),
        )
        atexit.register(dist.destroy_process_group)
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), dist_init_required=False, auto_mpi_discovery=False, verbose=False
    )


def _meeting_place(world_size: int) -> dict[str, Any]:
    if world_size == 1:
        return {"store": dist.HashStore()}
    if path := os.environ.get(RENDEZVOUS_FILE):
        return {"store": dist.FileStore(path, world_size)}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SetupError(
            f"WORLD_SIZE={world_size}, but {' and '.join(missing)} not set: the ranks cannot find each other. "
            "Start them with torchrun or DeepSpeed's launcher, or leave RANK and WORLD_SIZE out and set "
            "learner.num_ranks.",
            reason="rendezvous",
        )
    return {"init_method": "env://"}
