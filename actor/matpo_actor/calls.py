"""Find the calls in what a model wrote. Whatever it wrote, the result is data: a bad call is an error to show it.

Rules kept here; each has a test in tests/actor/test_calls.py:
1. JSON is read by a JSON parser, so quotes, tags and braces inside a string end nothing.
2. A call inside a thinking block is no call.
3. What is left as `text` holds neither thinking nor call blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Syntax = Literal["json", "xml"]
MAX_CALLS = 32  # of one message; more are one error


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A well-formed call. Whether the name exists and the arguments fit is for the rollout to say."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CallError:
    """A call that did not parse, and what the model is told about it."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedTurn:
    """One message of the model: the text a person reads, and the calls in the order in which they stand."""

    text: str
    attempts: tuple[Call | CallError, ...] = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls that parsed."""
        return tuple(a for a in self.attempts if isinstance(a, Call))

    @property
    def errors(self) -> tuple[CallError, ...]:
        """The calls that did not."""
        return tuple(a for a in self.attempts if isinstance(a, CallError))


class _BadCallError(ValueError):
    """Internal: why one block is no call."""


def parse(text: str, syntax: Syntax) -> ParsedTurn:
    """Split a message into text and calls. Never raises."""
    text = without_thinking(text)
    opening, closing, read = _BLOCKS[syntax]
    kept: list[str] = []
    attempts: list[Call | CallError] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        kept.append(text[position:start])
        body = start + len(opening)
        try:
            call, end = read(text, body)
            position = _expect(text, end, closing)
            attempts.append(call)
        except _BadCallError as error:
            attempts.append(CallError(message=f"this call could not be read: {error}"))
            position = _after_broken(text, body, opening, closing)
        if len(attempts) > MAX_CALLS:
            attempts[MAX_CALLS:] = [
                CallError(message=f"more than {MAX_CALLS} calls in one message; the rest was ignored")
            ]
            position = len(text)
    kept.append(text[position:])
    return ParsedTurn(text="".join(kept).strip(), attempts=tuple(attempts))


def without_thinking(text: str) -> str:
    """Drop <think> blocks: closed ones, one that never closes, and one that the prompt had opened already."""
    first_open, first_close = text.find("<think>"), text.find("</think>")
    if first_close >= 0 and (first_open < 0 or first_close < first_open):
        text = text[first_close + len("</think>") :]
    kept = []
    while (start := text.find("<think>")) >= 0:
        kept.append(text[:start])
        end = text.find("</think>", start)
        text = text[end + len("</think>") :] if end >= 0 else ""
    return "".join([*kept, text])


def _read_json_call(text: str, position: int) -> tuple[Call, int]:
    value, end = _json_at(text, position)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _BadCallError('want {"name": "...", "arguments": {...}}')
    return Call(name=value["name"], arguments=_arguments(value.get("arguments", {}))), end


def _read_xml_call(text: str, position: int) -> tuple[Call, int]:
    # The arguments are JSON and may hold a bare < or &, which no XML parser accepts: tags are read here, JSON by json.
    position = _skip_space(text, position)
    if text.startswith("<server_name>", position):
        _, position = _element(text, position, "server_name")
    name, position = _element(text, position, "tool_name")
    value, end = _json_at(text, _expect(text, position, "<arguments>"))
    return Call(name=name, arguments=_arguments(value)), _expect(text, end, "</arguments>")


def _element(text: str, position: int, tag: str) -> tuple[str, int]:
    start = _expect(text, position, f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    if end < 0:
        raise _BadCallError(f"</{tag}> is missing")
    return text[start:end].strip(), end + len(tag) + 3


def _json_at(text: str, position: int) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, position))
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800" is JSON, but no text: nothing could carry it on
        return value, end
    except json.JSONDecodeError as error:
        raise _BadCallError(f"not valid JSON: {error.msg} at character {error.pos - position}") from None
    except (ValueError, RecursionError) as error:
        raise _BadCallError(f"not valid JSON: {error}") from None


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # OpenAI's habit: the arguments as a string of JSON
        value, _ = _json_at(value, 0)
    if not isinstance(value, dict):
        raise _BadCallError("arguments must be a JSON object")
    return value


def _expect(text: str, position: int, tag: str) -> int:
    position = _skip_space(text, position)
    if not text.startswith(tag, position):
        raise _BadCallError(f"{tag} is missing")
    return position + len(tag)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _after_broken(text: str, body: int, opening: str, closing: str) -> int:
    """Where to read on: behind the block's end if it has one before the next block, else at the next block."""
    next_block = text.find(opening, body)
    limit = next_block if next_block >= 0 else len(text)
    end = text.find(closing, body, limit)
    return end + len(closing) if end >= 0 else limit


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_BLOCKS: dict[Syntax, tuple[str, str, Callable[[str, int], tuple[Call, int]]]] = {
    "json": ("<tool_call>", "</tool_call>", _read_json_call),
    "xml": ("<use_mcp_tool>", "</use_mcp_tool>", _read_xml_call),
}
