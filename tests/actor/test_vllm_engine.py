"""Real vLLM, its own processes. The judge is a plain float32 forward pass of transformers over the whole turn."""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from matpo import snapshot
from matpo.errors import ConfigError, InfraError, SnapshotError
from matpo.testing import tiny_model
from matpo_actor.engines.base import Sampled

psutil = pytest.importorskip("psutil")
pytest.importorskip("vllm", reason="vLLM is not installed")
from matpo_actor.engines.vllm import VllmEngine, untie  # noqa: E402 - only where vLLM is there

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]
VOCABULARY = 264


class World:
    """One engine for the whole module, and snapshots with weights far from each other."""

    def __init__(self, folder: Path) -> None:
        self.model, self.snapshots = tiny_model(folder / "model"), folder / "snapshots"
        self.engine = VllmEngine(self.model, self.snapshots, num_threads=1)
        self.version = -1

    def publish(self) -> Path:
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        tensors = load_file(self.model / "model.safetensors")
        return snapshot.publish(
            self.snapshots,
            {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()},
            version=self.version,
            epoch=0,
            update=self.version,
            model_folder=self.model,
            dtype=torch.float32,
        )

    async def update(self) -> float:
        return await self.engine.load(self.publish(), self.version)

    def rescore(self, version: int, prompt: list[int], sampled: Sampled) -> list[float]:
        """Log-probs of the turn's tokens under one version, all keys and values computed with it."""
        folder = snapshot.version_folder(self.snapshots, version)
        judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = judge(input_ids=torch.tensor([[*prompt, *sampled.token_ids]])).logits[0]
        scores = torch.log_softmax(logits.float(), -1)
        return [float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(sampled.token_ids)]

    def check(self, prompt: list[int], sampled: Sampled) -> None:
        under = {version: self.rescore(version, prompt, sampled) for version in set(sampled.versions)}
        wanted = [under[version][i] for i, version in enumerate(sampled.versions)]
        assert list(sampled.logprobs) == pytest.approx(wanted, abs=1e-3)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    world = World(tmp_path_factory.mktemp("vllm"))
    await world.engine.start()
    await world.update()
    yield world
    await world.engine.close()
    with pytest.raises(InfraError, match="not running"):
        await world.engine.generate([1], max_tokens=1, stop_ids=[])


def prompts(num: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 150))] for _ in range(num)]


async def test_recorded_logprobs_equal_a_rescore_across_an_update_in_the_middle_of_a_turn(world: World) -> None:
    asked = prompts(16)
    for delay_s in (0.3, 1.0, 0.1, 2.0):  # how fast vLLM is here is not known: try until the update falls inside
        old = world.engine.version
        tasks = [asyncio.create_task(world.engine.generate(p, max_tokens=600, stop_ids=[], seed=1)) for p in asked]
        await asyncio.sleep(delay_s)
        await world.update()
        turns = await asyncio.gather(*tasks)
        for prompt, turn in zip(asked, turns, strict=True):
            assert set(turn.versions) <= {old, old + 1}
            assert list(turn.versions) == sorted(turn.versions)
            world.check(prompt, turn)
        if all(len(set(turn.versions)) == 2 for turn in turns):
            return
    pytest.fail("no update fell into the middle of the turns")


async def test_a_prompt_seen_before_an_update_is_computed_with_the_new_weights(world: World) -> None:
    prompt = prompts(1)[0] * 3
    for _ in range(2):
        turn = await world.engine.generate(prompt, max_tokens=20, stop_ids=[])
        assert set(turn.versions) == {world.engine.version}
        world.check(prompt, turn)
        await world.update()


async def test_reading_back_tells_every_tensor_of_other_weights(world: World) -> None:
    loaded = snapshot.version_folder(world.snapshots, world.engine.version)
    llm = world.engine._running()
    assert await llm.collective_rpc("matpo_compare", args=(str(loaded),)) == [[[], []]]
    [[different, unknown]] = await llm.collective_rpc("matpo_compare", args=(str(world.publish()),))
    assert unknown == []
    assert "lm_head.weight" in different
    assert len(different) == 2 * 8 + 3  # fused q, k, v and gate, up; two layers, embedding, norm and head


