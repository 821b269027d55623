"""The learner's benchmark: what both sides are given, and what it says without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from matpo import Episode, Segment, Task, schema
from matpo.errors import SetupError
from matpo.settings import LearnerSettings, load_run_file
from matpo_learner.packing import pack_sft
from matpo_ops.bench import learner_gpu, trl_update
from matpo_ops.bench.recorded import play_groups
from matpo_ops.demo import CONFIGS


def _segment(token_ids, sampled):
    mask = np.isin(np.arange(len(token_ids)), sampled)
    return Segment(
        index=0,
        parent=-1,
        role="planner",
        token_ids=np.array(token_ids, dtype=np.int32),
        sampled=mask,
        logprobs=np.where(mask, -np.arange(len(token_ids)), 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
    )


def test_played_groups_are_whole_and_as_valid_as_what_actors_send(tmp_path):
    run_file = load_run_file(CONFIGS / "demo.toml", [f"run.folder={tmp_path}", "learner.group_size=3"])
    groups = play_groups(run_file, 2)
    assert [[episode.member for episode in group.episodes] for group in groups] == [[0, 1, 2]] * 2
    for episode in [episode for group in groups for episode in group.episodes]:
        assert schema.decode(schema.encode(episode), vocab_size=1024, published_version=0).num_sampled > 0


def test_peer_is_given_every_sampled_token_once_with_its_context_and_recorded_log_prob():
    pairs = [(_segment([1, 2, 3, 4, 5, 6], [2, 4]), 0.5), (_segment([7, 8, 9], [1, 2]), -1.0)]
    batch = trl_update._batch(pairs, torch.tensor(4))
    assert batch["prompt_ids"].tolist() == [[1, 2], [0, 7]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["completion_ids"].tolist() == [[3, 4, 5], [8, 9, 0]]
    assert batch["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch["tool_mask"] * batch["completion_mask"]).tolist() == [[1, 0, 1], [1, 1, 0]]
    assert batch["old_per_token_logps"].tolist() == [[-2, 0, -4], [-1, -2, 0]]
    assert batch["advantages"].tolist() == [0.5, -1.0]


def test_needed_flops_are_six_per_weight_and_token_and_half_of_the_attention_square():
    episode = Episode(
        id="g.0.0",
        group="g",
        member=0,
        attempt=0,
        task=Task(id="t", environment="e", question="?"),
        segments=(_segment(range(11), range(1, 11)),),
        answer="",
        reward=0.0,
    )
    (row,) = pack_sft([episode], LearnerSettings())
    config = learner_gpu._config()
    # Scores and values, forward and twice backward: 2 * 2 * 3 FLOPs for each pair of positions, half of them seen.
    pairs = 12 * 10 * 10 / 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert learner_gpu.needed_flops(row, 1000, config) == 6 * 1000 * 10 + pairs


def test_gpu_batch_is_32k_tokens_in_one_row():
    (row,) = pack_sft([learner_gpu._episode()], LearnerSettings(microbatch_tokens=learner_gpu.TOKENS))
    assert row.num_tokens == learner_gpu.TOKENS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_figures_without_a_gpu_are_a_clear_error():
    with pytest.raises(SetupError, match="sees no GPU"):
        learner_gpu.learner_gpu()
