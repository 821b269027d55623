"""matpo.schema: what is sound comes back equal, and nothing else gets in or crashes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matpo import schema
from matpo.episode import Episode, Message, Segment, Task
from matpo.errors import EpisodeError

GOLDEN = Path(__file__).parents[1] / "golden" / "episode_v1.b64"


def a_segment(index: int = 0, parent: int = -1, *, length: int = 6, **changes: Any) -> Segment:
    sampled = np.arange(length) % 3 == 2
    return Segment(
        **{
            "index": index,
            "parent": parent,
            "role": "worker" if index else "planner",
            "token_ids": np.arange(length, dtype=np.int32) + 10 * index,
            "sampled": sampled,
            "logprobs": np.where(sampled, -0.5, 0).astype(np.float32),
            "versions": np.where(sampled, 3, -1).astype(np.int32),
            "termination": "max_turns",
            "num_turns": 2,
            "num_calls": 3,
            "num_malformed_calls": 1,
            "messages": (Message(role="user", content='a "quoted" \\ud800 é 😀\n', at_s=0.5, took_s=0.25),),
            **changes,
        }
    )


def an_episode(*segments: Segment, **changes: Any) -> Episode:
    return Episode(
        **{
            "id": "g-00000007.2.1",
            "group": "g-00000007",
            "member": 2,
            "attempt": 1,
            "task": Task(id="atlas-1", environment="atlas", question="Which?", data={"answers": ["Sol", None, 1.5]}),
            "segments": segments or (a_segment(), a_segment(1, 0, length=3), a_segment(2, 1)),
            "answer": "Sol",
            "reward": 0.75,
            "reward_components": {"acc": 1.0, "fmt": 0.5},
            "actor": "actor-1",
            "wall_s": 1.25,
            **changes,
        }
    )


def read(payload: bytes, *, vocab_size: int | None = 100, published_version: int | None = 3) -> Episode:
    return schema.decode(payload, vocab_size=vocab_size, published_version=published_version)


def reason_of(episode: Episode) -> str:
    with pytest.raises(EpisodeError) as caught:
        read(schema.encode(episode))
    return caught.value.reason


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
        elif field.name == "segments":
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                assert_equal(x, y)
        else:
            assert a == b, field.name


def rewrite(episode: Episode, change: Callable[[Any], Any], **options: Any) -> bytes:
    """The episode's record batch, changed, as a stream of its own."""
    with pa.ipc.open_stream(schema.encode(episode)) as stream:
        batch = change(stream.read_next_batch())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())


def reason_of_bytes(payload: bytes) -> str:
    with pytest.raises(EpisodeError) as caught:
        read(payload)
    return caught.value.reason


def test_an_episode_comes_back_equal() -> None:
    assert_equal(read(schema.encode(an_episode())), an_episode())


def test_equal_episodes_give_equal_bytes() -> None:
    assert schema.encode(read(schema.encode(an_episode()))) == schema.encode(an_episode())


def test_a_payload_in_the_middle_of_a_larger_buffer_is_read() -> None:
    payload = schema.encode(an_episode())
    assert_equal(read(memoryview(b"x" + payload)[1:]), an_episode())  # type: ignore[arg-type]


def test_golden_bytes_of_schema_v1_are_read_for_ever() -> None:
    assert_equal(read(base64.b64decode(GOLDEN.read_text())), an_episode())


@given(st.data())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_sound_episode_comes_back_equal(data: st.DataObject) -> None:
    segments = []
    for index in range(data.draw(st.integers(1, 4))):
        length = data.draw(st.integers(1, 20))
        sampled = np.array([False, *data.draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))])
        logprob = data.draw(st.floats(-1024, 0, width=32))
        segments.append(
            a_segment(
                index,
                data.draw(st.integers(0, index - 1)) if index else -1,
                token_ids=np.full(length, data.draw(st.integers(0, 2**31 - 1)), np.int32),
                sampled=sampled,
                logprobs=np.where(sampled, logprob, 0).astype(np.float32),
                versions=np.where(sampled, data.draw(st.integers(0, 3)), -1).astype(np.int32),
                error=data.draw(st.text(max_size=20)),
                trainable=data.draw(st.booleans()),
            )
        )
    episode = an_episode(*segments, answer=data.draw(st.text(max_size=20)), reward=data.draw(st.floats(-1e9, 1e9)))
    assert_equal(read(schema.encode(episode), vocab_size=None), episode)


