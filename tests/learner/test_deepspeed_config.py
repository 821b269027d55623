"""matpo_learner.deepspeed_config: theirs over ours, and what [learner] decides stays decided there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from matpo.errors import ConfigError
from matpo.settings import LearnerSettings
from matpo_learner.deepspeed_config import make_config

Make = Callable[..., LearnerSettings]


def test_the_table_wins_over_the_file_and_the_file_over_ours(make_settings: Make, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "a": 1}))
    over = {"zero_optimization": {"reduce_bucket_size": 9}}
    config = make_config(make_settings(zero_stage=2, deepspeed_config=path, deepspeed=over), 10)
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 9,
        "allgather_bucket_size": 65536,
        "overlap_comm": True,
    }
    assert config["a"] == 1


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"gradient_clipping": 0.5}, ["0.5", "learner.max_grad_norm is 1"]),
        ({"zero_optimization": {"stage": 3}}, ["stage is 3", "learner.zero_stage is 1"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled is true", 'learner.dtype is "float32"']),
        ({"bf16": {"check_grad_overflow": False}}, ["false", "never applied"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is true", "learner.dtype"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps is 4", "microbatch_tokens"]),
        ({"train_batch_size": 64}, ["train_batch_size is 64", "learner.groups_per_update"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["WarmupLR", "warmup_updates"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["nvme", "CPU only"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["learner.zero_stage is 1", ">= 3"]),
    ],
)
@pytest.mark.parametrize("place", ["file", "table"])
def test_a_contradiction_is_refused_with_both_values(
    make_settings: Make, tmp_path: Path, theirs: Mapping[str, Any], words: list[str], place: str
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(theirs))
    given = {"deepspeed": theirs} if place == "table" else {"deepspeed_config": tmp_path / "ds.json"}
    with pytest.raises(ConfigError) as caught:
        make_config(make_settings(zero_stage=1, **given), 10)
    assert [word for word in words if word not in str(caught.value)] == []


def test_every_contradiction_is_named_at_once(make_settings: Make) -> None:
    theirs = {"gradient_clipping": 0.5, "train_batch_size": 8}
    with pytest.raises(ConfigError, match=r"(?s)gradient_clipping.*train_batch_size"):
        make_config(make_settings(deepspeed=theirs), 10)


def test_agreement_and_auto_are_taken(make_settings: Make) -> None:
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
    }
    settings = make_settings(zero_stage=2, deepspeed=theirs)
    assert make_config(settings, 10) == make_config(make_settings(zero_stage=2), 10)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_no_config_is_named(make_settings: Make, tmp_path: Path, content: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match=r"learner\.deepspeed_config=.*ds\.json"):
        make_config(make_settings(deepspeed_config=tmp_path / "ds.json"), 10)


def test_a_file_that_is_not_there_is_named(make_settings: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        make_config(make_settings(deepspeed_config=tmp_path / "ds.json"), 10)
