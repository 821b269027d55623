"""The engine's part of a checkpoint on disk: whole tensors by name, counters, and a hash that is checked before use.

    state.safetensors   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME (float32) and rng/cpu
    engine.json         {"format": 1, "sha256": ..., "num_updates": ..., "num_steps": ...}

No pickle. Making the folder appear all at once is matpo_learner.checkpoint's job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matpo.errors import CheckpointError

FORMAT = 1
STATE_FILE, INDEX_FILE = "state.safetensors", "engine.json"


def write(folder: Path, state: Mapping[str, Tensor], **counters: int) -> None:
    """Write both files into an existing folder and fsync them."""
    save_file(dict(state), folder / STATE_FILE)
    index = {"format": FORMAT, "sha256": _sha256(folder / STATE_FILE), **counters}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    for name in (STATE_FILE, INDEX_FILE):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(state, counters). Raises CheckpointError (missing, format, hash)."""

    def refused(what: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{folder}: {what}. Use an older checkpoint.", reason=reason)

    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        found, wanted = _sha256(folder / STATE_FILE), index["sha256"]
        if index["format"] != FORMAT:
            raise refused(f"format {index['format']}, this release reads {FORMAT}", "format")
        if found != wanted:
            raise refused(f"{STATE_FILE} has SHA-256 {found[:12]}, want {wanted[:12]}", "hash")
        return load_file(folder / STATE_FILE), {name: int(index[name]) for name in ("num_updates", "num_steps")}
    except OSError as error:
        raise refused(f"{error.filename} cannot be read: {error.strerror}", "missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise refused(f"torn: {error!r}", "format") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
