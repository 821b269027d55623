"""The real learner and broker processes, fed by a scripted actor in the test: every group moves the weights once."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.fault.forking import ForkServer, Life
from transformers import AutoModelForCausalLM, AutoTokenizer

from matpo import schema, snapshot, wire
from matpo.episode import Episode, Segment, Task
from matpo.link import Link
from matpo.settings import RunFile, load_run_file
from matpo.testing import free_port, tiny_model, write_run_file
from matpo_broker.tables import accounting
from matpo_learner import checkpoint
from matpo_ops.summary import account

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
def started(
    module: str, *arguments: str, log: Path | None = None, run: str = "", **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A command. `log` gets what it says; `run` is Python that is executed in its place."""
    command = [sys.executable, *(("-c", run) if run else ("-m", module)), *arguments]
    with log.open("wb") if log else nullcontext() as file:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        process.wait(10)


@contextmanager
def forked(server: ForkServer, path: Path, *arguments: str, log: Path | None = None) -> Iterator[Life]:
    """A process of `server` with a run file. `log` gets what it says."""
    log = log or path.with_name("forked.log")
    log.touch()  # tests read it from the beginning
    life = server.start([str(path), *arguments], log)
    try:
        yield life
    finally:
        life.send_signal(signal.SIGTERM)
        with suppress(AssertionError):
            life.wait(30)
        life.kill()


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


async def ended(process: subprocess.Popen[bytes] | Life, timeout_s: float = 120) -> int:
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


async def test_a_learner_that_is_killed_and_started_again_trains_each_group_once(
    learners: ForkServer, path: Path
) -> None:
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 3 or learner.is_over)
                learner.kill()
                assert await ended(learner) == -signal.SIGKILL
            with forked(learners, path, "--resume") as learner:
                assert await ended(learner) == 0
    check_whole_run(run_file)
    assert [p.name[:7] for p in checkpoint.found(run_file.checkpoint_folder)] == ["c000004", "c000005"]


async def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_there(learners: ForkServer, path: Path) -> None:
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 1 or learner.is_over)
                learner.send_signal(signal.SIGTERM)
                assert await ended(learner) == 0
            assert len(list(run_file.checkpoint_folder.iterdir())) == 1
            with forked(learners, path, "--resume") as learner:
                assert await ended(learner) == 0
    check_whole_run(run_file)


async def test_a_broker_that_is_killed_and_started_again_loses_nothing(learners: ForkServer, path: Path) -> None:
    run_file = load_run_file(path)
    async with playing(run_file):
        with forked(learners, path) as learner:
            with started("matpo_broker", str(path)) as broker:
                await until(lambda: len(lines(run_file, "learner")) >= 2 or learner.is_over)
                broker.kill()
                await ended(broker)
            with started("matpo_broker", str(path)):
                assert await ended(learner) == 0
    check_whole_run(run_file)


def with_long_context(episode: Episode) -> Episode:
    columns = ("token_ids", "sampled", "logprobs", "versions")
    long = replace(
        episode.segments[0], **{name: np.resize(getattr(episode.segments[0], name), 4097) for name in columns}
    )
    return replace(episode, segments=(long, *episode.segments[1:]))


def with_unknown_role(episode: Episode) -> Episode:
    return replace(episode, segments=(episode.segments[0], replace(episode.segments[1], role="intruder")))


def with_another_root(episode: Episode) -> Episode:
    return replace(episode, segments=(replace(episode.segments[0], role="worker"), episode.segments[1]))


INVALID: dict[int, tuple[str, Callable[[Episode], bytes]]] = {
    0: ("framing", lambda e: schema.encode(e)[:-9]),
    1: ("advantage", lambda e: schema.encode(replace(e, reward=1e200))),
    3: ("role", lambda e: schema.encode(with_unknown_role(e))),
    4: ("role", lambda e: schema.encode(with_another_root(e))),
    6: ("context", lambda e: schema.encode(with_long_context(e))),
    7: ("task", lambda e: schema.encode(replace(e, task=replace(e.task, environment="other")))),
    9: ("reward_components", lambda e: schema.encode(replace(e, reward_components={"x" * 65: 1.0}))),
}
"""Index of a group -> why it cannot be trained, and what makes it so."""


