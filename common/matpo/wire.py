"""Messages between the processes, and their frames. No sockets here.

On the wire a message is exactly two frames (ROUTER adds the peer's identity in front):

    header    msgpack map {"v": 3, "seq": n, "kind": "...", ...fields}, at most MAX_HEADER_BYTES
    payload   opaque bytes, possibly empty; its length and CRC32C stand in the header where they matter

Small messages of one peer may share two frames, which costs both ends far less. Such a bundle has for its header a
msgpack array [3, [header, ...], [length of payload, ...]] of whole headers, and for its payload all of theirs in that
order. Each message in it is judged as if it had come alone.

Every request carries `seq`, every reply repeats it; an unsolicited message (a notice) has seq 0.
Whatever is wrong with received bytes is one error: ProtocolError, with a stable `reason`.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar

import google_crc32c
import msgpack
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError

from matpo.errors import ProtocolError

WIRE_VERSION = 3
MAX_HEADER_BYTES = 1 << 20
MAX_LIST = 65536
MAX_FIELDS = 64  # of one message, and many more than any has
MAX_COUNTS = 4096
MAX_BUNDLE = 64  # messages
BUNDLE_BYTES = 1 << 20  # of payloads: with more in one message nothing gets faster
_BUNDLE_MARK = 0x93  # a msgpack array of three; any other header is a map

Name = Annotated[str, Field(min_length=1, max_length=256)]
Short = Annotated[str, Field(max_length=1024)]
Natural = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Version = Annotated[int, Field(ge=-1, lt=2**53)]
Cell = int | float | str | None
Item = TypeVar("Item")
Container = TypeVar("Container", dict[str, Any], list[Any])
# The first bad item refuses the list: one error for each of a million items would take gigabytes.
Many = Annotated[list[Item], FailFast()]


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_COUNTS:
        raise ValueError(f"{len(value)} counts, at most {MAX_COUNTS}")
    return value


class Message(BaseModel):
    """Base of all messages. Unknown or missing fields and wrong types are protocol errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    seq: Natural = 0


class OrderedTask(BaseModel):
    """matpo.Task as it travels: everything an actor needs to play and score it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Name
    environment: Name
    question: str
    data: dict[str, Any] = Field(default_factory=dict)


class Order(BaseModel):
    """The learner's request for one group. `index` is its place in the run's order stream; it names the group."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    group: Name
    index: Natural
    group_size: Annotated[int, Field(ge=1, le=4096)]
    task: OrderedTask


class Lease(BaseModel):
    """An actor's right to one member until it is silent for lease_s."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lease: Name
    group: Name
    member: Natural
    attempt: Natural
    task: OrderedTask


class DeliveredEpisode(BaseModel):
    """One episode inside a delivered group's payload: the payloads stand one after the other, in this order."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    episode: Name
    member: Natural
    attempt: Natural
    num_bytes: Natural
    crc32c: Natural


# ---- both sides to the broker


class Hello(Message):
    """First message of a peer, repeated after each reconnect. A learner's hello raises the learner epoch."""

    kind: Literal["hello"] = "hello"
    peer: Literal["actor", "learner", "operator"]
    name: Name
    incarnation: Name  # new for each process start
    run: Name
    schema_version: Natural
    model: Short = ""  # fingerprint of vocabulary and architecture; must agree with the learner's


class Stat(Message):
    """Ask for counts of everything."""

    kind: Literal["stat"] = "stat"


# ---- actor to broker


class LeaseRequest(Message):
    """Ask for up to `num_members` members; the broker may hold the answer for up to `wait_s`."""

    kind: Literal["lease"] = "lease"
    num_members: Annotated[int, Field(ge=1, le=4096)]
    wait_s: Seconds = 0.0


class StoreEpisode(Message):
    """A finished episode; the payload frame is its Arrow record batch."""

    kind: Literal["episode"] = "episode"
    lease: Name
    group: Name
    member: Natural
    attempt: Natural
    episode: Name
    num_bytes: Natural
    crc32c: Natural
    num_tokens: Annotated[int, Field(ge=0, lt=2**32)] = 0  # sums of it have to fit into 64 bits
    min_version: Version = -1  # oldest policy version of a sampled token; -1: none was sampled
    environment: Short = ""


class Heartbeat(Message):
    """Renew leases. The reply names those that are lost."""

    kind: Literal["heartbeat"] = "heartbeat"
    leases: Annotated[Many[Name], Field(max_length=MAX_LIST)]
    policy_version: Version