async def test_a_snapshot_that_does_not_fit_keeps_the_old_weights(world: World, tmp_path: Path) -> None:
    version = world.engine.version
    tensors = load_file(snapshot.version_folder(world.snapshots, version) / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SnapshotError, match=r"model\.norm\.weight is \[3\], want \[64\]"):
        await world.engine.load(tmp_path, version + 1)
    turn = await world.engine.generate([1, 2, 3], max_tokens=20, stop_ids=[])
    assert set(turn.versions) == {version}
    world.check([1, 2, 3], turn)


async def test_cancelled_requests_leave_and_the_others_go_on(world: World) -> None:
    asked = prompts(8)
    tasks = [asyncio.create_task(world.engine.generate(p, max_tokens=300, stop_ids=[])) for p in asked]
    await asyncio.sleep(0.1)
    for task in tasks[::2]:
        task.cancel()
    turns = await asyncio.gather(*tasks[1::2])
    assert [len(t.token_ids) for t in turns] == [300] * 4
    assert world.engine._running().get_num_unfinished_requests() == 0


async def test_a_turn_ends_with_its_stop_token_included(world: World) -> None:
    stop = set(range(0, VOCABULARY, 2))
    turns = await asyncio.gather(*[world.engine.generate(p, max_tokens=60, stop_ids=stop) for p in prompts(10)])
    for turn in turns:
        assert turn.finish == "stop"
        assert turn.token_ids[-1] in stop
        assert not stop & set(turn.token_ids[:-1])


async def test_the_models_own_stop_token_does_not_end_a_turn_unless_asked(world: World) -> None:
    turns = await asyncio.gather(*[world.engine.generate(p, max_tokens=200, stop_ids=[]) for p in prompts(16)])
    end = json.loads((world.model / "config.json").read_text())["eos_token_id"]
    assert any(end in turn.token_ids[:-1] for turn in turns)
    assert {len(turn.token_ids) for turn in turns} == {200}


async def test_bad_requests_do_not_reach_vllm(world: World) -> None:
    for prompt, max_tokens in (([], 5), ([VOCABULARY], 5), ([-1], 5), ([1], 0)):
        with pytest.raises(ValueError, match="want a prompt"):
            await world.engine.generate(prompt, max_tokens=max_tokens, stop_ids=[])
    with pytest.raises(ConfigError, match="max_model_len"):
        await world.engine.generate([1] * 4000, max_tokens=97, stop_ids=[])


def test_an_argument_that_the_engine_owns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actor\.vllm sets logprobs_mode"):
        VllmEngine(tmp_path, tmp_path, arguments={"logprobs_mode": "processed_logits", "max_num_seqs": 8})


async def test_untie_gives_a_tied_model_a_head_of_its_own(tmp_path: Path) -> None:
    model, target = tiny_model(tmp_path / "model"), tmp_path / "untied"
    target.mkdir()
    untie(model, target, json.loads((model / "config.json").read_text()))
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_file(target / "lm_head.safetensors")["lm_head.weight"], embedding)


ACTOR = """
import asyncio, sys
from pathlib import Path
from matpo_actor.engines.vllm import VllmEngine

async def main():
    engine = VllmEngine(Path(sys.argv[1]), Path(sys.argv[1]) / "no-snapshots")
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(1000)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_vllms_processes_end_with_an_actor_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "actor.py"
    script.write_text(ACTOR)
    command = [sys.executable, str(script), str(tiny_model(tmp_path / "model"))]
    actor = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert actor.stdout is not None
        assert await actor.stdout.readline() == b"ready\n"
        children = psutil.Process(actor.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(c.cmdline()) for c in children)
    finally:
        actor.kill()  # SIGKILL
        await actor.wait()
    deadline = time.monotonic() + 15
    while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
        assert time.monotonic() < deadline, f"still there: {children}"
        await asyncio.sleep(0.1)