BAD_SEGMENTS = {
    "nan": ("logprobs", a_segment(logprobs=np.array([0, 0, np.nan, 0, 0, -1], np.float32))),
    "infinite": ("logprobs", a_segment(logprobs=np.array([0, 0, -np.inf, 0, 0, -1], np.float32))),
    "just above 0": ("logprobs", a_segment(logprobs=np.array([0, 0, 1e-7, 0, 0, -1], np.float32))),
    "log-prob of a prompt token": ("logprobs", a_segment(logprobs=np.array([0, -1, -1, 0, 0, -1], np.float32))),
    "negative id": ("vocabulary", a_segment(token_ids=np.array([1, 2, -1, 4, 5, 6], np.int32))),
    "id beyond the vocabulary": ("vocabulary", a_segment(token_ids=np.array([1, 2, 100, 4, 5, 6], np.int32))),
    "version not published": ("versions", a_segment(versions=np.array([-1, -1, 4, -1, -1, 3], np.int32))),
    "sampled without version": ("versions", a_segment(versions=np.array([-1, -1, -1, -1, -1, 3], np.int32))),
    "version of a prompt token": ("versions", a_segment(versions=np.array([0, -1, 3, -1, -1, 3], np.int32))),
    "first token sampled": ("mask", a_segment(sampled=np.array([1, 0, 1, 0, 0, 1], bool))),
    "columns of unequal lengths": ("lengths", a_segment(token_ids=np.arange(5, dtype=np.int32))),
    "no tokens": ("lengths", a_segment(length=0)),
    "a planner with a parent": ("tree", a_segment(0, 0)),
    "not at its index": ("tree", a_segment(1, -1)),
    "unknown termination": ("termination", a_segment(termination="bored")),
    "more malformed than calls": ("counts", a_segment(num_malformed_calls=4)),
    "no role": ("ids", a_segment(role="")),
}


@pytest.mark.parametrize("name", BAD_SEGMENTS)
def test_a_segment_that_breaks_a_rule_is_refused_by_name(name: str) -> None:
    reason, segment = BAD_SEGMENTS[name]
    assert reason_of(an_episode(segment)) == reason


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 1), (-1, 0), (0, 3)])
def test_a_tree_with_a_cycle_or_two_roots_is_refused(first: int, second: int) -> None:
    assert reason_of(an_episode(a_segment(), a_segment(1, first), a_segment(2, second))) == "tree"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["reward", "wall_s"])
def test_numbers_that_are_not_finite_are_refused(field: str, value: float) -> None:
    # NaN differs from itself, so with several rows it is refused as an inconsistency; with one row by its value.
    assert reason_of(an_episode(a_segment(), **{field: value})) in {"reward", "ids"}


def test_a_component_that_is_not_finite_is_refused() -> None:
    assert reason_of(an_episode(reward_components={"acc": float("nan")})) == "json"


@pytest.mark.parametrize("change", [{"id": "g-00000007.2.0"}, {"member": -1, "id": "g-00000007.-1.1"}])
def test_an_id_that_does_not_say_group_member_attempt_is_refused(change: dict[str, Any]) -> None:
    assert reason_of(an_episode(**change)) == "ids"


def test_rows_of_two_episodes_are_refused() -> None:
    one, two = schema.encode(an_episode(a_segment())), schema.encode(an_episode(a_segment(), answer="other"))
    batches = [pa.ipc.open_stream(payload).read_next_batch() for payload in (one, two)]
    payload = rewrite(an_episode(), lambda _: pa.concat_batches(batches))
    assert reason_of_bytes(payload) == "ids"


