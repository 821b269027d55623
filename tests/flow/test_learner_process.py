"""The real learner and broker processes, fed by a scripted actor in the test: every group moves the weights once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matpo import schema, snapshot, wire
from matpo.episode import Episode, Segment, Task
from matpo.link import Link
from matpo.settings import RunFile, load_run_file
from matpo.testing import tiny_model, write_run_file

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PLUGIN = """
from matpo import Environment, Task

class Toy(Environment):
    def tasks(self, split):
        return [Task(id=f"{split}-{i}", environment="toy", question=f"{i}?", data={"i": i}) for i in range(7)]

    def reward(self, task, episode):
        return 0.0
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return run_file_of(tmp_path)


def run_file_of(folder: Path) -> Path:
    """A run file of five updates, its model and its environment."""
    (folder / "toy.py").write_text(PLUGIN)
    return write_run_file(
        folder / "run.toml",
        model=tiny_model(folder / "model"),
        environment={"name": "toy", "plugin": f"{folder / 'toy.py'}:Toy"},
        learner={
            "num_updates": 5,
            "groups_per_update": 2,
            "group_size": 2,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "num_threads": 1,
            "device": "cpu",
        },
    )


@contextmanager
def started(module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        process.wait(10)


def scripted_episode(lease: wire.Lease, version: int) -> Episode:
    """A planner and a worker with made-up tokens. Member 0 fails and member 1 succeeds, save in every third group."""
    made = np.random.default_rng(zlib.crc32(f"{lease.group}.{lease.member}".encode()))
    segments = []
    for index, role in enumerate(("planner", "worker")):
        sampled = np.arange(12) >= 6
        segments.append(
            Segment(
                index=index,
                parent=index - 1,
                role=role,
                token_ids=made.integers(0, 256, 12, dtype=np.int32),
                sampled=sampled,
                logprobs=np.where(sampled, -5.5, 0).astype(np.float32),
                versions=np.where(sampled, version, -1).astype(np.int32),
            )
        )
    return Episode(
        id=f"{lease.group}.{lease.member}.{lease.attempt}",
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        task=Task(**lease.task.model_dump()),
        segments=segments,
        answer="",
        reward=1.0 if int(lease.group[2:]) % 3 == 2 else float(lease.member),
    )


async def play(run_file: RunFile, change: Callable[[Episode, bytes], bytes]) -> None:
    hello = wire.Hello(
        peer="actor",
        name="scripted",
        incarnation="1",
        run=run_file.run.name,
        schema_version=schema.SCHEMA_VERSION,
        model=snapshot.fingerprint(run_file.model_folder),
    )
    link = Link(f"tcp://127.0.0.1:{run_file.broker.actor_port}", hello)
    try:
        await link.connect(timeout_s=60)
        while True:
            reply, _ = await link.request(wire.LeaseRequest(num_members=2, wait_s=1.0))
            assert isinstance(reply, wire.Leases)
            for lease in reply.leases:
                version = snapshot.newest(run_file.snapshot_folder)
                assert version is not None  # orders come after the first snapshot
                episode = scripted_episode(lease, version)
                payload = change(episode, schema.encode(episode))
                message = wire.StoreEpisode(
                    lease=lease.lease,
                    group=lease.group,
                    member=lease.member,
                    attempt=lease.attempt,
                    episode=episode.id,
                    num_bytes=len(payload),
                    crc32c=wire.crc32c(payload),
                )
                await link.request(message, payload)
    finally:
        await link.close()


@asynccontextmanager
async def playing(
    run_file: RunFile, change: Callable[[Episode, bytes], bytes] = lambda _, payload: payload
) -> AsyncIterator[None]:
    task = asyncio.create_task(play(run_file, change))
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def lines(run_file: RunFile, name: str) -> list[dict[str, Any]]:
    file = run_file.run.folder / "metrics" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def ended(process: subprocess.Popen[bytes], timeout_s: float = 120) -> int:
    return await asyncio.to_thread(process.wait, timeout_s)


def check_whole_run(run_file: RunFile) -> None:
    """Five updates, each of two groups, each group once; what carries no signal is counted and replaced."""
    updates, consumed = lines(run_file, "learner"), lines(run_file, "trained")
    assert [row["update"] for row in updates] == [1, 2, 3, 4, 5]
    assert max(Counter(row["group"] for row in consumed).values()) == 1
    trained = [row for row in consumed if row["fate"] == "trained"]
    assert Counter(row["update"] for row in trained) == dict.fromkeys(range(1, 6), 2)
    assert {row["fate"] for row in consumed} == {"trained", "zero_signal"}
    assert all((row["fate"] == "zero_signal") == (row["index"] % 3 == 2) for row in consumed)
    assert all(set(row["by_role_and_lag"]) == {"planner", "worker"} for row in updates)
    versions = [row["version"] for row in updates]
    assert versions == sorted(set(versions))
    assert snapshot.newest(run_file.snapshot_folder) == versions[-1]
    snapshot.verify(
        run_file.snapshot_folder, versions[-1], fingerprint=snapshot.fingerprint(run_file.model_folder), min_version=-1
    )


async def test_a_learner_that_is_killed_and_started_again_trains_each_group_once(path: Path) -> None:
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with started("matpo_learner", str(path)) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 3 or learner.poll() is not None)
                learner.kill()
                assert await ended(learner) == -signal.SIGKILL
            with started("matpo_learner", str(path), "--resume") as learner:
                assert await ended(learner) == 0
    check_whole_run(run_file)
    assert sorted(p.name for p in run_file.checkpoint_folder.iterdir()) == ["c000004", "c000005"]


