"""Episodes to and from Arrow, schema v1. Whatever is wrong with received bytes is one error: EpisodeError.

A payload is one Arrow IPC stream: the schema message, one record batch, the end mark, nothing behind it. One row is one
segment; what belongs to the episode is repeated on each row, so that a row explains itself in an export.

Rules kept here, each with a test in tests/common/test_schema.py:
1. decode checks in this order: framing, version and exact schema (which leaves no room for dictionary, union, view,
   run-end or extension columns), no compressed body, Arrow's own full validation, no nulls, then the meaning.
   Nothing is read before it is validated: a corrupt offset would crash the process.
2. A log-probability is finite and <= 0, exactly. Nothing is clamped here: an engine whose float noise can reach above 0
   rounds its own numbers to 0 before it reports them, because only it knows how large its noise is.
3. Position 0 is never sampled: no policy can have scored a token without context.
4. Where nothing was sampled the log-prob is 0 and the version UNSAMPLED_VERSION.

EpisodeError.reason is one of: framing, version, schema, compressed, arrow, nulls, segments, ids, tree, lengths, mask,
vocabulary, logprobs, versions, reward, termination, counts, json, text.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from matpo.episode import UNSAMPLED_VERSION, Episode, Message, Segment, Task, Termination
from matpo.errors import EpisodeError

SCHEMA_VERSION = 1
MAX_SEGMENTS = 4096
TERMINATIONS = frozenset(get_args(Termination))

_TOKEN_COLUMNS = {"token_ids": pa.int32(), "sampled": pa.bool_(), "logprobs": pa.float32(), "versions": pa.int32()}
_SEGMENT_COLUMNS = {
    "segment": pa.int32(),
    "parent": pa.int32(),
    "role": pa.string(),
    "trainable": pa.bool_(),
    "termination": pa.string(),
    "error": pa.string(),
    "num_turns": pa.int32(),
    "num_calls": pa.int32(),
    "num_malformed_calls": pa.int32(),
    "messages": pa.string(),  # JSON: [[role, content, at_s, took_s], ...]
}
_EPISODE_COLUMNS = {
    "episode": pa.string(),
    "group": pa.string(),
    "member": pa.int32(),
    "attempt": pa.int32(),
    "task": pa.string(),
    "environment": pa.string(),
    "question": pa.string(),
    "task_data": pa.string(),  # JSON object
    "answer": pa.string(),
    "reward": pa.float64(),
    "reward_components": pa.string(),  # JSON object of numbers
    "actor": pa.string(),
    "wall_s": pa.float64(),
}
SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind in (_EPISODE_COLUMNS | _SEGMENT_COLUMNS).items()]
    + [
        pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=False)
        for name, kind in _TOKEN_COLUMNS.items()
    ],
    metadata={"matpo.schema_version": str(SCHEMA_VERSION)},
)

_END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_FRAME = struct.Struct("<II")  # length and CRC32C in front of each payload of an episode file
_Checked = TypeVar("_Checked")


def encode(episode: Episode) -> bytes:
    """The episode as one Arrow IPC stream. Equal episodes give equal bytes.

    Checks only what Arrow needs (texts that are UTF-8, columns of the right kind); decode checks the meaning.

    Raises EpisodeError (text, arrow).
    """
    segments = episode.segments
    rows: dict[str, Any] = {name: [value] * len(segments) for name, value in _episode_values(episode).items()}
    values = [_segment_values(segment) for segment in segments]
    rows |= {name: [row[name] for row in values] for name in _SEGMENT_COLUMNS}
    try:
        arrays = [pa.array(rows[name], SCHEMA.field(name).type) for name in rows]
        arrays += [_token_column([getattr(s, name) for s in segments], kind) for name, kind in _TOKEN_COLUMNS.items()]
        batch = pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
    except UnicodeEncodeError as error:
        raise EpisodeError(f"episode {episode.id}: a text is not valid Unicode: {error}", reason="text") from None
    except (pa.ArrowException, OverflowError) as error:
        raise EpisodeError(
            f"episode {episode.id} does not fit schema v{SCHEMA_VERSION}: {error}", reason="arrow"
        ) from None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())


def decode(payload: bytes | memoryview, *, vocab_size: int | None, published_version: int | None) -> Episode:
    """The episode inside a payload, with every rule checked.

    Token ids must be below `vocab_size` and versions at most `published_version`; None leaves that check out.

    Raises EpisodeError with a stable `reason` (see the module) for anything else than a sound episode.
    """
    batch = _read_batch(bytes(payload))
    columns = {name: batch.column(name) for name in SCHEMA.names}
    rows = {name: columns[name].to_pylist() for name in _EPISODE_COLUMNS | _SEGMENT_COLUMNS}
    for name in _EPISODE_COLUMNS:
        if any(value != rows[name][0] for value in rows[name]):  # NaN lands here too; it is refused either way
            raise EpisodeError(f"{name} differs between the rows of one episode", reason="ids")
    tokens = {name: _split(columns[name]) for name in _TOKEN_COLUMNS}
    episode = _build(rows, tokens)
    check(episode, vocab_size=vocab_size, published_version=published_version)
    return episode


def check(episode: Episode, *, vocab_size: int | None, published_version: int | None) -> None:
    """Check the meaning of an episode. Raises EpisodeError."""
    if episode.id != f"{episode.group}.{episode.member}.{episode.attempt}" or episode.member < 0 or episode.attempt < 0:
        raise EpisodeError(
            f'episode id "{episode.id}" is not group.member.attempt of group "{episode.group}", '
            f"member {episode.member}, attempt {episode.attempt}",
            reason="ids",
        )
    numbers = [episode.reward, episode.wall_s, *episode.reward_components.values()]
    if not all(math.isfinite(number) for number in numbers):
        raise EpisodeError(f"episode {episode.id}: reward, its components or wall_s is not finite", reason="reward")
    for index, segment in enumerate(episode.segments):
        where = f"episode {episode.id}, segment {index}"
        _check_place(where, segment, index)
        _check_tokens(where, segment, vocab_size, published_version)


def write_episodes(path: Path, episodes: Iterable[Episode]) -> int:
    """Write episodes to one file (length and CRC32C in front of each payload). Returns how many."""
    count = 0
    with path.open("wb") as file:
        for episode in episodes:
            payload = encode(episode)
            file.write(_FRAME.pack(len(payload), google_crc32c.value(payload)) + payload)
            count += 1
    return count


def read_episodes(path: Path, *, vocab_size: int | None = None) -> Iterator[Episode]:
    """Read what write_episodes wrote, one at a time. Raises EpisodeError (framing, or decode's reasons)."""
    with path.open("rb") as file:
        while head := file.read(_FRAME.size):
            at = file.tell() - len(head)
            if len(head) < _FRAME.size:
                raise EpisodeError(f"{path}: cut off at byte {at}. Write the file again.", reason="framing")
            length, crc = _FRAME.unpack(head)
            payload = file.read(length)
            if len(payload) != length or google_crc32c.value(payload) != crc:
                raise EpisodeError(f"{path}: the episode at byte {at} is cut off or damaged.", reason="framing")
            yield decode(payload, vocab_size=vocab_size, published_version=None)


# ---- to Arrow


def _episode_values(episode: Episode) -> dict[str, Any]:
    task = episode.task
    return {
        "episode": episode.id,
        "group": episode.group,
        "member": episode.member,
        "attempt": episode.attempt,
        "task": task.id,
        "environment": task.environment,
        "question": task.question,
        "task_data": _dump(task.data),
        "answer": episode.answer,
        "reward": episode.reward,
        "reward_components": _dump(episode.reward_components),
        "actor": episode.actor,
        "wall_s": episode.wall_s,
    }


def _segment_values(segment: Segment) -> dict[str, Any]:
    messages = [list(asdict(message).values()) for message in segment.messages]
    values = {name: getattr(segment, name) for name in _SEGMENT_COLUMNS if name not in ("segment", "messages")}
    return {**values, "segment": segment.index, "messages": _dump(messages)}


def _dump(value: Any) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False, separators=(",", ":"))


