"""matpo_learner.judge: what becomes of a group when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from matpo.episode import Episode, Group
from matpo.settings import RunFile, load_run_file
from matpo.testing import write_run_file
from matpo_learner.judge import MAX_COMPONENT_CHARACTERS, MAX_COMPONENTS, Judge, context_tokens
from matpo_learner.lineage import NEVER_RESUMED, Lineage

Make = Callable[..., Group]


@pytest.fixture
def run_file(tmp_path: Path, tiny_model: Path) -> RunFile:
    return load_run_file(
        write_run_file(tmp_path / "run.toml", model=tiny_model, learner={"group_size": 2, "drop_lag_versions": 3})
    )


@pytest.fixture
def made(make_segment, make_episode) -> Make:
    def build(rewards: tuple[float, float] = (1.0, 0.0), *, version: int = 0, length: int = 4, **changes) -> Group:
        def episode(member: int) -> Episode:
            segments = [
                make_segment(
                    i, role, token_ids=[1] * length, sampled=[length - 1], version=version, trainable=role == "planner"
                )
                for i, role in enumerate(("planner", "worker"))
            ]
            return make_episode("g", member, segments, rewards[member])

        return Group(id="g", episodes=(episode(0), replace(episode(1), **changes)))

    return build


def fate(run_file: RunFile, group: Group, *, update: int = 0, lineage: Lineage = NEVER_RESUMED) -> tuple[str, str]:
    verdict = Judge(run_file)(group, update=update, lineage=lineage)
    assert (verdict.why != "") == (verdict.fate == "invalid")
    return verdict.fate, verdict.reason


def test_a_sound_group_is_trained_and_one_of_equal_rewards_has_no_signal(run_file: RunFile, made: Make) -> None:
    assert fate(run_file, made()) == ("trained", "")
    assert fate(run_file, made((1.0, 1.0))) == ("zero_signal", "")


def test_a_group_beyond_the_hard_cap_is_stale_whatever_else_is_wrong_with_it(run_file: RunFile, made: Make) -> None:
    assert fate(run_file, made(version=2), update=5) == ("trained", "")
    assert fate(run_file, made(version=1), update=5) == ("stale", "stale")
    assert fate(run_file, made((1e200, -1e200), version=1), update=5) == ("stale", "stale")


def test_lag_is_in_updates_where_a_resume_made_the_version_numbers_jump(run_file: RunFile, made: Make) -> None:
    verdict = Judge(run_file)(made(version=2), update=5, lineage=Lineage(((0, 0), (40, 4))))
    assert (verdict.fate, verdict.lag) == ("trained", 3)


def test_a_role_that_the_run_file_does_not_name_or_another_root_is_invalid(run_file: RunFile, made: Make) -> None:
    planner, worker = made().episodes[0].segments
    for segments in ((planner, replace(worker, role="intruder")), (replace(planner, role="worker"), worker)):
        assert fate(run_file, made(segments=segments)) == ("invalid", "role")


def test_a_segment_longer_than_the_model_s_context_is_invalid(run_file: RunFile, made: Make) -> None:
    limit = context_tokens(run_file.model_folder)
    assert limit == 256
    assert fate(run_file, made(length=limit)) == ("trained", "")
    assert fate(run_file, made(length=limit + 1)) == ("invalid", "context")


def test_rewards_that_overflow_are_invalid(run_file: RunFile, made: Make) -> None:
    assert fate(run_file, made((1e200, -1e200))) == ("invalid", "advantage")


def test_reward_components_that_are_too_many_or_too_long_are_invalid(run_file: RunFile, made: Make) -> None:
    parts = {f"part {i}": 1.0 for i in range(MAX_COMPONENTS)}
    assert fate(run_file, made(reward_components=parts)) == ("trained", "")
    assert fate(run_file, made(reward_components=parts | {"more": 1.0})) == ("invalid", "reward_components")
    name = "x" * MAX_COMPONENT_CHARACTERS
    assert fate(run_file, made(reward_components={name: 1.0})) == ("trained", "")
    assert fate(run_file, made(reward_components={name + "x": 1.0})) == ("invalid", "reward_components")
