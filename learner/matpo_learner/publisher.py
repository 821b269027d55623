"""From engine weights to snapshots, and what the version numbers mean.

Rules kept here, each with a test in tests/learner/test_publisher.py:
1. Versions only rise, also over crashes: a learner that resumes publishes its weights again above everything published.
2. A version means one set of weights for ever. `Lineage` knows how many updates stand behind each version, so that lag
   is counted in updates even where a resume made the numbers jump (docs/decisions/0002-versions-after-resume.md).
3. Lineage is durable before the first snapshot that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from matpo import logs, snapshot
from matpo.episode import UNSAMPLED_VERSION
from matpo.errors import CheckpointError
from matpo.settings import RunFile

GRACE_S = 300.0
"""A snapshot that is not the newest any more stays at least this long: an actor may be reading it."""
log = logs.get()
_Branches = TypeAdapter(list[tuple[int, int]])


class Lineage:
    """Which update each version is of: branches of (first version, its update), one per learner process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._branches = _Branches.validate_json(path.read_bytes()) if path.exists() else []
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Restore it, or start in a new run.folder.") from None

    def begin(self, version: int, update: int) -> None:
        """A new process publishes from `version` on, which is the weights of `update`."""
        # A process that died before its first publish left a branch that no version is of.
        self._branches = [branch for branch in self._branches if branch[0] < version]
        self._branches.append((version, update))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        snapshot.replace_text(self._path, _Branches.dump_json(self._branches).decode())

    def update_of(self, version: int) -> int:
        """How many updates stand behind a version that was published."""
        first, update = max(branch for branch in self._branches if branch[0] <= version)
        return update + version - first

    def lag(self, update: int, min_version: int) -> int:
        """Updates between the oldest token's weights and those at `update`.

        0 for tokens of updates that a crash undid (they are ahead, not behind), and without any sampled token.
        """
        return 0 if min_version == UNSAMPLED_VERSION else max(0, update - self.update_of(min_version))

    def oldest_within(self, update: int, max_lag: int) -> int:
        """The smallest version whose lag at `update` is at most `max_lag`; every older one lags more."""
        ends = [first for first, _ in self._branches[1:]]
        for (first, at), end in zip(self._branches, [*ends, None], strict=True):
            version = first + max(0, update - max_lag - at)
            if end is None or version < end:
                return version
        raise AssertionError("a lineage has a branch once begin was called")


class Publisher:
    """Numbers and writes the snapshots of one learner process. Only rank 0 has one."""

    def __init__(self, run_file: RunFile, *, epoch: int, update: int, known_version: int) -> None:
        """`known_version` is the newest one that anybody has heard of (the checkpoint's, the broker's); -1 for none."""
        self._folder = run_file.snapshot_folder
        self._model_folder = run_file.model_folder
        self._dtype = getattr(torch, run_file.model.dtype)
        self._keep = run_file.learner.keep_snapshots
        self._epoch = epoch
        published = snapshot.versions(self._folder)
        self.lineage = Lineage(run_file.run.folder / "lineage.json")
        self.version = max([known_version, *published]) + 1
        self.lineage.begin(self.version, update)

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], *, update: int) -> int:
        """Write the weights of `update` as the next version; returns it."""
        if self.lineage.update_of(self.version) != update:
            raise ValueError(
                f"version {self.version} is to hold update {self.lineage.update_of(self.version)}, got {update}"
            )
        version = self.version
        began_s = time.monotonic()
        folder = snapshot.publish(
            self._folder,
            dict(tensors),
            version=version,
            epoch=self._epoch,
            update=update,
            model_folder=self._model_folder,
            dtype=self._dtype,
        )
        self.version += 1
        snapshot.collect(self._folder, keep=self._keep, grace_s=GRACE_S, now_s=time.time())
        log.info("snapshot.published", version=version, folder=str(folder), took_s=round(time.monotonic() - began_s, 3))
        return version
