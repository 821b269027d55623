"""How many updates stand behind a policy version, and how far two versions are apart. Pure but for `read` and `write`.

A learner that resumes publishes above everything published, so version numbers jump where updates do not
(docs/decisions/0002-versions-after-resume.md). A lineage knows where: one branch (first version, its update) per
learner process. Example: ((0, 0), (6, 2)) is a learner that published versions 0 to 5, was killed, and resumed at
update 2. Versions 3, 4 and 5 are of updates that were lost; version 6 holds the weights of version 2.

Rules kept here, each with a test in tests/learner/test_lineage.py:
1. A version means one set of weights for ever: branches are only added. One that published nothing makes room.
2. Two lags, both in updates. `lag`, for dropping: how far the learner is ahead; a crash never makes a group stale.
   `lags`, of single tokens: the updates between the weights that sampled it and those at `version`, along the branches;
   so it is 0 exactly where these are the same weights.
3. A file that is damaged is a named error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from matpo import snapshot
from matpo.episode import UNSAMPLED_VERSION
from matpo.errors import CheckpointError

FILE = "lineage.json"  # in the run folder
Branches = tuple[tuple[int, int], ...]
_FORMAT = TypeAdapter(Branches)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which update each version is of. The default: version n is of update n, as in a run that never resumed."""

    branches: Branches = ((0, 0),)  # (first version, its update), versions rising; not empty

    def begun(self, version: int, update: int) -> Lineage:
        """With a new process, which publishes from `version` on, which is the weights of `update`."""
        # A process that died before its first publish left a branch that no version is of.
        kept = tuple(branch for branch in self.branches if branch[0] < version)
        return replace(self, branches=(*kept, (version, update)))

    def update_of(self, version: int) -> int:
        """How many updates stand behind a version that was published."""
        return int(self._placed(np.array([version]))[1][0])

    def lag(self, update: int, min_version: int) -> int:
        """Updates between the oldest token's weights and those at `update`, for dropping.

        0 for tokens of updates that a crash undid (they are ahead, not behind), and without any sampled token.
        """
        return 0 if min_version == UNSAMPLED_VERSION else max(0, update - self.update_of(min_version))

    def lags(self, versions: NDArray[np.int32], *, version: int) -> NDArray[np.int32]:
        """[M], updates between each of `versions` [M] and `version`, the learner's.

        From lost weights that is the way back to where they were resumed and from there on to `version`:
        with branches ((0, 0), (6, 2)), from version 4 (update 4) to version 7 (update 3) it is 2 + 1.
        """
        branch, update = self._placed(versions)
        # What is left of a branch ends at the lowest update at which any later one resumed.
        resumed_at = np.array([at for _, at in self.branches[1:]] + [np.iinfo(np.int64).max])
        kept = np.minimum.accumulate(resumed_at[::-1])[::-1][branch]
        lost = np.maximum(update - kept, 0)
        lags: NDArray[np.int32] = np.maximum(self.update_of(version) - update + 2 * lost, 0).astype(np.int32)
        return lags

    def oldest_within(self, update: int, max_lag: int) -> int:
        """The smallest version whose `lag` at `update` is at most `max_lag`; every older one lags more."""
        ends = [first for first, _ in self.branches[1:]]
        for (first, at), end in zip(self.branches, [*ends, None], strict=True):
            version = first + max(0, update - max_lag - at)
            if end is None or version < end:
                return version
        raise AssertionError("a lineage has a branch")

    def _placed(self, versions: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(which branch, which update) of each version. One below all branches counts as of the first."""
        first, at = np.array(self.branches, dtype=np.int64).T
        branch = np.maximum(np.searchsorted(first, versions, side="right") - 1, 0)
        return branch, at[branch] + versions - first[branch]


NEVER_RESUMED = Lineage()


def read(path: Path) -> Lineage:
    """What earlier processes of the run have left; the default where there is no file.

    Raises CheckpointError when the file is damaged.
    """
    try:
        branches = _FORMAT.validate_json(path.read_bytes()) if path.exists() else ()
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Restore it, or start in a new run.folder.") from None
    return Lineage(branches) if branches else NEVER_RESUMED


def write(path: Path, lineage: Lineage) -> None:
    """Replace the file, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    snapshot.replace_text(path, _FORMAT.dump_json(lineage.branches).decode())
