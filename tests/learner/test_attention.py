"""Shared prefixes and stacks of segments: the plain form's numbers and gradients, and no leak between siblings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from matpo_learner import attention
from matpo_learner.attention import PackedAttention, packed_attention
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import pack_sft


@pytest.fixture(scope="module")
def siblings(make_segment, make_episode):
    """Segments that share a long prompt, a prompt and some sampled tokens, everything, or nothing."""
    prompt, rng = list(range(10, 30)), np.random.default_rng(2)
    bodies = [[*prompt, *rng.integers(0, 64, n)] for n in (4, 9, 30, 31)]
    bodies += [[*bodies[2][:40], 1, 2, 3], bodies[0], prompt, [7, 8, 9], [7, 8, 9, 10, 11]]
    return [
        make_episode("g", k, [make_segment(0, "planner", token_ids=b, sampled=range(len(b) - 2, len(b)))], 1.0)
        for k, b in enumerate(bodies)
    ]


def _score(scorer, row):
    t = torch.as_tensor
    packing = PackedAttention(row.segment_lengths.tolist(), row.segment_rows)
    return scorer(t(row.token_ids), t(row.position_ids), packing, t(row.predict_from), t(row.target_ids))


def _targets_in_order(row):
    """Each target's order by what cannot depend on packing: its number, given as mu below."""
    return np.argsort(row.mu, kind="stable")


def _numbered(episodes):
    """mu of each sampled token is its own number."""
    numbers = iter(range(10_000))
    for episode in episodes:
        for s in episode.segments:
            s.logprobs[s.sampled] = [next(numbers) for _ in range(s.num_sampled)]
    return episodes


def _loss_and_gradient(folder, episodes, settings, dtype, **changes):
    """Log-probs in the order of the episodes' tokens, and the gradient of a sum of them with uneven weights."""
    scorer = load_scorer(folder, chunk_tokens=5, **changes).to(dtype)
    (row,) = pack_sft(_numbered(episodes), settings)
    logprobs = _score(scorer, row)[0][torch.as_tensor(_targets_in_order(row))]
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=dtype)).sum().backward()
    return row, logprobs.detach(), {name: p.grad for name, p in scorer.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_gradient_with_shared_prefixes_equals_the_plain_form(
    tiny_model, siblings, make_settings, dtype, error, checkpointing
):
    """1e-7: transformers' RMSNorm and RoPE round to float32 also in a float64 model."""
    plain = make_settings(share_prefixes=False)
    apart, want, want_grad = _loss_and_gradient(tiny_model, siblings, plain, dtype)
    row, found, grad = _loss_and_gradient(
        tiny_model, siblings, make_settings(), dtype, activation_checkpointing=checkpointing
    )
    assert row.num_tokens < 0.6 * apart.num_tokens
    torch.testing.assert_close(found, want, atol=error, rtol=error)
    one, other = (torch.cat([g.flatten().double() for g in side.values()]) for side in (grad, want_grad))
    assert float((one - other).norm() / other.norm()) <= error
    assert float(torch.cosine_similarity(one, other, dim=0)) >= 0.99999


def test_log_probs_with_shared_prefixes_equal_each_segment_alone(tiny_model, siblings, make_settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa")
    _, found, _ = _loss_and_gradient(tiny_model, siblings, make_settings(), torch.float64)
    want = []
    for segment in [s for e in siblings for s in e.segments]:
        ids = torch.as_tensor(segment.token_ids, dtype=torch.int64)
        logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        want += [logs[t - 1, ids[t]] for t in np.flatnonzero(segment.sampled)]
    torch.testing.assert_close(found, torch.stack(want), atol=1e-7, rtol=0)


def test_changing_a_sibling_s_own_tokens_changes_no_bit_of_another(tiny_model, siblings, make_settings):
    (row,) = pack_sft(siblings, make_settings())
    scorer = load_scorer(tiny_model, chunk_tokens=50)
    before, _ = _score(scorer, row)
    segments = np.split(row.segment_rows, np.cumsum(row.segment_lengths)[:-1])
    for index, segment in enumerate(segments):
        others = np.unique(np.concatenate([s for i, s in enumerate(segments) if i != index]))
        own = np.setdiff1d(segment, others)
        changed = dataclasses.replace(row, token_ids=row.token_ids.copy())
        changed.token_ids[own] = (changed.token_ids[own] + 1) % 64
        after, _ = _score(scorer, changed)
        elsewhere = torch.as_tensor(~np.isin(row.predict_from, own))
        assert torch.equal(before[elsewhere], after[elsewhere])
        assert bool((before[~elsewhere] != after[~elsewhere]).all())


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9), window=st.sampled_from([None, 1, 5, 40]))
def test_stacked_attention_equals_a_loop_over_segments_and_positions(lengths, window):
    total = sum(lengths)
    rng = np.random.default_rng(total)
    rows = rng.permutation(total)
    query, key, value = (torch.as_tensor(rng.standard_normal((1, heads, total, 3))) for heads in (4, 2, 2))
    packing = PackedAttention(lengths, rows)
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, packing=packing, sliding_window=window)
    for segment in np.split(rows, np.cumsum(lengths)[:-1]):
        for i in range(len(segment)):
            seen = segment[max(0, i + 1 - (window or total)) : i + 1]
            for head in range(4):
                scores = key[0, head // 2, seen] @ query[0, head, segment[i]] / 3**0.5
                want = scores.softmax(0) @ value[0, head // 2, seen]
                torch.testing.assert_close(found[0, segment[i], head], want, atol=1e-12, rtol=0)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_stacks_are_few_and_little_of_them_is_padding(lengths):
    lengths = sorted(lengths, reverse=True)
    stacks = attention._stacks(lengths)
    assert [i for s in stacks for i in range(s.start, s.stop)] == list(range(len(lengths)))
    for stack in stacks:
        longest = lengths[stack.start]
        assert all(longest - n <= 0.15 * longest + 16 for n in lengths[stack])
    assert len(stacks) <= 40


def test_sliding_window_layers_see_only_their_window_behind_a_shared_prefix(
    tmp_path, make_segment, make_episode, make_settings
):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        initializer_range=0.5,
    )
    Qwen3ForCausalLM(config).double().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="sdpa")
    bodies = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 9, 10], [1, 2, 3, 11, 12, 13]]
    episodes = [
        make_episode("g", k, [make_segment(0, "planner", token_ids=b, sampled=range(1, len(b)))], 1.0)
        for k, b in enumerate(bodies)
    ]
    row, found, _ = _loss_and_gradient(tmp_path, episodes, make_settings(), torch.float64)
    assert row.num_tokens == 10
    ids = [torch.tensor(b) for b in bodies]
    logs = [model(input_ids=b[None]).logits[0, :-1].log_softmax(-1) for b in ids]
    want = torch.cat([one.gather(-1, b[1:, None]).squeeze(-1) for one, b in zip(logs, ids, strict=True)])
    torch.testing.assert_close(found, want, atol=1e-7, rtol=0)