async def test_a_group_that_cannot_be_trained_is_counted_and_the_run_goes_on(learners: ForkServer, path: Path) -> None:
    def change(episode: Episode, payload: bytes) -> bytes:
        index = int(episode.group[2:])
        return INVALID[index][1](episode) if index in INVALID and episode.member == 1 else payload

    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file, change):
            with forked(learners, path, "--set", "learner.num_updates=2") as learner:
                assert await ended(learner) == 0
    found = {row["index"]: row["reason"] for row in lines(run_file, "trained") if row["fate"] == "invalid"}
    assert found == {index: reason for index, (reason, _) in INVALID.items()}
    rows = lines(run_file, "learner")
    assert [row["update"] for row in rows] == [1, 2]
    assert sum(row["groups_dropped"] for row in rows) == len(INVALID)


def listens_on(process: Life) -> set[str]:
    """Addresses, as /proc/net/tcp writes them, on which a process and its descendants listen."""
    pids, sockets = {process.pid}, set()
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) in pids:
                pids.add(int(stat.parent.name))
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                sockets.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local.partition(":")[0])
    return found


async def test_two_ranks_train_with_every_part_of_the_objective_and_listen_on_loopback_only(
    learners: ForkServer, path: Path
) -> None:
    changes = {
        "num_ranks": 2, "loss": "decoupled_ppo", "num_minibatches": 2, "prox": "loglinear", "kl_beta": 0.1,
        "entropy_beta": 0.01, "credit": "leader_only", "task_norm": "true", "task_norm_min_episodes": 2,
        "abnormal_reward": -1.0, "denominator": "token",
    }  # fmt: skip
    heard: set[str] = set()
    options = [word for key, value in changes.items() for word in ("--set", f"learner.{key}={value}")]
    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path, *options) as learner:
                while not learner.is_over:
                    heard |= await asyncio.to_thread(listens_on, learner)
                    await asyncio.sleep(0.02)
                assert learner.wait() == 0, learner.said()
    assert heard  # gloo's
    assert heard <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1
    updates = lines(run_file, "learner")
    assert len(updates) == 5
    assert all(set(row["by_role_and_lag"]) == {"planner"} for row in updates), "the leader alone"
    assert updates[0]["reference_kl"] < updates[-1]["reference_kl"]
    assert all(row["advantage_std"] == pytest.approx(1.0, abs=1e-3) for row in updates)
    assert updates[0]["engine_gap"]["num_tokens"] > 0


async def test_two_ranks_make_the_same_run_and_stop_in_order(learners: ForkServer, path: Path) -> None:
    run_file = load_run_file(path)
    ranks = ("--set", "learner.num_ranks=2", "--set", "learner.zero_stage=1")
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path, *ranks) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 1 or learner.is_over)
                learner.send_signal(signal.SIGTERM)
                assert await ended(learner) == 0
            with forked(learners, path, *ranks, "--resume") as learner:
                assert await ended(learner) == 0
    check_whole_run(run_file)


async def test_ranks_that_somebody_else_starts_meet_and_wait_for_a_broker_longer_than_a_collective_may_take(
    path: Path,
) -> None:
    run_file = load_run_file(path)
    impatient = (
        "import matpo_learner.deepspeed_ranks as ranks, matpo_learner.process as process;"
        "ranks.COLLECTIVE_TIMEOUT_S, process.KEEP_ALIVE_S = 6.0, 1.0;"
        "from matpo_learner.__main__ import main; main()"
    )
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [path.with_name(f"rank{rank}.log") for rank in (0, 1)]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                started("", str(path), log=logs[rank], run=impatient, RANK=str(rank), LOCAL_RANK=str(rank), **meet)
            )
            for rank in (0, 1)
        ]
        await until(lambda: "broker.unreachable" in logs[0].read_text())
        await asyncio.sleep(9)  # longer than the time-out: rank 1 waits in a collective
        assert [rank.poll() for rank in ranks] == [None, None], [log.read_text() for log in logs]
        with started("matpo_broker", str(path)):
            async with playing(run_file):
                assert [await ended(rank) for rank in ranks] == [0, 0], [log.read_text() for log in logs]
    check_whole_run(run_file)


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_a_learner_that_waits_for_its_broker_stops_when_told_to(
    learners: ForkServer, path: Path, num_ranks: int
) -> None:
    log = path.with_name("learner.log")
    with forked(learners, path, "--set", f"learner.num_ranks={num_ranks}", log=log) as learner:
        await until(lambda: "broker.unreachable" in log.read_text() or learner.is_over)
        learner.send_signal(signal.SIGTERM)
        assert await ended(learner, 30) == 0, log.read_text()
    assert not load_run_file(path).checkpoint_folder.exists()


