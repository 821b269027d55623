"""Follow the learner's snapshots: pointer -> verify -> load into the engine while requests are in flight.

Rules kept here; each has a test in tests/actor/test_follower.py:
1. Nothing is loaded that matpo.snapshot.verify has not accepted; whatever is wrong, the old weights stay.
2. Versions only rise, and the learner epoch never falls. Versions in between are skipped.
3. A refused snapshot is counted by reason, logged once, and tried again with growing waits; a newer one at once.
4. A notice saves a poll; nothing depends on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from matpo import logs, snapshot
from matpo.errors import SnapshotError, TryAgainError
from matpo.metrics import Metrics
from matpo_actor.engines.base import Engine

MAX_BACK_OFF_S = 60.0
PROGRESS_S = 10.0  # between two lines that say what is waited for

log = logs.get()


class Follower:
    """Keeps one engine at the newest good snapshot in `folder`.

    `fingerprint` is that of the actor's own model folder (matpo.snapshot.fingerprint).
    """

    def __init__(self, folder: Path, engine: Engine, fingerprint: str, *, poll_s: float, metrics: Metrics) -> None:
        self._folder, self._engine, self._fingerprint = folder, engine, fingerprint
        self._poll_s, self._metrics = poll_s, metrics
        self._epoch = 0
        self._noticed = asyncio.Event()
        self._refused: tuple[int, str] | None = None  # the version that was refused last, and why
        self._num_refusals = 0
        self._retry_at_s = 0.0

    def notice(self, version: int) -> None:
        """The learner says that `version` is there: look now instead of at the next poll."""
        if version > self._engine.version:
            self._noticed.set()

    async def first(self, timeout_s: float) -> int:
        """Wait until a snapshot is loaded, saying so in the log. Returns its version. Raises TryAgainError."""
        began = said = time.monotonic()
        while not await self.check():
            now = time.monotonic()
            waited_s = now - began
            if waited_s >= timeout_s:
                raise TryAgainError(
                    f"no snapshot in {self._folder} after {waited_s:.0f} s. Is the learner running, with the same "
                    "[run] folder on a shared filesystem?",
                    reason="no_snapshot",
                )
            if now - said >= PROGRESS_S or said == began:
                said = now
                log.info("snapshot.waiting", folder=str(self._folder), waited_s=round(waited_s), timeout_s=timeout_s)
            await self._sleep(min(self._poll_s, timeout_s - waited_s))
        return self._engine.version

    async def run(self) -> None:
        """Follow for ever. Raises InfraError when the engine broke while it loaded."""
        while True:
            await self.check()
            await self._sleep(self._poll_s)

    async def check(self) -> bool:
        """Load the newest snapshot if it is newer than what is loaded. True: a new version is loaded now."""
        version = snapshot.newest(self._folder)
        if version is None or version == self._engine.version:
            return False
        if self._refused is not None and version == self._refused[0] and time.monotonic() < self._retry_at_s:
            return False
        began = time.monotonic()
        try:
            manifest = await asyncio.to_thread(
                snapshot.verify,
                self._folder,
                version,
                fingerprint=self._fingerprint,
                min_version=self._engine.version,
                min_epoch=self._epoch,
            )
            pause_s = await self._engine.load(snapshot.version_folder(self._folder, version), version)
        except SnapshotError as error:
            self._refuse(version, error)
            return False
        self._epoch, self._refused, self._num_refusals = manifest.epoch, None, 0
        load_s = time.monotonic() - began
        self._metrics.set("policy_version", version)
        self._metrics.observe("snapshot_load_seconds", load_s)
        self._metrics.observe("pause_seconds", pause_s)
        log.info("snapshot.loaded", version=version, seconds=round(load_s, 3), pause_s=round(pause_s, 3))
        return True

    def _refuse(self, version: int, error: SnapshotError) -> None:
        self._metrics.count("snapshot_errors_total", reason=error.reason)
        self._num_refusals = self._num_refusals + 1 if self._refused and self._refused[0] == version else 1
        back_off_s = min(self._poll_s * 2**self._num_refusals, MAX_BACK_OFF_S)
        self._retry_at_s = time.monotonic() + back_off_s
        if self._refused != (version, error.reason):
            log.warning(
                "snapshot.refused",
                version=version,
                reason=error.reason,
                error=str(error),
                kept_version=self._engine.version,
                retry_s=round(back_off_s, 1),
            )
        self._refused = (version, error.reason)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            # Not wait_for: on Python 3.11 it swallows a cancel that comes together with the event.
            async with asyncio.timeout(seconds):
                await self._noticed.wait()
        self._noticed.clear()
