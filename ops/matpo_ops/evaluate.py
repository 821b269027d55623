"""Accuracy of one policy on held-out tasks, with a 95 % interval: the actor's own rollout, without a broker."""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matpo import Episode, Task, logs
from matpo.errors import ConfigError, InfraError
from matpo.plugins import Environment, load_environment
from matpo.settings import RunFile
from matpo.wire import Lease, OrderedTask
from matpo_actor import engines
from matpo_actor.chat import load_chat
from matpo_actor.roles import resolve
from matpo_actor.rollout import play

Z_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A mean reward in [0, 1] with its 95 % Wilson interval.

    Exact for rewards of 0 and 1; for rewards between (F1, format terms) their variance is smaller, so the interval is
    wider than it has to be.
    """

    mean: float
    low: float
    high: float
    num_tasks: int

    def triple(self) -> list[float]:
        """[mean, low, high], rounded for printing."""
        return [round(self.mean, 4), round(self.low, 4), round(self.high, 4)]


def wilson(rewards: Sequence[float]) -> Score:
    """Wilson score interval of the mean (Wilson 1927) at 95 %. Raises ValueError on no rewards."""
    n = len(rewards)
    if n == 0:
        raise ValueError("no rewards: nothing was evaluated")
    mean = min(max(sum(rewards) / n, 0.0), 1.0)
    centre = (mean + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n * n)) / (1 + Z_95**2 / n)
    return Score(mean=mean, low=max(centre - half, 0.0), high=min(centre + half, 1.0), num_tasks=n)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `matpo eval` found."""

    policy: str
    environment: str
    split: str
    score: Score
    components: dict[str, float]
    num_failed: int  # infrastructure failures: not scored
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file or line."""
        return asdict(self)


def held_out_tasks(environment: Environment, run_file: RunFile) -> list[Task]:
    """eval.num_tasks tasks of eval.split, the same ones for every policy of a run.

    Raises ConfigError when the split is empty or shares a task with "train".
    """
    tasks = list(environment.tasks(run_file.eval.split))
    if not tasks:
        raise ConfigError(
            f'eval.split="{run_file.eval.split}" of environment "{run_file.environment.name}" has no tasks.'
        )
    random.Random(run_file.run.seed).shuffle(tasks)
    chosen = tasks[: run_file.eval.num_tasks]
    shared = {t.id for t in chosen} & {t.id for t in environment.tasks("train")}
    if shared:
        raise ConfigError(
            f'eval.split="{run_file.eval.split}" shares {len(shared)} tasks with "train" (first: {min(shared)}). '
            "Held-out means never trained on: choose another split."
        )
    return chosen


def evaluate(
    run_file: RunFile, folder: Path, *, policy: str, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Play every held-out task once at temperature 1 with the weights in `folder` (a snapshot or a model folder)."""
    return asyncio.run(_evaluate(run_file, folder, policy, progress))


async def _evaluate(
    run_file: RunFile, folder: Path, policy: str, progress: Callable[[int, int], None] | None
) -> Evaluation:
    settings = run_file.environment
    environment = load_environment(settings.name, settings.plugin, settings.options)
    tasks = held_out_tasks(environment, run_file)
    nowhere = tempfile.TemporaryDirectory(prefix="matpo-eval-")  # an engine that finds snapshots would serve the newest
    served = run_file.model_copy(
        update={
            "model": run_file.model.model_copy(update={"path": str(folder)}),
            "run": run_file.run.model_copy(update={"folder": Path(nowhere.name)}),
        }
    )
    engine = engines.make(served)
    rollout = run_file.rollout
    chat = load_chat(folder, syntax=rollout.syntax, reply_role=rollout.reply_role)
    team = resolve(run_file, environment)
    started = time.monotonic()
    episodes: list[Episode] = []
    num_failed = 0
    try:
        await engine.start()
        limit = asyncio.Semaphore(run_file.actor.num_members)

        async def one(index: int, task: Task) -> Episode | None:
            async with limit:
                try:
                    lease = _lease(index, task)
                    return await play(
                        lease, environment=environment, engine=engine, chat=chat, run_file=run_file, team=team
                    )
                except InfraError as error:
                    logs.get().warning("eval.task_failed", task=task.id, reason=str(error))
                    return None

        for done, future in enumerate(asyncio.as_completed([one(i, t) for i, t in enumerate(tasks)]), start=1):
            episode = await future
            if episode is None:
                num_failed += 1
            else:
                episodes.append(episode)
            if progress is not None:
                progress(done, len(tasks))
    finally:
        await engine.close()
        environment.close()
        nowhere.cleanup()
    names = sorted({name for e in episodes for name in e.reward_components})
    return Evaluation(
        policy=policy,
        environment=settings.plugin or settings.name,
        split=run_file.eval.split,
        score=wilson([e.reward for e in episodes]),
        components={n: sum(e.reward_components.get(n, 0.0) for e in episodes) / len(episodes) for n in names},
        num_failed=num_failed,
        wall_s=time.monotonic() - started,
    )


def _lease(index: int, task: Task) -> Lease:
    ordered = OrderedTask(id=task.id, environment=task.environment, question=task.question, data=dict(task.data))
    return Lease(lease=f"eval-{index}", group=f"eval-{index:06d}", member=0, attempt=0, task=ordered)
