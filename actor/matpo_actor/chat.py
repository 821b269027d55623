"""Messages <-> token ids. The only module that knows chat templates.

Rules kept here; each has a test in tests/actor/test_chat.py:
1. Token in, token out: what was sampled is never rendered or tokenised again. Later messages are appended as ids,
   taken from the template's own delta behind a dummy assistant message.
2. A conversation built turn by turn has the ids that the template gives the whole conversation, byte for byte.
3. A turn that was cut by length is closed by ids that are appended, and so never trained.
4. Text from tools, tasks and other roles cannot forge control tokens: their spelling is broken up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matpo.errors import ConfigError, SetupError
from matpo_actor import calls

_SPLIT = "MATPO-SPLIT-7b1f"  # stands for what the assistant said; cut out again
_PROBE = "MATPO-PROBE-3c5e"


class Chat:
    """One tokenizer with its chat template. Not thread-safe: fast tokenizers are not."""

    def __init__(
        self, tokenizer: Any, *, syntax: calls.Syntax = "json", reply_role: Literal["tool", "user"] = "tool"
    ) -> None:
        self._tokenizer = tokenizer
        self._syntax = syntax
        self._reply_role = reply_role
        added = tokenizer.added_tokens_decoder
        self._added = {str(token): int(token_id) for token_id, token in added.items()}
        control = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._lead, self._stop = self._find_end_of_turn()
        control |= {self._stop}
        self._control = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True) if len(t) > 1))
        eos = tokenizer.eos_token_id
        stop_id = self._added[self._stop]
        self.stop_ids: tuple[int, ...] = (stop_id,) if eos in (None, stop_id) else (stop_id, int(eos))
        """Sampling ends at any of these; the first is the template's own end of turn."""
        schema = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
        self._shows_tools = syntax == "json" and _PROBE in self._render([_message("user", "?")], tools=[schema])
        if _PROBE not in self._delta([(_PROBE, _PROBE)], None):
            raise ConfigError(
                f'the chat template of {tokenizer.name_or_path} does not show messages of role "{reply_role}". '
                'Set rollout.reply_role = "user".'
            )

    def opening(self, system: str, user: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the prompt that opens a segment. `tools` are OpenAI-style function schemas."""
        if tools and not self._shows_tools:
            system = f"{system}\n\n{_describe(tools, self._syntax)}"
            tools = ()
        messages = [_message("system", system), _message("user", self._inert(user))]
        return self._encode(self._render(messages, tools=list(tools) or None))

    def continuation(self, replies: Sequence[tuple[str, str]], *, ended: bool, request: str | None = None) -> list[int]:
        """Ids to append behind a sampled turn: replies (name, text), perhaps a user's request, the model's cue.

        `ended`: the turn's last sampled id is a stop token. Otherwise the missing end of the turn is put first.
        """
        delta = self._delta(replies, request)
        if not ended:
            return self._encode(self._lead + self._stop + delta)
        # The stop token is only an anchor: some tokenizers put a space in front of the first word of a text.
        return self._encode(self._stop + delta)[1:]

    def request(self, text: str, *, ended: bool) -> list[int]:
        """Ids of a request by the user, for the final-summary turn."""
        return self.continuation((), ended=ended, request=text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, without the stop token at its end."""
        kept = list(ids)
        while kept and kept[-1] in self.stop_ids:
            kept.pop()
        return self.text_of(kept)

    def text_of(self, ids: Sequence[int]) -> str:
        """Text of any ids, control tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def parse(self, text: str) -> calls.ParsedTurn:
        """Split what the model wrote into text and calls."""
        return calls.parse(text, self._syntax)

    def cut(self, text: str, max_tokens: int) -> str:
        """The text, or its first `max_tokens` tokens and a note that it was cut."""
        ids = self._encode(text[: max_tokens * 64])  # no need to tokenise megabytes to keep a page
        if len(ids) <= max_tokens and len(text) <= max_tokens * 64:
            return text
        kept = self._tokenizer.decode(ids[:max_tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(kept).rstrip("\ufffd") + " [cut]"

    def _delta(self, replies: Sequence[tuple[str, str]], request: str | None) -> str:
        """What the template puts behind the end of an assistant's turn, up to and with the cue for the next one."""
        shown = [(name, self._inert(text)) for name, text in replies]
        messages = []
        if self._reply_role == "tool":
            messages = [{"role": "tool", "name": n, "tool_call_id": "000000000", "content": t} for n, t in shown]
            if request is not None:
                messages.append(_message("user", request))
        else:  # one message: many templates want user and assistant to alternate
            parts = [f"Result of {name}:\n{text}" for name, text in shown]
            messages = [_message("user", "\n\n".join([*parts, request] if request is not None else parts))]
        rendered = self._render([_message("user", "?"), _message("assistant", _SPLIT), *messages])
        return rendered.partition(_SPLIT)[2].removeprefix(self._lead + self._stop)

    def _find_end_of_turn(self) -> tuple[str, str]:
        """(text the template puts before the stop token, the stop token)."""
        messages = [_message("user", "?"), _message("assistant", _SPLIT), _message("user", _PROBE)]
        behind = self._render(messages).partition(_SPLIT)[2].partition(_PROBE)[0]
        found = sorted((behind.find(token), -len(token), token) for token in self._added if token in behind)
        if not found:
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path} ends an assistant's turn without a special "
                "token, so a sampled turn has no end. Use a chat model's tokenizer."
            )
        place, _, token = found[0]
        return behind[:place], token

    def _render(self, messages: list[dict[str, Any]], tools: list[Mapping[str, Any]] | None = None) -> str:
        import jinja2

        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
            )
        except (jinja2.TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
            roles = ", ".join(m["role"] for m in messages)
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path} cannot show messages of roles {roles}: {error}"
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(
            self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        )

    def _inert(self, text: str) -> str:
        return self._control.sub(lambda m: m[0][0] + " " + m[0][1:], text)


def load_chat(model_folder: Path, *, syntax: calls.Syntax, reply_role: Literal["tool", "user"]) -> Chat:
    """The Chat of a model folder. Raises SetupError when its tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot load a tokenizer from {model_folder}: {error}", reason="tokenizer") from error
    return Chat(tokenizer, syntax=syntax, reply_role=reply_role)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _describe(tools: Sequence[Mapping[str, Any]], syntax: calls.Syntax) -> str:
    """Tools as text, for templates that do not show them, and for the XML syntax."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    if syntax == "json":
        form = '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>'
    else:
        form = (
            "<use_mcp_tool>\n<server_name>tools</server_name>\n<tool_name>NAME</tool_name>\n"
            "<arguments>\n{...}\n</arguments>\n</use_mcp_tool>"
        )
    return f"# Tools\n\nYou may call these (JSON schemas):\n{listed}\n\nTo call one, write:\n{form}"