async def test_batches_that_are_not_finite_are_dropped_saved_and_counted_and_too_many_end_the_run(
    learners: ForkServer, path: Path
) -> None:
    """At a rate of 1e30 the first update makes weights that overflow in every forward pass after it."""
    run_file, log = load_run_file(path), path.with_name("learner.log")
    hot = ("--set", "learner.learning_rate=1e30", "--set")
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path, *hot, "learner.max_bad_updates=1000", log=log) as learner:
                bad = lambda: [row for row in lines(run_file, "trained") if row["fate"] == "not_finite"]  # noqa: E731
                await until(lambda: len(bad()) >= 8 or learner.is_over)
                learner.send_signal(signal.SIGTERM)
                assert await ended(learner) == 0, log.read_text()
            found = checkpoint.found(run_file.checkpoint_folder)[-1]
            assert checkpoint.verify(found).update == 1  # with all that was dropped
            dropped = len(bad())
            assert all("loss is nan" in row["reason"] or "gradient" in row["reason"] for row in bad())
            with forked(learners, path, *hot, "learner.max_bad_updates=3", log=log) as learner:
                assert await ended(learner) == 1
    assert "3 updates in a row were not finite" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert len(bad()) == dropped + 3 * 2
    assert [row["update"] for row in lines(run_file, "learner")] == [1]
    assert {row["update"] for row in bad()} == {2}
    batches = sorted((run_file.run.folder / "bad_batches").iterdir())
    assert len(batches) == min(8, len(bad()) // 2)
    for batch in batches:
        what = json.loads((batch / "what.json").read_text())
        episodes = list(schema.read_episodes(batch / "episodes"))
        assert [f"{group}.{member}.0" for group in what["groups"] for member in (0, 1)] == [e.id for e in episodes]
    whole = account(run_file.run.folder, max_open=run_file.learner.max_open_groups)
    assert (whole.episodes_lost, whole.episodes_twice, whole.episodes_invented) == (0, 0, 0)
    assert whole.groups_dropped == len(bad())
    assert whole.episodes_dropped == 2 * len(bad())


async def test_a_checkpoint_comes_by_time_when_no_group_has_signal(learners: ForkServer, path: Path) -> None:
    def change(episode: Episode, _: bytes) -> bytes:
        return schema.encode(replace(episode, reward=1.0))

    run_file = load_run_file(path)
    with started("matpo_broker", str(path)):
        async with playing(run_file, change):
            with forked(learners, path, "--set", "learner.checkpoint_interval_s=0.2") as learner:
                seen: set[str] = set()

                def several() -> bool:
                    seen.update(found.name for found in checkpoint.found(run_file.checkpoint_folder))
                    return len(seen) >= 4 or learner.is_over

                await until(several)
                learner.send_signal(signal.SIGTERM)
                assert await ended(learner) == 0
    found = checkpoint.found(run_file.checkpoint_folder)
    assert len(found) == run_file.learner.keep_checkpoints
    last = checkpoint.verify(found[-1])
    assert (last.update, last.book().num_consumed) == (0, len(lines(run_file, "trained")))
    ledger = accounting(run_file.journal_folder)
    assert len(ledger.committed) == last.book().num_consumed  # the broker heard of it, and may forget them


async def test_a_learner_that_comes_back_when_another_has_taken_over_writes_nothing_and_says_why(
    learners: ForkServer, path: Path
) -> None:
    """It is stopped (SIGSTOP) in the middle of its work, as a machine that hangs; a second one takes the run over."""
    run_file, log = load_run_file(path), path.with_name("older.log")
    folder, many = run_file.run.folder, ("--set", "learner.num_updates=1000000")
    epochs = lambda: [snapshot.read_manifest(run_file.snapshot_folder, v).epoch for v in published()]  # noqa: E731
    published = lambda: snapshot.versions(run_file.snapshot_folder)  # noqa: E731
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path, *many, log=log) as older:
                await until(lambda: len(checkpoint.found(run_file.checkpoint_folder)) >= 2)
                stop_outside_of_writes(older, folder / "learner.epoch")
                with forked(learners, path, *many) as newer:
                    await until(lambda: epochs()[-1] == 2 and len(lines(run_file, "learner")) >= 4)
                    older.send_signal(signal.SIGCONT)
                    assert await ended(older, 30) == 5, log.read_text()
                    now = len(lines(run_file, "learner"))
                    await until(lambda: len(lines(run_file, "learner")) >= now + 4 or newer.is_over)
                    newer.send_signal(signal.SIGTERM)
                    assert await ended(newer) == 0
    assert "learner epoch 1 is over" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert epochs() == sorted(epochs())
    assert {checkpoint.verify(found).epoch for found in checkpoint.found(run_file.checkpoint_folder)} == {2}
    updates, consumed = lines(run_file, "learner"), lines(run_file, "trained")
    assert [row["update"] for row in updates] == list(range(1, len(updates) + 1))
    assert max(Counter(row["group"] for row in consumed).values()) == 1
    whole = account(folder, max_open=run_file.learner.max_open_groups)
    assert (whole.episodes_lost, whole.episodes_twice, whole.episodes_invented) == (0, 0, 0)


