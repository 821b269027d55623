"""Groups for the learner's benchmark: played here and now by the tiny policy, so that their segments are real ones."""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from matpo import Episode, Group, Segment
from matpo.plugins import load_environment
from matpo.settings import RunFile
from matpo.wire import Lease, OrderedTask
from matpo_actor import engines
from matpo_actor.chat import load_chat
from matpo_actor.roles import resolve
from matpo_actor.rollout import play


def play_groups(run_file: RunFile, num_groups: int) -> list[Group]:
    """`num_groups` whole groups of learner.group_size episodes of training tasks, sampled with the run's base model."""
    with tempfile.TemporaryDirectory(prefix="matpo-bench-") as nowhere:  # no snapshots: the base model is served
        run = run_file.run.model_copy(update={"folder": Path(nowhere)})
        return asyncio.run(_play(run_file.model_copy(update={"run": run}), num_groups))


async def _play(run_file: RunFile, num_groups: int) -> list[Group]:
    settings = run_file.environment
    environment = load_environment(settings.name, settings.plugin, settings.options)
    tasks = list(environment.tasks("train"))
    random.Random(run_file.run.seed).shuffle(tasks)
    chat = load_chat(run_file.model_folder, syntax=run_file.rollout.syntax, reply_role=run_file.rollout.reply_role)
    team, engine = resolve(run_file, environment), engines.make(run_file)
    limit = asyncio.Semaphore(run_file.actor.num_members)

    async def one(number: int, member: int) -> Episode:
        task = tasks[number]
        ordered = OrderedTask(id=task.id, environment=task.environment, question=task.question, data=dict(task.data))
        lease = Lease(lease=f"{number}.{member}", group=f"bench-{number:04d}", member=member, attempt=0, task=ordered)
        async with limit:
            episode = await play(lease, environment=environment, engine=engine, chat=chat, run_file=run_file, team=team)
        return replace(episode, segments=tuple(_published(segment) for segment in episode.segments))

    try:
        await engine.start()
        size = run_file.learner.group_size
        episodes = await asyncio.gather(*(one(g, k) for g in range(num_groups) for k in range(size)))
    finally:
        await engine.close()
        environment.close()
    return [Group(id=f"bench-{g:04d}", episodes=tuple(episodes[g * size : (g + 1) * size])) for g in range(num_groups)]


def _published(segment: Segment) -> Segment:
    """As if the base model were version 0: an engine without snapshots calls it -1, which no published weights have."""
    return replace(segment, versions=np.where(segment.sampled, 0, segment.versions))
