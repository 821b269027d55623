"""Started by test_deepspeed_engine.py under DeepSpeed's launcher: two updates under each ZeRO stage and denominator.

    rank_program.py MODEL EPISODES OUT

OUT/variants.json names the settings of each run. Writes OUT/{name}.safetensors (weights after the updates), .json
(reports) and a checkpoint for each, and loads each checkpoint again on both ranks; exits 1 when a weight comes back
changed.
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
    variants = json.loads((out / "variants.json").read_text())
    episodes = list(read_episodes(episodes_file))
    groups = [Group(id=f"g-{i}", episodes=episodes[i : i + 2]) for i in range(0, len(episodes), 2)]
    advantages = [np.array([1.0, -0.5])] * len(groups)
    for name, settings in variants.items():
        run = LearnerSettings.model_validate(settings)
        engine = LearnerEngine(model, run)
        reports = []
        for version in range(2):
            plan = pack_update(
                groups, advantages, run, version=5 + version, rank=engine.rank, world_size=engine.world_size
            )
            reports.append(engine.step(plan))
        tensors = dict(engine.tensors())
        folder = out / f"checkpoint-{name}"
        folder.mkdir(exist_ok=True)
        engine.save(folder)
        loaded = LearnerEngine(model, run)
        loaded.load(folder)
        for weight, whole in loaded.tensors():
            if not torch.equal(whole, tensors[weight]):
                raise SystemExit(f"{name}, rank {engine.rank}: {weight} came back changed")
        text = engine.broadcast_bytes(b"\x00hello" if engine.rank == 0 else None)
        if engine.rank == 1:
            (out / f"heard-{name}").write_bytes(text)
        if engine.rank == 0:
            save_file(tensors, out / f"{name}.safetensors")
            numbers = [
                [r.loss, r.grad_norm, r.num_tokens, r.overall.ess, r.overall.kl, r.overall.gap_max] for r in reports
            ]
            (out / f"{name}.json").write_text(json.dumps(numbers))
        engine.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
