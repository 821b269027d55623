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

from matpo.errors import CheckpointError
from matpo.schema import write_episodes
from matpo_learner.attention import PackedAttention
from matpo_learner.deepspeed_engine import LearnerEngine
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


BAD = {
    "loss nan": lambda row: dataclasses.replace(row, advantages=row.advantages * np.float32("nan")),
    "loss inf": lambda row: dataclasses.replace(row, weights=row.weights * np.float32("inf")),
    "only the gradient": lambda row: row,
}
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ALL_OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
SETUPS = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    "stage 2, offloaded": {"zero_stage": 2, "deepspeed": OFFLOADED},
    "stage 3, offloaded": {"zero_stage": 3, "deepspeed": ALL_OFFLOADED},
    "bfloat16": {"dtype": "bfloat16", "learning_rate": 1e-2},
    "bfloat16, stage 3": {"dtype": "bfloat16", "learning_rate": 1e-2, "zero_stage": 3},
    "adapters": {"lora": {"rank": 2}},
    "adapters, stage 3": {"lora": {"rank": 2}, "zero_stage": 3},
    "adapters, bfloat16": {"lora": {"rank": 2}, "dtype": "bfloat16", "learning_rate": 1e-2},
}


def _masters(engine) -> dict[str, Tensor]:
    """Weights and moments, whole, float32."""
    return {
        f"{key}/{name}": engine._state.get(p, key).detach().float().cpu().clone()
        for name, p in engine._trained.items()
        for key in (None, "exp_avg", "exp_avg_sq")
    }


def _plan(engine, groups, version=5):
    return pack_update(groups, [ADVANTAGES] * len(groups), engine.settings, version=version)


def _weights(engine) -> dict[str, Tensor]:
    return dict(engine.tensors())


def _gradient(engine) -> dict[str, Tensor]:
    """After one step: AdamW's first moment is (1 - beta1) times the clipped gradient, so it shows what weights hide:
    Adam's first step has the size of the rate whatever the gradient's size."""
    return {name: engine._state.get(p, "exp_avg") / 0.1 for name, p in engine._trained.items()}


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
@pytest.mark.parametrize(
    "objective",
    [
        {"loss": "tis"},
        {"loss": "ppo_clip", "denominator": "token"},
        {"loss": "decoupled_ppo", "denominator": "constant"},
        {"loss": "gspo"},
        {"loss": "cispo", "kl_beta": 0.1, "entropy_beta": 0.1},
    ],
)
def test_update_does_not_depend_on_packing(engine, groups, objective, change):
    """Defect 3 of the official code: a mean per micro-batch made the gradient depend on packing."""
    one, many = engine(**objective, microbatch_tokens=100_000), engine(**objective, **change)
    reports = [e.step(_plan(e, groups)) for e in (one, many)]
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-5)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)
    assert reports[1].engine_gap == reports[0].engine_gap
    _assert_same(_gradient(many), _gradient(one), 1e-6)


@pytest.mark.parametrize("denominator", ["episode", "token", "constant"])
def test_shares_of_all_ranks_together_are_the_update_of_one(engine, groups, denominator):
    """The weights of each rank's share count the whole step."""
    one, shared = (engine(denominator=denominator, microbatch_tokens=30) for _ in range(2))
    shares = [
        pack_update(groups, [ADVANTAGES] * len(groups), shared.settings, version=5, rank=rank, world_size=3)[0]
        for rank in range(3)
    ]
    want, found = one.step(_plan(one, groups)), shared.step([[row for share in shares for row in share]])
    assert found.loss == pytest.approx(want.loss, rel=1e-5)
    _assert_same(_gradient(shared), _gradient(one), 1e-6)


def test_without_lag_the_engine_gap_is_the_distance_of_the_recorded_log_probs(engine, groups):
    trained = engine()
    newest = max(int(s.versions.max()) for g in groups for e in g.episodes for s in e.segments if s.trainable)
    ((row,),) = _plan(trained, groups, version=newest)
    (log_pi,) = trained.log_probs([row])
    gaps = np.abs(log_pi - row.mu)[row.lags == 0]
    report = trained.step([[row]])
    assert (report.engine_gap.mean, report.engine_gap.max) == pytest.approx((gaps.mean(), gaps.max()), rel=1e-5)
    assert report.engine_gap.num_tokens == len(gaps) > 0
    assert trained.step(_plan(trained, groups, version=9)).engine_gap is None


