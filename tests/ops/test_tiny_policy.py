import asyncio
import json
from pathlib import Path

import pytest

from matpo.plugins import load_environment
from matpo.settings import load_run_file
from matpo.snapshot import LM_HEAD
from matpo_actor.chat import load_chat
from matpo_ops.tiny_policy import episodes, oracle
from matpo_ops.tiny_policy.make import CONFIGS


@pytest.fixture(scope="module", params=["demo.toml", "demo-single-agent.toml"])
def game(request):
    run_file = load_run_file(CONFIGS / request.param, ["environment.options.num_cities=400"])
    environment = load_environment("atlas", None, run_file.environment.options)
    chat = load_chat(run_file.model_folder, syntax="json", reply_role="tool")
    yield run_file, environment, chat
    environment.close()


def record(game, flaws, num):
    from transformers import AutoTokenizer

    run_file, environment, chat = game
    tokenizer = AutoTokenizer.from_pretrained(str(run_file.model_folder))
    return asyncio.run(episodes.play_all(run_file, chat, tokenizer, environment, flaws=flaws, num=num))


def test_the_shipped_policy_is_small_and_carries_its_lm_head():
    from safetensors import safe_open

    folder = load_run_file(CONFIGS / "demo.toml").model_folder
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert LM_HEAD in weights.keys()  # noqa: SIM118 - a safetensors file is no mapping
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) <= 6_000_000
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_clean_script_earns_the_whole_reward(game):
    assert [e.reward for e in record(game, oracle.CLEAN, 40)].count(1.0) >= 39


def test_a_poor_strategist_is_mostly_wrong_and_always_well_formed(game):
    played = record(game, oracle.MIXED, 60)
    assert sum(e.reward_components["accuracy"] for e in played) < 30
    assert all(s.num_malformed_calls == 0 for e in played for s in e.segments)


def test_the_same_seed_writes_the_same_episodes(game):
    first, second = (record(game, oracle.MIXED, 10) for _ in range(2))
    assert [s.token_ids.tolist() for e in first for s in e.segments] == [
        s.token_ids.tolist() for e in second for s in e.segments
    ]


def test_segments_stay_short(game):
    assert max(s.num_tokens for e in record(game, oracle.MIXED, 60) for s in e.segments) <= 160


def test_a_name_has_the_same_tokens_wherever_it_stands(game):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(game[0].model_folder))
    name = tokenizer.encode("Zwevegem", add_special_tokens=False)
    for text in ("country of Zwevegem", "where Zwevegem is?", '{"query": "Zwevegem"}}', "named Zwevegem."):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert any(ids[i : i + len(name)] == name for i in range(len(ids)))
