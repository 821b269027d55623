"""The engine: one update is the same however it is packed, ordered, sharded or resumed."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from matpo.errors import CheckpointError, ConfigError, MatpoError
from matpo.schema import write_episodes
from matpo_learner.attention import PackedAttention
from matpo_learner.deepspeed_engine import LearnerEngine, make_config
from matpo_learner.logprobs import load_scorer
from matpo_learner.packing import pack_sft, pack_update

ADVANTAGES = np.array([1.0, -0.5])
TWO_STEPS = {"num_minibatches": 2, "loss": "decoupled_ppo"}


@pytest.fixture(scope="module")
def groups(random_groups):
    return random_groups(11, num_groups=4, group_size=2, max_workers=3)


@pytest.fixture
def engine(tiny_model, make_settings):
    """Builds engines and frees them."""
    made = []

    def build(model=tiny_model, **changes):
        made.append(LearnerEngine(model, make_settings(**changes)))
        return made[-1]

    yield build
    for one in made:
        one.close()


def _plan(engine, groups, version=5):
    return pack_update(groups, [ADVANTAGES] * len(groups), engine.settings, version=version)


def _weights(engine) -> dict[str, Tensor]:
    return dict(engine.tensors())


def _gradient(engine) -> dict[str, Tensor]:
    """After one step: AdamW's first moment is (1 - beta1) times the clipped gradient, so it shows what weights hide:
    Adam's first step has the size of the rate whatever the gradient's size."""
    return {name: engine._get(p, "exp_avg") / 0.1 for name, p in engine._scorer.named_parameters()}


def _assert_same(found, want, atol):
    assert set(found) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(
            found[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"microbatch_tokens": 30},
        {"microbatch_tokens": 1},
        {"logprob_chunk_tokens": 3},
        {"share_prefixes": False},
        {"activation_checkpointing": True},
    ],
)
@pytest.mark.parametrize("loss", ["tis", "ppo_clip", "decoupled_ppo"])
def test_update_does_not_depend_on_packing(engine, groups, loss, change):
    """Defect 3 of the official code: a mean per micro-batch made the gradient depend on packing."""
    one, many = engine(loss=loss, microbatch_tokens=100_000), engine(loss=loss, **change)
    reports = [e.step(_plan(e, groups)) for e in (one, many)]
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-5)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)
    _assert_same(_gradient(many), _gradient(one), 1e-6)


def test_update_does_not_depend_on_the_order_of_micro_batches(engine, groups):
    forward, backward = engine(microbatch_tokens=30), engine(microbatch_tokens=30)
    forward.step(_plan(forward, groups))
    backward.step([list(reversed(step)) for step in _plan(backward, groups)])
    _assert_same(_gradient(backward), _gradient(forward), 1e-6)


def test_empty_micro_batches_change_nothing(engine, groups):
    plain, padded = engine(), engine()
    (rows,) = _plan(plain, groups)
    empty = dataclasses.replace(pack_sft([], plain.settings)[0], roles=rows[0].roles)
    plain.step([rows])
    padded.step([[empty, *rows, empty]])
    _assert_same(_gradient(padded), _gradient(plain), 0.0)


def test_gradient_is_the_weighted_sum_over_every_micro_batch(engine, groups, tiny_model):
    """Against plain torch: one backward over a sum that is written out segment by segment."""
    trained = engine(microbatch_tokens=30, max_grad_norm=1e9)
    rows = _plan(trained, groups)[0]
    scorer = load_scorer(tiny_model, chunk_tokens=1024)
    total = torch.zeros(())
    for row in rows:
        t = torch.as_tensor
        log_pi, _ = scorer(
            t(row.token_ids),
            t(row.position_ids),
            PackedAttention(row.segment_lengths.tolist(), row.segment_rows),
            t(row.predict_from),
            t(row.target_ids),
        )
        for i in range(row.num_targets):
            a, w, x = float(row.advantages[i]), float(row.weights[i]), log_pi[i] - float(row.mu[i])
            moved = float(log_pi[i].exp()) - float(np.exp(row.mu[i]))
            keep = not (moved > 0.2 if a > 0 else moved < -0.2)
            total = total + w * (-keep * min(float(x.exp()), 2.0) * a * log_pi[i] + 1e-3 * x.square())
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in scorer.parameters()])
    report = trained.step([rows])
    assert report.loss == pytest.approx(float(total), rel=1e-5)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_stage_gives_the_update_of_plain_training(engine, groups, stage):
    plain, sharded = (
        engine(microbatch_tokens=40, **TWO_STEPS),
        engine(microbatch_tokens=40, zero_stage=stage, **TWO_STEPS),
    )
    for version in (5, 6):
        want, found = plain.step(_plan(plain, groups, version)), sharded.step(_plan(sharded, groups, version))
        assert found.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    _assert_same(_weights(sharded), _weights(plain), 2e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_first_adamw_step_has_the_size_of_the_rate(engine, groups, stage):
    """Rate * sign(gradient), by bias correction. With a step counted before the first it would be 0.73 of that."""
    trained = engine(zero_stage=stage)
    before = _weights(trained)
    trained.step(_plan(trained, groups))
    moved = max(float((tensor - before[name]).abs().max()) for name, tensor in trained.tensors())
    assert moved == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_engine_continues_exactly(engine, groups, tmp_path, stage):
    first = engine(zero_stage=stage, warmup_updates=4)
    first.step(_plan(first, groups))
    first.save(tmp_path)
    first.step(_plan(first, groups))
    second = engine(zero_stage=stage, warmup_updates=4)
    second.load(tmp_path)
    assert second.num_updates == 1
    report = second.step(_plan(second, groups))
    assert report.learning_rate == pytest.approx(2 / 5 * 1e-3)
    _assert_same(_weights(second), _weights(first), 0.0)


def test_checkpoint_resumes_under_another_zero_stage(engine, groups, tmp_path):
    first, second = engine(zero_stage=3), engine(zero_stage=1)
    first.step(_plan(first, groups))
    first.save(tmp_path)
    second.load(tmp_path)
    _assert_same(_weights(second), _weights(first), 0.0)
    for one in (first, second):
        one.step(_plan(one, groups))
    _assert_same(_weights(second), _weights(first), 2e-5)


def test_damaged_or_foreign_checkpoint_is_refused_and_changes_nothing(engine, groups, untied_model, tmp_path):
    trained = engine()
    trained.step(_plan(trained, groups))
    before = _weights(trained)
    with pytest.raises(CheckpointError, match=r"engine\.json cannot be read"):
        trained.load(tmp_path)
    engine(untied_model).save(tmp_path)
    with pytest.raises(CheckpointError, match="of another model"):
        trained.load(tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="SHA-256"):
        trained.load(tmp_path)
    _assert_same(_weights(trained), before, 0.0)


def test_loss_that_is_not_finite_stops_before_the_weights(engine, groups):
    trained = engine()
    before = _weights(trained)
    (rows,) = _plan(trained, groups)
    rows = [dataclasses.replace(row, advantages=row.advantages * np.float32("nan")) for row in rows]
    with pytest.raises(MatpoError, match="weights were not changed") as caught:
        trained.step([rows])
    assert caught.value.reason == "not_finite"
    _assert_same(_weights(trained), before, 0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_out_under_their_hugging_face_names_with_an_explicit_head(engine, tiny_model, untied_model, tied):
    folder = tiny_model if tied else untied_model
    found, want = _weights(engine(folder)), load_file(folder / "model.safetensors")
    want.setdefault("lm_head.weight", want["model.embed_tokens.weight"])
    _assert_same(found, want, 0.0)


def test_log_probs_align_with_the_micro_batches(engine, groups):
    scoring = engine()
    episodes = [e for g in groups for e in g.episodes]
    fine, whole = (
        pack_sft(episodes, scoring.settings.model_copy(update={"microbatch_tokens": 25})),
        pack_sft(episodes, scoring.settings),
    )
    pairs = lambda rows: sorted(  # noqa: E731
        (float(mu), float(x))
        for row, found in zip(rows, scoring.log_probs(rows), strict=True)
        for mu, x in zip(row.mu, found, strict=True)
    )
    np.testing.assert_allclose(pairs(fine), pairs(whole), atol=1e-5)


def test_supervised_steps_lower_the_loss(engine, groups):
    trained = engine(learning_rate=1e-2)
    rows = pack_sft([e for g in groups for e in g.episodes], trained.settings)
    seen = [trained.step([rows], loss="sft").loss for _ in range(8)]
    assert seen[-1] < seen[0] - 0.3


def test_bfloat16_trains_with_float32_masters(engine, groups):
    """A rate so small that bfloat16 weights cannot show a single step; the masters add them up."""
    trained = engine(dtype="bfloat16", learning_rate=1e-6)
    master = lambda: trained._get(trained._scorer.head.weight, None).detach().clone()  # noqa: E731
    before, served = master(), _weights(trained)
    for _ in range(3):
        trained.step(_plan(trained, groups))
    moved = (master() - before).abs().max()
    assert 1e-6 < float(moved) < 4e-6
    assert served["lm_head.weight"].dtype == torch.bfloat16


def test_deepspeed_config_may_not_change_what_an_update_is(make_settings):
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        make_config(make_settings(deepspeed={"gradient_accumulation_steps": 4}), 10)
    merged = make_config(make_settings(deepspeed={"zero_optimization": {"overlap_comm": True}}, zero_stage=2), 10)
    assert (merged["zero_optimization"]["stage"], merged["zero_optimization"]["overlap_comm"]) == (2, True)


@pytest.fixture(scope="module")
def two_ranks(groups, tiny_model, make_settings, tmp_path_factory):
    """Two ranks under DeepSpeed's launcher, ZeRO 0 to 3 one after the other. Returns (folder, settings)."""
    out = tmp_path_factory.mktemp("ranks")
    write_episodes(out / "episodes", [e for g in groups for e in g.episodes])
    settings = make_settings(microbatch_tokens=40, **TWO_STEPS)
    (out / "settings.json").write_text(settings.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    program = [str(Path(__file__).with_name("rank_program.py")), str(tiny_model), str(out / "episodes"), str(out)]
    done = subprocess.run(
        [*launcher, f"--master_port={port}", "--no_local_rank", *program],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, settings


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_under_each_zero_stage_give_the_single_rank_update(two_ranks, engine, groups, stage):
    out, settings = two_ranks
    single = engine(**settings.model_dump(exclude_unset=True))
    reports = [single.step(_plan(single, groups, version)) for version in (5, 6)]
    want = [[r.loss, r.grad_norm, r.num_tokens, r.overall.ess, r.overall.kl] for r in reports]
    np.testing.assert_allclose(json.loads((out / f"stage{stage}.json").read_text()), want, rtol=1e-4)
    _assert_same(load_file(out / f"stage{stage}.safetensors"), _weights(single), 2e-5)


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoint_of_two_ranks_resumes_on_one(two_ranks, engine, stage):
    out, _ = two_ranks
    resumed = engine()
    resumed.load(out / f"checkpoint{stage}")
    assert resumed.num_updates == 2
    assert resumed._get_num_steps() == 4
    _assert_same(_weights(resumed), load_file(out / f"stage{stage}.safetensors"), 0.0)


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_bytes_of_rank_0_arrive_on_the_other(two_ranks):
    out, _ = two_ranks
    assert (out / "heard0").read_bytes() == b"\x00hello"
