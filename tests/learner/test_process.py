"""matpo_learner.process: the other ranks train what rank 0 trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from matpo import schema
from matpo.episode import Group
from matpo.settings import LearnerSettings
from matpo_learner.lineage import Lineage
from matpo_learner.packing import pack_update
from matpo_learner.process import Batch, batch_message, batch_of


def test_another_rank_counts_lags_as_rank_0_does_also_after_a_resume(
    random_groups: Callable[..., list[Group]], make_settings: Callable[..., LearnerSettings]
) -> None:
    groups = random_groups(5, num_groups=2, group_size=2)
    mine = Batch(version=7, lineage=Lineage(((0, 0), (3, 1))), groups=groups)
    payloads = [(g.id, [schema.encode(e) for e in g.episodes]) for g in groups]
    message: dict[str, Any] = msgpack.unpackb(msgpack.packb(batch_message(mine, payloads)))
    theirs = batch_of(message)

    def lags(batch: Batch) -> list[list[int]]:
        advantages = [np.array([1.0, -1.0])] * len(groups)
        (rows,) = pack_update(batch.groups, advantages, make_settings(), version=batch.version, lineage=batch.lineage)
        return [row.lags.tolist() for row in rows]

    assert lags(theirs) == lags(mine)
    assert {lag for row in lags(mine) for lag in row} == {3, 4, 5}  # by version numbers: 3 to 7
