"""What an update leaves behind: one line that is JSON, and metrics whose labels are bounded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from prometheus_client import generate_latest

from matpo.metrics import Metrics
from matpo_learner import records
from matpo_learner.deepspeed_engine import StepReport
from matpo_learner.diagnostics import Diagnostics, EngineGap
from matpo_learner.judge import MAX_COMPONENTS
from matpo_learner.records import Outcome

PART = Diagnostics(
    num_tokens=10,
    ess=0.9,
    ratio=1.01,
    log_ratio=0.01,
    kl=0.002,
    truncated=0.1,
    masked=0.2,
    entropy=1.5,
    advantage=-0.1,
    advantage_std=1.0,
    advantage_abs=0.8,
    gap=0.03,
    gap_max=0.4,
    reference_kl=0.05,
)
REPORT = StepReport(
    loss=0.5,
    grad_norm=2.0,
    learning_rate=1e-3,
    num_steps=1,
    num_tokens=20,
    overall=replace(PART, num_tokens=20),
    by_role_and_lag={("planner", "0"): PART, ("worker", "3-4"): replace(PART, ess=0.7)},
    skipped={},
    engine_gap=EngineGap(num_tokens=10, mean=0.03, max=0.4),
)


@pytest.fixture
def groups(random_groups):
    return random_groups(1, num_groups=2, group_size=2)


def _export(metrics, groups, report):
    row = records.summarise(groups, [], [0, 1], report) | {"version": 3}
    records.export(metrics, row, [0, 1], "atlas", report)
    return row, generate_latest(metrics.registry).decode()


def test_line_of_an_update_has_the_diagnostics_of_each_role_and_lag(groups):
    row = json.loads(json.dumps(records.summarise(groups, [], [0, 1], REPORT)))
    assert row["by_role_and_lag"]["worker"]["3-4"] == asdict(REPORT.by_role_and_lag["worker", "3-4"])
    assert set(row["by_role_and_lag"]["planner"]) == {"0"}
    assert row["engine_gap"] == {"num_tokens": 10, "mean": 0.03, "max": 0.4}
    assert (row["advantage_std"], row["reference_kl"], row["ess"]) == (1.0, 0.05, 0.9)


def test_every_metric_by_role_and_lag_shows_its_number(groups):
    _, text = _export(Metrics("learner"), groups, REPORT)
    for name, attribute in records.BY_ROLE_AND_LAG.items():
        value = float(getattr(PART, attribute))
        assert f'matpo_learner_{name}{{lag="0",role="planner"}} {value}' in text
    assert 'matpo_learner_ess_ratio{lag="3-4",role="worker"} 0.7' in text
    assert 'matpo_learner_engine_gap_nats{stat="max"} 0.4' in text
    assert "matpo_learner_reference_kl_nats 0.05" in text


def test_a_cell_without_tokens_in_an_update_keeps_no_value_of_an_earlier_one(groups):
    metrics = Metrics("learner")
    _export(metrics, groups, REPORT)
    later = replace(REPORT, by_role_and_lag={("planner", "1"): PART}, engine_gap=None)
    row, text = _export(metrics, groups, later)
    assert row["engine_gap"] is None
    assert 'ess_ratio{lag="1",role="planner"}' in text
    assert 'role="worker"' not in text
    assert "engine_gap_nats{" not in text


def test_reward_components_beyond_the_limit_are_one_number_however_many_names_actors_invent():
    honest = [Outcome(reward=1.0, components={"answer": 0.5, "format": 1.0}) for _ in range(3)]
    invented = [Outcome(reward=0.0, components={f"a{i}.{n}": float(i) for n in range(20)}) for i in range(4)]
    row = records.summarise([], [[*honest, *invented]], [], REPORT)
    assert len(row["reward_components"]) == MAX_COMPONENTS + 1
    assert row["reward_components"]["answer"] == 0.5
    assert row["reward_components"]["format"] == 1.0
    kept = [name for name in row["reward_components"] if name.startswith("a") and name != "answer"]
    left = [v for one in invented for name, v in one.components.items() if name not in kept]
    assert row["reward_components"]["other"] == pytest.approx(sum(left) / len(left))


def test_a_reward_component_of_that_name_does_not_hide_the_reward(groups):
    named = [replace(g, episodes=[replace(e, reward_components={"reward": 9.0}) for e in g.episodes]) for g in groups]
    row, text = _export(Metrics("learner"), named, REPORT)
    assert f'reward{{component="reward",environment="atlas"}} {row["reward"]}' in text