def _token_column(columns: Sequence[NDArray[Any]], kind: Any) -> Any:
    dtype = kind.to_pandas_dtype()
    columns = [np.asarray(column, dtype) for column in columns]
    offsets = np.cumsum([0, *(len(column) for column in columns)], dtype=np.int32)
    flat = np.concatenate(columns) if columns else np.empty(0, dtype)
    item = pa.field("item", kind, nullable=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind), type=pa.list_(item))


# ---- from Arrow


def _read_batch(payload: bytes) -> Any:
    """The one validated record batch of a payload, with one row or more and no nulls."""
    try:
        if not payload.endswith(_END_MARK):
            raise EpisodeError("the payload has no end mark", reason="framing")
        source = pa.BufferReader(payload)
        messages = list(pa.ipc.MessageReader.open_stream(source))
        # A damaged size field would otherwise become an allocation of gigabytes, or a second batch nobody looks at.
        if [message.type for message in messages] != ["schema", "record batch"] or source.tell() != len(payload):
            raise EpisodeError("the payload is not one schema and one record batch", reason="framing")
        _check_schema(messages[0])
        if _is_compressed(bytes(messages[1].metadata)):
            raise EpisodeError("the record batch has a compressed body", reason="compressed")
        batch = pa.ipc.read_record_batch(messages[1], SCHEMA)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, struct.error, MemoryError, OverflowError, ValueError, TypeError) as error:
        raise EpisodeError(f"not a sound Arrow stream: {error}", reason="arrow") from None
    if not 1 <= batch.num_rows <= MAX_SEGMENTS:
        raise EpisodeError(f"{batch.num_rows} segments, want 1 to {MAX_SEGMENTS}", reason="segments")
    for column in batch.columns:
        if column.null_count or (pa.types.is_list(column.type) and column.values.null_count):
            raise EpisodeError("a column has nulls", reason="nulls")
    return batch


