"""Started by test_deepspeed_engine.py under DeepSpeed's launcher: the same updates under each setup.

    rank_program.py MODEL EPISODES OUT

OUT/setups.json has the settings of each setup by name. Writes OUT/NAME.safetensors (weights after the updates), .json
(reports) and a checkpoint per setup. Before the last update, one whose gradient is not finite on rank 1 alone is
tried. Each checkpoint is loaded again on both ranks, where only rank 0 is told its folder; exits 1 when a weight comes
back changed, or when the ranks do not agree about the step that was left out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from matpo.episode import Group
from matpo.schema import read_episodes
from matpo.settings import LearnerSettings
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.packing import MicroBatch, pack_update


def main(model: Path, episodes_file: Path, out: Path) -> None:
    episodes = list(read_episodes(episodes_file))
    groups = [Group(id=f"g-{i}", episodes=episodes[i : i + 2]) for i in range(0, len(episodes), 2)]
    advantages = [np.array([1.0, -0.5])] * len(groups)
    for setup, settings in json.loads((out / "setups.json").read_text()).items():
        run = LearnerSettings.model_validate(settings)
        engine = LearnerEngine(model, run)
        reports = []
        for version in (5, 6):
            plan = pack_update(groups, advantages, run, version=version, rank=engine.rank, world_size=engine.world_size)
            if version == 6:
                check_that_a_bad_step_is_left_out(engine, plan)
            reports.append(engine.step(plan))
        tensors = dict(engine.tensors())
        folder = out / f"checkpoint {setup}"
        folder.mkdir(exist_ok=True)
        engine.save(folder if engine.rank == 0 else Path("nowhere"))
        loaded = LearnerEngine(model, run)
        loaded.load(folder if engine.rank == 0 else Path("nowhere"))
        for name, whole in loaded.tensors():
            if not torch.equal(whole, tensors[name]):
                raise SystemExit(f"{setup}, rank {engine.rank}: {name} came back changed")
        text = engine.broadcast_bytes(b"\x00hello" if engine.rank == 0 else None)
        if engine.rank == 1:
            (out / f"heard {setup}").write_bytes(text)
        if engine.rank == 0:
            save_file(tensors, out / f"{setup}.safetensors")
            numbers = [
                [r.loss, r.grad_norm, r.num_tokens, r.overall.ess, r.overall.kl, r.overall.gap_max] for r in reports
            ]
            (out / f"{setup}.json").write_text(json.dumps(numbers))
        engine.close()
        loaded.close()


def check_that_a_bad_step_is_left_out(engine: LearnerEngine, plan: list[list[MicroBatch]]) -> None:
    factor = np.float32("nan" if engine.rank == 1 else 1)
    spoilt = [[replace(row, weights=row.weights * factor) for row in minibatch] for minibatch in plan]
    report = engine.step(spoilt)
    if report.num_steps or engine.num_updates != 1:
        raise SystemExit(f"rank {engine.rank} took a step that was not finite on rank 1")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
