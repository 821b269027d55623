"""Hostile bytes against wire.decode and schema.decode: one error type each, in bounded time and memory, never a crash.

The valid messages and episodes are small, so that every one-bit flip and every truncation can be tried.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matpo import schema, wire
from matpo.episode import Episode, Segment, Task
from matpo.errors import EpisodeError, ProtocolError

KINDS = sorted(message.model_fields["kind"].default for message in get_args(wire.AnyMessage))
FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# ---- headers


def packed(**fields: object) -> bytes:
    header: bytes = msgpack.packb({"v": wire.WIRE_VERSION, "seq": 0, **fields})
    return header


def decoded(header: bytes) -> wire.AnyMessage | None:
    """The message, or None when it is refused; anything else than ProtocolError ends the test."""
    assert 0 <= wire.peek_seq([header, b""]) < 2**53
    try:
        return wire.decode([header, b""])[0]
    except ProtocolError as error:
        refused = error
    assert refused.reason in {"header", "header_size", "version", "fields"}
    assert len(str(refused)) < 1000
    return None


def a_store(payload: bytes) -> wire.StoreEpisode:
    return wire.StoreEpisode(
        seq=5, lease="0a1b2c3d-17", group="g-00000007", member=2, attempt=1, episode="g-00000007.2.1",
        num_bytes=len(payload), crc32c=wire.crc32c(payload), num_tokens=9, min_version=3, environment="atlas",
    )  # fmt: skip


@given(st.lists(st.binary(max_size=400), max_size=4))
@settings(FUZZ, max_examples=300)
def test_any_bytes_as_frames_give_a_message_or_a_protocol_error(frames: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        wire.decode(frames)
    assert wire.peek_seq(frames) >= 0


@given(st.lists(st.binary(max_size=40), max_size=3), st.lists(st.integers(-1, 2), max_size=3), st.binary(max_size=4))
@settings(FUZZ, max_examples=300)
def test_any_bundle_gives_its_messages_or_a_protocol_error(headers: list[bytes], sizes: list[int], data: bytes) -> None:
    frames = [msgpack.packb([wire.WIRE_VERSION, headers, sizes]), data]
    if not headers or len(headers) != len(sizes) or min(sizes) < 0 or sum(sizes) != len(data):
        with pytest.raises(ProtocolError, match="a bundle of messages"):
            wire.unbundle(frames)
        return
    found = wire.unbundle(frames)
    assert [header for header, _ in found] == headers
    assert [len(payload) for _, payload in found] == sizes
    assert b"".join(bytes(payload) for _, payload in found) == data


@given(st.binary(max_size=200), st.binary(max_size=20))
@settings(FUZZ, max_examples=300)
def test_any_bytes_that_begin_like_a_bundle_are_a_protocol_error(garbage: bytes, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.unbundle([b"\x93" + garbage, payload])


def test_every_truncation_of_the_header_of_a_bundle_is_refused() -> None:
    header, payload = wire.bundle([wire.encode(a_store(b"x"), b"x")] * 2)
    for length in range(1, len(header)):
        with pytest.raises(ProtocolError):
            wire.unbundle([bytes(header[:length]), payload])


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
    | st.binary(max_size=20) | st.just(msgpack.ExtType(5, b"")) | st.just(msgpack.Timestamp(1, 2))
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(0, 99), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = sorted({name for message in get_args(wire.AnyMessage) for name in message.model_fields} - {"kind"})


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=8))
@settings(FUZZ, max_examples=600)
def test_any_fields_of_any_kind_give_a_message_or_a_protocol_error(kind: str, fields: dict[str, Any]) -> None:
    header: bytes = msgpack.packb({"v": wire.WIRE_VERSION, **fields, "kind": kind})
    message = decoded(header)
    if message is not None:  # what was accepted can be sent on
        assert decoded(bytes(wire.encode(message)[0])) is not None


@given(st.data())
@settings(FUZZ, max_examples=600)
def test_a_header_with_overwritten_bytes_gives_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    task = wire.OrderedTask(id="t", environment="e", question="q", data={"answers": ["Sol", {"n": 1}]})
    message = data.draw(
        st.sampled_from(
            [
                a_store(b"x"),
                wire.PlaceOrders(epoch=1, orders=[wire.Order(group="g-0", index=0, group_size=8, task=task)]),
                wire.Commit(epoch=1, checkpoint="c", consumed_below=3, consumed=[5, 7], oldest_kept_below=1),
                wire.Rows(columns=["group"], rows=[["g-0"], [None]]),
            ]
        )
    )
    header = bytearray(wire.encode(message)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=4))
        header[at : at + len(patch)] = patch
    decoded(bytes(header))


def test_every_truncation_of_a_header_is_refused() -> None:
    header = bytes(wire.encode(a_store(b"payload"))[0])
    assert [decoded(header[:length]) for length in range(len(header))] == [None] * len(header)


def test_every_flipped_bit_of_a_header_is_refused_or_stands_in_the_message_that_comes_out() -> None:
    # The header has no hash of its own: TCP's and CURVE's are below it. What must not happen is that a flip is
    # accepted and unseen: then decode would read less than what was sent.
    header = bytes(wire.encode(a_store(b"payload"))[0])
    outcome: Counter[str] = Counter()
    for bit in range(len(header) * 8):
        flipped = bytearray(header)
        flipped[bit // 8] ^= 1 << bit % 8
        message = decoded(bytes(flipped))
        outcome["refused" if message is None else "differs" if message != a_store(b"payload") else "unseen"] += 1
    assert outcome["unseen"] == 0
    assert outcome["refused"] > outcome["differs"]


def test_every_flipped_bit_and_every_truncation_of_a_payload_is_refused_by_its_hash() -> None:
    payload = bytes(range(256)) * 2
    message = a_store(payload)
    wire.check_payload(message, payload)
    for bit in range(len(payload) * 8):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError) as error:
            wire.check_payload(message, bytes(flipped))
        assert error.value.reason == "payload_hash"
    for length in range(len(payload)):
        with pytest.raises(ProtocolError) as error:
            wire.check_payload(message, payload[:length])
        assert error.value.reason == "payload_size"


FULL = wire.MAX_LIST - 1


def order(data: bytes) -> bytes:
    """An orders message whose task has these packed bytes for data."""
    task = b"\x84\xa2id\xa1t\xabenvironment\xa1e\xa8question\xa1q\xa4data" + data
    orders = [{"group": "g", "index": 0, "group_size": 1, "task": "T"}]
    return packed(kind="orders", epoch=1, orders=orders).replace(b"\xa1T", task)


def bombs() -> dict[str, bytes]:
    """Headers of at most 1 MiB that ask for much more than they are."""
    empty_maps = b"\xdc\xff\xff" + b"\x80" * 65535
    return {
        "nested arrays that claim 65535 items each": b"\xdc\xff\xff" * 1000,
        "the same with room for it": (b"\xdc\xff\xff" * 1000).ljust(wire.MAX_HEADER_BYTES, b"\x00"),
        "nested maps that claim 65535 keys each": b"\xde\xff\xff\xa1a" * 1000,
        "an array that claims 2^32-1 items": b"\xdd\xff\xff\xff\xff",
        "a text that claims 2^32-1 bytes": b"\x81\xa4kind\xdb\xff\xff\xff\xffstat",
        "bytes that claim 2^32-1": b"\x81\xa4kind\xc6\xff\xff\xff\xff",
        "a million empty maps": b"\x9f" + empty_maps * 15,
        "a million bad cells": packed(kind="rows", columns=["a"], rows=[[{}] * FULL] * 15),
        "bad leases": packed(kind="heartbeat", leases=[1] * FULL, policy_version=0),
        "bad episodes": packed(kind="group", group="g", index=0, episodes=[{}] * FULL),
        "bad orders": packed(kind="orders", epoch=1, orders=[{}] * FULL),
        "bad counts": packed(kind="stats", counts={f"{i}": None for i in range(FULL)}),
        "unknown fields": packed(kind="stat", **{f"k{i}": 1 for i in range(FULL - 3)}),
        "a kind of a million letters": packed(kind="x" * 1_000_000),
        "a field of a million letters": packed(kind="stat", **{"x" * 1_000_000: 1}),
        "a kind that is a tower": b"\x83\xa1v\x03\xa3seq\x00\xa4kind" + b"\x91" * 990 + b"\x00",
        "a tower that is too high": b"\x91" * 100_000,
        "a task that is a tower": order(b"\x81\xa1a" * 900 + b"\x00"),
        "a task with an empty extension": order(b"\x81\xa1a\xc7\x00\x05"),
        "a task with a key twice": order(b"\x82\xa1a\x00\xa1a\x00"),
        "a time stamp": packed(kind="stat", seq=msgpack.Timestamp(1)),
        "bad UTF-8": b"\x82\xa1v\x03\xa4kind\xa4\xff\xfe\xfd\xfc",
        "a key twice": b"\x83\xa1v\x03\xa4kind\xa4stat\xa4kind\xa4stat",
        "bytes behind it": packed(kind="stat") + b"\xc0",
        "a number for a key": b"\x82\xa1v\x03\x01\x02",
        "version 3.0": msgpack.packb({"v": 3.0, "kind": "stat"}),
        "too large": packed(kind="stat").ljust(wire.MAX_HEADER_BYTES + 1, b"\x00"),
    }  # fmt: skip


ACCEPTED = {"a task that is a tower"}  # deep, but small and nothing that we would not pass on


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_by_name_within_a_second(name: str) -> None:
    header = bombs()[name]
    started_s = time.perf_counter()
    message = decoded(header)
    assert time.perf_counter() - started_s < 1.0
    assert (message is not None) == (name in ACCEPTED)
    if message is not None:
        assert decoded(bytes(wire.encode(message)[0])) == message


MEMORY_OF_BOMBS = """
import json, resource, sys
from matpo import wire
from matpo.errors import ProtocolError
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
bombs = [bytes.fromhex(line) for line in sys.stdin]
address_space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (address_space + 200 * 2**20,) * 2)  # what is only claimed counts too
before = peak_mib()
for header in bombs * 3:
    try:
        wire.decode([header, b""])
    except ProtocolError:
        pass
