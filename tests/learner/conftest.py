"""Episodes and a tiny model for the tests of the learner's mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from matpo.episode import Episode, Group, Segment, Task
from matpo.settings import LearnerSettings

VOCABULARY = 64


def build_segment(
    index: int,
    role: str,
    *,
    token_ids: Sequence[int],
    sampled: Sequence[int],
    mu: float = -1.0,
    version: int = 0,
    trainable: bool = True,
) -> Segment:
    """A segment; `sampled` are positions."""
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[list(sampled)] = True
    return Segment(
        index=index,
        parent=index - 1 if index == 0 else 0,
        role=role,
        token_ids=np.array(token_ids, dtype=np.int32),
        sampled=mask,
        logprobs=np.where(mask, mu, 0.0).astype(np.float32),
        versions=np.where(mask, version, -1).astype(np.int32),
        trainable=trainable,
    )


def build_episode(group: str, member: int, segments: Sequence[Segment], reward: float) -> Episode:
    return Episode(
        id=f"{group}.{member}.0",
        group=group,
        member=member,
        attempt=0,
        task=Task(id="t", environment="e", question="?"),
        segments=tuple(segments),
        answer="",
        reward=reward,
    )


def build_random_groups(
    seed: int,
    *,
    num_groups: int,
    group_size: int,
    max_workers: int = 2,
    max_tokens: int = 24,
    vocabulary: int = VOCABULARY,
) -> list[Group]:
    """Groups of planners with 0 to max_workers workers; random masks, rewards, mu and versions; some frozen."""
    rng = np.random.default_rng(seed)

    def one(index: int) -> Segment:
        length = int(rng.integers(2, max_tokens))
        sampled = 1 + np.flatnonzero(rng.random(length - 1) < 0.5)
        segment = build_segment(
            index,
            "planner" if index == 0 else "worker",
            token_ids=rng.integers(0, vocabulary, length).tolist(),
            sampled=sampled.tolist(),
            version=int(rng.integers(0, 5)),
            trainable=bool(index == 0 or rng.random() < 0.8),
        )
        segment.logprobs[sampled] = -rng.random(len(sampled)) * 5
        return segment

    return [
        Group(
            id=f"g-{g}",
            episodes=[
                build_episode(
                    f"g-{g}", k, [one(i) for i in range(1 + int(rng.integers(0, max_workers + 1)))], float(rng.random())
                )
                for k in range(group_size)
            ],
        )
        for g in range(num_groups)
    ]


@pytest.fixture(scope="session")
def make_segment() -> Callable[..., Segment]:
    return build_segment


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    return build_episode


@pytest.fixture(scope="session")
def random_groups() -> Callable[..., list[Group]]:
    return build_random_groups


@pytest.fixture(scope="session")
def make_settings() -> Callable[..., LearnerSettings]:
    def build(**changes: object) -> LearnerSettings:
        base: dict[str, object] = {
            "group_size": 2,
            "groups_per_update": 4,
            "device": "cpu",
            "num_threads": 1,
            "learning_rate": 1e-3,
        }
        return LearnerSettings.model_validate(base | changes)

    return build


def _save_model(folder: Path, *, tied: bool) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        initializer_range=0.3,  # large, so that a leak or a wrong gradient is far above rounding
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 with random weights, embeddings tied to the head."""
    return _save_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    return _save_model(tmp_path_factory.mktemp("untied"), tied=False)
