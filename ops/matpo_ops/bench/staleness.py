"""`matpo bench staleness`: what lag costs, with the importance correction and without it.

A controlled run in one process: rollouts, credit, packing, losses, snapshots and evaluation are those of a live run,
but who waits for whom is fixed, so that the lag is what was asked for and not what a busy machine makes of it. Update n
trains the batch that was played by the weights of update max(0, n - 1 - lag), as in a live run whose actors always keep
(1 + lag) batches ahead. Every condition has the same tasks in the same order, the same seeds and the same number of
updates; the lag of every trained episode is measured, not assumed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from matpo import snapshot
from matpo.episode import Episode, Group
from matpo.errors import ConfigError
from matpo.plugins import Environment, load_environment
from matpo.settings import RunFile
from matpo.wire import Lease
from matpo_actor import engines
from matpo_actor.chat import load_chat
from matpo_actor.engines.base import Engine
from matpo_actor.roles import resolve
from matpo_actor.rollout import play
from matpo_learner import credit
from matpo_learner.deepspeed_engine import LearnerEngine, StepReport
from matpo_learner.orders import OrderStream
from matpo_learner.process import Batch, update
from matpo_learner.records import Stopwatch
from matpo_ops.evaluate import evaluate

TAIL_UPDATES = 5
MAX_WAVES = 20  # groups without signal are replaced so often; a policy that never fails has nothing to learn


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """One batch: the groups to train, and the mean reward of all that were played for it."""

    groups: Sequence[Group]
    reward: float


@dataclass(kw_only=True)
class Curves:
    """What each update did."""

    reward: list[float] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)  # of each trained episode
    reports: list[StepReport] = field(default_factory=list)

    def add(self, played: Played, report: StepReport, version: int) -> None:
        """One more update, which trained the weights of `version`."""
        self.reward.append(played.reward)
        self.lags += [version - e.min_version for group in played.groups for e in group.episodes if e.num_sampled]
        self.reports.append(report)

    def figures(self) -> dict[str, float]:
        """Means over the updates; `_end`: over the last TAIL_UPDATES of them."""
        overall = [report.overall for report in self.reports]
        return {
            "lag_mean": mean(self.lags),
            "reward_end": mean(self.reward[-TAIL_UPDATES:]),
            "kl_nats": mean(o.kl for o in overall),
            "kl_nats_max": max(o.kl for o in overall),
            "ess": mean(o.ess for o in overall),
            "ess_min": min(o.ess for o in overall),
            "truncated": mean(o.truncated for o in overall),
            "masked": mean(o.masked for o in overall),
            "entropy_end": mean(o.entropy for o in overall[-TAIL_UPDATES:]),
            "grad_norm": mean(report.grad_norm for report in self.reports),
        }


class Players:
    """Plays batches with the weights that the engine holds."""

    def __init__(self, run_file: RunFile, engine: Engine, environment: Environment) -> None:
        self._run_file, self._engine, self._environment = run_file, engine, environment
        rollout = run_file.rollout
        self._chat = load_chat(run_file.model_folder, syntax=rollout.syntax, reply_role=rollout.reply_role)
        self._team = resolve(run_file, environment)
        settings = run_file.learner
        self._stream = OrderStream(environment.tasks("train"), seed=run_file.run.seed, group_size=settings.group_size)
        self._next = 0

    async def batch(self) -> Played:
        """learner.groups_per_update groups with a signal; the others are replaced by the next tasks.

        Raises ConfigError when there is hardly a group with a signal.
        """
        wanted = self._run_file.learner.groups_per_update
        everyone: list[Group] = []
        found: list[Group] = []
        for _ in range(MAX_WAVES):
            groups = await asyncio.gather(*(self._group() for _ in range(wanted - len(found))))
            everyone += groups
            found += [g for g in groups if credit.advantages(g, self._run_file.learner).has_signal]
            if len(found) == wanted:
                return Played(groups=found, reward=mean(e.reward for g in everyone for e in g.episodes))
        raise ConfigError(
            f"of {len(everyone)} groups only {len(found)} had rewards that differ: nothing is left to learn, or "
            "nothing can be learned yet. Set learner.num_updates lower, or learner.group_size higher."
        )

    async def _group(self) -> Group:
        order = self._stream.order(self._next)
        self._next += 1

        async def member(number: int) -> Episode:
            lease = Lease(lease=f"{order.group}.{number}", group=order.group, member=number, attempt=0, task=order.task)
            return await play(
                lease,
                environment=self._environment,
                engine=self._engine,
                chat=self._chat,
                run_file=self._run_file,
                team=self._team,
            )

        return Group(id=order.group, episodes=await asyncio.gather(*(member(n) for n in range(order.group_size))))


async def train(run_file: RunFile, learner: LearnerEngine, snapshots: Path, *, lag: int) -> Curves:
    """Train learner.num_updates updates on batches that are `lag` updates old. The newest snapshot is the result."""
    settings, curves = run_file.learner, Curves()
    environment = load_environment(run_file.environment.name, run_file.environment.plugin, run_file.environment.options)
    # The engine looks into the run folder at its start, and would serve the newest snapshot of another run.
    served = run_file.model_copy(update={"run": run_file.run.model_copy(update={"folder": snapshots / "nowhere"})})
    engine = engines.make(served)
    watch = Stopwatch(None)
    try:
        await engine.start()
        players = Players(run_file, engine, environment)
        ahead: deque[Played] = deque()
        await _publish(learner, engine, snapshots, run_file)
        for number in range(1, settings.num_updates + 1):
            while len(ahead) <= min(lag, settings.num_updates - number):
                ahead.append(await players.batch())
            played = ahead.popleft()
            version = number - 1
            report = await asyncio.to_thread(
                update, learner, Batch(version=version, groups=played.groups), run_file, watch
            )
            curves.add(played, report, version)
            await _publish(learner, engine, snapshots, run_file)
    finally:
        await engine.close()
        environment.close()
    return curves


async def _publish(learner: LearnerEngine, engine: Engine, snapshots: Path, run_file: RunFile) -> None:
    version = learner.num_updates
    folder = snapshot.publish(
        snapshots,
        dict(learner.tensors()),
        version=version,
        epoch=0,
        update=version,
        model_folder=run_file.model_folder,
        dtype=getattr(torch, run_file.model.dtype),
    )
    await engine.load(folder, version)
    snapshot.collect(snapshots, keep=1, grace_s=0, now_s=time.time())


def condition(run_file: RunFile, *, lag: int, scratch: Path) -> dict[str, Any]:
    """Train one policy and measure it on held-out tasks. What it writes goes under `scratch`."""
    began_s = time.monotonic()
    settings = run_file.learner.model_copy(update={"num_ranks": 1})
    run_file = run_file.model_copy(update={"learner": settings})
    snapshots = Path(tempfile.mkdtemp(prefix=f"staleness-{lag}-", dir=scratch))
    try:
        with closing(LearnerEngine(run_file.model_folder, settings, seed=run_file.run.seed)) as learner:
            curves = asyncio.run(train(run_file, learner, snapshots, lag=lag))
            newest = snapshot.version_folder(snapshots, learner.num_updates)
            heldout = evaluate(run_file, newest, policy=f"lag {lag}")
    finally:
        shutil.rmtree(snapshots, ignore_errors=True)
    figures = {name: float(f"{value:.4g}") for name, value in curves.figures().items()}
    return {
        "loss": settings.loss,
        "lag": lag,
        "updates": settings.num_updates,
        "heldout": heldout.score.triple(),
        **figures,
        "wall_s": round(time.monotonic() - began_s, 1),
    }


def staleness(runs: Mapping[str, RunFile], scratch: Path, *, lags: Sequence[int]) -> dict[str, Any]:
    """Every loss at every lag, one after the other. `runs` has a run file for each loss."""
    scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for lag in lags:
        for loss, run_file in runs.items():
            row = condition(run_file, lag=lag, scratch=scratch)
            print(
                f"{loss:<10} lag {lag} ({row['lag_mean']:.2f}): held-out {row['heldout'][0]:.3f} "
                f"[{row['heldout'][1]:.3f}, {row['heldout'][2]:.3f}], KL {row['kl_nats']:.4f}, ESS {row['ess']:.3f}, "
                f"{row['wall_s']:.0f} s",
                flush=True,
            )
            rows.append(row)
    return {"conditions": rows}
