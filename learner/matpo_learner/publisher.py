"""From engine weights to snapshots.

Rules kept here, each with a test in tests/learner/test_publisher.py:
1. Versions only rise, also over crashes: a learner that resumes publishes its weights again above everything published.
2. The lineage (matpo_learner.lineage) is durable before the first snapshot that needs it.
3. A version holds the update that was announced for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from matpo import logs, snapshot
from matpo.settings import RunFile
from matpo_learner import lineage

GRACE_S = 300.0
"""A snapshot that is not the newest any more stays at least this long: an actor may be reading it."""
log = logs.get()


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
        self.version = max([known_version, *published]) + 1
        path = run_file.run.folder / lineage.FILE
        self.lineage = lineage.read(path).begun(self.version, update)
        lineage.write(path, self.lineage)

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
