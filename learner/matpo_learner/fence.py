"""Who may write into a run folder: the learner with the highest epoch, and nobody that came before it.

The broker refuses an older learner as soon as a newer one has said hello. But what a learner has in hand it can finish
without the broker, so the folder has a fence of its own.

Rules kept here, each with a test in tests/learner/test_fence.py:
1. Whoever takes over waits until a write in progress is complete; from then on every older learner's write is refused
   before it begins.
2. Epochs only rise, also over crashes.

How: one small file with the epoch, locked (flock) during each write and while it changes. It needs a file system whose
locks hold between the machines that learners run on; on one machine every file system's do.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matpo.errors import RefusedError

NAME = "learner.epoch"
POLL_S = 0.1
_DIGITS = 20  # of fixed width: overwritten in place, never empty in between


class Fence:
    """The right of one learner to write. Freed with `close`, or by the process's end."""

    def __init__(self, folder: Path, epoch: int, idle: Callable[[], None] = lambda: None) -> None:
        """Take over the folder. `idle` is called while an older learner completes a write.

        Raises RefusedError(fenced) when a newer learner has it.
        """
        self.epoch = epoch
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o600)
        self._depth = 0
        self._lock(idle)
        try:
            self._check()
            os.pwrite(self._file, f"{epoch:0{_DIGITS}d}\n".encode(), 0)
            os.fsync(self._file)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write inside this. Raises RefusedError(fenced) when a newer learner has taken over. May be nested."""
        if self._depth == 0:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._depth += 1
        try:
            self._check()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go."""
        os.close(self._file)

    def _lock(self, idle: Callable[[], None]) -> None:
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                idle()
                time.sleep(POLL_S)

    def _check(self) -> None:
        newest = int(os.pread(self._file, _DIGITS, 0) or b"0")
        if newest > self.epoch:
            raise RefusedError(
                f"learner epoch {self.epoch} is over: epoch {newest} has taken over this run. Stop this learner.",
                reason="fenced",
            )
