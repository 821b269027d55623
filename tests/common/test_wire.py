"""Messages to frames and back; whatever is wrong with frames is one error with a stable reason."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpo import wire
from matpo.errors import ProtocolError

TASK = wire.OrderedTask(id="t", environment="e", question="q", data={"answers": ["Sol"], "hops": 2})
MESSAGES = [
    wire.Hello(peer="actor", name="a", incarnation="i", run="r", schema_version=1),
    wire.LeaseRequest(seq=3, num_members=4, wait_s=1.5),
    wire.PlaceOrders(epoch=1, orders=[wire.Order(group="g-0", index=0, group_size=8, task=TASK)]),
    wire.Leases(leases=[wire.Lease(lease="l", group="g-0", member=0, attempt=0, task=TASK)], paused=""),
    wire.Commit(epoch=1, checkpoint="c", consumed_below=3, consumed=[5, 7], oldest_kept_below=1),
    wire.NoGroup(orders_open=1, members_open=2, members_leased=3, actors=4),
    wire.StatReply(counts={"a": 1, "b": 0.5, "c": "x"}),
    wire.Fetch(epoch=1, min_version=7),
    wire.Peek(state="quarantined", limit=7),
    wire.Rows(columns=["group", "reason"], rows=[["g-0", None], ["g-1", "x"]]),
]


def header(**fields: object) -> bytes:
    packed: bytes = msgpack.packb({"v": wire.WIRE_VERSION, "seq": 0, **fields})
    return packed


def store_message(payload: bytes, **changes: object) -> wire.StoreEpisode:
    fields = {"num_bytes": len(payload), "crc32c": wire.crc32c(payload), **changes}
    return wire.StoreEpisode.model_validate(
        {"lease": "l", "group": "g", "member": 0, "attempt": 0, "episode": "g.0.0", **fields}
    )


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.kind)
def test_a_message_is_the_same_after_the_wire(message: wire.AnyMessage) -> None:
    assert wire.decode(wire.encode(message, b"payload")) == (message, b"payload")


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "frames"),
        ([header(kind="stat")], "frames"),
        ([header(kind="stat"), b"", b""], "frames"),
        ([b"\x00" * (wire.MAX_HEADER_BYTES + 1), b""], "header_size"),
        ([b"", b""], "header"),
        ([b"\xc1", b""], "header"),
        ([b"\x91" * 5000, b""], "header"),
        ([header(kind="stat") + b"\x00", b""], "header"),
        ([b"\x82\xa1v\x01\xa1v\x01", b""], "header"),
        ([msgpack.packb({1: 2}), b""], "header"),
        ([msgpack.packb({"v": wire.WIRE_VERSION, "kind": msgpack.ExtType(1, b"x")}), b""], "header"),
        ([msgpack.packb({"kind": "stat"}), b""], "version"),
        ([header(v=1, kind="stat"), b""], "version"),
        ([header(kind="nonsense"), b""], "fields"),
        ([header(kind="stat", more=1), b""], "fields"),
        ([header(kind="lease", num_members="4"), b""], "fields"),
        ([header(kind="lease", num_members=1, wait_s=float("nan")), b""], "fields"),
        ([header(kind="stat", seq=2**60), b""], "fields"),
    ],
)
def test_bad_frames_have_a_reason(frames: list[bytes], reason: str) -> None:
    with pytest.raises(ProtocolError) as error:
        wire.decode(frames)
    assert error.value.reason == reason


def test_the_messages_of_a_bundle_come_out_as_they_went_in() -> None:
    messages = [(store_message(payload), payload) for payload in (b"one", b"", b"three")]
    frames = wire.bundle([wire.encode(*each) for each in messages])
    assert len(frames) == 2
    assert [wire.decode(each) for each in wire.unbundle(frames)] == messages


def test_a_message_alone_is_no_bundle() -> None:
    frames = wire.encode(wire.Stat(), b"payload")
    assert wire.bundle([frames]) == frames
    assert wire.unbundle(frames) == [frames]


@pytest.mark.parametrize(
    ("fields", "payload", "reason"),
    [
        ([wire.WIRE_VERSION + 1, [b"a"], [0]], b"", "version"),
        ([True, [b"a"], [0]], b"", "version"),
        ([wire.WIRE_VERSION, [], []], b"", "bundle"),
        ([wire.WIRE_VERSION, [b"a"] * (wire.MAX_BUNDLE + 1), [0] * (wire.MAX_BUNDLE + 1)], b"", "bundle"),
        ([wire.WIRE_VERSION, [b"a", b"b"], [1]], b"x", "bundle"),
        ([wire.WIRE_VERSION, [b"a", b"b"], [1, 1]], b"x", "bundle"),
        ([wire.WIRE_VERSION, [b"a", b"b"], [1, 0]], b"xy", "bundle"),
        ([wire.WIRE_VERSION, [b"a", b"b"], [2, -1]], b"x", "bundle"),
        ([wire.WIRE_VERSION, [b"a", b"b"], [True, 0]], b"x", "bundle"),
        ([wire.WIRE_VERSION, ["a"], [0]], b"", "bundle"),
        ([wire.WIRE_VERSION, b"a", [0]], b"", "bundle"),
    ],
)
def test_a_bundle_that_does_not_add_up_is_refused(fields: list[object], payload: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as error:
        wire.unbundle([msgpack.packb(fields), payload])
    assert error.value.reason == reason


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_no_bytes_raise_anything_but_a_protocol_error(frames: list[bytes]) -> None:
    assert wire.peek_seq(frames) >= 0
    with contextlib.suppress(ProtocolError):
        wire.decode(frames)


@pytest.mark.parametrize(
    ("frames", "seq"),
    [
        ([header(v=9, seq=41)], 41),
        ([header(seq=-1)], 0),
        ([header(seq="x")], 0),
        ([header(seq=True)], 0),
        ([b"\xc1"], 0),
        ([], 0),
    ],
)
def test_the_seq_of_a_refused_header_is_read_if_it_can_be(frames: list[bytes], seq: int) -> None:
    assert wire.peek_seq(frames) == seq


def test_a_payload_of_another_length_is_found() -> None:
    with pytest.raises(ProtocolError) as error:
        wire.check_payload(store_message(b"payload", num_bytes=3), b"payload")
    assert error.value.reason == "payload_size"


def test_a_payload_with_a_flipped_bit_is_found() -> None:
    with pytest.raises(ProtocolError) as error:
        wire.check_payload(store_message(b"payload"), b"pazload")
    assert error.value.reason == "payload_hash"


def test_crc32c_is_castagnoli() -> None:
    assert wire.crc32c(b"123456789") == 0xE3069283
