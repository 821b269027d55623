"""Bad input over real sockets to a real broker: a named refusal that is counted, bounded memory, others are served.

While each attack runs, a well-behaved actor leases and stores; it must get ahead, and no answer may take long.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest
import zmq
from tests.common.test_wire_fuzz import ACCEPTED, bombs
from tests.fault.harness import RUN, Life, Place, episode_of, payload_of, stored_bytes
from tests.flow.test_learner_process import PLUGIN, ended, lines, playing, started

from matpo import schema, wire
from matpo.episode import Episode
from matpo.settings import load_run_file
from matpo.testing import tiny_model, write_run_file

pytestmark = pytest.mark.processes

MIB = 2**20
MAX_PAYLOAD = 100_000
MAX_GROWTH = 256 * MIB  # of the broker's memory, through all attacks together
PATIENCE_S = 5.0  # the longest that the well-behaved actor may wait for an answer

Frames = Sequence[bytes | memoryview]


# ---- a broker, a stranger, and an actor that minds its own business


class Stranger:
    """A socket that sends any frames."""

    def __init__(self, place: Place, port: int) -> None:
        self.socket = place.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = 0
        self.socket.connect(f"tcp://127.0.0.1:{place.ports[port]}")

    def send(self, frames: Frames) -> None:
        self.socket.send_multipart(frames, copy=True)

    def receive(self, timeout_s: float = 20.0) -> Any:
        assert self.socket.poll(int(timeout_s * 1000)), "no answer"
        return wire.decode(self.socket.recv_multipart())[0]

    def answer(self, frames: Frames) -> Any:
        self.send(frames)
        return self.receive()

    def close(self) -> None:
        self.socket.close(0)


class Citizen(threading.Thread):
    """An actor that leases and stores, one member after the other, and notes how long each answer took."""

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        self.place = place
        self.over = threading.Event()
        self.stored = 0
        self.slowest_s = 0.0
        self.trouble: BaseException | None = None

    def run(self) -> None:
        try:
            with self.place.peer("actor", "citizen") as peer:
                while not self.over.is_set():
                    for lease in self.timed(peer.ask, wire.LeaseRequest(num_members=1, wait_s=1.0)).leases:
                        assert self.timed(peer.ask, *episode_of(lease)).kind == "stored"
                        self.stored += 1
        except BaseException as error:  # noqa: BLE001  for the test's thread to see
            self.trouble = error

    def timed(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        started_s = time.monotonic()
        reply = ask(*arguments)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
        return reply


class Target:
    """A broker under attack."""

    def __init__(self, place: Place, life: Life) -> None:
        self.place, self.life = place, life
        self.strangers: list[Stranger] = []
        self.learner = place.learner(20_000, 1)
        self.base = life.status("VmRSS")

    def stranger(self, port: int = 0) -> Stranger:
        self.strangers.append(Stranger(self.place, port))
        return self.strangers[-1]

    def lease(self, name: str) -> tuple[Any, wire.Lease]:
        """An actor of this name with one lease."""
        peer = self.place.peer("actor", name)
        return peer, peer.ask(wire.LeaseRequest(num_members=1)).leases[0]

    @contextmanager
    def attack(self, **refusals: int) -> Iterator[None]:
        """The citizen gets ahead, memory stays bounded, and exactly these refusals are counted."""
        before = self.place.counts()
        citizen = Citizen(self.place)
        citizen.start()
        settle(lambda: citizen.stored > 0 or citizen.trouble is not None)
        at_start = citizen.stored
        yield
        settle(lambda: citizen.stored > at_start or citizen.trouble is not None)
        citizen.over.set()
        citizen.join(30)
        after = self.place.counts()
        assert citizen.trouble is None
        assert citizen.slowest_s < PATIENCE_S
        found = {
            name.removeprefix("refused_"): int(after[name]) - int(before.get(name, 0))
            for name in after
            if name.startswith("refused_") and after[name] != before.get(name, 0)
        }
        assert found == refusals
        assert self.life.status("VmHWM") - self.base < MAX_GROWTH


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    place = Place(tmp_path_factory.mktemp("hostile") / "place", max_payload_bytes=MAX_PAYLOAD, lease_s=600)
    life = place.start()
    place.wait_ready()
    target = Target(place, life)
    yield target
    for peer in (*target.strangers, target.learner):
        peer.close()
    assert not life.is_over
    place.close()


def settle(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def refusal(reply: Any) -> str:
    return reply.reason if isinstance(reply, wire.Refused) else f"({reply.kind})"


def header(**fields: object) -> bytes:
    packed: bytes = msgpack.packb({"v": wire.WIRE_VERSION, "seq": 7, **fields})
    return packed


# ---- frames and headers


@pytest.mark.parametrize("port", [0, 1])
def test_messages_of_another_number_of_frames_are_refused(target: Target, port: int) -> None:
    stranger = target.stranger(port)
    with target.attack(frames=5):
        assert refusal(stranger.answer([b""])) == "frames"
        reply = stranger.answer([header(kind="stat")])
        assert (refusal(reply), reply.seq) == ("frames", 7)  # it finds its request all the same
        assert refusal(stranger.answer([header(kind="stat"), b"", b""])) == "frames"
        assert refusal(stranger.answer([b"x" * 100] * 8000)) == "frames"
        assert refusal(stranger.answer([b""] * 8000)) == "frames"
    assert stranger.answer([header(kind="stat"), b""]).kind == "stats"


def test_a_header_that_is_too_large_is_refused(target: Target) -> None:
    stranger = target.stranger()
    with target.attack(header_size=1):
        assert refusal(stranger.answer([b"x" * (wire.MAX_HEADER_BYTES + 1), b""])) == "header_size"


def test_a_frame_that_is_much_too_large_is_cut_off_and_the_connection_can_be_made_again(target: Target) -> None:
    with target.attack():
        for _ in range(10):
            stranger = target.stranger()
            stranger.send([header(kind="stat"), b"x" * (16 * MIB)])
            assert not stranger.socket.poll(200)
            stranger.close()
        assert target.stranger().answer([header(kind="stat"), b""]).kind == "stats"


@pytest.mark.parametrize("port", [0, 1])
def test_bombs_are_refused_by_name(target: Target, port: int) -> None:
    hostile = {name: bomb for name, bomb in bombs().items() if name not in ACCEPTED}
    expected = {name: decode_reason(bomb) for name, bomb in hostile.items()}
    assert set(expected.values()) == {"header", "header_size", "version", "fields"}
    stranger = target.stranger(port)
    counted: dict[str, int] = {}
    for reason in expected.values():
        counted[reason] = counted.get(reason, 0) + 3
    with target.attack(**counted):
        for _ in range(3):
            found = {name: refusal(stranger.answer([bomb, b""])) for name, bomb in hostile.items()}
            assert found == expected


def decode_reason(bomb: bytes) -> str:
    with pytest.raises(wire.ProtocolError) as error:
        wire.decode([bomb, b""])
    return error.value.reason


def test_ten_thousand_messages_of_garbage_at_once_are_all_refused(target: Target) -> None:
    stranger = target.stranger()
    made = np.random.default_rng(7)
    with target.attack(header=10_000):
        for _ in range(10_000):
            stranger.send([b"\xc1" + made.bytes(64), made.bytes(64)])  # 0xc1 begins no msgpack
        assert {refusal(stranger.receive()) for _ in range(10_000)} == {"header"}


def test_a_message_of_another_role_or_before_hello_is_refused(target: Target) -> None:
    stranger = target.stranger()
    actor = target.place.peer("actor", "nosy")
    epoch = target.learner.welcome.epoch
    with target.attack(hello_first=1, kind=6, port=1):
        assert refusal(stranger.answer(wire.encode(wire.LeaseRequest(seq=1, num_members=1)))) == "hello_first"
        for message in (
            wire.Fetch(epoch=epoch), wire.Peek(), wire.Drain(on=True), wire.Rows(columns=[], rows=[]),
            wire.Commit(epoch=epoch, checkpoint="c", consumed_below=10**6, consumed=[]), wire.Purge(groups=["g"]),
        ):  # fmt: skip
            assert refusal(actor.ask(message)) == "kind"
        hello = wire.Hello(seq=2, peer="learner", name="l", incarnation="x", run=RUN, schema_version=1)
        assert refusal(stranger.answer(wire.encode(hello))) == "port"
    actor.close()


# ---- episodes on the wire


def test_an_episode_that_is_too_large_is_refused(target: Target) -> None:
    actor, lease = target.lease("large")
    with target.attack(payload_size=2):
        assert refusal(actor.ask(*episode_of(lease, MAX_PAYLOAD + 1))) == "payload_size"
        assert refusal(actor.ask(*episode_of(lease, MAX_PAYLOAD + MIB // 2))) == "payload_size"
        assert actor.ask(*episode_of(lease, MAX_PAYLOAD)).kind == "stored"
    actor.close()


def test_no_flipped_bit_and_no_truncation_of_an_episode_is_stored(target: Target) -> None:
    actor, lease = target.lease("flipping")
    message, payload = episode_of(lease, 120)
    flipped = []
    for bit in range(len(payload) * 8):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(changed))
    with target.attack(payload_hash=len(flipped), payload_size=len(payload) + 1):
        assert {refusal(actor.ask(message, changed)) for changed in flipped} == {"payload_hash"}
        shorter = [payload[:length] for length in range(len(payload))]
        assert {refusal(actor.ask(message, changed)) for changed in (*shorter, payload + b"\0")} == {"payload_size"}
        assert actor.ask(message, payload).kind == "stored"
    assert stored_bytes(target.place.journal)[message.episode] == payload
    actor.close()


def test_every_truncation_of_a_header_is_refused(target: Target) -> None:
    actor, lease = target.lease("truncating")
    message, payload = episode_of(lease)
    whole = bytes(wire.encode(message.model_copy(update={"seq": 9}))[0])
    stranger = target.stranger()
    with target.attack(header=len(whole)):
        assert {refusal(stranger.answer([whole[:length], payload])) for length in range(len(whole))} == {"header"}
    assert actor.ask(message, payload).kind == "stored"
    actor.close()


def test_the_same_id_with_other_bytes_is_refused_and_changes_nothing(target: Target) -> None:
    actor, lease = target.lease("twice")
    message, payload = episode_of(lease)
    other = payload_of("something else")
    forged = message.model_copy(update={"num_bytes": len(other), "crc32c": wire.crc32c(other)})
    with target.attack(lease_lost=1):
        assert actor.ask(message, payload).duplicate is False
        assert refusal(actor.ask(forged, other)) == "lease_lost"
        assert actor.ask(message, payload).duplicate is True
    assert stored_bytes(target.place.journal)[message.episode] == payload
    actor.close()


# ---- bundles


def lying_bundles() -> dict[str, tuple[str, Frames]]:
    """Frames that begin like a bundle and are none, each with the reason of its refusal."""
    version, one = wire.WIRE_VERSION, header(kind="stat")
    many = wire.MAX_BUNDLE + 1

    def frames(*fields: object, payload: bytes = b"") -> Frames:
        return [msgpack.packb(list(fields)), payload]

    return {
        "no header": ("bundle", frames(version, [], [])),
        "too many headers": ("bundle", frames(version, [one] * many, [0] * many)),
        "65,536 headers": ("bundle", frames(version, [b""] * 65536, [0] * 65536)),
        "a length missing": ("bundle", frames(version, [one, one], [3], payload=b"abc")),
        "lengths beyond the payload": ("bundle", frames(version, [one, one], [2, 2**62], payload=b"abc")),
        "lengths short of the payload": ("bundle", frames(version, [one, one], [1, 1], payload=b"abc")),
        "a negative length": ("bundle", frames(version, [one, one], [4, -1], payload=b"abc")),
        "lengths that are no numbers": ("bundle", frames(version, [one], ["3"], payload=b"abc")),
        "headers that are text": ("bundle", frames(version, ["x", "y"], [1, 2], payload=b"abc")),
        "a header for the list": ("bundle", frames(version, one, [3], payload=b"abc")),
        "another version": ("version", frames(version - 1, [one], [0])),
        "cut short": ("header", [msgpack.packb([version, [one, one], [0, 0]])[:-1], b""]),
        "a list that claims four billion": ("header", [b"\x93\x03\xdd\xff\xff\xff\xff", b""]),
        "too large": ("header_size", [b"\x93" + b"x" * wire.MAX_HEADER_BYTES, b""]),
    }


@pytest.mark.parametrize("port", [0, 1])
def test_a_bundle_that_lies_is_refused_as_a_whole_and_by_name(target: Target, port: int) -> None:
    stranger = target.stranger(port)
    lies = lying_bundles()
    expected = {name: reason for name, (reason, _) in lies.items()}
    counted = {reason: 20 * list(expected.values()).count(reason) for reason in expected.values()}
    with target.attack(**counted):
        for _ in range(20):
            assert {name: refusal(stranger.answer(frames)) for name, (_, frames) in lies.items()} == expected


def test_a_bad_message_in_a_bundle_costs_only_itself(target: Target) -> None:
    actor = target.place.peer("actor", "careless")
    leases = actor.ask(wire.LeaseRequest(num_members=4)).leases
    good = [wire.encode(*episode_of(lease)) for lease in leases]
    inner = wire.bundle(good[2:])
    flipped = bytes([good[1][1][0] ^ 1]) + bytes(good[1][1][1:])
    cut: Frames = [good[2][0][:-1], good[2][1]]
    sent = [good[0], [good[1][0], flipped], inner, cut, [b"", b""], wire.encode(wire.Stat()), good[3]]
    with target.attack(header=3, payload_hash=1, kind=1):
        actor.socket.send_multipart(wire.bundle(sent))
        found = [refusal(wire.decode(each)[0]) for each in wire.unbundle(actor.socket.recv_multipart())]
        assert found == ["(stored)", "payload_hash", "header", "header", "header", "kind", "(stored)"]
        actor.socket.send_multipart(wire.bundle(good))
        again = [wire.decode(each)[0] for each in wire.unbundle(actor.socket.recv_multipart())]
        assert [each.duplicate for each in again] == [True, False, False, True]
    kept = stored_bytes(target.place.journal)
    assert [kept[name] for name in (each.episode for each in again)] == [bytes(payload) for _, payload in good]
    actor.close()


# ---- leases of others, members that were handed out again, learners that are over


def test_nobody_renews_releases_or_stores_on_the_lease_of_another(target: Target) -> None:
    owner, lease = target.lease("owner")
    thief, own = target.lease("thief")
    with target.attack(lease_mismatch=2, episode_id=1):
        assert thief.ask(wire.Heartbeat(leases=[lease.lease, own.lease], policy_version=0)).lost == [lease.lease]
        assert thief.ask(wire.Release(leases=[lease.lease], infra=True, reason="sabotage")).kind == "done"
        assert refusal(thief.ask(*episode_of(lease))) == "lease_mismatch"
        forged, payload = episode_of(own)
        forged = forged.model_copy(update={"group": lease.group, "member": lease.member, "attempt": lease.attempt})
        assert refusal(thief.ask(forged, payload)) == "episode_id"
        episode = f"{lease.group}.{lease.member}.{lease.attempt}"
        assert refusal(thief.ask(forged.model_copy(update={"episode": episode}), payload)) == "lease_mismatch"
        assert owner.ask(wire.Heartbeat(leases=[lease.lease], policy_version=0)).lost == []
        assert owner.ask(*episode_of(lease)).kind == "stored"
        assert thief.ask(*episode_of(own)).kind == "stored"
    owner.close()
    thief.close()


def test_an_episode_of_a_member_that_was_handed_out_again_is_refused(target: Target) -> None:
    slow, lost = target.lease("slow")
    assert slow.ask(wire.Release(leases=[lost.lease], infra=False, reason="test")).kind == "done"
    quick = target.place.peer("actor", "quick")
    again = quick.ask(wire.LeaseRequest(num_members=1)).leases[0]
    assert (again.group, again.member, again.attempt) == (lost.group, lost.member, lost.attempt + 1)
    with target.attack(lease_lost=2):
        assert refusal(slow.ask(*episode_of(lost))) == "lease_lost"
        assert quick.ask(*episode_of(again)).kind == "stored"
        assert refusal(slow.ask(*episode_of(lost))) == "lease_lost"
    slow.close()
    quick.close()


def test_a_learner_of_an_older_epoch_changes_nothing_and_a_replayed_hello_does_not_bring_it_back(
    make_place: Callable[..., Place],
) -> None:
    place = make_place()
    life = place.start()
    place.wait_ready()
    old = place.learner(2000, 1, incarnation="old")
    target = Target.__new__(Target)
    target.place, target.life, target.base = place, life, life.status("VmRSS")
    new = place.learner(2000, 1, incarnation="new")
    epoch = old.welcome.epoch
    assert new.welcome.epoch == epoch + 1
    zombie: list[wire.AnyMessage] = [
        wire.Fetch(epoch=epoch), wire.Trained(epoch=epoch, indices=[0]), wire.SnapshotNotice(epoch=epoch, version=99),
        wire.Commit(epoch=epoch, checkpoint="c", consumed_below=500, consumed=[], oldest_kept_below=500),
        wire.Resume(epoch=epoch, checkpoint="c", consumed_below=500, consumed=[]),
        wire.Quarantine(epoch=epoch, group="g-00000000", reason="x"), wire.PlaceOrders(epoch=epoch, orders=[]),
        wire.Hello(peer="learner", name="learner", incarnation="old", run=RUN, schema_version=1),
    ]  # fmt: skip
    with target.attack(fenced=len(zombie)):
        assert {refusal(old.ask(message)) for message in zombie} == {"fenced"}
    counts = place.counts()
    assert (counts["epoch"], counts["snapshot_version"], counts["groups_consumed"]) == (epoch + 1, -1, 0)
    assert new.ask(wire.Fetch(epoch=epoch + 1)).kind == "group"
    old.close()
    new.close()


def test_a_hello_that_is_said_again_and_again_takes_nothing_from_anyone(target: Target) -> None:
    actor, lease = target.lease("insisting")
    hello = wire.Hello(peer="actor", name="insisting", incarnation="1", run=RUN, schema_version=1)
    before = target.place.counts()["members_leased"]
    with target.attack():
        assert {actor.ask(hello).kind for _ in range(500)} == {"welcome"}
        echo = target.stranger()  # the same bytes from elsewhere
        assert echo.answer(wire.encode(hello.model_copy(update={"seq": 1}))).kind == "welcome"
    assert target.place.counts()["members_leased"] == before
    assert actor.ask(wire.Heartbeat(leases=[lease.lease], policy_version=0)).lost == []
    assert actor.ask(*episode_of(lease)).kind == "stored"
    actor.close()


def test_the_commands_show_what_was_refused(target: Target) -> None:
    counts = target.place.counts()
    assert {"refused_frames", "refused_header", "refused_payload_hash"} <= counts.keys()
    log = target.life.log.read_text()
    assert "message.refused" in log
    assert max(map(len, log.splitlines())) < 4000  # no peer writes our log


# ---- episodes that are well framed, to a real learner

VOCABULARY = 264


def changed(episode: Episode, column: str, make: Callable[[Any], Any]) -> bytes:
    """The episode's payload with one column made anew."""
    batch = pa.ipc.open_stream(schema.encode(episode)).read_next_batch()
    number = batch.schema.get_field_index(column)
    batch = batch.set_column(number, schema.SCHEMA.field(number), make(batch.column(number)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def with_tokens(column: str, value: float) -> Callable[[Episode], bytes]:
    """The last token of each segment gets a value."""

    def make(old: Any) -> Any:
        rows = old.to_pylist()
        return pa.array([[*row[:-1], value] for row in rows], old.type)

    return lambda episode: changed(episode, column, make)


HOSTILE: dict[str, Callable[[Episode], bytes]] = {
    "log-probs that are NaN": with_tokens("logprobs", float("nan")),
    "log-probs above 0": with_tokens("logprobs", 0.5),
    "token ids beyond the vocabulary": with_tokens("token_ids", VOCABULARY + 5),
    "negative token ids": with_tokens("token_ids", -7),
    "versions that nobody published": with_tokens("versions", 10**6),
    "a cyclic tree": lambda e: changed(e, "parent", lambda c: pa.array([-1, 1], c.type)),
    "null columns": lambda e: changed(e, "role", lambda c: pa.array([None, None], c.type)),
    "a reward that is infinite": lambda e: changed(e, "reward", lambda c: pa.array([np.inf] * 2, c.type)),
    "another episode's id": lambda e: changed(e, "episode", lambda c: pa.array(["g-99999999.0.0"] * 2)),
    "no Arrow at all": lambda e: b"\0" * 1000,
    "half an episode": lambda e: schema.encode(e)[:-100],
}


@pytest.mark.timeout(300)
async def test_hostile_episodes_are_set_aside_and_counted_and_the_learner_goes_on(
    tmp_path: Path, report: Callable[..., None]
) -> None:
    (tmp_path / "toy.py").write_text(PLUGIN)
    path = write_run_file(
        tmp_path / "run.toml",
        model=tiny_model(tmp_path / "model"),
        environment={"name": "toy", "plugin": f"{tmp_path / 'toy.py'}:Toy"},
        learner={
            "num_updates": 12, "groups_per_update": 2, "group_size": 2, "learning_rate": 1e-3, "checkpoint_every": 4,
            "num_threads": 1, "device": "cpu",
        },
    )  # fmt: skip
    run_file = load_run_file(path)
    kinds = dict(enumerate(HOSTILE, start=2))  # group index -> what is wrong with its first episode

    def change(episode: Episode, payload: bytes) -> bytes:
        kind = kinds.get(int(episode.group[2:]))
        return payload if kind is None or episode.member else HOSTILE[kind](episode)

    with started("matpo_broker", str(path)):
        async with playing(run_file, change):
            with started("matpo_learner", str(path)) as learner:
                assert await ended(learner, 240) == 0
        consumed = {row["index"]: row["fate"] for row in lines(run_file, "trained")}
        updates = lines(run_file, "learner")
        counts = await asyncio.to_thread(stat, run_file)
    report(
        "hostile episodes", kinds=len(kinds), quarantined=counts["groups_quarantined"], updates=len(updates),
        trained=sum(fate == "trained" for fate in consumed.values()),
    )  # fmt: skip
    assert len(updates) == 12
    assert {index for index, fate in consumed.items() if fate in ("trained", "zero_signal")}.isdisjoint(kinds)
    assert set(kinds) <= consumed.keys()
    assert counts["groups_quarantined"] == len(kinds)


def stat(run_file: Any) -> Any:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(f"tcp://127.0.0.1:{run_file.broker.learner_port}")
    socket.send_multipart(wire.encode(wire.Stat(seq=1)))
    assert socket.poll(10_000)
    reply, _ = wire.decode(socket.recv_multipart())
    socket.close()
    context.term()
    assert isinstance(reply, wire.StatReply)
    return reply.counts
