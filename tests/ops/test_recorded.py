"""Which recorded groups make which update of a replay: real journals, no engine."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.broker.journals import forget, group_of, journal

from matpo import schema
from matpo.episode import Episode, Group, Segment, Task
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings
from matpo_broker.recording import Recording
from matpo_ops.recorded import Batch, Reader, Step, Tally, steps_of

SETTINGS = LearnerSettings(groups_per_update=2, group_size=2)
EQUAL = {2, 5}  # groups whose members have the same reward
VOCAB_SIZE = 100


def episode(index: int, member: int, *, token: int = 7, reward: float | None = None) -> bytes:
    group = group_of(index)
    sampled = np.array([False, True, True])
    segment = Segment(
        index=0,
        parent=-1,
        role="planner",
        token_ids=np.array([1, 2, token], dtype=np.int32),
        sampled=sampled,
        logprobs=np.where(sampled, -1.0, 0).astype(np.float32),
        versions=np.where(sampled, 0, -1).astype(np.int32),
    )
    given = 1.0 if index in EQUAL else float(member)
    found = Episode(
        id=f"{group}.{member}.0",
        group=group,
        member=member,
        attempt=0,
        task=Task(id="t", environment="e", question="q"),
        segments=[segment],
        answer="",
        reward=given if reward is None else reward,
    )
    return schema.encode(found)


GROUPS = {i: [episode(i, m) for m in range(2)] for i in range(8)}


def replayed(
    folder: Path, steps: Iterable[Step] | None, settings: LearnerSettings = SETTINGS
) -> tuple[list[Any], Tally]:
    """((update, version, trained groups, groups without signal) of each batch, what became of the groups)."""
    with Recording(folder) as recording:
        reader = Reader(recording, settings, vocab_size=VOCAB_SIZE)
        found = [shown(batch) for batch in reader.batches(None if steps is None else list(steps))]
    return found, reader.tally


def shown(batch: Batch) -> tuple[int, int, list[str], list[str]]:
    return batch.update, batch.version, [g.id for g in batch.groups], [g.id for g in batch.zero_signal]


def names(*indices: int) -> list[str]:
    return [group_of(i) for i in indices]


def line(update: int, index: int, fate: str = "trained") -> dict[str, Any]:
    return {"update": update, "group": group_of(index), "index": index, "fate": fate}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with journal(tmp_path / "journal", GROUPS):
        pass
    return tmp_path / "journal"


def test_an_update_of_a_replay_has_the_groups_of_the_live_one_in_its_order(folder: Path) -> None:
    trained = [line(1, 3), line(1, 2, "zero_signal"), line(1, 0), line(2, 4), line(2, 6, "stale"), line(2, 1)]
    steps = steps_of(trained, [{"update": 1, "version": 1}, {"update": 2, "version": 2}])
    found, _ = replayed(folder, steps)
    assert found == [(1, 0, names(3, 0), names(2)), (2, 1, names(4, 1), [])]


def test_an_update_that_the_live_learner_did_not_finish_is_left_out() -> None:
    steps = steps_of([line(1, 0), line(1, 1), line(2, 3)], [{"update": 1, "version": 1}])
    assert steps == [Step(update=1, version=0, groups=names(0, 1))]


def test_the_weights_that_train_an_update_after_a_resume_are_one_version_older_than_its_own() -> None:
    steps = steps_of([line(1, 0), line(2, 1)], [{"update": 1, "version": 1}, {"update": 2, "version": 9}])
    assert [step.version for step in steps] == [0, 8]


def test_without_a_record_groups_come_by_index_and_what_fills_no_batch_is_left_over(folder: Path) -> None:
    found, tally = replayed(folder, None, SETTINGS.model_copy(update={"groups_per_update": 4}))
    assert found == [(1, 0, names(0, 1, 3, 4), names(2))]
    assert (tally.left_over, tally.zero_signal) == (2, 2)


def test_a_group_that_the_settings_of_the_replay_refuse_is_counted_by_reason(folder: Path) -> None:
    found, tally = replayed(folder, None, SETTINGS.model_copy(update={"group_size": 3}))
    assert (found, tally.invalid) == ([], {"group_size": 8})


def test_a_group_that_the_run_file_does_not_allow_is_counted_by_reason(folder: Path) -> None:
    def check(group: Group) -> None:
        if group.id == group_of(3):
            raise EpisodeError("a role that nobody knows", reason="role")

    with Recording(folder) as recording:
        reader = Reader(recording, SETTINGS, vocab_size=VOCAB_SIZE, check=check)
        found = [shown(batch) for batch in reader.batches([Step(update=1, version=0, groups=names(0, 3, 4))])]
    assert (found, reader.tally.invalid) == ([(1, 0, names(0, 4), [])], {"role": 1})


def test_a_record_that_is_no_episode_or_has_ids_beyond_the_vocabulary_is_counted(tmp_path: Path) -> None:
    groups = {**GROUPS, 0: [episode(0, 0), b"garbage"], 1: [episode(1, 0), episode(1, 1, token=VOCAB_SIZE)]}
    with journal(tmp_path, groups):
        pass
    found, tally = replayed(tmp_path, [Step(update=1, version=0, groups=names(0, 1, 3))])
    assert found == [(1, 0, names(3), [])]
    assert sum(tally.invalid.values()) == 2


def test_a_damaged_record_costs_its_group_and_nothing_else(folder: Path) -> None:
    path = folder / "payload-00000000.bin"
    path.write_bytes(path.read_bytes().replace(f"{group_of(3)}.1.0".encode(), f"{group_of(3)}.1.X".encode()))
    found, tally = replayed(folder, [Step(update=1, version=0, groups=names(0, 3, 4))])
    assert found == [(1, 0, names(0, 4), [])]
    assert [(one.episode, one.reason) for one in tally.damage] == [(f"{group_of(3)}.1.0", "hash")]


def test_groups_that_the_journal_has_given_back_are_counted_and_a_batch_of_nothing_else_is_skipped(
    tmp_path: Path,
) -> None:
    with journal(tmp_path, GROUPS, file_bytes=100) as (store, epoch):
        forget(store, epoch, below=2)
        steps = [Step(update=1, version=0, groups=names(0, 1)), Step(update=2, version=1, groups=names(3, 99))]
        found, tally = replayed(tmp_path, steps)
    assert found == [(2, 1, names(3), [])]
    assert tally.gone == 3  # one of them was never recorded