def _check_schema(message: Any) -> None:
    schema = pa.ipc.read_schema(message)
    if schema.equals(SCHEMA, check_metadata=True):
        return
    version = (schema.metadata or {}).get(b"matpo.schema_version")
    if version != str(SCHEMA_VERSION).encode():
        raise EpisodeError(
            f"schema version {version!r}, want {SCHEMA_VERSION}. Run the same release everywhere.", reason="version"
        )
    raise EpisodeError(f"columns differ from schema v{SCHEMA_VERSION}", reason="schema")


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch message says that its body is compressed. pyarrow would inflate it without asking.

    Flatbuffers: a table starts with the signed distance back to its vtable of 16-bit field offsets (0: absent).
    Message.header is field 2, RecordBatch.compression field 3 (Arrow's format/Message.fbs). Arrow has verified the
    buffer by now; struct.error covers the rest.
    """

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        at = 4 + 2 * number
        return struct.unpack_from("<H", metadata, vtable + at)[0] if at + 2 <= size else 0

    message = struct.unpack_from("<I", metadata, 0)[0]
    header_at = message + field(message, 2)
    header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
    return field(header, 3) != 0


def _split(column: Any) -> list[NDArray[Any]]:
    """A list column as one array of its own per row: aligned, and not holding on to the payload."""
    offsets = column.offsets.to_numpy()
    flat = column.values.to_numpy(zero_copy_only=False)
    return [flat[a:b].copy() for a, b in pairwise(offsets)]


def _build(rows: Mapping[str, list[Any]], tokens: Mapping[str, list[NDArray[Any]]]) -> Episode:
    first = {name: rows[name][0] for name in _EPISODE_COLUMNS}
    plain = [name for name in _SEGMENT_COLUMNS if name not in ("segment", "messages")]
    segments = tuple(
        Segment(
            index=rows["segment"][i],
            messages=_parse("messages", rows["messages"][i], _messages),
            **{name: rows[name][i] for name in plain},
            token_ids=tokens["token_ids"][i],
            sampled=tokens["sampled"][i],
            logprobs=tokens["logprobs"][i],
            versions=tokens["versions"][i],
        )
        for i in range(len(rows["segment"]))
    )
    return Episode(
        id=first["episode"],
        task=Task(
            id=first["task"],
            environment=first["environment"],
            question=first["question"],
            data=_parse("task_data", first["task_data"], _object),
        ),
        segments=segments,
        reward_components=_parse("reward_components", first["reward_components"], _numbers),
        **{name: first[name] for name in ("group", "member", "attempt", "answer", "reward", "actor", "wall_s")},
    )


def _parse(column: str, text: str, shape: Callable[[Any], _Checked]) -> _Checked:
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogates, no 1e999
        return shape(value)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise EpisodeError(f"{column} is not the JSON we expect: {error}", reason="json") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("want an object")
    return value


def _numbers(value: Any) -> dict[str, float]:
    if any(type(number) not in (int, float) for number in _object(value).values()):
        raise TypeError("want numbers")
    return {name: float(number) for name, number in value.items()}


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise TypeError("want a list of messages")
    for row in value:
        role, content, at_s, took_s = row
        if not (isinstance(role, str) and isinstance(content, str)) or {type(at_s), type(took_s)} - {int, float}:
            raise TypeError("want [role, content, at_s, took_s]")
    return tuple(Message(role=r, content=c, at_s=float(a), took_s=float(t)) for r, c, a, t in value)


# ---- the meaning


def _check_place(where: str, segment: Segment, index: int) -> None:
    if segment.index != index:
        raise EpisodeError(f"{where} says that it is segment {segment.index}", reason="tree")
    # parent < index also rules out cycles, and a second planner.
    if segment.parent != -1 if index == 0 else not 0 <= segment.parent < index:
        raise EpisodeError(
            f"{where}: parent {segment.parent} is not an earlier segment (-1: the planner)", reason="tree"
        )
    if segment.termination not in TERMINATIONS:
        known = ", ".join(sorted(TERMINATIONS))
        raise EpisodeError(f'{where}: termination "{segment.termination}" is none of {known}', reason="termination")
    if not (0 <= segment.num_malformed_calls <= segment.num_calls and segment.num_turns >= 0):
        raise EpisodeError(f"{where}: counts of turns or calls are impossible", reason="counts")
    if not segment.role:
        raise EpisodeError(f"{where} has no role", reason="ids")


def _check_tokens(where: str, segment: Segment, vocab_size: int | None, published_version: int | None) -> None:
    ids, sampled, logprobs, versions = segment.token_ids, segment.sampled, segment.logprobs, segment.versions
    lengths = {len(ids), len(sampled), len(logprobs), len(versions)}
    if len(lengths) != 1 or lengths == {0}:
        raise EpisodeError(
            f"{where}: token columns of lengths {sorted(lengths)}, want one length above 0", reason="lengths"
        )
    if sampled[0]:
        raise EpisodeError(f"{where}: the first token is marked as sampled, but has no context", reason="mask")
    if ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size):
        raise EpisodeError(
            f"{where}: token ids {ids.min()}..{ids.max()}, the vocabulary has {vocab_size}. Is it the same model?",
            reason="vocabulary",
        )
    if not np.isfinite(logprobs).all() or (logprobs > 0).any() or (logprobs[~sampled] != 0).any():
        raise EpisodeError(
            f"{where}: log-probs must be finite, <= 0, and 0 where nothing was sampled", reason="logprobs"
        )
    if (versions[~sampled] != UNSAMPLED_VERSION).any():
        raise EpisodeError(f"{where}: a version stands at a token that was not sampled", reason="versions")
    of_sampled = versions[sampled]
    if len(of_sampled) and (
        of_sampled.min() < 0 or (published_version is not None and of_sampled.max() > published_version)
    ):
        raise EpisodeError(
            f"{where}: versions {of_sampled.min()}..{of_sampled.max()}, published are 0..{published_version}",
            reason="versions",
        )
