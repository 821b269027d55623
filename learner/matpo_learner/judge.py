"""What a group is judged by when its turn comes: can it be trained, and is it worth it? No socket, no clock.

Rules kept here, each with a test in tests/learner/test_judge.py:
1. Lag is judged when a group is about to be trained, in updates, over the tokens that would be trained; and before
   anything else is.
2. A group that cannot be trained is invalid, with the reason: a role that the run file does not name, a segment longer
   than the model's context, more reward components than a run may have, or what matpo_learner.credit refuses.
3. A group that is sound but says nothing has no signal.
Names in episodes become labels of metrics and keys of logs: what passes here is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matpo.episode import UNSAMPLED_VERSION, Episode, Group
from matpo.errors import ConfigError, EpisodeError
from matpo.settings import RunFile
from matpo_learner import credit
from matpo_learner.lineage import Lineage

MAX_COMPONENTS = 32
"""Parts of the reward that one episode may name."""
MAX_COMPONENT_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of one group. `reason` and `why` say what is wrong with one that is invalid."""

    fate: Literal["trained", "zero_signal", "stale", "invalid"]
    lag: int  # updates
    reason: str = ""
    why: str = ""


class Judge:
    """Judges groups by one run file and the model that it names."""

    def __init__(self, run_file: RunFile) -> None:
        self._run_file = run_file
        self._context_tokens = context_tokens(run_file.model_folder)

    def __call__(self, group: Group, *, update: int, lineage: Lineage) -> Verdict:
        """The verdict on a group that would be trained by the weights of `update`."""
        settings = self._run_file.learner
        lag = lineage.lag(update, oldest_version(credit.as_trained(group, settings).episodes))
        if lag > settings.drop_lag_versions:
            return Verdict(fate="stale", lag=lag, reason="stale")
        try:
            self.check(group)
            worth = credit.advantages(group, settings)
        except EpisodeError as error:
            return Verdict(fate="invalid", lag=lag, reason=error.reason, why=str(error))
        return Verdict(fate="trained" if worth.has_signal else "zero_signal", lag=lag)

    def check(self, group: Group) -> None:
        """Raises EpisodeError (role, context, reward_components) for a group that this run cannot train."""
        for episode in group.episodes:
            check_roles(episode, self._run_file)
            check_context(episode, self._context_tokens)
            check_components(episode)


def check_roles(episode: Episode, run_file: RunFile) -> None:
    """Refuse roles that the run file does not name: they would be trained, and become labels of metrics.

    Raises EpisodeError(role).
    """
    roles = [segment.role for segment in episode.segments]
    unknown = sorted(set(roles) - set(run_file.roles))
    if unknown or roles[0] != run_file.rollout.root:
        raise EpisodeError(
            f"episode {episode.id}: root {roles[0][:64]}, unknown roles {str(unknown)[:200]}; want root "
            f"{run_file.rollout.root} and roles {', '.join(run_file.roles)}. Does its actor have this run file?",
            reason="role",
        )


def check_context(episode: Episode, limit: int | None) -> None:
    """Raises EpisodeError(context) for a segment of more than `limit` tokens."""
    for segment in episode.segments:
        if limit is not None and len(segment.token_ids) > limit:
            raise EpisodeError(
                f"segment {segment.index} of {episode.id} has {len(segment.token_ids)} tokens, the model's context "
                f"is {limit}. Set roles.{segment.role}.max_context_tokens <= {limit}.",
                reason="context",
            )


def check_components(episode: Episode) -> None:
    """Raises EpisodeError(reward_components) when the parts of a reward are too many, or named at too great length."""
    names = episode.reward_components
    if len(names) > MAX_COMPONENTS or any(len(name) > MAX_COMPONENT_CHARACTERS for name in names):
        raise EpisodeError(
            f"episode {episode.id} names {len(names)} reward components, the longest of "
            f"{max(map(len, names))} characters. Return at most {MAX_COMPONENTS} from Environment.reward, of at most "
            f"{MAX_COMPONENT_CHARACTERS} characters: each is a label of a metric.",
            reason="reward_components",
        )


def oldest_version(episodes: Iterable[Episode]) -> int:
    """The oldest version of any sampled, trainable token; UNSAMPLED_VERSION where there is none."""
    found = [e.min_version for e in episodes if e.min_version != UNSAMPLED_VERSION]
    return min(found, default=UNSAMPLED_VERSION)


# ---- what the model's config says


def vocab_size(model_folder: Path) -> int:
    """How many token ids the model has. Raises ConfigError when its config does not say."""
    size = _text_config(model_folder).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{model_folder / 'config.json'} has no vocab_size. Use a causal LM such as Qwen3.")
    return size


def context_tokens(model_folder: Path) -> int | None:
    """The longest segment that the model has positions for, as stretched (YaRN, ...); None: its config does not say."""
    config = _text_config(model_folder)
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = rope.get("factor")
    return int(limit * max(1.0, factor)) if isinstance(factor, int | float) else limit


def _text_config(model_folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    return {**config.get("text_config", {}), **config}