class Release(Message):
    """Give leases back. `infra`: a failure that counts against the member's attempts; otherwise none is counted."""

    kind: Literal["release"] = "release"
    leases: Annotated[Many[Name], Field(max_length=MAX_LIST)]
    infra: bool
    reason: Short


class Goodbye(Message):
    """The peer leaves; its remaining leases are free."""

    kind: Literal["goodbye"] = "goodbye"


# ---- learner to broker. `epoch` is the one that Welcome gave; an older one is refused: a zombie changes nothing.


class Resume(Message):
    """After hello: what the checkpoint (or a fresh start: nothing) knows to be consumed.

    Groups with index < consumed_below, and those in `consumed`, are done. Every other complete group is ready again.
    """

    kind: Literal["resume"] = "resume"
    epoch: Natural
    checkpoint: Short
    consumed_below: Natural
    consumed: Annotated[Many[Natural], Field(max_length=MAX_LIST)]


class PlaceOrders(Message):
    """Work orders. Placing one that is there already changes nothing."""

    kind: Literal["orders"] = "orders"
    epoch: Natural
    orders: Annotated[Many[Order], Field(max_length=4096)]


class Fetch(Message):
    """Ask for the oldest group that is ready; the broker may hold the answer for up to `wait_s`.

    `received` is the group of the last reply that arrived: the broker repeats its last delivery until it stands here,
    so a lost reply loses no group. matpo.link fills it in.
    """

    kind: Literal["fetch"] = "fetch"
    epoch: Natural
    wait_s: Seconds = 0.0
    received: Short = ""
    min_version: Version = -1  # a whole group with an older token is given up as "stale", without its payload


class Trained(Message):
    """The learner is done with these groups, without harm: they went through an update, or there was nothing to train.

    No checkpoint covers them yet, so they come again after Resume, but they are no suspects if this learner dies.
    """

    kind: Literal["trained"] = "trained"
    epoch: Natural
    indices: Annotated[Many[Natural], Field(max_length=MAX_LIST)]


class Quarantine(Message):
    """The content of a delivered group is invalid: set it aside for people to look at."""

    kind: Literal["quarantine"] = "quarantine"
    epoch: Natural
    group: Name
    reason: Short


class Commit(Message):
    """A durable checkpoint covers these groups; the broker may forget what every kept checkpoint covers."""

    kind: Literal["commit"] = "commit"
    epoch: Natural
    checkpoint: Name
    consumed_below: Natural
    consumed: Annotated[Many[Natural], Field(max_length=MAX_LIST)]
    oldest_kept_below: Natural = 0  # consumed_below of the oldest checkpoint that is kept


class SnapshotNotice(Message):
    """A snapshot was published. Learner to broker, and on to every actor: saves a poll, nothing depends on it."""

    kind: Literal["snapshot"] = "snapshot"
    epoch: Natural
    version: Natural


# ---- operators to broker


class Peek(Message):
    """List groups, oldest first: those in one `state`, or one `group` with its members.

    The reply holds as many rows as fit into one message. To go on, ask for those `after` the last one's index (member);
    none are left when no row comes.
    """

    kind: Literal["peek"] = "peek"
    state: Literal["", "open", "ready", "delivered", "consumed", "dropped", "quarantined"] = ""
    group: Short = ""
    after: Version = -1
    limit: Annotated[int, Field(ge=1, le=4096)] = 100


class Show(Message):
    """Ask for the payloads of one whole or quarantined group; delivers nothing."""

    kind: Literal["show"] = "show"
    group: Name


class Requeue(Message):
    """Put quarantined groups back into the stream. Refused when a checkpoint of the learner covers one."""

    kind: Literal["requeue"] = "requeue"
    groups: Annotated[Many[Name], Field(max_length=4096)]


class Purge(Message):
    """Let the payloads of quarantined groups go."""

    kind: Literal["purge"] = "purge"
    groups: Annotated[Many[Name], Field(max_length=4096)]


class Drain(Message):
    """`on`: hand out no more leases; what is in play is still stored and delivered. Lasts until the broker restarts."""

    kind: Literal["drain"] = "drain"
    on: bool


# ---- broker to peers


