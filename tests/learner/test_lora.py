"""matpo_learner.lora: only adapters move, and what is published is the model as it behaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from matpo import snapshot
from matpo.errors import CheckpointError, ConfigError
from matpo_learner import lora
from matpo_learner.attention import PackedAttention
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import pack_sft, pack_update

ADVANTAGES = np.array([1.0, -0.5])
LORA = {"rank": 2, "alpha": 8}


@pytest.fixture(scope="module")
def groups(random_groups):
    return random_groups(12, num_groups=4, group_size=2, max_workers=3)


@pytest.fixture
def engine(tiny_model, make_settings):
    made = []

    def build(model=tiny_model, **changes):
        made.append(LearnerEngine(model, make_settings(**{"lora": LORA, "learning_rate": 1e-2, **changes}), seed=4))
        return made[-1]

    yield build
    for one in made:
        one.close()


def train(engine, groups, times=3):
    for version in range(5, 5 + times):
        plan = pack_update(groups, [ADVANTAGES] * len(groups), engine.settings, version=version)
        assert engine.step(plan).grad_norm > 0


def test_a_run_begins_at_the_base_model_under_its_names(engine, tiny_model):
    found, want = dict(engine().tensors()), load_file(tiny_model / "model.safetensors")
    assert found.keys() == {*want, snapshot.LM_HEAD}
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("tied", [True, False])
def test_only_adapted_layers_change(engine, groups, tiny_model, untied_model, tied):
    trained = engine(tiny_model if tied else untied_model, lora={**LORA, "target_modules": ["q_proj", "down_proj"]})
    before = dict(trained.tensors())
    train(trained, groups)
    moved = {name for name, tensor in trained.tensors() if not torch.equal(tensor, before[name])}
    adapted = ("self_attn.q_proj", "mlp.down_proj")
    assert moved == {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in adapted}


@pytest.mark.parametrize("changes", [{}, {"zero_stage": 1}, {"zero_stage": 3}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_snapshot_gives_the_log_probs_of_the_learner(
    engine, groups, tiny_model, untied_model, tmp_path, tied, changes
):
    """The snapshot is scored by transformers alone: a plain forward of each segment, whole logits."""
    base = tiny_model if tied else untied_model
    trained = engine(base, **changes)
    train(trained, groups)
    folder = snapshot.publish(
        tmp_path, dict(trained.tensors()), version=0, epoch=1, update=3, model_folder=base, dtype=torch.float32
    )
    from transformers import AutoModelForCausalLM

    served = AutoModelForCausalLM.from_pretrained(folder)
    (row, *rest) = pack_sft([episode for group in groups for episode in group.episodes], trained.settings)
    assert rest == []
    found = torch.from_numpy(trained.log_probs([row])[0])
    wanted = torch.empty(row.num_targets)
    for place in np.split(row.segment_rows, np.cumsum(row.segment_lengths)[:-1]):
        logits = served(torch.from_numpy(row.token_ids[None, place])).logits[0].log_softmax(-1)
        here = np.flatnonzero(np.isin(row.predict_from, place))
        wanted[here] = logits[row.position_ids[row.predict_from[here]], row.target_ids[here]]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    plain = engine(base, lora=None)
    assert np.abs(plain.log_probs([row])[0] - found.numpy()).max() > 1e-2  # training moved the model at all


def test_the_gradient_of_the_adapters_is_that_of_plain_autograd(engine, groups, tiny_model):
    """d loss / d A and d B by hand from the gradient of the merged weight: dA = s B' dW, dB = s dW A'."""
    trained = engine(max_grad_norm=1e9, microbatch_tokens=30)
    train(trained, groups, times=1)  # so that B is not zero
    merged = dict(trained.tensors())
    scorer = load_scorer(tiny_model, chunk_tokens=1024)
    scorer.model.load_state_dict(merged)
    rows = pack_sft([e for g in groups for e in g.episodes], trained.settings)
    for row in rows:
        t = torch.as_tensor
        packing = PackedAttention(row.segment_lengths.tolist(), row.segment_rows)
        log_pi, _ = scorer(t(row.token_ids), t(row.position_ids), packing, t(row.predict_from), t(row.target_ids))
        (-(t(row.weights) * log_pi).sum()).backward()
    layer = trained._scorer.model.model.layers[1].mlp.up_proj
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    whole = scorer.model.model.layers[1].mlp.up_proj.weight.grad
    wanted = {a: 4.0 * b.detach().T @ whole, b: 4.0 * whole @ a.detach().T}
    trained._accumulate("sft", rows, None)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)
    trained._engine.zero_grad()


def test_a_checkpoint_holds_adapters_only(engine, groups, tmp_path, untied_model):
    trained = engine(untied_model)
    train(trained, groups, times=1)
    trained.save(tmp_path)
    state = load_file(tmp_path / "state.safetensors")
    kinds = ("lora_A", "lora_B", "rng/")
    assert [name for name in state if not any(kind in name for kind in kinds)] == []
    adapted = 2 * 7  # layers, and linear layers in each
    assert len(state) == adapted * 2 * 3 + 1


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, LORA), (LORA, None), (LORA, {**LORA, "alpha": 9}), (LORA, {**LORA, "rank": 3})],
    ids=["full to adapters", "adapters to full", "another alpha", "another rank"],
)
def test_a_checkpoint_of_another_kind_of_training_is_refused(engine, tmp_path, first, second):
    engine(lora=first).save(tmp_path)
    resumed = engine(lora=second)
    before = dict(resumed.tensors())
    with pytest.raises(CheckpointError, match="run that trains") as caught:
        resumed.load(tmp_path)
    assert caught.value.reason == "model"
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.tensors())


def test_adapters_of_another_base_model_are_refused(engine, groups, tiny_model, tmp_path):
    engine().save(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    weights = {name: tensor * 1.5 for name, tensor in load_file(tiny_model / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="run that trains"):
        engine(other).load(tmp_path)


@pytest.mark.parametrize(
    ("modules", "words"),
    [(["nope"], "Linear layers of this model: down_proj"), (["lm_head"], "LM head"), (["embed_tokens"], "embeddings")],
)
def test_target_modules_that_cannot_be_adapted_are_refused(tiny_model, make_settings, modules, words):
    settings = make_settings(lora={**LORA, "target_modules": modules})
    with pytest.raises(ConfigError, match=words):
        lora.add_adapters(load_scorer(tiny_model, chunk_tokens=64).model, settings.lora)


def test_dropout_is_refused(make_settings):
    with pytest.raises(ValueError, match="sample without dropout"):
        make_settings(lora={**LORA, "dropout": 0.1})
