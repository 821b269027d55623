"""What tests of plug-ins and of whole processes need. Heavy libraries are imported only by the functions that use them.

folder = tiny_model(tmp_path / "model")                       # a real Qwen3 with random weights, 0.1 s
run_file = write_run_file(tmp_path / "run.toml", model=folder)   # loopback, free ports, small limits
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '\\n\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages if m['role'] != 'system' %}
{%- if m['role'] == 'tool' %}
{%- if loop.previtem is undefined or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
"""ChatML with tools, the way Qwen's models have it."""


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def byte_tokenizer(chat_template: str = CHAT_TEMPLATE) -> Any:
    """A tokenizer with one id per byte and the ChatML control tokens: every text has exactly one spelling."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write a Qwen3 with random weights and the byte tokenizer, in a form that transformers and vLLM load."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_tokenizer()
    settings = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    model.float().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def write_run_file(path: Path, *, model: Path, name: str = "test", **sections: Mapping[str, Any]) -> Path:
    """Write a run file beside its run folder: loopback, free ports, the sections given on top."""
    document: dict[str, dict[str, Any]] = {
        "run": {"name": name, "folder": str(path.parent / name)},
        "model": {"path": str(model)},
        "broker": {"actor_port": free_port(), "learner_port": free_port()},
    }
    for section, values in sections.items():
        document.setdefault(section, {}).update(values)
    path.write_text("".join(_toml(name, values) for name, values in document.items()), encoding="utf-8")
    return path


def _toml(section: str, values: Mapping[str, Any]) -> str:
    """One section as TOML. JSON's spelling of strings, numbers, booleans and lists is also TOML's."""
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    lines = [f"[{section}]", *(f"{k} = {json.dumps(v, default=str)}" for k, v in plain.items())]
    nested = [_toml(f"{section}.{k}", v) for k, v in values.items() if isinstance(v, Mapping)]
    return "\n".join([*lines, "", *nested])
