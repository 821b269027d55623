"""Credit: advantages by hand, by a plain loop, and what must not change them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpo.episode import Group
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings
from matpo_learner import credit

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "two_episodes.json").read_text())


def _group(make_episode, make_segment, rewards, *, num_workers=lambda i: 0, worker_role="worker"):
    episodes = []
    for i, reward in enumerate(rewards):
        segments = [make_segment(0, "planner", token_ids=[1, 2, 3], sampled=[2])]
        segments += [make_segment(1 + w, worker_role, token_ids=[1, 2], sampled=[1]) for w in range(num_workers(i))]
        episodes.append(make_episode("g", i, segments, reward))
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


@given(workers=st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_number_of_workers_never_changes_an_advantage(make_episode, make_segment, workers):
    settings = LearnerSettings(group_size=4)
    rewards = [1.0, 0.0, 0.5, 0.0]
    alone = credit.advantages(_group(make_episode, make_segment, rewards), settings)
    team = credit.advantages(_group(make_episode, make_segment, rewards, num_workers=lambda i: workers[i]), settings)
    assert team.advantages.tolist() == alone.advantages.tolist()


@given(reward=st.floats(-10, 10), size=st.integers(2, 8))
def test_group_of_equal_rewards_has_no_signal_and_zero_advantages(make_episode, make_segment, reward, size):
    result = credit.advantages(_group(make_episode, make_segment, [reward] * size), LearnerSettings(group_size=size))
    assert not result.has_signal
    assert result.advantages.tolist() == [0.0] * size


def test_group_with_a_member_missing_is_refused(make_episode, make_segment, make_settings):
    with pytest.raises(EpisodeError, match=r"holds 2 episodes, want learner\.group_size=3") as caught:
        credit.advantages(_group(make_episode, make_segment, [0.0, 1.0]), make_settings(group_size=3))
    assert caught.value.reason == "group_size"


def test_reward_that_is_not_finite_is_refused(make_episode, make_segment, make_settings):
    with pytest.raises(EpisodeError, match="not all finite"):
        credit.advantages(_group(make_episode, make_segment, [float("nan"), 1.0]), make_settings())


def test_grpo_gives_a_single_agent_the_same_numbers(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0])
    result = credit.advantages(group, make_settings(credit="grpo"))
    assert result.advantages == pytest.approx(GOLDEN["advantages"])


def test_grpo_refuses_an_episode_with_a_second_role(make_episode, make_segment, make_settings):
    group = _group(make_episode, make_segment, [1.0, 0.0], num_workers=lambda i: 1)
    with pytest.raises(EpisodeError, match=r'Set learner.credit = "matpo"'):
        credit.advantages(group, make_settings(credit="grpo"))
