"""The embedded engine. The judge is a plain float32 forward pass of transformers over the whole turn."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from matpo.errors import ConfigError, InfraError, SetupError, SnapshotError
from matpo.testing import tiny_model
from matpo_actor.engines.base import Sampled
from matpo_actor.engines.transformers import TransformersEngine, sample

VOCABULARY = 264
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "ours")


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(model, num_threads=1, kept_rows=4)
    await engine.start()
    yield engine
    await engine.close()


def weights(model: Path, seed: int) -> Weights:
    """Weights far away from the model's own, the head its own tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def write(folder: Path, tensors: Weights) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def rescore(model: Path, tensors: Weights | None, prompt: list[int], sampled: Sampled) -> list[float]:
    """Log-probs of the turn's tokens under one set of weights, all keys and values computed with them."""
    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    if tensors is not None:
        head = torch.nn.Linear(64, VOCABULARY, bias=False)
        judge.lm_head = head
        judge.load_state_dict(tensors)
    with torch.no_grad():
        logits = judge(input_ids=torch.tensor([[*prompt, *sampled.token_ids]])).logits[0]
    scores = torch.log_softmax(logits.float(), -1)
    return [float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(sampled.token_ids)]


def prompts(num: int, seed: int = 0, shared: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    start = [rng.randrange(VOCABULARY) for _ in range(shared)]
    return [start + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 150))] for _ in range(num)]


async def until_running(engine: TransformersEngine, num_tokens: int) -> None:
    async with asyncio.timeout(60):
        while not engine._batch or len(engine._batch[0].logprobs) < num_tokens:
            await asyncio.sleep(0.001)


async def test_recorded_logprobs_equal_a_rescore(engine: TransformersEngine, model: Path) -> None:
    asked = prompts(12)
    turns = await asyncio.gather(*[engine.generate(p, max_tokens=20 + i, stop_ids=[]) for i, p in enumerate(asked)])
    for prompt, turn in zip(asked, turns, strict=True):
        assert turn.logprobs == pytest.approx(rescore(model, None, prompt, turn), abs=1e-4)
        assert set(turn.versions) == {-1}


async def test_recorded_logprobs_equal_a_rescore_when_prompts_reuse_earlier_contexts(
    engine: TransformersEngine, model: Path
) -> None:
    prompt = prompts(1)[0]
    for _ in range(3):
        turn, *_ = await asyncio.gather(*[engine.generate(prompt, max_tokens=9, stop_ids=[]) for _ in range(6)])
        assert turn.logprobs == pytest.approx(rescore(model, None, prompt, turn), abs=1e-4)
        prompt = [*prompt, *turn.token_ids, 7, 8, 9]


async def test_a_turn_with_an_update_in_its_middle_rescores_under_its_stamped_versions(
    engine: TransformersEngine, model: Path, tmp_path: Path
) -> None:
    old, new = weights(model, 1), weights(model, 2)
    await engine.load(write(tmp_path / "v0", old), 0)
    asked = prompts(16)
    tasks = [asyncio.create_task(engine.generate(p, max_tokens=150, stop_ids=[])) for p in asked]
    await until_running(engine, 5)
    await engine.load(write(tmp_path / "v1", new), 1)
    turns = await asyncio.gather(*tasks)
    assert {tuple(sorted(set(t.versions))) for t in turns} == {(0, 1)}
    for prompt, turn in zip(asked, turns, strict=True):
        under = {0: rescore(model, old, prompt, turn), 1: rescore(model, new, prompt, turn)}
        wanted = [under[version][i] for i, version in enumerate(turn.versions)]
        assert turn.logprobs == pytest.approx(wanted, abs=1e-4)
        assert list(turn.versions) == sorted(turn.versions)


