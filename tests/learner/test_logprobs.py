"""Packed log-probs: no leak between segments, no [T, V] logits, exact gradients."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from matpo.errors import ConfigError
from matpo_learner import loss as losses
from matpo_learner.attention import ATTENTION, PackedAttention
from matpo_learner.logprobs import Head, Scorer, load_scorer
from matpo_learner.packing import pack_sft, pack_update


def _scorer(folder, *, chunk_tokens=5, dtype=torch.float64, entropy_gradient=False):
    return load_scorer(folder, chunk_tokens=chunk_tokens, entropy_gradient=entropy_gradient).to(dtype)


def _score(scorer, batch):
    t = torch.as_tensor
    return scorer(
        t(batch.token_ids),
        t(batch.position_ids),
        PackedAttention(batch.segment_lengths.tolist(), batch.segment_rows),
        t(batch.predict_from),
        t(batch.target_ids),
    )


def _rows(random_groups, settings, seed=1, **changes):
    groups = random_groups(seed, num_groups=3, group_size=2)
    return pack_sft(
        [e for g in groups for e in g.episodes],
        settings(**{"microbatch_tokens": 200, "share_prefixes": False} | changes),
    )


def _all_float64(scorer):
    """transformers' RMSNorm rounds to float32 inside a float64 model: too coarse for finite differences."""
    for module in list(scorer.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return scorer


def _naive(folder, row):
    """Each segment alone through transformers' own sdpa model, full logits. Returns log-probs and entropies."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    by_place = {}
    for segment in np.split(row.segment_rows, np.cumsum(row.segment_lengths)[:-1]):
        logs = model(input_ids=torch.as_tensor(row.token_ids[segment])[None]).logits[0].log_softmax(-1)
        by_place |= {int(place): logs[i] for i, place in enumerate(segment)}
    at = [by_place[int(place)] for place in row.predict_from]
    logprobs = [logs[token] for logs, token in zip(at, row.target_ids, strict=True)]
    return model, torch.stack(logprobs), torch.stack([-(logs.exp() * logs).sum() for logs in at])


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_packed_chunked_log_probs_equal_each_segment_alone_with_full_logits(
    tiny_model, random_groups, make_settings, chunk_tokens
):
    scorer = _scorer(tiny_model, chunk_tokens=chunk_tokens)
    for row in _rows(random_groups, make_settings):
        logprobs, entropy = _score(scorer, row)
        _, want, want_entropy = _naive(tiny_model, row)
        torch.testing.assert_close(logprobs, want, atol=1e-10, rtol=0)
        torch.testing.assert_close(entropy, want_entropy, atol=1e-10, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_of_every_weight_equals_the_naive_one(tiny_model, untied_model, random_groups, make_settings, tied):
    folder = tiny_model if tied else untied_model
    (row,) = _rows(random_groups, make_settings)
    scorer = _scorer(folder)
    weights = torch.linspace(-1, 1, row.num_targets, dtype=torch.float64)
    (weights * _score(scorer, row)[0]).sum().backward()
    model, logprobs, _ = _naive(folder, row)
    (weights * logprobs).sum().backward()
    found = dict(scorer.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("chunk_tokens", [3, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_of_log_probs_and_entropy_together_equals_the_naive_one(
    tiny_model, untied_model, random_groups, make_settings, tied, chunk_tokens
):
    folder = tiny_model if tied else untied_model
    (row,) = _rows(random_groups, make_settings)
    scorer = _scorer(folder, chunk_tokens=chunk_tokens, entropy_gradient=True)
    weights = torch.linspace(-1, 1, row.num_targets, dtype=torch.float64)
    logprobs, entropy = _score(scorer, row)
    (weights * logprobs + weights.flip(0) * entropy).sum().backward()
    model, logprobs, entropy = _naive(folder, row)
    (weights * logprobs + weights.flip(0) * entropy).sum().backward()
    found = dict(scorer.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-9, rtol=0, msg=name)


def test_gradient_of_the_head_equals_finite_differences_with_and_without_the_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(11, 4, dtype=torch.float64))
    targets = torch.randint(0, 11, (7,))
    both, plain = (Head(weight, 3, entropy_gradient=on) for on in (True, False))
    assert torch.autograd.gradcheck(lambda h, w: both(h, targets), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: plain(h, targets)[0], (hidden, weight))


def test_entropy_has_no_gradient_and_keeps_nothing_unless_asked_for(tiny_model, random_groups, make_settings):
    (row,) = _rows(random_groups, make_settings)
    kept = {}
    for asked in (False, True):
        scorer, sizes = _scorer(tiny_model, entropy_gradient=asked), []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.shape) or t, lambda t: t):
            _, entropy = _score(scorer, row)
        assert entropy.requires_grad == asked
        kept[asked] = Counter(sizes)
    assert not kept[False] - kept[True]
    # The entropies, and which of them each target has.
    assert all(len(shape) == 1 and shape[0] <= row.num_targets for shape in (kept[True] - kept[False]).elements())


def test_changing_one_segment_changes_no_bit_of_another(tiny_model, random_groups, make_settings):
    (row,) = _rows(random_groups, make_settings)
    scorer = _scorer(tiny_model, dtype=torch.float32)
    before, _ = _score(scorer, row)
    own = row.segment_rows[: row.segment_lengths[0]]
    row.token_ids[own] = (row.token_ids[own] + 1) % 64
    after, _ = _score(scorer, row)
    elsewhere = torch.as_tensor(~np.isin(row.predict_from, own))
    assert torch.equal(before[elsewhere], after[elsewhere])
    assert not torch.equal(before[~elsewhere], after[~elsewhere])


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_of_row_length_times_vocabulary_is_kept_or_made(
    tmp_path, random_groups, make_settings, entropy_gradient
):
    vocabulary, chunk = 4096, 8
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    groups = random_groups(5, num_groups=8, group_size=4, vocabulary=vocabulary, max_tokens=60)
    (row,) = pack_sft([e for g in groups for e in g.episodes], make_settings(microbatch_tokens=100_000))
    assert row.num_targets > 20 * chunk
    scorer = load_scorer(tmp_path, chunk_tokens=chunk, entropy_gradient=entropy_gradient)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    kept = []
    with Watch(), saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logprobs, entropy = _score(scorer, row)
        (logprobs.sum() + entropy.sum()).backward()
    weight = vocabulary * config.hidden_size
    assert largest <= max(weight, chunk * vocabulary)
    assert max(kept) <= weight


@pytest.mark.parametrize(
    "changes",
    [
        # The weight of tis or cispo is not differentiated: by design their value has another derivative.
        {"loss": "ppo_clip"},
        {"loss": "ppo_clip", "kl_beta": 0.3, "entropy_beta": 0.2},
    ],
)
def test_gradient_equals_finite_differences(tiny_model, random_groups, make_settings, changes):
    settings = make_settings(group_size=2, microbatch_tokens=300, **changes)
    groups = random_groups(4, num_groups=2, group_size=2)
    advantages = [np.array([0.7, -0.7])] * 2
    ((row,),) = pack_update(groups, advantages, settings, version=4)
    scorer = _all_float64(_scorer(tiny_model, entropy_gradient=True))
    with torch.no_grad():  # away from the kinks of cap and mask: mu close to pi
        before = _score(scorer, row)[0]
    row.mu[:] = before.numpy() - 0.01
    tokens = losses.Tokens.of(row, reference=before - 0.5)

    def value():
        return losses.weighted_sum(settings.loss, *_score(scorer, row), tokens, settings)[0]

    value().backward()
    rng = np.random.default_rng(0)
    for parameter in scorer.parameters():
        direction = torch.as_tensor(rng.standard_normal(tuple(parameter.shape)))
        step = 1e-6
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(float(value()))
                parameter -= sign * step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5, abs=1e-8)


def test_gradient_at_masked_tokens_is_exactly_zero(tiny_model, make_segment, make_episode, make_settings):
    """At the last hidden states: only the position that predicts the one sampled token has a gradient."""
    segment = make_segment(0, "planner", token_ids=[1, 2, 3, 4, 5, 6], sampled=[3])
    (row,) = pack_sft([make_episode("g", 0, [segment], 1.0)], make_settings())
    scorer = _scorer(tiny_model)
    outputs = []

    def keep(_module, _arguments, out):
        out.retain_grad()
        outputs.append(out)

    scorer.model.base_model.norm.register_forward_hook(keep)
    _score(scorer, row)[0].sum().backward()
    grad = outputs[0].grad[0]
    assert len(grad) == 3  # nothing after the last sampled token is read at all
    assert grad[2].abs().max() > 0
    assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))


def test_sliding_window_layers_see_only_their_window(tmp_path):
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
    ids = torch.randint(0, 32, (11,))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="sdpa")
    want = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    scorer = _scorer(tmp_path)
    two = torch.cat([ids, ids])
    packing = PackedAttention([11, 11], np.arange(22))
    found, _ = scorer(two, torch.arange(11).repeat(2), packing, torch.arange(11, 21), ids[1:])
    torch.testing.assert_close(found, want, atol=1e-10, rtol=0)


def test_model_that_would_leak_or_bend_logits_is_refused(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=ATTENTION)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        Scorer(model, chunk_tokens=8)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="see each other"):
        Scorer(model, chunk_tokens=8)


def test_model_folder_with_weights_missing_is_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_model / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        load_scorer(tmp_path, chunk_tokens=8)
