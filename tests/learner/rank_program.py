"""Started by test_deepspeed_engine.py under DeepSpeed's launcher: the same updates under each ZeRO stage.

    rank_program.py MODEL EPISODES OUT

Writes OUT/stage{n}.safetensors (weights after the updates), .json (reports) and a checkpoint per stage, and loads
each checkpoint again on both ranks; exits 1 when a weight comes back changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from matpo.episode import Group
from matpo.schema import read_episodes
from matpo.settings import LearnerSettings
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.packing import pack_update


def main(model: Path, episodes_file: Path, out: Path) -> None:
    settings = json.loads((out / "settings.json").read_text())
    episodes = list(read_episodes(episodes_file))
    groups = [Group(id=f"g-{i}", episodes=episodes[i : i + 2]) for i in range(0, len(episodes), 2)]
    advantages = [np.array([1.0, -0.5])] * len(groups)
    for stage in (0, 1, 2, 3):
        run = LearnerSettings.model_validate(settings | {"zero_stage": stage})
        engine = LearnerEngine(model, run)
        reports = []
        for version in range(2):
            plan = pack_update(
                groups, advantages, run, version=5 + version, rank=engine.rank, world_size=engine.world_size
            )
            reports.append(engine.step(plan))
        tensors = dict(engine.tensors())
        folder = out / f"checkpoint{stage}"
        folder.mkdir(exist_ok=True)
        engine.save(folder)
        loaded = LearnerEngine(model, run)
        loaded.load(folder)
        for name, whole in loaded.tensors():
            if not torch.equal(whole, tensors[name]):
                raise SystemExit(f"stage {stage}, rank {engine.rank}: {name} came back changed")
        text = engine.broadcast_bytes(b"\x00hello" if engine.rank == 0 else None)
        if engine.rank == 1:
            (out / f"heard{stage}").write_bytes(text)
        if engine.rank == 0:
            save_file(tensors, out / f"stage{stage}.safetensors")
            numbers = [[r.loss, r.grad_norm, r.num_tokens, r.overall.ess, r.overall.kl] for r in reports]
            (out / f"stage{stage}.json").write_text(json.dumps(numbers))
        engine.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
