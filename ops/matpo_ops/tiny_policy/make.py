"""Remake the shipped tiny policy: tokenizer, random weights, scripted episodes, supervised warm start.

    python -m matpo_ops.tiny_policy.make FOLDER        (the same as `matpo tiny-policy FOLDER`)

Rules:
1. Environment, prompts and limits are those of configs/demo.toml and demo-single-agent.toml; nothing is said twice.
2. Only training cities are used: the demo's held-out tasks stay unseen.
3. Weights are trained by `matpo-learner --mode sft`, the learner that also does the reinforcement.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matpo import logs
from matpo.errors import ConfigError, SetupError
from matpo.plugins import load_environment
from matpo.settings import LogSettings, RunFile, load_run_file
from matpo_actor.chat import load_chat
from matpo_ops.tiny_policy import episodes, tokenizer
from matpo_ops.tiny_policy.oracle import MIXED

CONFIGS = Path(__file__).parents[1] / "configs"
SHARES = {"demo.toml": 20_000, "demo-single-agent.toml": 12_000}  # episodes; a team's hold 2.5 segments, an agent's 1
PHASES = ((4000, 2e-3), (1200, 6e-4), (800, 1.5e-4))  # (steps, learning rate): falls, as a schedule would
SEGMENTS_PER_STEP = 32
TIMEOUT_S = 3600.0
KEPT = (
    "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
log = logs.get()


def make(out: Path) -> None:
    """Write the policy to a new folder `out`. Takes about ten minutes on two cores.

    Raises ConfigError if `out` exists, SetupError if the learner fails.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Name a new folder.")
    with tempfile.TemporaryDirectory(prefix="matpo-tiny-") as name:
        work = Path(name)
        model = work / "untrained"
        _untrained(model)
        recorded = _record(work, model)
        for number, (steps, rate) in enumerate(PHASES):
            trained = work / f"trained-{number}"
            _train(model, recorded, trained, steps=steps, rate=rate, folder=work / "run")
            shutil.copyfile(work / "untrained" / "generation_config.json", trained / "generation_config.json")
            model = trained
        out.mkdir(parents=True)
        for kept in KEPT:
            shutil.copyfile(model / kept, out / kept)
    log.info("tiny_policy.made", folder=str(out), bytes=sum(p.stat().st_size for p in out.iterdir()))


def _run_file(name: str, model: Path) -> RunFile:
    return load_run_file(CONFIGS / name, [f'model.path="{model}"'])


def _untrained(folder: Path) -> None:
    """Tokenizer and random weights of a Qwen3 of 0.7M parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # The settings check that model.path is there: any folder with a config will do until this one is written.
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    settings = _run_file("demo.toml", folder).environment
    made = tokenizer.build(episodes.corpus(load_environment(settings.name, settings.plugin, settings.options)))
    made.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(made),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=False,  # vLLM would serve a tied head's old weights after an update
        bos_token_id=None,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def _record(work: Path, model: Path) -> Path:
    """Scripted episodes of the team and of the single agent, in one file."""
    from transformers import AutoTokenizer

    path = work / "episodes.bin"
    with path.open("wb") as whole:
        for name, num in SHARES.items():
            run_file = _run_file(name, model)
            made: Any = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
            chat = load_chat(model, syntax=run_file.rollout.syntax, reply_role=run_file.rollout.reply_role)
            settings = run_file.environment
            environment = load_environment(settings.name, settings.plugin, settings.options)
            part = work / f"{run_file.run.name}.bin"
            played = episodes.write(part, run_file, chat, made, environment, flaws=MIXED, num=num)
            whole.write(part.read_bytes())
            log.info(
                "tiny_policy.recorded", run=name, num=num, mean_reward=round(sum(e.reward for e in played) / num, 3)
            )
    return path


def _train(model: Path, recorded: Path, out: Path, *, steps: int, rate: float, folder: Path) -> None:
    sets = [
        f'model.path="{model}"', f'run.folder="{folder}"', "learner.num_threads=1", "learner.warmup_updates=50",
        "learner.microbatch_tokens=2048", "learner.weight_decay=0.01",
    ]  # fmt: skip
    command = [sys.executable, "-m", "matpo_learner", str(CONFIGS / "demo.toml"), "--mode", "sft"]
    command += ["--episodes", str(recorded), "--out", str(out), "--steps", str(steps), "--lr", str(rate)]
    command += ["--segments-per-step", str(SEGMENTS_PER_STEP), *(a for s in sets for a in ("--set", s))]
    try:
        done = subprocess.run(command, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SetupError(
            f"matpo-learner --mode sft took longer than {TIMEOUT_S:g} s. Free the CPU and try again."
        ) from None
    if done.returncode:
        raise SetupError(f"matpo-learner --mode sft ended with code {done.returncode}; its last lines say why.")


if __name__ == "__main__":
    logs.configure(LogSettings(), process="tiny-policy")
    make(Path(sys.argv[1]))
