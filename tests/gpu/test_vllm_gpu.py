"""vLLM on a real GPU, in bfloat16: versions are exact, and log-probs agree with a float32 re-score to rounding."""

import asyncio
import random
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from matpo import snapshot
from matpo.testing import tiny_model

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="vLLM is not installed")
from matpo_actor.engines.vllm import VllmEngine

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(600)]
VOCABULARY = 264


def publish(folder: Path, model: Path, version: int) -> Path:
    generator = torch.Generator().manual_seed(version)
    return snapshot.publish(
        folder,
        {
            name: t + 0.05 * torch.randn(t.shape, generator=generator)
            for name, t in load_file(model / "model.safetensors").items()
        },
        version=version,
        epoch=0,
        update=version,
        model_folder=model,
        dtype=torch.bfloat16,
    )


def rescore(folder: Path, ids: list[int]) -> torch.Tensor:
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").cuda()
    with torch.no_grad():
        return torch.log_softmax(judge(input_ids=torch.tensor([ids]).cuda()).logits[0].float(), -1).cpu()


async def test_recorded_logprobs_agree_with_a_rescore_across_an_update_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    folders = [publish(tmp_path / "snapshots", model, version) for version in (0, 1)]
    engine = VllmEngine(
        model,
        tmp_path / "snapshots",
        dtype="bfloat16",
        arguments={"gpu_memory_utilization": 0.2, "enforce_eager": True},
    )
    await engine.start()
    try:
        await engine.load(folders[0], 0)
        rng = random.Random(0)
        asked = [[rng.randrange(VOCABULARY) for _ in range(50)] for _ in range(64)]
        tasks = [asyncio.create_task(engine.generate(p, max_tokens=1500, stop_ids=[])) for p in asked]
        await asyncio.sleep(1.0)
        pause_s = await engine.load(folders[1], 1)
        turns = await asyncio.gather(*tasks)
    finally:
        await engine.close()
    assert pause_s < 5
    differences = []
    for prompt, turn in zip(asked, turns, strict=True):
        assert sorted(set(turn.versions)) == [0, 1]
        under = [rescore(folder, [*prompt, *turn.token_ids]) for folder in folders]
        differences += [
            abs(float(under[version][len(prompt) + i - 1, token]) - logprob)
            for i, (token, logprob, version) in enumerate(
                zip(turn.token_ids, turn.logprobs, turn.versions, strict=True)
            )
        ]
    assert statistics.median(differences) < 0.02
    assert max(differences) < 0.5
