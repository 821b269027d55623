"""matpo_learner.diary: what is pending for the next line survives a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.learner.test_records import REPORT

from matpo.metrics import Metrics
from matpo.settings import RunFile, load_run_file
from matpo.testing import write_run_file
from matpo_learner.checkpoint import Pending
from matpo_learner.diary import Diary


@pytest.fixture
def run_file(tmp_path: Path, tiny_model: Path) -> RunFile:
    return load_run_file(write_run_file(tmp_path / "run.toml", model=tiny_model))


def opened(run_file: RunFile, covered: dict[str, int] | None = None, pending: Pending | None = None) -> Diary:
    return Diary(run_file, Metrics("learner"), covered=covered or {}, pending=pending or Pending())


def line(run_file: RunFile, diary: Diary, groups) -> dict[str, object]:
    lags = [0] * sum(len(group.episodes) for group in groups)
    diary.updated(groups, lags, REPORT, update=1, version=1, batch_ready=False, seconds={"wait": 1.0})
    diary.close()
    (text,) = (run_file.run.folder / "metrics" / "learner.jsonl").read_text().splitlines()
    row: dict[str, object] = json.loads(text)
    row.pop("time_s")
    return row


def test_a_diary_that_is_opened_at_a_checkpoint_goes_on_as_if_it_had_never_been_closed(
    run_file: RunFile, random_groups
) -> None:
    without, *trained = random_groups(3, num_groups=3, group_size=2)
    rewards = [episode.reward for group in (*trained, without) for episode in group.episodes]
    diary = opened(run_file)
    diary.no_signal(without)
    diary.dropped("g-9", "stale", "stale")
    diary.consumed("g-9", 9, "stale", ["g-9.0.0"], reason="stale", update=1)
    pending, covered = diary.pending(), diary.sync()
    want = line(run_file, diary, trained)
    assert (want["groups_zero_signal"], want["groups_dropped"]) == (1, 1)
    assert want["reward"] == pytest.approx(sum(rewards) / len(rewards))
    again = opened(run_file, covered, Pending.model_validate_json(pending.model_dump_json()))
    assert line(run_file, again, trained) == want
    assert len((run_file.run.folder / "metrics" / "trained.jsonl").read_text().splitlines()) == 1


def test_a_line_takes_along_what_was_pending_and_the_next_one_begins_anew(run_file: RunFile, random_groups) -> None:
    without, *trained = random_groups(3, num_groups=3, group_size=2)
    diary = opened(run_file)
    diary.no_signal(without)
    diary.dropped("g-9", "invalid", "role")
    assert (diary.num_zero_signal, diary.num_dropped) == (1, 1)
    line(run_file, diary, trained)
    assert diary.pending() == Pending()


def test_only_the_rewards_of_a_group_without_signal_are_kept(run_file: RunFile, random_groups) -> None:
    (group,) = random_groups(3, num_groups=1, group_size=2)
    diary = opened(run_file)
    diary.no_signal(group)
    assert diary.pending().zero_signal == [[(e.reward, dict(e.reward_components)) for e in group.episodes]]
    diary.close()
