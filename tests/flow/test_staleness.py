"""`matpo bench staleness`: the lag of a batch is the one that was asked for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import closing
from itertools import groupby
from pathlib import Path

import pytest
from tests.flow.test_run import run_file_of

from matpo import snapshot
from matpo.settings import load_run_file
from matpo.testing import tiny_model
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_ops.bench.staleness import condition, train

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staleness")
    return run_file_of(folder, tiny_model(folder / "model"), num_updates=5)


@pytest.mark.parametrize("lag", [0, 2])
def test_every_token_of_an_update_is_exactly_as_old_as_asked_for_once_the_run_is_that_old(
    path: Path, tmp_path: Path, lag: int
) -> None:
    run_file = load_run_file(path)
    with closing(LearnerEngine(run_file.model_folder, run_file.learner)) as learner:
        curves = asyncio.run(train(run_file, learner, tmp_path, lag=lag))
    lags = [age for age, _ in groupby(curves.lags)]
    assert lags == ([0] if lag == 0 else [0, 1, 2])
    assert len(curves.lags) == 5 * 2 * 4  # updates, groups, members
    assert [report.overall.kl < 1e-9 for report in curves.reports] == [n <= 1 or lag == 0 for n in range(1, 6)]
    assert snapshot.newest(tmp_path) == 5


def test_a_condition_leaves_figures_and_no_file(path: Path, tmp_path: Path) -> None:
    run_file = load_run_file(path, ["eval.num_tasks=8", "learner.num_updates=2"])
    row = condition(run_file, lag=1, scratch=tmp_path)
    assert (row["loss"], row["lag"], row["lag_mean"], row["updates"]) == ("tis", 1, 0.5, 2)
    assert len(row["heldout"]) == 3
    json.dumps(row)
    assert list(tmp_path.iterdir()) == []


def test_lags_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "matpo_ops", "bench", "staleness", "--lags", "one", "--losses", "tis"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ))
    assert done.returncode == 2
    assert "--lags one: want numbers" in done.stderr
