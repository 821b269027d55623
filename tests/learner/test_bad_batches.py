"""matpo_learner.bad_batches: whole, readable, and not too many."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from matpo.schema import read_episodes
from matpo_learner import bad_batches


def test_a_batch_can_be_read_again_with_what_was_wrong(random_groups, tmp_path: Path) -> None:
    groups = random_groups(3, num_groups=2, group_size=2)
    folder = bad_batches.save(tmp_path / "bad", groups, {"loss": "tis"}, update=4)
    wanted = [episode for group in groups for episode in group.episodes]
    found = list(read_episodes(folder / "episodes"))
    assert [episode.id for episode in found] == [episode.id for episode in wanted]
    for one, other in zip(found, wanted, strict=True):
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
    what = json.loads((folder / "what.json").read_text())
    assert what == {"update": 4, "loss": "tis", "groups": ["g-0", "g-1"]}


def test_only_the_newest_are_kept_and_nothing_else_is_left(random_groups, tmp_path: Path) -> None:
    groups = random_groups(3, num_groups=1, group_size=2)
    made = [bad_batches.save(tmp_path, groups, {}, update=update).name for update in range(bad_batches.MAX_KEPT + 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == made[3:]


def test_the_same_batch_again_replaces_the_first(random_groups, tmp_path: Path) -> None:
    groups = random_groups(3, num_groups=1, group_size=2)
    for loss in ("tis", "ppo_clip"):
        folder = bad_batches.save(tmp_path, groups, {"loss": loss}, update=4)
    assert [path.name for path in tmp_path.iterdir()] == ["u000004-g0"]
    assert json.loads((folder / "what.json").read_text())["loss"] == "ppo_clip"
