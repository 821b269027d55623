"""Packing and shared prefixes on a GPU: the gradient of the plain form on the same GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from matpo.episode import Episode, Segment, Task
from matpo.settings import LearnerSettings
from matpo_learner.attention import PackedAttention
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import pack_sft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def episode():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 512, 100)
    bodies = [np.concatenate([prompt, rng.integers(0, 512, n)]) for n in (3, 50, 51, 400)] + [rng.integers(0, 512, 90)]
    segments = []
    for index, body in enumerate(bodies):
        sampled = np.arange(len(body)) > len(body) - 40
        segments.append(
            Segment(
                index=index,
                parent=-1 if index == 0 else 0,
                role="planner",
                token_ids=body.astype(np.int32),
                sampled=sampled,
                logprobs=np.zeros(len(body), dtype=np.float32),
                versions=np.where(sampled, 0, -1).astype(np.int32),
            )
        )
    task = Task(id="t", environment="e", question="?")
    return Episode(
        id="g.0.0", group="g", member=0, attempt=0, task=task, segments=tuple(segments), answer="", reward=1.0
    )


def _gradient(folder, episode, dtype, **changes):
    settings = LearnerSettings.model_validate({"microbatch_tokens": 10_000} | changes)
    scorer = load_scorer(folder, chunk_tokens=64).to(dtype).cuda()
    for row in pack_sft([episode], settings):
        columns = [torch.as_tensor(c, device="cuda") for c in (row.token_ids, row.position_ids)]
        targets = [torch.as_tensor(c, device="cuda") for c in (row.predict_from, row.target_ids)]
        packing = PackedAttention(row.segment_lengths.tolist(), row.segment_rows, torch.device("cuda"))
        scorer(*columns, packing, *targets)[0].sum().backward()
    return torch.cat([p.grad.flatten().double() for p in scorer.parameters()])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_gradient_of_shared_prefixes_and_stacks_equals_one_segment_per_row_on_the_gpu(
    model_folder, episode, dtype, error
):
    want = _gradient(model_folder, episode, torch.float32, share_prefixes=False, microbatch_tokens=1)
    for share in (False, True):
        found = _gradient(model_folder, episode, dtype, share_prefixes=share)
        assert float((found - want).norm() / want.norm()) <= error
