"""What an actor recorded is what the learner finds: whole episodes, played by the actor, scored by the learner."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from matpo import Episode, snapshot
from matpo.plugins import load_environment
from matpo.settings import LearnerSettings, RunFile, load_run_file
from matpo.wire import Lease, OrderedTask
from matpo_actor import engines
from matpo_actor.chat import load_chat
from matpo_actor.rollout import play
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.packing import pack_sft
from matpo_ops.demo import CONFIGS

NUM_EPISODES = 24


def publish_two_versions(run_file: RunFile) -> list[Path]:
    """The shipped policy as version 0, and one with every weight moved by a tenth as version 1."""
    tensors = load_file(run_file.model_folder / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {name: t * (1 + 0.1 * torch.randn(t.shape, generator=noise)) for name, t in tensors.items()}
    return [
        snapshot.publish(
            run_file.snapshot_folder,
            weights,
            version=version,
            epoch=0,
            update=version,
            model_folder=run_file.model_folder,
            dtype=torch.float32,
        )
        for version, weights in enumerate((tensors, moved))
    ]


async def play_across_an_update(run_file: RunFile, folders: list[Path]) -> list[Episode]:
    environment = load_environment("atlas", None, run_file.environment.options)
    chat = load_chat(run_file.model_folder, syntax="json", reply_role="tool")
    engine = engines.make(run_file)
    await engine.start()
    try:
        await engine.load(folders[0], 0)
        plays = []
        for i, task in enumerate(environment.tasks("test")[:NUM_EPISODES]):
            ordered = OrderedTask(id=task.id, environment="atlas", question=task.question, data=dict(task.data))
            lease = Lease(lease=f"l{i}", group=f"g-{i}", member=0, attempt=0, task=ordered)
            plays.append(
                asyncio.create_task(play(lease, environment=environment, engine=engine, chat=chat, run_file=run_file))
            )
        await asyncio.wait(plays, return_when=asyncio.FIRST_COMPLETED)  # the others are in the middle
        await engine.load(folders[1], 1)
        return list(await asyncio.gather(*plays))
    finally:
        await engine.close()
        environment.close()


@pytest.mark.processes
async def test_the_learner_finds_the_log_probs_that_the_actor_recorded_under_each_stamped_version(
    tmp_path: Path,
) -> None:
    run_file = load_run_file(CONFIGS / "demo.toml", [f'run.folder="{tmp_path}"'])
    folders = publish_two_versions(run_file)
    episodes = await play_across_an_update(run_file, folders)
    assert {s.role for e in episodes for s in e.segments} == {"planner", "worker"}
    checked: Counter[int] = Counter()
    for version, folder in enumerate(folders):
        learner = LearnerEngine(folder, LearnerSettings(num_threads=1), seed=0)
        batches = pack_sft(episodes, LearnerSettings(), version=1)
        for batch, found in zip(batches, learner.log_probs(batches), strict=True):
            ours = 1 - batch.lags == version  # packed for version 1, so lag = 1 - version of the token
            np.testing.assert_allclose(found[ours], batch.mu[ours], atol=1e-4)
            checked[version] += int(ours.sum())
        learner.close()
    assert min(checked[0], checked[1]) >= 100
    assert any(len(set(s.versions[s.sampled].tolist())) == 2 for e in episodes for s in e.segments)