class Welcome(Message):
    """Reply to hello."""

    kind: Literal["welcome"] = "welcome"
    epoch: Natural  # the learner's fence; actors ignore it
    heartbeat_s: Seconds
    lease_s: Seconds
    snapshot_version: Version
    durability: Name  # what an ack means: broker.durability of the run file
    max_payload_bytes: Natural
    window_bytes: Natural  # an actor's credit: payload bytes that it may have sent without an answer ...
    window_episodes: Natural  # ... and episodes; one is always allowed
    bundle_episodes: Annotated[int, Field(ge=1, le=MAX_BUNDLE)] = 1  # how many may share a message


class Leases(Message):
    """Reply to lease. Empty: nothing to do now; `paused` says why if the broker holds actors back."""

    kind: Literal["leases"] = "leases"
    leases: Many[Lease]
    paused: Short = ""


class Stored(Message):
    """The episode is kept as `durability` says. `duplicate`: it was there already."""

    kind: Literal["stored"] = "stored"
    episode: Name
    durability: Name
    duplicate: bool = False


class Refused(Message):
    """No. `retry_after_s` is None when asking again is pointless."""

    kind: Literal["refused"] = "refused"
    reason: Name
    message: str
    retry_after_s: Seconds | None = None


class Alive(Message):
    """Reply to heartbeat: which leases are lost, the newest snapshot, and the credit of now (see Welcome)."""

    kind: Literal["alive"] = "alive"
    lost: Many[Name]
    snapshot_version: Version
    window_bytes: Natural
    window_episodes: Natural


class Done(Message):
    """Reply to whatever has nothing else to say: it is durable."""

    kind: Literal["done"] = "done"


class GroupReady(Message):
    """Reply to fetch: one whole group, or the tombstone of one that was given up (`dropped` says why, no episodes)."""

    kind: Literal["group"] = "group"
    group: Name
    index: Natural
    episodes: Many[DeliveredEpisode]
    dropped: Short = ""


class NoGroup(Message):
    """Reply to fetch when nothing is ready: what is missing, so that the learner can say who is waited for."""

    kind: Literal["no_group"] = "no_group"
    orders_open: Natural
    members_open: Natural
    members_leased: Natural
    actors: Natural


class StatReply(Message):
    """Counts of everything, flat."""

    kind: Literal["stats"] = "stats"
    counts: Annotated[dict[str, int | float | str], BeforeValidator(_few)]


class Rows(Message):
    """Reply to peek: a table."""

    kind: Literal["rows"] = "rows"
    columns: Many[Name]
    rows: Many[Many[Cell]]


AnyMessage = (
    Hello | Stat | LeaseRequest | StoreEpisode | Heartbeat | Release | Goodbye | Resume | PlaceOrders | Fetch | Trained
    | Quarantine | Commit | SnapshotNotice | Peek | Show | Requeue | Purge | Drain | Welcome | Leases | Stored | Refused
    | Alive | Done | GroupReady | NoGroup | StatReply | Rows
)  # fmt: skip
_ADAPTER: TypeAdapter[AnyMessage] = TypeAdapter(Annotated[AnyMessage, Field(discriminator="kind")])


def crc32c(data: Sized) -> int:
    """CRC32C (Castagnoli) of the bytes of anything that shows them, as an unsigned 32-bit number."""
    return int(google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data))