async def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_there(path: Path) -> None:
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with started("matpo_learner", str(path)) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 1 or learner.poll() is not None)
                learner.send_signal(signal.SIGTERM)
                assert await ended(learner) == 0
            assert len(list(run_file.checkpoint_folder.iterdir())) == 1
            with started("matpo_learner", str(path), "--resume") as learner:
                assert await ended(learner) == 0
    check_whole_run(run_file)


async def test_a_broker_that_is_killed_and_started_again_loses_nothing(path: Path) -> None:
    run_file = load_run_file(path)
    async with playing(run_file):
        with started("matpo_learner", str(path)) as learner:
            with started("matpo_broker", str(path)) as broker:
                await until(lambda: len(lines(run_file, "learner")) >= 2 or learner.poll() is not None)
                broker.kill()
                await ended(broker)
            with started("matpo_broker", str(path)):
                assert await ended(learner) == 0
    check_whole_run(run_file)


async def test_a_group_with_a_hostile_episode_is_counted_and_the_run_goes_on(path: Path) -> None:
    def change(episode: Episode, payload: bytes) -> bytes:
        return payload[:-9] if episode.group == "g-00000001" else payload

    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file, change):
            with started("matpo_learner", str(path), "--set", "learner.num_updates=2") as learner:
                assert await ended(learner) == 0
    fates = {row["index"]: (row["fate"], row["reason"]) for row in lines(run_file, "trained")}
    assert fates[1] == ("invalid", "framing")
    assert len(lines(run_file, "learner")) == 2


def with_huge_reward(episode: Episode) -> Episode:
    return replace(episode, reward=1e200)


def with_unknown_role(episode: Episode) -> Episode:
    return replace(episode, segments=(episode.segments[0], replace(episode.segments[1], role="intruder")))


def with_another_root(episode: Episode) -> Episode:
    return replace(episode, segments=(replace(episode.segments[0], role="worker"), episode.segments[1]))


@pytest.mark.parametrize(
    ("spoil", "reason"), [(with_huge_reward, "advantage"), (with_unknown_role, "role"), (with_another_root, "role")]
)
async def test_a_group_that_cannot_be_trained_is_counted_and_the_run_goes_on(
    path: Path, spoil: Callable[[Episode], Episode], reason: str
) -> None:
    def change(episode: Episode, payload: bytes) -> bytes:
        bad = episode.group == "g-00000001" and episode.member == 1
        return schema.encode(spoil(episode)) if bad else payload

    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file, change):
            with started("matpo_learner", str(path), "--set", "learner.num_updates=2") as learner:
                assert await ended(learner) == 0
    fates = {row["index"]: (row["fate"], row["reason"]) for row in lines(run_file, "trained")}
    assert fates[1] == ("invalid", reason)
    assert len(lines(run_file, "learner")) == 2


async def test_two_ranks_train_with_every_part_of_the_objective_switched_on(path: Path) -> None:
    changes = {
        "num_ranks": 2, "loss": "decoupled_ppo", "num_minibatches": 2, "prox": "loglinear", "kl_beta": 0.1,
        "entropy_beta": 0.01, "credit": "leader_only", "task_norm": "true", "task_norm_min_episodes": 2,
        "abnormal_reward": -1.0, "denominator": "token",
    }  # fmt: skip
    options = [word for key, value in changes.items() for word in ("--set", f"learner.{key}={value}")]
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with started("matpo_learner", str(path), *options) as learner:
                assert await ended(learner) == 0
    updates = lines(run_file, "learner")
    assert len(updates) == 5
    assert all(set(row["by_role_and_lag"]) == {"planner"} for row in updates), "the leader alone"
    assert updates[0]["reference_kl"] < updates[-1]["reference_kl"]
    assert all(row["advantage_std"] == pytest.approx(1.0, abs=1e-3) for row in updates)
    assert updates[0]["engine_gap"]["num_tokens"] > 0


async def test_two_ranks_make_the_same_run_and_stop_in_order(path: Path) -> None:
    run_file = load_run_file(path)
    ranks = ("--set", "learner.num_ranks=2", "--set", "learner.zero_stage=1")
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with started("matpo_learner", str(path), *ranks) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 1 or learner.poll() is not None)
                learner.send_signal(signal.SIGTERM)
                assert await ended(learner) == 0
            with started("matpo_learner", str(path), *ranks, "--resume") as learner:
                assert await ended(learner) == 0
    check_whole_run(run_file)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    task = wire.OrderedTask(id="t", environment="toy", question="?")
    leases = [wire.Lease(lease="l", group=f"g-{i:08d}", member=0, attempt=0, task=task) for i in range(8)]
    schema.write_episodes(tmp_path / "episodes", [scripted_episode(lease, 0) for lease in leases])
    return tmp_path / "episodes"


def test_a_warm_start_learns_recorded_episodes_and_writes_a_model(path: Path, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "warm"
    options = ("--mode", "sft", "--episodes", str(recorded), "--out", str(out), "--steps", "60", "--lr", "0.01")
    with started("matpo_learner", str(path), *options, "--segments-per-step", "16") as learner:
        assert learner.wait(120) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    first = next(schema.read_episodes(recorded)).segments[0]
    ids = torch.tensor(first.token_ids[None].astype(np.int64))
    logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert logprobs[5:].mean() > -1  # -5.6 before
    assert len(AutoTokenizer.from_pretrained(out)) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume",), "holds no checkpoint"),
        (("--resume", "--fresh"), "exclude each other"),
        (("--mode", "sft"), "needs --episodes"),
        (("--set", "learner.nope=1"), "unknown key"),
    ],
)
def test_a_command_line_that_cannot_work_ends_with_2_and_one_sentence(
    path: Path, arguments: tuple[str, ...], words: str
) -> None:
    command = [sys.executable, "-m", "matpo_learner", str(path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