def test_loglinear_prox_spares_the_extra_forward_and_starts_as_the_recomputed_one(engine, groups, monkeypatch):
    exact, approximate = engine(**TWO_STEPS), engine(prox="loglinear", **TWO_STEPS)
    want = exact.step(_plan(exact, groups)[:1])
    scored = []
    monkeypatch.setattr(approximate, "log_probs", scored.append)
    found = approximate.step(_plan(approximate, groups)[:1])
    assert scored == []
    assert found.loss == pytest.approx(want.loss, rel=1e-6)
    _assert_same(_weights(approximate), _weights(exact), 1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_kl_penalty_is_zero_at_the_reference_and_positive_away_from_it(engine, groups, stage):
    trained = engine(kl_beta=0.1, zero_stage=stage)
    seen = [trained.step(_plan(trained, groups)).overall.reference_kl for _ in range(2)]
    assert seen[0] == pytest.approx(0.0, abs=1e-9)
    assert seen[1] > 1e-4


def test_kl_penalty_holds_the_policy_near_the_reference(engine, groups):
    free, held = (engine(kl_beta=beta, learning_rate=1e-2) for beta in (1e-9, 10.0))
    apart = {}
    for one in (free, held):
        for _ in range(6):
            apart[one] = one.step(_plan(one, groups)).overall.reference_kl
    assert apart[held] < apart[free] / 2


def test_entropy_bonus_raises_the_entropy(engine, groups):
    trained = engine(entropy_beta=1.0, learning_rate=1e-2)
    nothing = [np.zeros(2)] * len(groups)
    plan = pack_update(groups, nothing, trained.settings, version=5)
    seen = [trained.step(plan).overall.entropy for _ in range(4)]
    assert seen[-1] > seen[0] + 0.1


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


@pytest.mark.parametrize("setup", SETUPS)
def test_resumed_engine_continues_exactly(engine, groups, tmp_path, setup):
    changes = {**SETUPS[setup], "warmup_updates": 4}
    first = engine(**changes)
    first.step(_plan(first, groups))
    first.save(tmp_path)
    random_numbers = torch.rand(4)
    first.step(_plan(first, groups))
    second = engine(**changes)
    second.load(tmp_path)
    assert second.num_updates == 1
    assert torch.equal(torch.rand(4), random_numbers)
    report = second.step(_plan(second, groups))
    assert report.learning_rate == pytest.approx(2 / 5 * second.settings.learning_rate)
    _assert_same(_weights(second), _weights(first), 0.0)
    _assert_same(_masters(second), _masters(first), 0.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_gives_the_update_of_plain_training(engine, groups, stage):
    config = OFFLOADED if stage == 2 else ALL_OFFLOADED
    plain, offloaded = engine(**TWO_STEPS), engine(zero_stage=stage, deepspeed=config, **TWO_STEPS)
    for version in (5, 6):
        want, found = plain.step(_plan(plain, groups, version)), offloaded.step(_plan(offloaded, groups, version))
        assert found.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    _assert_same(_weights(offloaded), _weights(plain), 2e-5)


def test_deterministic_runs_are_equal_bit_for_bit_and_say_so_to_torch(engine, groups):
    one, other = engine(deterministic=True, num_threads=0), engine(deterministic=True, num_threads=0)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1
    for version in (5, 6, 7):
        assert one.step(_plan(one, groups, version)) == other.step(_plan(other, groups, version))
    _assert_same(_masters(one), _masters(other), 0.0)
    engine()
    assert not torch.are_deterministic_algorithms_enabled()


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


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("bad", BAD)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_is_as_if_it_had_not_been(engine, groups, bad, setup):
    plain, hit = engine(microbatch_tokens=40, **SETUPS[setup]), engine(microbatch_tokens=40, **SETUPS[setup])
    for one in (plain, hit):
        one.step(_plan(one, groups))
    before = _masters(hit)
    (rows,) = _plan(hit, groups, 6)
    empty = dataclasses.replace(pack_sft([], hit.settings)[0], roles=rows[0].roles)
    spoilt = next(iter(hit._trained.values())).register_hook(lambda gradient: gradient * float("nan"))
    if bad != "only the gradient":
        spoilt.remove()
    report = hit.step([[BAD[bad](rows[0]), *rows[1:], empty]])
    spoilt.remove()
    assert (report.num_steps, report.num_tokens, hit.num_updates) == (0, 0, 1)
    assert list(report.skipped) == [0]
    assert np.isfinite([report.loss, report.grad_norm]).all()
    _assert_same(_masters(hit), before, 0.0)
    for one in (plain, hit):
        one.step(_plan(one, groups, 6))
    _assert_same(_masters(hit), _masters(plain), 0.0)
    assert hit._state.num_steps == plain._state.num_steps == 2


def test_a_minibatch_that_is_not_finite_is_left_out_and_the_others_are_not(engine, groups):
    trained, only = engine(**TWO_STEPS), engine(**TWO_STEPS)
    first, second = _plan(trained, groups)
    report = trained.step([[BAD["loss nan"](row) for row in first], second])
    assert (report.num_steps, trained.num_updates) == (1, 1)
    assert report.skipped == {0: "the decoupled_ppo loss is nan"}
    only.step([second])
    _assert_same(_weights(trained), _weights(only), 0.0)


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
    master = lambda: trained._state.get(trained._scorer.head.weight, None).detach().clone()  # noqa: E731
    before, served = master(), _weights(trained)
    for _ in range(3):
        trained.step(_plan(trained, groups))
    moved = (master() - before).abs().max()
    assert 1e-6 < float(moved) < 4e-6
    assert served["lm_head.weight"].dtype == torch.bfloat16


TWO_RANKS = {
    **{name: {**TWO_STEPS, **SETUPS[name]} for name in SETUPS if name != "adapters"},
    "adapters": {"lora": {"rank": 2}, "zero_stage": 1},
    "packed, ppo": {"zero_stage": 2, "loss": "ppo_clip"},
    "token": {"denominator": "token"},
    "constant": {"denominator": "constant", "loss": "cispo"},
    "regularised": {"loss": "gspo", "kl_beta": 0.1, "entropy_beta": 0.1, "zero_stage": 3},
}


@pytest.fixture(scope="module")
def two_ranks(groups, tiny_model, make_settings, tmp_path_factory):
    """Two ranks under DeepSpeed's launcher, one setup after the other. Returns (folder, settings of each)."""
    out = tmp_path_factory.mktemp("ranks")
    write_episodes(out / "episodes", [e for g in groups for e in g.episodes])
    setups = {name: make_settings(microbatch_tokens=40, **changes) for name, changes in TWO_RANKS.items()}
    (out / "setups.json").write_text(json.dumps({n: s.model_dump(mode="json") for n, s in setups.items()}))
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
    return out, setups


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("setup", TWO_RANKS)
def test_two_ranks_give_the_single_rank_update(two_ranks, engine, groups, setup):
    """In bfloat16 the two sum gradients in another order, and Adam's first steps have the size of the rate whatever
    the gradient's: a weight whose gradient is rounding moves by up to the rate in either direction, but few do."""
    out, settings = two_ranks
    single = engine(**settings[setup].model_dump(exclude_unset=True))
    reports = [single.step(_plan(single, groups, version)) for version in (5, 6)]
    want = [[r.loss, r.grad_norm, r.num_tokens, r.overall.ess, r.overall.kl, r.overall.gap_max] for r in reports]
    found, rough = load_file(out / f"{setup}.safetensors"), "bfloat16" in setup
    np.testing.assert_allclose(json.loads((out / f"{setup}.json").read_text()), want, rtol=0.05 if rough else 1e-4)
    if not rough:
        _assert_same(found, _weights(single), 2e-5)
        return
    assert found.keys() == _weights(single).keys()
    apart = torch.cat([(found[n].float() - w.float()).abs().flatten() for n, w in single.tensors()])
    assert float(apart.median()) < 0.05 * single.settings.learning_rate
    assert float(apart.mean()) < 0.2 * single.settings.learning_rate


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("setup", TWO_RANKS)
def test_checkpoint_of_two_ranks_resumes_on_one(two_ranks, engine, setup):
    out, settings = two_ranks
    changes = settings[setup].model_dump(exclude_unset=True)
    resumed = engine(**{**changes, "zero_stage": 0, "deepspeed": {}})
    resumed.load(out / f"checkpoint {setup}")
    assert resumed.num_updates == 2
    assert resumed._state.num_steps == 2 * settings[setup].num_minibatches
    _assert_same(_weights(resumed), load_file(out / f"{setup}.safetensors"), 0.0)


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_bytes_of_rank_0_arrive_on_the_other(two_ranks):
    out, _ = two_ranks
    assert (out / "heard stage 0").read_bytes() == b"\x00hello"