def stop_outside_of_writes(process: Life, lock: Path) -> None:
    while True:
        process.send_signal(signal.SIGSTOP)
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                process.send_signal(signal.SIGCONT)


async def test_a_run_with_adapters_publishes_whole_models_resumes_and_is_no_full_run(
    learners: ForkServer, path: Path
) -> None:
    run_file, log = load_run_file(path), path.with_name("full.log")
    adapters = ("--set", "learner.lora.rank=4", "--set", "learner.learning_rate=0.01")
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path, *adapters) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 3 or learner.is_over)
                learner.kill()
                await ended(learner)
            with forked(learners, path, log=log) as learner:
                assert await ended(learner) == 4
            with forked(learners, path, *adapters, "--resume") as learner:
                assert await ended(learner) == 0
    assert "run that trains adapters of rank 4" in log.read_text()
    assert "Traceback" not in log.read_text()
    check_whole_run(run_file)
    base = load_file(run_file.model_folder / "model.safetensors")
    served = snapshot.load_tensors(run_file.snapshot_folder, lines(run_file, "learner")[-1]["version"])
    moved = {name for name, tensor in served.items() if name in base and not torch.equal(tensor, base[name])}
    assert served.keys() == {*base, snapshot.LM_HEAD}
    assert moved == {name for name in base if "_proj." in name}
    state = checkpoint.found(run_file.checkpoint_folder)[-1] / "state.safetensors"
    trained = 3 * 4 * 4 * sum(sum(base[name].shape) for name in moved)  # master and moments, rank 4, float32
    assert trained < state.stat().st_size < trained + 20_000  # names, random state


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    task = wire.OrderedTask(id="t", environment="toy", question="?")
    leases = [wire.Lease(lease="l", group=f"g-{i:08d}", member=0, attempt=0, task=task) for i in range(8)]
    schema.write_episodes(tmp_path / "episodes", [scripted_episode(lease, 0) for lease in leases])
    return tmp_path / "episodes"


def test_a_warm_start_learns_recorded_episodes_and_writes_a_model(
    learners: ForkServer, path: Path, recorded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "warm"
    options = ("--mode", "sft", "--episodes", str(recorded), "--out", str(out), "--steps", "60", "--lr", "0.01")
    with forked(learners, path, *options, "--segments-per-step", "16") as learner:
        assert learner.wait(120) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    first = next(schema.read_episodes(recorded)).segments[0]
    ids = torch.tensor(first.token_ids[None].astype(np.int64))
    logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert logprobs[5:].mean() > -1  # -5.6 before
    assert len(AutoTokenizer.from_pretrained(out)) > 0


def test_a_warm_start_that_is_not_finite_ends_and_writes_nothing(
    learners: ForkServer, path: Path, recorded: Path, tmp_path: Path
) -> None:
    options = ("--mode", "sft", "--episodes", str(recorded), "--out", str(tmp_path / "warm"), "--lr", "1e30")
    with forked(learners, path, *options, log=tmp_path / "log") as learner:
        assert learner.wait(120) == 1
    assert "use a lower --lr" in (tmp_path / "log").read_text()
    assert not (tmp_path / "warm").exists()


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
    learners: ForkServer, path: Path, arguments: tuple[str, ...], words: str
) -> None:
    with forked(learners, path, *arguments) as learner:
        assert learner.wait() == 2
    assert words in learner.said()
    assert "Traceback" not in learner.said()
