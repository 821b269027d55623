"""The run file: every mistake is named with its place and what to do."""

from pathlib import Path

import pytest

from matpo.errors import ConfigError
from matpo.settings import RunFile, load_run_file

MINIMAL = '[run]\nname = "r"\nfolder = "runs/r"\n[model]\npath = "MODEL"\n'


@pytest.fixture
def write(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def write_file(text: str = "", head: str = MINIMAL) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(head.replace("MODEL", str(model)) + text)
        return path

    return write_file


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_file(path, overrides)
    return str(caught.value)


def test_a_minimal_run_file_gives_planner_and_worker(write) -> None:
    run_file = load_run_file(write())
    assert run_file.roles["planner"].calls == ["worker"]
    assert run_file.snapshot_folder == Path("runs/r/snapshots")


def test_an_unknown_key_names_file_line_and_nearest_key(write) -> None:
    path = write("[learner]\nlearning_rat = 1.0\n")
    assert problem(path) == f'{path}:7: unknown key "learner.learning_rat"; did you mean "learning_rate"?'


def test_an_unknown_key_of_a_role_is_found_too(write) -> None:
    message = problem(write("[roles.planner]\nmax_turn = 3\n"))
    assert ':7: unknown key "roles.planner.max_turn"; did you mean "max_turns"?' in message


def test_an_unknown_section_is_named(write) -> None:
    assert 'unknown key "lerner"; did you mean "learner"?' in problem(write("[lerner]\nx = 1\n"))


def test_all_errors_are_reported_at_once(write) -> None:
    message = problem(write('[learner]\nlearning_rate = -1.0\ngroup_size = "eight"\n[broker]\nlease_s = 0\n'))
    assert len(message.splitlines()) == 3


def test_all_broken_rules_of_a_section_are_reported_at_once(write) -> None:
    message = problem(write(), "learner.num_minibatches=99", "learner.drop_lag_versions=0", "broker.lease_s=6")
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_rate_that_is_no_number_is_refused(write, value: str) -> None:
    assert "finite number" in problem(write(), f"learner.learning_rate={value}")


@pytest.mark.parametrize("key", ["learner.learning_rate", "broker.lease_s", "actor.drain_s", "learner.max_grad_norm"])
def test_a_negative_rate_is_refused(write, key: str) -> None:
    assert key in problem(write(), f"{key}=-1.0")


def test_a_missing_model_folder_says_what_to_name(write) -> None:
    assert "holds no config.json" in problem(write(), "model.path=nowhere")


def test_a_missing_run_file_is_one_line(tmp_path: Path) -> None:
    message = problem(tmp_path / "none.toml")
    assert "cannot read the run file" in message
    assert "\n" not in message


def test_broken_toml_names_the_file(write) -> None:
    path = write("[learner\n")
    assert problem(path).startswith(f"{path}: not valid TOML")


def test_an_override_wins_over_the_file(write) -> None:
    run_file = load_run_file(
        write("[learner]\nlearning_rate = 1.0\n"), ["learner.learning_rate=3e-4", "model.dtype=bfloat16"]
    )
    assert (run_file.learner.learning_rate, run_file.model.dtype) == (3e-4, "bfloat16")


@pytest.mark.parametrize("override", ["learner", "=1", "run.name.x=1"])
def test_a_malformed_override_is_refused(write, override: str) -> None:
    assert f"--set {override}" in problem(write(), override)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["learner.num_minibatches=2"], "decoupled_ppo"),
        (["learner.max_lag_versions=9"], "drop_lag_versions >= 9"),
        (["broker.lease_s=6"], "lease_s >= 15"),
        (["broker.learner_port=5710"], "Give each its own"),
        (["sampling.temperature=0.7"], "importance ratios would be wrong"),
        (["rollout.root=boss"], "is no role of this file"),
        (["rollout.max_depth=1"], "max_depth=1 forbids it"),
        (["learner.credit=grpo"], "single agent"),
        (["learner.credit=leader_only", "roles.planner.trainable=false"], "trains only roles.planner, which is frozen"),
        (["learner.credit=rloo", "roles.planner.trainable=false", "roles.worker.trainable=false"], "no role is train"),
        (["learner.loss=gspo", "learner.num_minibatches=2"], "decoupled_ppo"),
        (["learner.prox=loglinear"], "only decoupled_ppo has a prox"),
        (["learner.reference=nowhere"], "kl_beta > 0"),
        (["learner.reference=nowhere", "learner.kl_beta=0.1"], "Name a model folder"),
        (["learner.task_norm=true", "learner.task_norm_min_episodes=129"], "task_norm_min_episodes <= 128"),
        (['learner.abnormal_terminations=["error"]'], "Set abnormal_reward"),
        (["learner.task_norm_min_episodes=1"], "greater than or equal to 2"),
        (['actor.engine="scripted"'], "needs `script`"),
    ],
)
def test_a_combination_that_cannot_work_says_what_to_do(write, overrides: list[str], advice: str) -> None:
    assert advice in problem(write(), *overrides)


def test_every_setting_is_documented() -> None:
    undocumented = [
        f"{name}.{key}"
        for name, section in RunFile.model_fields.items()
        if hasattr(section.annotation, "model_fields")
        for key, field in section.annotation.model_fields.items()
        if not field.description and name != "run"
    ]
    assert undocumented == []
