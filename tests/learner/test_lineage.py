"""matpo_learner.lineage: lag is counted in updates, whatever a resume did to the version numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpo.errors import CheckpointError
from matpo_learner import lineage
from matpo_learner.lineage import NEVER_RESUMED, Lineage

RESUMED = Lineage(((0, 0), (6, 2), (9, 4)))  # versions 0-5: updates 0-5; 6-8: 2-4; from 9 on: 4, 5, ...


def distance(parent: dict[int, int | None], one: int, other: int) -> int:
    """Edges between two nodes of a tree."""

    def ancestors(node: int | None) -> list[int]:
        found = []
        while node is not None:
            found.append(node)
            node = parent[node]
        return found

    above, others = ancestors(one), ancestors(other)
    common = next(node for node in above if node in others)
    return above.index(common) + others.index(common)


def test_lag_of_a_group_is_counted_in_updates_across_resumes() -> None:
    assert [RESUMED.update_of(version) for version in range(12)] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 5, 6]
    assert RESUMED.lag(update=6, min_version=2) == 4
    assert RESUMED.lag(update=4, min_version=5) == 0  # from an update that was lost: ahead, not behind
    assert RESUMED.lag(update=4, min_version=-1) == 0  # no sampled token


def test_lag_of_a_token_is_the_way_from_its_weights_to_the_learner_s() -> None:
    versions = np.arange(11, dtype=np.int32)
    assert RESUMED.lags(versions, version=11).tolist() == [6, 5, 4, 5, 6, 7, 4, 3, 2, 2, 1]
    assert NEVER_RESUMED.lags(versions, version=10).tolist() == list(range(10, -1, -1))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 100)), min_size=1, max_size=6))
def test_lags_equal_a_walk_through_the_tree_of_weights(lives: list[tuple[int, int]]) -> None:
    """Each life makes some updates, and resumes at any update of the line before it."""
    found = NEVER_RESUMED
    parent: dict[int, int | None] = {0: None}  # weights -> the weights before them
    node_of, line = [0], [0]  # of each version; of each update of the surviving line
    for number, (num_updates, at) in enumerate(lives):
        if number:
            line = line[: at % len(line) + 1]
            found = found.begun(len(node_of), len(line) - 1)
            node_of.append(line[-1])  # the same weights under a new version
        for _ in range(num_updates):
            parent[len(parent)] = line[-1]
            line.append(len(parent) - 1)
            node_of.append(line[-1])
    want = [distance(parent, node, line[-1]) for node in node_of]
    versions = np.arange(len(node_of), dtype=np.int32)
    assert found.lags(versions, version=len(node_of) - 1).tolist() == want


@pytest.mark.parametrize("update", range(8))
@pytest.mark.parametrize("max_lag", range(4))
def test_every_version_below_the_oldest_admissible_one_lags_more(update: int, max_lag: int) -> None:
    admissible = [version for version in range(30) if RESUMED.lag(update, version) <= max_lag]
    assert RESUMED.oldest_within(update, max_lag) == admissible[0]


def test_a_branch_that_published_nothing_makes_room_for_the_next() -> None:
    # Killed before version 30 was there, and its checkpoint is torn: the next one is older.
    found = NEVER_RESUMED.begun(30, 5).begun(30, 4)
    assert [found.update_of(version) for version in (29, 30, 31)] == [29, 4, 5]


def test_a_version_older_than_every_branch_has_a_lag_all_the_same() -> None:
    assert Lineage(((8, 3),)).lags(np.array([6, 8], np.int32), version=9).tolist() == [3, 1]


def test_a_lineage_is_read_as_it_was_written_and_without_a_file_it_never_resumed(tmp_path: Path) -> None:
    path = tmp_path / "folder" / lineage.FILE
    assert lineage.read(path) == NEVER_RESUMED
    lineage.write(path, RESUMED)
    assert lineage.read(path) == RESUMED


@pytest.mark.parametrize("content", ["[[0, 0], [", "[[0]]", "[]x"])
def test_a_damaged_lineage_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / lineage.FILE).write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        lineage.read(tmp_path / lineage.FILE)
