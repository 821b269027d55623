"""What every engine does: token ids in; ids, log-probs and versions out; load weights while requests are in flight."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

ENGINE_DEAD = "engine_dead"
"""Reason of an InfraError after which nothing can be sampled: the actor ends, and its supervisor starts it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One turn as it was sampled. The three columns have one entry per sampled token, the stop token included.

    `logprobs` are natural logs under the plain softmax (temperature 1). `versions` rise when weights were loaded in
    the middle of the turn.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """One sampler. `version` is that of the weights that the next token will be sampled with; -1 before any load."""

    version: int

    async def start(self) -> None:
        """Get ready to sample. Raises SetupError when the engine cannot run here."""

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Collection[int], seed: int | None = None
    ) -> Sampled:
        """Sample one turn. Cancelling the task frees what it holds. `seed` repeats a turn where the engine can.

        Raises InfraError if the engine broke, with reason ENGINE_DEAD when it will not come back by itself.
        """

    async def load(self, folder: Path, version: int) -> float:
        """Load a snapshot that matpo.snapshot.verify has accepted, requests in flight carried on.

        Returns the seconds for which sampling paused. Raises SnapshotError and keeps the old weights if the snapshot
        does not fit; raises InfraError if the engine is broken and has to be started again.
        """

    async def close(self) -> None:
        """Free everything."""
