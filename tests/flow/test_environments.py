"""Full loops of the shipped policy on the built-in environments, with real processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from matpo import schema
from matpo.settings import load_run_file
from matpo.testing import free_port
from matpo_broker.journal import read_episodes
from matpo_ops.demo import CONFIGS
from matpo_ops.processes import Child, fleet_of, wait_for_exit
from matpo_ops.summary import account, read_lines

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]
REAL = Path(__file__).parents[3] / "shared" / "data" / "multihop"


def play(run_path: Path, folder: Path, *overrides: str) -> Path:
    """Run to the end and return the run folder."""
    sets = [
        f'run.folder="{folder}"',
        f"broker.actor_port={free_port()}",
        f"broker.learner_port={free_port()}",
        "actor.num_members=16",
        "learner.groups_per_update=2",
        "learner.group_size=4",
        *overrides,
    ]
    load_run_file(run_path, sets)
    fleet = fleet_of(run_path, folder, num_actors=1, overrides=sets)
    learner = fleet.children[1]
    try:
        fleet.start()
        assert wait_for_exit(learner, 240) == 0, "\n\n".join(f"{c.name}:\n{c.tail(20)}" for c in fleet.children)
    finally:
        fleet.stop(grace_s=20)
    return folder


def roles_seen(folder: Path) -> set[str]:
    return {
        segment.role
        for stored in read_episodes(folder / "journal")
        for segment in schema.decode(stored.payload, vocab_size=None, published_version=None).segments
    }


def test_the_demo_run_file_trains_planner_and_workers(tmp_path: Path) -> None:
    folder = play(CONFIGS / "demo.toml", tmp_path / "run", "learner.num_updates=3")
    assert roles_seen(folder) == {"planner", "worker"}
    assert account(folder, max_open=4).episodes_lost == 0


@pytest.mark.vllm
def test_an_actor_whose_vllm_died_ends_and_is_started_again_without_loss(tmp_path: Path) -> None:
    sets = [
        f'run.folder="{tmp_path / "run"}"',
        f"broker.actor_port={free_port()}",
        f"broker.learner_port={free_port()}",
        'actor.engine="vllm"',
        "actor.num_members=16",
        "learner.groups_per_update=2",
        "learner.group_size=4",
        "learner.num_updates=6",
    ]
    fleet = fleet_of(CONFIGS / "demo.toml", tmp_path / "run", num_actors=1, overrides=sets)
    _, learner, actor = fleet.children
    lines = tmp_path / "run" / "metrics" / "learner.jsonl"
    deadline_s = time.monotonic() + 240
    try:
        fleet.start()
        killed = False
        while learner.exit_code is None and time.monotonic() < deadline_s:
            if not killed and len(list(read_lines(lines))) >= 2:
                os.kill(worker_of(actor), signal.SIGKILL)
                killed = True
            fleet.watch(time.monotonic())
            time.sleep(0.1)
        assert killed
        assert learner.exit_code == 0, "\n\n".join(f"{c.name}:\n{c.tail(20)}" for c in fleet.children)
    finally:
        fleet.stop(grace_s=20)
    assert actor.num_restarts == 1
    found = account(tmp_path / "run", max_open=4)
    assert (found.episodes_lost, found.episodes_twice) == (0, 0)
    assert found.groups_dropped <= 16, "attempts were not burnt in a tight loop"


def worker_of(actor: Child) -> int:
    """The process that holds vLLM's model, below the actor."""
    assert actor.process is not None
    below = psutil.Process(actor.process.pid).children(recursive=True)
    return next(p.pid for p in below if "VLLM::Worker" in (p.name() + " ".join(p.cmdline())))


@pytest.mark.vllm
def test_the_demo_run_file_trains_with_real_vllm_actors(tmp_path: Path) -> None:
    folder = play(CONFIGS / "demo.toml", tmp_path / "run", 'actor.engine="vllm"', "learner.num_updates=3")
    updates = list(read_lines(folder / "metrics" / "learner.jsonl"))
    assert [u["update"] for u in updates] == [1, 2, 3]
    assert updates[0]["kl"] < 1e-3, "at lag 0 the actor's log-probs are the learner's"
    found = account(folder, max_open=4)
    assert (found.episodes_lost, found.episodes_twice) == (0, 0)


def test_the_single_agent_run_file_trains_one_role_with_grpo(tmp_path: Path) -> None:
    folder = play(CONFIGS / "demo-single-agent.toml", tmp_path / "run", "learner.num_updates=3")
    assert len(roles_seen(folder)) == 1
    assert account(folder, max_open=4).episodes_lost == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MuSiQue files are not shipped with the project")
def test_multihop_runs_the_full_loop_on_the_real_musique_files(tmp_path: Path) -> None:
    files = f'questions="{REAL / "musique_train.jsonl"}", corpus="{REAL / "musique_corpus.jsonl"}"'
    options = f"environment.options={{{files}, max_search_characters=400, format_without_workers=0.0}}"
    folder = play(
        CONFIGS / "demo.toml",
        tmp_path / "run",
        'environment.name="multihop"',
        options,
        'roles.worker.calls=["search", "fetch"]',
        "roles.planner.max_context_tokens=1024",
        "roles.worker.max_context_tokens=1024",
        "learner.num_updates=2",
    )
    updates = list(read_lines(folder / "metrics" / "learner.jsonl"))
    assert {"exact_match", "f1", "format"} <= updates[-1]["reward_components"].keys()
    found = account(folder, max_open=4)
    assert (found.episodes_lost, found.episodes_twice) == (0, 0)
    assert found.episodes_stored >= 16
