"""The frozen reference: the policy's own forward, unchanged for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from matpo import snapshot
from matpo.errors import ConfigError
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.packing import pack_sft, pack_update
from matpo_learner.reference import Reference

CPU = torch.device("cpu")


@pytest.fixture
def rows(random_groups, make_settings):
    groups = random_groups(2, num_groups=2, group_size=2)
    return pack_sft([e for g in groups for e in g.episodes], make_settings(microbatch_tokens=40))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_scores_exactly_as_the_policy_that_it_was(tiny_model, rows, make_settings, dtype):
    settings = make_settings(dtype=dtype)
    policy = LearnerEngine(tiny_model, settings)
    reference = Reference(tiny_model, settings, vocab_size=64, device=CPU)
    for row, want in zip(rows, policy.log_probs(rows), strict=True):
        assert np.array_equal(reference.log_probs(row).numpy(), want)
    policy.close()


def test_reference_does_not_move_with_the_policy(tiny_model, rows, random_groups, make_settings):
    settings = make_settings(kl_beta=0.5, learning_rate=1e-2)
    policy = LearnerEngine(tiny_model, settings)
    before = [policy._reference.log_probs(row) for row in rows]
    groups = random_groups(2, num_groups=4, group_size=2)
    policy.step(pack_update(groups, [np.array([1.0, -1.0])] * 4, settings, version=5))
    after = [policy._reference.log_probs(row) for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not np.array_equal(policy.log_probs(rows)[0], before[0].numpy())
    assert not any(value.requires_grad for value in after)
    policy.close()


def test_a_published_snapshot_can_be_the_reference(tiny_model, rows, make_settings, tmp_path):
    policy = LearnerEngine(tiny_model, make_settings())
    published = snapshot.publish(
        tmp_path,
        dict(policy.tensors()),
        version=1,
        epoch=0,
        update=0,
        model_folder=tiny_model,
        dtype=torch.float32,
    )
    reference = Reference(published, make_settings(), vocab_size=64, device=CPU)
    for row, want in zip(rows, policy.log_probs(rows), strict=True):
        np.testing.assert_allclose(reference.log_probs(row).numpy(), want, atol=1e-6)
    policy.close()


def test_micro_batch_without_targets_has_no_log_probs(tiny_model, make_settings):
    reference = Reference(tiny_model, make_settings(), vocab_size=64, device=CPU)
    assert reference.log_probs(pack_sft([], make_settings())[0]).shape == (0,)


def test_reference_with_another_vocabulary_is_refused(tiny_model, make_settings, tmp_path):
    config = Qwen3Config(
        vocab_size=65,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 65 token ids, the policy has 64"):
        LearnerEngine(tiny_model, make_settings(kl_beta=0.1, reference=tmp_path))
