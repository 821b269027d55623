"""Credit: advantages by hand, by a plain loop, and what must not change them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from matpo.episode import Group
from matpo.errors import EpisodeError
from matpo.settings import Credit, LearnerSettings
from matpo_learner import credit

ESTIMATORS = get_args(Credit)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "two_episodes.json").read_text())


def _group(make_episode, make_segment, rewards, *, num_workers=lambda i: 0, ends=None, environment="e", sampled=(2,)):
    episodes = []
    for i, reward in enumerate(rewards):
        segments = [make_segment(0, "planner", token_ids=[1, 2, 3], sampled=list(sampled))]
        if ends is not None:
            segments[0] = replace(segments[0], termination=ends[i])
        segments += [make_segment(1 + w, "worker", token_ids=[1, 2], sampled=[1]) for w in range(num_workers(i))]
        episode = make_episode("g", i, segments, reward)
        episodes.append(replace(episode, task=replace(episode.task, environment=environment)))
    return Group(id="g", episodes=episodes)


def test_advantages_of_two_episodes_equal_the_numbers_worked_by_hand(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, GOLDEN["rewards"], num_workers=lambda i: [2, 0][i])
    result = credit.advantages(group, make_settings())
    assert result.advantages == pytest.approx(GOLDEN["advantages"], abs=1e-12)
    assert (result.mean, result.std, result.has_signal) == pytest.approx((0.5, GOLDEN["std"], True))


@given(
    rewards=st.lists(st.floats(-5, 5), min_size=2, max_size=9),
    norm_std=st.booleans(),
    eps=st.floats(1e-6, 0.1),
)
def test_advantages_equal_a_plain_loop(make_episode, make_segment, rewards, norm_std, eps):
    settings = LearnerSettings(group_size=len(rewards), norm_std=norm_std, advantage_eps=eps)
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    result = credit.advantages(_group(make_episode, make_segment, rewards), settings)
    for found, reward in zip(result.advantages, rewards, strict=True):
        want = (reward - mean) / (std + eps) if norm_std else reward - mean
        assert found == pytest.approx(want if result.has_signal else 0.0, abs=1e-7)


@given(rewards=st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_leave_one_out_advantages_equal_a_plain_loop(make_episode, make_segment, rewards):
    settings = LearnerSettings(group_size=len(rewards), credit="rloo")
    result = credit.advantages(_group(make_episode, make_segment, rewards), settings)
    for i, found in enumerate(result.advantages):
        others = [reward for j, reward in enumerate(rewards) if j != i]
        want = rewards[i] - sum(others) / len(others)
        assert found == pytest.approx(want if result.has_signal else 0.0, abs=1e-7)


@given(workers=st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_number_of_workers_never_changes_an_advantage(make_episode, make_segment, workers):
    settings = LearnerSettings(group_size=4)
    rewards = [1.0, 0.0, 0.5, 0.0]
    alone = credit.advantages(_group(make_episode, make_segment, rewards), settings)
    team = credit.advantages(_group(make_episode, make_segment, rewards, num_workers=lambda i: workers[i]), settings)
    assert team.advantages.tolist() == alone.advantages.tolist()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(reward=st.floats(-10, 10), size=st.integers(2, 8))
def test_group_of_equal_rewards_has_no_signal_and_zero_advantages(make_episode, make_segment, estimator, reward, size):
    settings = LearnerSettings(group_size=size, credit=estimator)
    result = credit.advantages(_group(make_episode, make_segment, [reward] * size), settings)
    assert not result.has_signal
    assert result.advantages.tolist() == [0.0] * size


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_without_a_trained_token_has_no_signal(make_episode, make_segment, make_settings, estimator):
    """Questions that do not fit the context: the rewards may differ, but nothing can be trained."""
    group = _group(make_episode, make_segment, [1.0, 0.0], sampled=())
    assert not credit.advantages(group, make_settings(credit=estimator)).has_signal


def test_workers_alone_are_no_signal_for_the_leader(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0], sampled=(), num_workers=lambda i: 2)
    assert credit.advantages(group, make_settings(credit="matpo")).has_signal
    assert not credit.advantages(group, make_settings(credit="leader_only")).has_signal


def test_under_leader_only_the_root_role_alone_is_trained(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0], num_workers=lambda i: 1 + i)
    (trained,), (found,) = credit.assign([group], make_settings(credit="leader_only"))
    assert found == pytest.approx(GOLDEN["advantages"])
    kept = [[s.role for s in e.segments if s.trainable] for e in trained.episodes]
    assert kept == [["planner"], ["planner"]]
    assert [e.num_sampled for e in trained.episodes] == [1, 1]


@pytest.mark.parametrize("estimator", ["matpo", "rloo"])
def test_under_the_other_estimators_every_trainable_segment_is_trained(
    make_episode, make_segment, make_settings, estimator
):
    group = _group(make_episode, make_segment, [1.0, 0.0], num_workers=lambda i: 2)
    (trained,), _ = credit.assign([group], make_settings(credit=estimator))
    assert [e.num_sampled for e in trained.episodes] == [3, 3]


def test_an_abnormal_end_is_worth_what_the_run_file_says(make_episode, make_segment, make_settings):
    ends = ["answer", "deadline", "max_turns"]
    group = _group(make_episode, make_segment, [0.0, 0.6, 0.6], ends=ends)
    settings = make_settings(
        group_size=3, norm_std=False, abnormal_reward=-0.3, abnormal_terminations=("deadline", "max_tokens")
    )
    assert credit.advantages(group, settings).advantages == pytest.approx([-0.1, -0.4, 0.5])


def test_without_the_setting_an_abnormal_end_keeps_its_reward(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0], ends=["max_turns", "answer"])
    assert credit.advantages(group, make_settings()).advantages == pytest.approx(GOLDEN["advantages"])


def test_an_abnormal_end_is_a_signal_among_equal_rewards(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [0.0, 0.0], ends=["answer", "deadline"])
    assert not credit.advantages(group, make_settings()).has_signal
    assert credit.advantages(group, make_settings(abnormal_reward=-1.0)).has_signal


def _plain_task_norm(groups, found, eps, min_episodes):
    """Token by token."""
    result = [list(map(float, of_group)) for of_group in found]
    for environment in {e.task.environment for g in groups for e in g.episodes}:
        members = [
            (g, k, e) for g, group in enumerate(groups) for k, e in enumerate(group.episodes)
            if e.task.environment == environment
        ]  # fmt: skip
        tokens = [
            float(found[g][k]) for g, k, e in members for s in e.segments if s.trainable for hit in s.sampled if hit
        ]
        if len(members) < min_episodes or not tokens:
            continue
        mean = sum(tokens) / len(tokens)
        std = math.sqrt(sum((a - mean) ** 2 for a in tokens) / len(tokens))
        if std <= 1e-9:
            continue
        for g, k, _ in members:
            result[g][k] = (float(found[g][k]) - mean) / (std + eps)
    return result


@given(seed=st.integers(0, 10_000), min_episodes=st.integers(2, 8))
def test_task_normalisation_equals_a_plain_loop_over_tokens(random_groups, seed, min_episodes):
    groups = random_groups(seed, num_groups=4, group_size=2)
    named = [
        replace(g, episodes=[replace(e, task=replace(e.task, environment=f"env{i % 3}")) for e in g.episodes])
        for i, g in enumerate(groups)
    ]
    settings = LearnerSettings(group_size=2, task_norm=True, task_norm_min_episodes=min_episodes)
    _, found = credit.assign(named, settings)
    plain = [credit.advantages(g, settings).advantages for g in named]
    for got, want in zip(found, _plain_task_norm(named, plain, settings.advantage_eps, min_episodes), strict=True):
        assert got == pytest.approx(want, abs=1e-9)


def test_normalised_advantages_of_an_environment_have_mean_0_and_deviation_1_over_tokens(random_groups):
    groups = random_groups(3, num_groups=6, group_size=4)
    settings = LearnerSettings(group_size=4, task_norm=True, advantage_eps=1e-12)
    trained, found = credit.assign(groups, settings)
    tokens = [
        float(a)
        for g, of_group in zip(trained, found, strict=True)
        for e, a in zip(g.episodes, of_group, strict=True)
        for _ in range(e.num_sampled)
    ]
    mean = sum(tokens) / len(tokens)
    assert mean == pytest.approx(0.0, abs=1e-9)
    assert math.sqrt(sum((a - mean) ** 2 for a in tokens) / len(tokens)) == pytest.approx(1.0, abs=1e-9)


def test_an_environment_with_few_episodes_is_not_normalised(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0])
    _, (found,) = credit.assign([group], make_settings(task_norm=True, task_norm_min_episodes=3))
    assert found == pytest.approx(GOLDEN["advantages"])


def test_group_with_a_member_missing_is_refused(make_episode, make_segment, make_settings):
    with pytest.raises(EpisodeError, match=r"holds 2 episodes, want learner\.group_size=3") as caught:
        credit.advantages(_group(make_episode, make_segment, [0.0, 1.0]), make_settings(group_size=3))
    assert caught.value.reason == "group_size"


def test_group_of_one_member_is_refused(make_episode, make_segment, make_settings):
    with pytest.raises(EpisodeError, match="holds 1 episodes"):
        credit.advantages(_group(make_episode, make_segment, [1.0]), make_settings())
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        make_settings(group_size=1)


def test_reward_that_is_not_finite_is_refused(make_episode, make_segment, make_settings):
    with pytest.raises(EpisodeError, match="not all finite"):
        credit.advantages(_group(make_episode, make_segment, [float("nan"), 1.0]), make_settings())


@pytest.mark.parametrize("rewards", [[1e200, 0.0], [1.7e308, 1.6e308], [1.7e308, -1.7e308]])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_that_overflow_are_refused(make_episode, make_segment, make_settings, estimator, rewards):
    with pytest.raises(EpisodeError, match="a float can square") as caught:
        credit.advantages(_group(make_episode, make_segment, rewards), make_settings(credit=estimator))
    assert caught.value.reason == "advantage"


def test_grpo_gives_a_single_agent_the_same_numbers(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0])
    result = credit.advantages(group, make_settings(credit="grpo"))
    assert result.advantages == pytest.approx(GOLDEN["advantages"])


def test_grpo_refuses_an_episode_with_a_second_role(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0], num_workers=lambda i: 1)
    with pytest.raises(EpisodeError, match=r'Set learner.credit = "matpo"'):
        credit.advantages(group, make_settings(credit="grpo"))