def test_a_text_that_is_not_unicode_is_not_encoded() -> None:
    with pytest.raises(EpisodeError, match="not valid Unicode") as caught:
        schema.encode(an_episode(answer="\ud800"))
    assert caught.value.reason == "text"


@pytest.mark.parametrize("column", ["task_data", "reward_components", "messages"])
@pytest.mark.parametrize("text", ["", "nope", "3", '["a"]', '[["a", 1, 0, 0]]', "[" * 100_000, '{"a": "\\ud800"}'])
def test_json_of_another_shape_is_refused(column: str, text: str) -> None:
    if (column, text) == ("task_data", ""):
        text = "null"
    number = schema.SCHEMA.get_field_index(column)

    def change(batch: Any) -> Any:
        return batch.set_column(number, schema.SCHEMA.field(number), pa.array([text] * batch.num_rows))

    assert reason_of_bytes(rewrite(an_episode(), change)) == "json"


def test_a_compressed_body_is_refused_before_it_is_inflated() -> None:
    big = an_episode(a_segment(length=3000))
    assert reason_of_bytes(rewrite(big, lambda batch: batch, compression="zstd")) == "compressed"


def test_another_schema_version_is_refused_as_such() -> None:
    def change(batch: Any) -> Any:
        return batch.replace_schema_metadata({"matpo.schema_version": "2"})

    assert reason_of_bytes(rewrite(an_episode(), change)) == "version"


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()])
def test_other_column_kinds_are_refused(kind: Any) -> None:
    def change(batch: Any) -> Any:
        column = batch.column("role").dictionary_encode() if pa.types.is_dictionary(kind) else batch.column("role")
        return batch.set_column(batch.schema.get_field_index("role"), "role", column.cast(kind))

    assert reason_of_bytes(rewrite(an_episode(), change)) in {"schema", "framing"}


def test_a_missing_column_is_refused() -> None:
    assert reason_of_bytes(rewrite(an_episode(), lambda batch: batch.drop_columns(["answer"]))) == "schema"


def test_nulls_are_refused() -> None:
    def change(batch: Any) -> Any:
        number = batch.schema.get_field_index("role")
        return batch.set_column(number, schema.SCHEMA.field("role"), pa.array(["planner", None, "worker"]))

    assert reason_of_bytes(rewrite(an_episode(), change)) in {"nulls", "arrow"}


def test_no_rows_are_refused() -> None:
    assert reason_of_bytes(rewrite(an_episode(), lambda batch: batch.slice(0, 0))) == "segments"


@pytest.mark.parametrize("payload", [b"", b"x", b"\xff" * 64, b"\x00" * 64, b"ARROW1\x00\x00"])
def test_garbage_is_refused(payload: bytes) -> None:
    assert reason_of_bytes(payload) in {"framing", "arrow"}


def test_bytes_after_the_end_are_refused() -> None:
    payload = schema.encode(an_episode())
    assert reason_of_bytes(payload + payload) == "framing"


def test_every_truncation_is_an_episode_error() -> None:
    payload = schema.encode(an_episode())
    for length in range(len(payload)):
        with pytest.raises(EpisodeError):
            read(payload[:length])


@given(st.data())
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bits_never_raise_anything_but_an_episode_error(data: st.DataObject) -> None:
    payload = bytearray(schema.encode(an_episode()))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        episode = read(bytes(payload))
    except EpisodeError:
        return
    assert schema.check(episode, vocab_size=100, published_version=3) is None


def test_a_file_of_episodes_is_read_back(tmp_path: Path) -> None:
    episodes = [an_episode(), an_episode(a_segment(), answer="other")]
    assert schema.write_episodes(tmp_path / "e", episodes) == 2
    for one, other in zip(schema.read_episodes(tmp_path / "e"), episodes, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    schema.write_episodes(tmp_path / "e", [an_episode()])
    content = (tmp_path / "e").read_bytes()
    (tmp_path / "e").write_bytes(content[:cut] if cut == 5 else content[:-cut])
    with pytest.raises(EpisodeError, match="cut off"):
        list(schema.read_episodes(tmp_path / "e"))