print(json.dumps(peak_mib() - before))
"""


@pytest.mark.processes
def test_no_bomb_takes_more_than_128_mib() -> None:
    lines = "\n".join(header.hex() for header in bombs().values())
    found = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_BOMBS], input=lines, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(found.stdout) < 128


# ---- episodes


def an_episode(**changes: Any) -> Episode:
    sampled = np.array([False, False, True])
    segment = Segment(
        index=0, parent=-1, role="planner", token_ids=np.array([4, 5, 6], np.int32), sampled=sampled,
        logprobs=np.where(sampled, -0.5, 0).astype(np.float32), versions=np.where(sampled, 3, -1).astype(np.int32),
    )  # fmt: skip
    task = Task(id="t", environment="e", question="q")
    return Episode(
        **{
            "id": "g-7.2.1", "group": "g-7", "member": 2, "attempt": 1, "task": task, "segments": (segment,),
            "answer": "Sol", "reward": 0.5, "reward_components": {"acc": 0.5}, **changes,
        }
    )  # fmt: skip


PAYLOAD = schema.encode(an_episode())


def outcome(payload: bytes) -> str:
    """The reason that the payload is refused for, or "sound". Any other exception ends the test."""
    try:
        episode = schema.decode(payload, vocab_size=100, published_version=3)
    except EpisodeError as error:
        return error.reason
    schema.check(episode, vocab_size=100, published_version=3)
    schema.decode(schema.encode(episode), vocab_size=100, published_version=3)  # what came out is an episode
    return "sound"


def stream(batch: Any, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def messages(payload: bytes) -> tuple[bytes, bytes]:
    """The schema message and the record batch message of a payload, without the end mark."""
    length = int.from_bytes(PAYLOAD[4:8], "little") + 8
    return payload[:length], payload[length:-8]


END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def test_any_flipped_bit_of_an_episode_is_an_episode_error_or_leaves_a_sound_episode() -> None:
    found: Counter[str] = Counter()
    started_s = time.perf_counter()
    for bit in range(len(PAYLOAD) * 8):
        flipped = bytearray(PAYLOAD)
        flipped[bit // 8] ^= 1 << bit % 8
        found[outcome(bytes(flipped))] += 1
    assert found["sound"] < found.total() / 2  # padding, letters of a text, ...
    assert time.perf_counter() - started_s < 60


def test_any_truncation_of_an_episode_is_an_episode_error() -> None:
    assert "sound" not in {outcome(PAYLOAD[:length]) for length in range(len(PAYLOAD))}


EXTREMES = (-1, 0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))


def test_any_length_or_offset_that_claims_too_much_is_an_episode_error() -> None:
    # Row counts, null counts, buffer offsets and lengths are 64-bit words of the metadata, list and text offsets
    # 32-bit words of the body: each word of both, replaced by each extreme.
    started_s = time.perf_counter()
    for size in (8, 4):
        for at in range(0, len(PAYLOAD) - 8, size):
            for value in EXTREMES:
                changed = bytearray(PAYLOAD)
                changed[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
                outcome(bytes(changed))
    assert time.perf_counter() - started_s < 60


@given(st.data())
@settings(FUZZ, max_examples=400)
def test_an_episode_with_bytes_moved_about_is_an_episode_error_or_sound(data: st.DataObject) -> None:
    changed = bytearray(PAYLOAD)
    for _ in range(data.draw(st.integers(1, 4))):
        at, to = (data.draw(st.integers(0, len(PAYLOAD) // 4 - 1)) * 4 for _ in range(2))
        length = data.draw(st.sampled_from([4, 8, 16, 64, 256]))
        changed[to : to + length] = PAYLOAD[at : at + length]
    outcome(bytes(changed))


@given(st.binary(max_size=300), st.sampled_from(["alone", "schema before", "end after", "both"]))
@settings(FUZZ, max_examples=300)
def test_any_bytes_are_an_episode_error(garbage: bytes, place: str) -> None:
    head, _ = messages(PAYLOAD)
    before = head if place in ("schema before", "both") else b""
    after = END if place in ("end after", "both") else b""
    assert outcome(before + garbage + after) != "sound"


ROWS = 2**31 - 1
COLUMNS: dict[str, Callable[[], Any]] = {
    "nulls": lambda: pa.nulls(ROWS),
    "run-end encoded": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([ROWS], pa.int32()), pa.array(["x"])),
    "lists of no items": lambda: pa.FixedSizeListArray.from_buffers(
        pa.list_(pa.int32(), 0), ROWS, [None], children=[pa.array([], pa.int32())]
    ),
    "no columns": lambda: None,
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_claims_two_billion_rows_in_a_few_bytes_is_refused(name: str) -> None:
    column = COLUMNS[name]()
    plain = pa.schema([] if column is None else [pa.field("episode", column.type)], schema.SCHEMA.metadata)
    batch = pa.RecordBatch.from_arrays([] if column is None else [column], schema=plain)
    payload = stream(batch)
    assert len(payload) < 1000
    started_s = time.perf_counter()
    assert outcome(payload) == "schema"
    # the same batch behind our schema
    assert outcome(messages(PAYLOAD)[0] + payload[int.from_bytes(payload[4:8], "little") + 8 :]) in {"arrow", "framing"}
    assert time.perf_counter() - started_s < 1


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_body_is_refused_before_it_expands(codec: str) -> None:
    batch = pa.ipc.open_stream(PAYLOAD).read_next_batch()
    number = schema.SCHEMA.get_field_index("answer")
    large = batch.set_column(number, schema.SCHEMA.field(number), pa.array(["\0" * 2**26]))
    payload = stream(large, compression=codec)
    assert len(payload) < 2**20
    before = pa.total_allocated_bytes()
    del large
    assert outcome(payload) == "compressed"
    assert pa.total_allocated_bytes() <= before


def test_a_second_schema_or_batch_in_the_stream_is_refused() -> None:
    head, batch = messages(PAYLOAD)
    assert outcome(head + batch + END) == "sound"
    for parts in (
        [head, head, batch], [head, batch, head], [head, batch, batch], [batch], [batch, head], [head], [],
        [head, batch, END, head, batch],
    ):  # fmt: skip
        assert outcome(b"".join([*parts, END])) in {"framing", "arrow"}


def test_a_dictionary_or_a_file_in_place_of_a_stream_is_refused() -> None:
    batch = pa.ipc.open_stream(PAYLOAD).read_next_batch()
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert outcome(sink.getvalue()) in {"framing", "arrow"}
    coded = batch.set_column(0, batch.schema.names[0], batch.column(0).dictionary_encode())
    assert outcome(stream(coded)) in {"framing", "schema"}


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "9" * 5000, "[1e999]", '{"a": 1e999}', '{"a": -Infinity}', '{"a": 1, "a": "x"}', '{"a":[]}']
)
@pytest.mark.parametrize("column", ["task_data", "reward_components", "messages"])
def test_json_bombs_are_refused_or_harmless(column: str, text: str) -> None:
    batch = pa.ipc.open_stream(PAYLOAD).read_next_batch()
    number = schema.SCHEMA.get_field_index(column)
    payload = stream(batch.set_column(number, schema.SCHEMA.field(number), pa.array([text])))
    assert outcome(payload) in ({"json", "sound"} if column == "task_data" else {"json", "reward"})
