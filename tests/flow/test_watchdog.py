"""A learner that waits says for whom, whatever it waits for, and its hint follows who is slow. Real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flow.test_learner_process import ended, lines, playing, run_file_of, started, until

from matpo import schema
from matpo.episode import Episode
from matpo.settings import load_run_file

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


def ear(capfd: pytest.CaptureFixture[str]) -> Callable[[str], bool]:
    """A function that says whether a process has logged that it waits for somebody."""
    logged = ""

    def says(who: str) -> bool:
        nonlocal logged
        logged += "".join(capfd.readouterr())
        return any("learner.waiting" in line and f"who={who}" in line for line in logged.splitlines())

    return says


async def test_a_learner_names_the_broker_then_the_actors_then_the_missing_signal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run_file_of(tmp_path)
    run_file = load_run_file(path)
    says = ear(capfd)

    def without_signal(episode: Episode, _: bytes) -> bytes:
        return schema.encode(replace(episode, reward=1.0))

    with started("matpo_learner", str(path)) as learner:
        await until(lambda: says("broker") or learner.poll() is not None)
        with started("matpo_broker", str(path)):
            await until(lambda: says("actors") or learner.poll() is not None)
            async with playing(run_file, without_signal):
                await until(lambda: says("signal") or learner.poll() is not None)
            assert learner.poll() is None
            learner.send_signal(signal.SIGTERM)
            assert await ended(learner) == 0
    assert all(says(who) for who in ("broker", "actors", "signal"))


async def test_another_rank_says_that_it_waits_for_rank_0(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file_of(tmp_path)
    says = ear(capfd)
    ranks = ("--set", "learner.num_ranks=2", "--set", "learner.zero_stage=1")
    with started("matpo_broker", str(path)), started("matpo_learner", str(path), *ranks) as learner:
        await until(lambda: (says("rank_0") and says("actors")) or learner.poll() is not None)
        assert learner.poll() is None
    assert says("rank_0")


async def test_an_actor_that_is_slow_makes_the_learner_ask_for_actors(tmp_path: Path) -> None:
    def slowly(_: Episode, payload: bytes) -> bytes:
        time.sleep(0.3)  # the actor's pace
        return payload

    path = run_file_of(tmp_path)
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file, slowly):
            with started("matpo_learner", str(path)) as learner:
                assert await ended(learner) == 0
    last = lines(run_file, "learner")[-1]
    assert (last["hint"], last["batch_ready"]) == ("add_actors", False)
    assert last["wait_fraction"] > 0.5
