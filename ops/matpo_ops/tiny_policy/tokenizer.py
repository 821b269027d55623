"""The tiny policy's tokenizer: byte-level BPE of 1,024 entries, with a compact chat template.

Rules:
1. A capitalised word is always cut off from what surrounds it, spaces included, so that a name has the same tokens in
   a question, a call, a passage and an answer. A tiny model can then copy names that it never saw.
2. The fixed text between names ("country of ", the JSON around a call) is cut where it varies, and merges to one token.
3. Any text has tokens (byte fallback); text unlike atlas merely has more of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|im_end|>")
CALL_TOKENS = ("<tool_call>", "</tool_call>")
_PIECES = r"""\{"name": "\w+", "arguments": \{"\w+": "|"\}\}|\p{Lu}[\p{L}\p{M}]*|\p{N}+|\n|[^\p{Lu}\p{N}\n"]+|."""

# One token opens a message, one ends it. Tools are listed by name: schemas would be longer than the whole episode.
CHAT_TEMPLATE = """\
{%- macro names() -%}
{%- for t in tools %}{{ (t.function if t.function is defined else t).name }}{{ ', ' if not loop.last }}{%- endfor %}
{%- endmacro -%}
{%- if tools and (not messages or messages[0].role != 'system') %}
{{- '<|system|>Tools: ' + names() + '<|im_end|>' }}
{%- endif -%}
{%- for m in messages %}
{{- '<|' + m.role + '|>' + (m.content or '') }}
{%- if m.role == 'system' and loop.first and tools %}{{- ' Tools: ' + names() }}{% endif %}
{%- for c in m.tool_calls or [] %}
{%- set f = c.function if c.function is defined else c %}
{{- '<tool_call>{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}{{- '}</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif -%}
"""


def build(texts: Iterable[str]) -> Any:
    """Train the merges on `texts` (prompts, questions, calls, passages, answers) and attach the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(CALL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in CALL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:-1]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
