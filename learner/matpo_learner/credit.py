"""From groups to one advantage per episode. Pure: no torch, no clock.

Rules kept here, each with a test in tests/learner/test_credit.py:
1. Mean and standard deviation are over the K episodes (planner roots); how many workers an episode has changes nothing.
2. An episode has one scalar advantage, the same for each of its trained segments. Which tokens carry it is the
   segment's own mask (matpo_learner.packing), never another segment's.
3. A group in which no trained token has an advantage other than 0 has no signal, whatever the estimator; it is replaced
   before any normalisation over the batch.
4. A group is never shrunk: one that does not hold exactly K episodes is refused.
5. Every advantage is finite; a group that would have another is refused.

The order: what an abnormal end is worth (as_trained), the estimator (advantages), then task_norm over the update. An
estimator is a function from the K rewards to K advantages; which segments they reach is a property of the group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from matpo.episode import Episode, Group
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings

EQUAL_REWARDS = 1e-9
"""Rewards closer than this are equal: sums of the same components in another order differ in the last bits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Credit:
    """What one group is worth.

    Example, K = 2, rewards (1, 0), norm_std, eps = 1e-4: mean 0.5, std 0.70711, advantages (0.70701, -0.70701).
    """

    group: str
    advantages: NDArray[np.float64]  # [K], in the order of Group.episodes
    mean: float
    std: float
    has_signal: bool  # False: no trained token has an advantage other than 0


def assign(groups: Sequence[Group], settings: LearnerSettings) -> tuple[list[Group], list[NDArray[np.float64]]]:
    """The groups of one update as they are trained, and their advantages [K] each: what packing.pack_update takes.

    Raises EpisodeError as `advantages` does; the leader has dropped such groups before.
    """
    trained = [as_trained(group, settings) for group in groups]
    found = [advantages(group, settings).advantages for group in trained]
    return trained, task_norm(trained, found, settings) if settings.task_norm else found


def as_trained(group: Group, settings: LearnerSettings) -> Group:
    """The group with abnormal ends revalued and, under "leader_only", only the root role's segments trainable."""
    return replace(group, episodes=tuple(_as_trained(episode, settings) for episode in group.episodes))


def _as_trained(episode: Episode, settings: LearnerSettings) -> Episode:
    root = episode.segments[0]
    if settings.abnormal_reward is not None and root.termination in settings.abnormal_terminations:
        episode = replace(episode, reward=settings.abnormal_reward)
    if settings.credit == "leader_only":
        kept = (replace(s, trainable=s.trainable and s.role == root.role) for s in episode.segments)
        episode = replace(episode, segments=tuple(kept))
    return episode


def advantages(group: Group, settings: LearnerSettings) -> Credit:
    """One scalar advantage per episode, by the estimator that the run file names.

    Raises EpisodeError (group_size, reward, advantage, not_single_agent) when the group is not what it needs.
    """
    if len(group.episodes) != settings.group_size:
        raise EpisodeError(
            f"group {group.id} holds {len(group.episodes)} episodes, want learner.group_size={settings.group_size}. "
            "Groups are never shrunk: drop it.",
            reason="group_size",
        )
    if settings.credit == "grpo":
        _check_single_agent(group)
    episodes = as_trained(group, settings).episodes
    rewards = np.array([episode.reward for episode in episodes], dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise EpisodeError(f"group {group.id}: rewards {rewards.tolist()} are not all finite", reason="reward")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        mean, std = float(rewards.mean()), float(rewards.std(ddof=1))
        differ = rewards.max() - rewards.min() > EQUAL_REWARDS
        found = ESTIMATORS[settings.credit](rewards, settings) if differ else np.zeros_like(rewards)
    if not np.isfinite([mean, std, *found]).all():
        raise EpisodeError(
            f"group {group.id}: rewards {rewards.tolist()} give advantages {found.tolist()}. "
            "Keep rewards within a range that a float can square.",
            reason="advantage",
        )
    return Credit(
        group=group.id,
        advantages=found,
        mean=mean,
        std=std,
        has_signal=any(a != 0 and e.num_sampled > 0 for a, e in zip(found, episodes, strict=True)),
    )


def _check_single_agent(group: Group) -> None:
    for episode in group.episodes:
        roles = sorted({segment.role for segment in episode.segments})
        if len(roles) > 1:
            raise EpisodeError(
                f'episode {episode.id} has roles {", ".join(roles)}; credit = "grpo" is for one. '
                'Set learner.credit = "matpo".',
                reason="not_single_agent",
            )


def group_relative(rewards: NDArray[np.float64], settings: LearnerSettings) -> NDArray[np.float64]:
    """A_i = (R_i - mean_K R) / (std_K R + eps); without norm_std only the difference (Dr. GRPO).

    std is the sample standard deviation (divided by K - 1), as in the official MATPO code and in verl; the papers write
    only "std". Source: MATPO, arXiv 2510.04678, section 3; GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, 2503.20783.
    """
    scale = rewards.std(ddof=1) + settings.advantage_eps if settings.norm_std else 1.0
    return np.asarray((rewards - rewards.mean()) / scale)


def leave_one_out(rewards: NDArray[np.float64], settings: LearnerSettings) -> NDArray[np.float64]:
    """A_i = R_i - mean of the other K - 1 rewards, never divided by a deviation: an unbiased baseline.

    Source: RLOO, arXiv 2402.14740.
    """
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return np.asarray(rewards - others)


ESTIMATORS: Mapping[str, Callable[[NDArray[np.float64], LearnerSettings], NDArray[np.float64]]] = {
    "matpo": group_relative,
    "grpo": group_relative,  # of a single agent: the baseline that MATPO is compared with
    "rloo": leave_one_out,
    "leader_only": group_relative,
}
"""[K] rewards, not all equal -> [K] advantages."""


def task_norm(
    groups: Sequence[Group], advantages: Sequence[NDArray[np.float64]], settings: LearnerSettings
) -> list[NDArray[np.float64]]:
    """A' = (A - mean_e A) / (std_e A + eps), mean and deviation over the trained tokens of environment e in the update.

    So environments whose rewards differ in scale, or whose episodes differ in length, move the weights alike. One with
    fewer than task_norm_min_episodes episodes, or whose tokens all have one advantage, is left as it is.
    Source: AgentRL, arXiv 2510.04206 (task advantage normalization).
    """
    places = defaultdict(list)
    for g, group in enumerate(groups):
        for k, episode in enumerate(group.episodes):
            places[episode.task.environment].append((g, k, episode.num_sampled))
    found = [of_group.copy() for of_group in advantages]
    for of_environment in places.values():
        values = np.array([advantages[g][k] for g, k, _ in of_environment])
        counts = np.array([count for _, _, count in of_environment])
        if len(values) < settings.task_norm_min_episodes or not counts.any():
            continue
        mean = np.average(values, weights=counts)
        std = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
        if std <= EQUAL_REWARDS:
            continue
        for (g, k, _), value in zip(of_environment, values, strict=True):
            found[g][k] = (value - mean) / (std + settings.advantage_eps)
    return found