def encode(message: AnyMessage, payload: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """The message as [header, payload]."""
    return [msgpack.packb({"v": WIRE_VERSION, **vars(message)}, use_bin_type=True, default=vars), payload]


def decode(frames: Sequence[bytes | memoryview]) -> tuple[AnyMessage, bytes | memoryview]:
    """Frames back to (message, payload). Checks everything but the payload's own hash (see check_payload).

    Raises ProtocolError with reason frames | header_size | header | version | fields.
    """
    if len(frames) != 2:
        raise ProtocolError(f"got {len(frames)} frames, want 2 (header, payload)", reason="frames")
    header, payload = frames
    fields = _unpack(header, dict)
    version = fields.pop("v", None)
    if type(version) is not int or version != WIRE_VERSION:
        del fields, version  # an error lives longer than this call, and its traceback with all that stands here
        raise _other_version()
    kind = fields.get("kind")
    if not isinstance(kind, str) or len(fields) > MAX_FIELDS:
        num_fields = len(fields)
        del fields, kind
        raise ProtocolError(f"a message of {num_fields} fields, or without a kind", reason="fields")
    try:
        return _ADAPTER.validate_python(fields), payload
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        # Names in it are the peer's; so is their length.
        problem = f"{kind[:64]!r} message: {where[:256]}: {first['msg'][:256]}"
    del fields
    raise ProtocolError(problem, reason="fields")


def bundle(messages: Sequence[Sequence[bytes | memoryview]]) -> list[bytes | memoryview]:
    """The frames of several messages as those of one bundle; a message alone stays what it is."""
    if len(messages) == 1:
        return list(messages[0])
    headers = [header for header, _ in messages]
    payloads = [payload for _, payload in messages]
    return [msgpack.packb([WIRE_VERSION, headers, [len(payload) for payload in payloads]]), b"".join(payloads)]


def unbundle(frames: Sequence[bytes | memoryview], *, limit: int = MAX_BUNDLE) -> list[Sequence[bytes | memoryview]]:
    """The frames of each message in a bundle, payloads copied; frames that are no bundle as they are, unchecked.

    Raises ProtocolError with reason header_size | header | version | bundle.
    """
    if len(frames) != 2 or not frames[0] or frames[0][0] != _BUNDLE_MARK:
        return [frames]
    header, payload = frames
    version, headers, lengths = _unpack(header, list)
    if type(version) is not int or version != WIRE_VERSION:
        raise _other_version()
    problem = ""
    if not isinstance(headers, list) or not isinstance(lengths, list):
        problem = "want a list of headers and one of lengths"
    elif not 0 < len(headers) == len(lengths) <= limit:
        problem = f"{len(headers)} headers and {len(lengths)} lengths, want as many of both, and at most {limit}"
    elif not all(isinstance(each, bytes) for each in headers):
        problem = "its headers are not all bytes"
    elif not all(type(each) is int and each >= 0 for each in lengths) or sum(lengths) != len(payload):
        problem = f"its lengths are not those of a payload of {len(payload)} bytes"
    if problem:
        del headers, lengths
        raise ProtocolError(f"a bundle of messages: {problem}", reason="bundle")
    view, begins = memoryview(payload), accumulate(lengths, initial=0)
    return [(each, bytes(view[at : at + n])) for each, n, at in zip(headers, lengths, begins, strict=False)]


def peek_seq(frames: Sequence[bytes | memoryview]) -> int:
    """The seq of frames that `decode` refused, so that the refusal finds its request; 0 if it cannot be read."""
    try:
        seq = _unpack(frames[0], dict).get("seq", 0) if frames else 0
    except ProtocolError:
        return 0
    return seq if type(seq) is int and 0 <= seq < 2**53 else 0  # a bool is an int, and no seq


def check_payload(message: StoreEpisode | DeliveredEpisode, payload: Sized) -> None:
    """Raise ProtocolError (payload_size | payload_hash) unless length and CRC32C are what the header says.

    `payload` is bytes, or anything else that shows its bytes; a memoryview is copied for its hash.
    """
    if len(payload) != message.num_bytes:
        raise ProtocolError(f"payload of {len(payload)} bytes, header says {message.num_bytes}", reason="payload_size")
    if crc32c(payload) != message.crc32c:
        raise ProtocolError(f"payload of {message.episode} does not match its CRC32C", reason="payload_hash")


def _other_version() -> ProtocolError:
    return ProtocolError(
        f"wire version differs from {WIRE_VERSION}. Run the same release everywhere.", reason="version"
    )


def _unpack(header: bytes | memoryview, kind: type[Container]) -> Container:
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(header)} bytes, at most {MAX_HEADER_BYTES}", reason="header_size")
    problem = ""
    try:
        claims = msgpack.Unpacker(read_size=len(header) or 1, max_buffer_size=MAX_HEADER_BYTES)
        claims.feed(header)
        claims.skip()  # builds nothing; below msgpack 1.1 makes room for all that is claimed, 500 MB for 3 kB
        fields = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_no_duplicate_keys,
            ext_hook=_no_extensions,
            max_ext_len=0,  # which still lets empty ones pass
            max_array_len=MAX_LIST,
            max_map_len=MAX_LIST,
        )
    # msgpack raises its own errors, ValueError (extra data, limits) and RecursionError-like StackError: all garbage.
    except (msgpack.UnpackException, ValueError, RecursionError, KeyError, TypeError) as error:
        fields, problem = None, str(error)[:256] or type(error).__name__
    if problem:
        raise ProtocolError(f"header is not the msgpack we expect: {problem}", reason="header")
    if isinstance(fields, kind):
        return fields
    found = type(fields).__name__
    del fields
    raise ProtocolError(f"header is a {found}, want a map", reason="header")


def _no_duplicate_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _no_extensions(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")