async def test_keep_leaves_old_keys_and_values_to_requests_in_flight_only(model: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(model, num_threads=1, kv_after_update="keep", kept_rows=4)
    await engine.start()
    prompt, new = prompts(1)[0], weights(model, 2)
    running = asyncio.create_task(engine.generate(prompt, max_tokens=150, stop_ids=[]))
    await until_running(engine, 5)
    await engine.load(write(tmp_path / "v1", new), 1)
    kept = await running
    fresh = await engine.generate(prompt, max_tokens=10, stop_ids=[])
    await engine.close()
    first = kept.versions.index(1) + 1
    under_new = rescore(model, new, prompt, kept)
    assert kept.logprobs[first:] != pytest.approx(under_new[first:], abs=1e-2)
    assert fresh.logprobs == pytest.approx(rescore(model, new, prompt, fresh), abs=1e-4)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
async def test_a_snapshot_that_does_not_fit_changes_nothing(
    engine: TransformersEngine, model: Path, tmp_path: Path, change: str
) -> None:
    before = await engine.generate([1, 2, 3], max_tokens=20, stop_ids=[], seed=5)
    tensors = weights(model, 1)
    if change == "missing":
        del tensors["lm_head.weight"]
    elif change == "extra":
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        tensors["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(SnapshotError, match="does not fit") as caught:
        await engine.load(write(tmp_path / "bad", tensors), 1)
    assert caught.value.reason == "tensors"
    assert await engine.generate([1, 2, 3], max_tokens=20, stop_ids=[], seed=5) == before


async def test_a_torn_file_is_a_snapshot_error(engine: TransformersEngine, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(SnapshotError, match="cannot be read"):
        await engine.load(tmp_path, 1)


async def test_cancelled_requests_leave_the_batch_and_the_others_go_on(engine: TransformersEngine, model: Path) -> None:
    asked = prompts(8)
    tasks = [asyncio.create_task(engine.generate(p, max_tokens=200, stop_ids=[])) for p in asked]
    await until_running(engine, 3)
    for task in tasks[::2]:
        task.cancel()
    async with asyncio.timeout(60):
        while len(engine._batch) > 4:
            await asyncio.sleep(0.001)
    for prompt, task in zip(asked[1::2], tasks[1::2], strict=True):
        turn = await task
        assert len(turn.token_ids) == 200
        assert turn.logprobs == pytest.approx(rescore(model, None, prompt, turn), abs=1e-4)


async def test_a_turn_ends_with_its_stop_token_included(engine: TransformersEngine) -> None:
    stop = set(range(0, VOCABULARY, 2))
    turns = await asyncio.gather(*[engine.generate(p, max_tokens=50, stop_ids=stop) for p in prompts(20)])
    for turn in turns:
        assert turn.finish == "stop"
        assert turn.token_ids[-1] in stop
        assert not stop & set(turn.token_ids[:-1])


async def test_a_turn_ends_at_max_tokens(engine: TransformersEngine) -> None:
    turn = await engine.generate([1], max_tokens=1, stop_ids=[])
    assert (len(turn.token_ids), turn.finish) == (1, "length")


async def test_the_same_seed_gives_the_same_turn(engine: TransformersEngine) -> None:
    first, second, other = [
        await engine.generate([1, 2, 3], max_tokens=30, stop_ids=[], seed=seed) for seed in (7, 7, 8)
    ]
    assert list(first.token_ids) == list(second.token_ids)
    assert list(first.token_ids) != list(other.token_ids)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -torch.inf, 2.0]).repeat(1000, 1)
    wanted = torch.softmax(logits[0], -1)
    tokens, logprobs = sample(logits, [(i + 0.5) / 1000 for i in range(1000)])
    for token, probability in enumerate(wanted.tolist()):
        assert tokens.count(token) == pytest.approx(1000 * probability, abs=1)
    assert logprobs == pytest.approx([float(wanted[t].log()) for t in tokens], abs=1e-6)


async def test_bad_requests_do_not_reach_the_model(engine: TransformersEngine) -> None:
    for prompt, max_tokens in (([], 5), ([VOCABULARY], 5), ([-1], 5), ([1], 0)):
        with pytest.raises(ValueError, match="want a prompt"):
            await engine.generate(prompt, max_tokens=max_tokens, stop_ids=[])
    with pytest.raises(ConfigError, match="max_context_tokens"):
        await engine.generate([1] * 4000, max_tokens=97, stop_ids=[])


async def test_close_fails_requests_in_flight_with_an_infra_error(engine: TransformersEngine) -> None:
    task = asyncio.create_task(engine.generate([1], max_tokens=3000, stop_ids=[]))
    await until_running(engine, 1)
    await engine.close()
    with pytest.raises(InfraError, match="closed"):
        await task
    with pytest.raises(InfraError, match="closed"):
        await engine.generate([1], max_tokens=1, stop_ids=[])


async def test_a_broken_model_fails_every_request_with_an_infra_error(engine: TransformersEngine) -> None:
    engine._model = None
    with pytest.raises(InfraError, match="stopped"):
        await engine.generate([1], max_tokens=1, stop_ids=[])


async def test_a_model_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", sliding_window=8, use_sliding_window=True, max_window_layers=0)
    with pytest.raises(SetupError, match="full attention only"):
        await TransformersEngine(folder).start()


async def test_a_missing_model_folder_is_a_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot load the model"):
        await TransformersEngine(tmp_path / "nothing").start()
