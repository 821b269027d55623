"""From a group to one advantage per episode. Pure: no torch, no clock.

Rules kept here, each with a test in tests/learner/test_credit.py:
1. Mean and standard deviation are over the K episodes (planner roots); how many workers an episode has changes nothing.
2. An episode has one scalar advantage, the same for each of its segments. Which tokens carry it is the segment's own
   mask (matpo_learner.packing), never another segment's.
3. A group whose rewards are all equal has no signal; it is dropped before any normalisation over the batch.
4. A group is never shrunk: one that does not hold exactly K episodes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matpo.episode import Group
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
    has_signal: bool  # False: all rewards equal; advantages are 0


def advantages(group: Group, settings: LearnerSettings) -> Credit:
    """One scalar advantage per episode, by the estimator that the run file names.

    Raises EpisodeError (group_size, reward, not_single_agent) when the group is not what the estimator needs.
    """
    if len(group.episodes) != settings.group_size:
        raise EpisodeError(
            f"group {group.id} holds {len(group.episodes)} episodes, want learner.group_size={settings.group_size}. "
            "Groups are never shrunk: drop it.",
            reason="group_size",
        )
    return ESTIMATORS[settings.credit](group, settings)


def matpo(group: Group, settings: LearnerSettings) -> Credit:
    """A_i = (R_i - mean_K R) / (std_K R + eps); without norm_std only the difference (Dr. GRPO).

    std is the sample standard deviation (divided by K - 1), as in the official MATPO code and in verl; the papers write
    only "std". Source: MATPO, arXiv 2510.04678, section 3; GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, 2503.20783.
    """
    rewards = np.array([episode.reward for episode in group.episodes], dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise EpisodeError(f"group {group.id}: rewards {rewards.tolist()} are not all finite", reason="reward")
    mean, std = float(rewards.mean()), float(rewards.std(ddof=1))
    has_signal = bool(rewards.max() - rewards.min() > EQUAL_REWARDS)
    difference = rewards - mean if has_signal else np.zeros_like(rewards)
    scale = std + settings.advantage_eps if settings.norm_std else 1.0
    return Credit(group=group.id, advantages=difference / scale, mean=mean, std=std, has_signal=has_signal)


def grpo(group: Group, settings: LearnerSettings) -> Credit:
    """The same formula for a single agent: the baseline that MATPO is compared with.

    Raises EpisodeError(not_single_agent) for an episode in which a second role spoke.
    """
    for episode in group.episodes:
        roles = sorted({segment.role for segment in episode.segments})
        if len(roles) > 1:
            raise EpisodeError(
                f'episode {episode.id} has roles {", ".join(roles)}; credit = "grpo" is for one. '
                'Set learner.credit = "matpo".',
                reason="not_single_agent",
            )
    return matpo(group, settings)


ESTIMATORS: Mapping[str, Callable[[Group, LearnerSettings], Credit]] = {"matpo": matpo, "grpo": grpo}
