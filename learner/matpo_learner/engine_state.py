"""The engine's part of a checkpoint on disk: whole tensors by name, counters, and a hash that is checked before use.

    state.safetensors   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME (float32) of what is trained, rng/cpu and rng/cuda
    engine.json         {"format": 2, "sha256": ..., "num_updates": ..., "num_steps": ..., "trains": ...}

No pickle. Making the folder appear all at once is matpo_learner.checkpoint's job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from matpo.errors import CheckpointError

FORMAT = 2
STATE_FILE, INDEX_FILE = "state.safetensors", "engine.json"


class Counters(BaseModel):
    """What is not a tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_updates: int
    num_steps: int  # of AdamW's bias correction
    trains: str  # "all weights", or which adapters of which base model


class _Index(Counters):
    format: int
    sha256: str


class StateFile:
    """A checked state file: tensors are read one at a time, so memory holds one of them."""

    def __init__(self, folder: Path, counters: Counters, file: Any) -> None:
        self.folder = folder
        self.counters = counters
        self._file = file
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def write(folder: Path, state: Mapping[str, Tensor], counters: Counters) -> None:
    """Write both files into an existing folder and fsync them."""
    save_file(dict(state), folder / STATE_FILE)
    index = _Index(format=FORMAT, sha256=_sha256(folder / STATE_FILE), **counters.model_dump())
    (folder / INDEX_FILE).write_text(index.model_dump_json(indent=1))
    for name in (STATE_FILE, INDEX_FILE):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(folder: Path) -> StateFile:
    """Check and open what `write` wrote. Raises CheckpointError (missing, format, hash)."""

    def refused(what: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{folder}: {what}. Use an older checkpoint.", reason=reason)

    try:
        content = json.loads((folder / INDEX_FILE).read_text())
        if content["format"] != FORMAT:
            raise refused(f"format {content['format']}, this release reads {FORMAT}", "format")
        index = _Index.model_validate(content)
        found = _sha256(folder / STATE_FILE)
        if found != index.sha256:
            raise refused(f"{STATE_FILE} has SHA-256 {found[:12]}, want {index.sha256[:12]}", "hash")
        counters = Counters(**index.model_dump(include=set(Counters.model_fields)))
        return StateFile(folder, counters, safetensors.safe_open(folder / STATE_FILE, framework="pt"))
    except OSError as error:
        raise refused(f"{error.filename} cannot be read: {error.strerror}", "missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError, safetensors.SafetensorError) as error:
        raise refused(f"torn: {error!r}", "format") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
