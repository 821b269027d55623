"""The broker behind real sockets: what peers see, hostile ones included."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from matpo import wire
from matpo.errors import SetupError
from matpo_broker.server import TURN_MESSAGES


def order(index: int, size: int = 1) -> wire.Order:
    task = wire.OrderedTask(id=f"t{index}", environment="e", question="q?")
    return wire.Order(group=f"g-{index}", index=index, group_size=size, task=task)


def lease_of(actor: Any, num_members: int = 1) -> wire.Lease:
    return actor.ask(wire.LeaseRequest(num_members=num_members, wait_s=5.0)).leases[0]


GARBAGE = {
    "no frames but an empty one": [b""],
    "one frame": [b"x"],
    "three frames": [b"x", b"y", b"z"],
    "not msgpack": [b"\xc1\xff", b""],
    "a list": [msgpack.packb([1, 2]), b""],
    "deep nesting": [b"\x91" * 100_000, b""],
    "wrong version": [msgpack.packb({"v": 1, "seq": 1, "kind": "stat"}), b""],
    "unknown kind": [msgpack.packb({"v": wire.WIRE_VERSION, "seq": 1, "kind": "rm"}), b""],
    "missing field": [msgpack.packb({"v": wire.WIRE_VERSION, "seq": 1, "kind": "lease"}), b""],
    "huge length": [b"\xdd\xff\xff\xff\xff", b""],
    "a bool for seq": [msgpack.packb({"v": wire.WIRE_VERSION, "seq": True, "kind": "x"}), b""],
    "a reply": [msgpack.packb({"v": wire.WIRE_VERSION, "seq": 1, "kind": "done"}), b""],
}


@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_and_the_broker_goes_on(broker: Any, frames: list[bytes]) -> None:
    stranger = broker.stranger(broker.actors)
    stranger.socket.send_multipart(frames)
    assert stranger.receive()[0].kind == "refused"
    assert stranger.ask(wire.Stat()).kind == "stats"


def test_garbage_is_counted_by_reason(broker: Any) -> None:
    stranger = broker.stranger(broker.actors)
    stranger.socket.send_multipart(GARBAGE["not msgpack"])
    stranger.receive()
    assert broker.counts()["refused_header"] == 1
    assert broker.metrics.registry.get_sample_value("matpo_broker_refusals_total", {"reason": "header"}) == 1


def test_a_refusal_of_another_wire_version_finds_its_request(broker: Any) -> None:
    stranger = broker.stranger(broker.actors)
    stranger.socket.send_multipart([msgpack.packb({"v": 1, "seq": 41, "kind": "hello"}), b""])
    reply, _ = stranger.receive()
    assert (reply.seq, reply.reason) == (41, "version")


def test_a_frame_far_beyond_the_limit_cuts_that_peer_off_only(broker: Any) -> None:
    stranger, other = broker.stranger(broker.actors), broker.actor()
    stranger.socket.send_multipart([b"x", bytes(5 * 2**20)])
    stranger.socket.rcvtimeo = 200
    with pytest.raises(zmq.Again):
        stranger.receive()
    assert other.ask(wire.Stat()).kind == "stats"


def test_a_payload_that_is_too_large_is_refused_with_a_message(broker: Any) -> None:
    broker.learner(order(0))
    actor = broker.actor()
    reply = actor.store(lease_of(actor), bytes(100_001))
    assert (reply.reason, "at most 100000" in reply.message) == ("payload_size", True)


def test_a_payload_that_does_not_match_its_hash_is_refused_and_counted(broker: Any) -> None:
    broker.learner(order(0))
    actor = broker.actor()
    assert actor.store(lease_of(actor), b"payload", crc32c=1).reason == "payload_hash"
    assert broker.counts()["refused_payload_hash"] == 1
    assert broker.counts()["episodes_stored"] == 0


def episodes(leases: list[wire.Lease], payload: bytes, **changes: object) -> list[list[bytes | memoryview]]:
    """Frames of a store for each lease; their seqs are 1, 2, ..."""
    return [
        wire.encode(
            wire.StoreEpisode(
                seq=seq,
                lease=lease.lease,
                group=lease.group,
                member=lease.member,
                attempt=lease.attempt,
                episode=f"{lease.group}.{lease.member}.{lease.attempt}",
                num_bytes=len(payload),
                crc32c=wire.crc32c(payload),
            ).model_copy(update=changes),
            payload,
        )
        for seq, lease in enumerate(leases, 1)
    ]


def answers(actor: Any) -> list[Any]:
    return [wire.decode(frames)[0] for frames in wire.unbundle(actor.socket.recv_multipart())]


def test_the_episodes_of_a_bundle_are_judged_one_by_one_and_answered_together(broker: Any) -> None:
    learner, actor = broker.learner(order(0, size=4)), broker.actor()
    leases = actor.ask(wire.LeaseRequest(num_members=4)).leases
    sent = episodes(leases, b"payload")
    sent[1] = episodes(leases, b"payload", crc32c=1)[1]
    sent[2] = [b"\xc1", b"payload"]  # not even a header
    actor.socket.send_multipart(wire.bundle([*sent, sent[0]]))
    found = answers(actor)
    assert [(each.kind, each.seq) for each in found] == [
        ("stored", 1), ("refused", 2), ("refused", 0), ("stored", 4), ("stored", 1)
    ]  # fmt: skip
    assert [each.reason for each in found[1:3]] == ["payload_hash", "header"]
    assert [each.duplicate for each in (found[0], found[3], found[4])] == [False, False, True]
    assert broker.counts()["episodes_stored"] == 2
    actor.socket.send_multipart(wire.bundle(episodes(leases, b"payload")[1:3]))
    assert [each.kind for each in answers(actor)] == ["stored", "stored"]
    learner.ask(wire.Fetch(epoch=1))
    assert learner.payload == b"payload" * 4


def test_a_bundle_of_a_stranger_stores_nothing(broker: Any) -> None:
    broker.learner(order(0, size=2))
    leases = broker.actor().ask(wire.LeaseRequest(num_members=2)).leases
    stranger = broker.stranger(broker.actors)
    stranger.socket.send_multipart(wire.bundle(episodes(leases, b"payload")))
    assert [each.reason for each in answers(stranger)] == ["hello_first"] * 2
    assert broker.counts()["episodes_stored"] == 0


def test_only_episodes_may_share_a_message(broker: Any) -> None:
    actor = broker.actor()
    actor.socket.send_multipart(wire.bundle([wire.encode(wire.LeaseRequest(seq=n, num_members=1)) for n in (1, 2)]))
    assert [(each.seq, each.reason) for each in answers(actor)] == [(1, "kind"), (2, "kind")]


def test_a_bundle_larger_than_the_welcome_allows_is_refused_as_a_whole(broker: Any) -> None:
    actor = broker.actor()
    actor.socket.send_multipart(wire.bundle([wire.encode(wire.Stat(seq=1))] * (wire.MAX_BUNDLE + 1)))
    assert answers(actor)[0].reason == "bundle"
    assert broker.counts()["refused_bundle"] == 1


def test_a_request_before_hello_is_refused(broker: Any) -> None:
    assert broker.stranger(broker.actors).ask(wire.LeaseRequest(num_members=1)).reason == "hello_first"


def test_a_learner_on_the_actors_port_is_told_so(broker: Any) -> None:
    assert broker.stranger(broker.actors).hello("learner").reason == "port"


def test_an_actor_may_not_give_orders(broker: Any) -> None:
    assert broker.actor().ask(wire.PlaceOrders(epoch=0, orders=[])).reason == "kind"


def test_a_whole_group_arrives_with_every_payload_in_order(broker: Any) -> None:
    learner, actor = broker.learner(order(0, size=3)), broker.actor()
    leases = actor.ask(wire.LeaseRequest(num_members=3)).leases
    for lease in reversed(leases):
        assert actor.store(lease, b"payload %d;" % lease.member).kind == "stored"
    ready = learner.ask(wire.Fetch(epoch=1))
    assert [episode.episode for episode in ready.episodes] == ["g-0.0.0", "g-0.1.0", "g-0.2.0"]
    assert learner.payload == b"payload 0;payload 1;payload 2;"


def test_an_episode_sent_twice_is_stored_once(broker: Any) -> None:
    broker.learner(order(0))
    actor = broker.actor()
    lease = lease_of(actor)
    assert [actor.store(lease, b"x").duplicate for _ in range(2)] == [False, True]
    assert broker.counts()["episodes_stored"] == 1


def test_an_episode_for_a_lost_lease_is_refused(make_broker: Callable[..., Any]) -> None:
    broker = make_broker(lease_s=0.2, heartbeat_s=0.05)
    broker.learner(order(0))
    slow, quick = broker.actor(), broker.actor(incarnation="i2")
    lost = lease_of(slow)
    again = lease_of(quick)  # parked until the first lease ends
    assert (again.member, again.attempt) == (lost.member, 1)
    assert slow.store(lost, b"late").reason in ("lease_lost", "hello_first")
    assert quick.store(again, b"in time").kind == "stored"


def test_a_parked_fetch_is_answered_as_soon_as_a_group_is_whole(broker: Any) -> None:
    learner, actor = broker.learner(order(0)), broker.actor()
    learner.send(wire.Fetch(epoch=1, wait_s=20.0))
    assert actor.store(lease_of(actor), b"x").kind == "stored"
    assert learner.receive()[0].group == "g-0"


def test_a_parked_lease_is_answered_as_soon_as_there_are_orders(broker: Any) -> None:
    actor = broker.actor()
    actor.send(wire.LeaseRequest(num_members=1, wait_s=20.0))
    broker.learner(order(0))
    assert actor.receive()[0].leases[0].group == "g-0"


def test_a_parked_fetch_ends_after_its_time_and_says_what_is_missing(broker: Any) -> None:
    learner = broker.learner(order(0, size=3))
    lease_of(broker.actor())
    reply = learner.ask(wire.Fetch(epoch=1, wait_s=0.1))
    assert (reply.orders_open, reply.members_open, reply.members_leased, reply.actors) == (1, 2, 1, 1)


def test_a_lost_delivery_comes_again(broker: Any) -> None:
    learner, actor = broker.learner(order(0), order(1)), broker.actor()
    for lease in actor.ask(wire.LeaseRequest(num_members=2)).leases:
        actor.store(lease, b"x")
    groups = [learner.ask(wire.Fetch(epoch=1, received=received)).group for received in ("", "", "g-0")]
    assert groups == ["g-0", "g-0", "g-1"]


def test_an_older_learner_is_fenced_off(broker: Any) -> None:
    old = broker.learner(order(0))
    broker.learner(incarnation="i2")
    assert old.ask(wire.Fetch(epoch=1)).reason == "fenced"


def test_a_snapshot_notice_reaches_every_actor(broker: Any) -> None:
    actors = [broker.actor(incarnation=f"i{i}") for i in range(2)]
    broker.learner().ask(wire.SnapshotNotice(epoch=1, version=7))
    assert [actor.receive()[0].version for actor in actors] == [7, 7]
    assert broker.actor(incarnation="i3").ask(wire.Heartbeat(leases=[], policy_version=0)).snapshot_version == 7


def test_actors_are_paused_by_credit_and_told_why(make_broker: Callable[..., Any]) -> None:
    broker = make_broker(credit_bytes=1000)
    learner, actor = broker.learner(order(0), order(1)), broker.actor()
    actor.store(lease_of(actor), bytes(2000))
    paused = actor.ask(wire.LeaseRequest(num_members=1))
    assert (paused.leases, "credit_bytes" in paused.paused) == ([], True)
    actor.send(wire.LeaseRequest(num_members=1, wait_s=20.0))
    learner.ask(wire.Fetch(epoch=1))
    assert actor.receive()[0].leases[0].group == "g-1"


def test_a_damaged_payload_costs_its_own_member_which_is_played_again(broker: Any) -> None:
    learner, actor = broker.learner(order(0), order(1)), broker.actor()
    for lease in actor.ask(wire.LeaseRequest(num_members=2)).leases:
        actor.store(lease, b"payload of " + lease.group.encode())
    (path,) = broker.folder.glob("payload-*.bin")
    with path.open("r+b") as file:  # in place: the broker goes on writing to this file
        file.seek(path.read_bytes().index(b"payload of g-0"))
        file.write(b"payload of g-X")
    assert learner.ask(wire.Fetch(epoch=1)).group == "g-1"
    assert learner.payload == b"payload of g-1"
    again = lease_of(actor)
    assert (again.group, again.attempt) == ("g-0", 1)
    actor.store(again, b"played again")
    assert learner.ask(wire.Fetch(epoch=1, received="g-1")).group == "g-0"
    assert learner.payload == b"played again"


def test_a_group_that_is_set_aside_can_be_seen_requeued_and_purged(broker: Any) -> None:
    learner, actor = broker.learner(order(0), order(1)), broker.actor()
    for lease in actor.ask(wire.LeaseRequest(num_members=2)).leases:
        actor.store(lease, lease.group.encode())
    operator = broker.stranger(broker.learners)
    operator.hello("operator")
    for received in ("", "g-0"):
        learner.ask(wire.Fetch(epoch=1, received=received))
    for group in ("g-0", "g-1"):
        assert learner.ask(wire.Quarantine(epoch=1, group=group, reason="nan")).kind == "done"
    listed = operator.ask(wire.Peek(state="quarantined"))
    assert [(row[0], row[3]) for row in listed.rows] == [("g-0", "nan"), ("g-1", "nan")]
    operator.ask(wire.Show(group="g-1"))
    assert operator.payload == b"g-1"
    operator.ask(wire.Requeue(groups=["g-1"]))
    successor = broker.learner(incarnation="i2")
    assert successor.ask(wire.Fetch(epoch=2)).group == "g-0"
    assert successor.ask(wire.Fetch(epoch=2, received="g-0")).dropped == ""
    assert operator.ask(wire.Purge(groups=["g-0"])).kind == "done"
    assert operator.ask(wire.Purge(groups=["g-0"])).reason == "not_quarantined"
    assert operator.ask(wire.Peek(group="g-1")).rows[0][2] == "stored"


def test_leases_that_a_dead_connection_could_not_take_are_free_at_once(broker: Any) -> None:
    dead, alive = broker.actor(name="dead"), broker.actor(name="alive")
    dead.send(wire.LeaseRequest(num_members=2, wait_s=30.0))
    broker.counts()  # the request is parked by now
    dead.socket.close()
    ends = {"event": "disconnected"}
    while not broker.metrics.registry.get_sample_value("matpo_broker_connections_total", ends):
        broker.counts()
    broker.learner(order(0, 2))
    leases = alive.ask(wire.LeaseRequest(num_members=2, wait_s=5.0)).leases
    assert len(leases) == 2


def test_a_turn_takes_no_more_than_its_bound_however_long_the_disk_is_busy(broker: Any) -> None:
    done: Future[float] = Future()
    with broker.another(broker.folder.parent / "other") as server:
        ports = server.bind("127.0.0.1", actor_port=0, learner_port=0)
        other = broker.stranger(ports[0])
        for seq in range(3 * TURN_MESSAGES):
            other.socket.send_multipart([msgpack.packb({"v": 1, "seq": seq, "kind": "stat"}), b""])
        threading.Timer(2.0, done.set_result, [0.0]).start()
        assert len(server._receive_during(done)) == TURN_MESSAGES


def test_a_broker_that_drains_hands_out_nothing_and_stores_what_is_in_play(broker: Any) -> None:
    broker.learner(order(0), order(1))
    actor, operator = broker.actor(), broker.stranger(broker.learners)
    lease = lease_of(actor)
    operator.hello("operator")
    operator.ask(wire.Drain(on=True))
    drained = actor.ask(wire.LeaseRequest(num_members=1))
    assert (drained.leases, "drain" in drained.paused) == ([], True)
    assert actor.store(lease, b"x").kind == "stored"
    operator.ask(wire.Drain(on=False))
    assert lease_of(actor).group == "g-1"


def test_an_operator_and_an_actor_say_only_what_their_role_may(broker: Any) -> None:
    broker.learner(order(0))
    actor, operator = broker.actor(), broker.stranger(broker.learners)
    operator.hello("operator")
    assert operator.ask(wire.Commit(epoch=1, checkpoint="c", consumed_below=1, consumed=[])).reason == "kind"
    assert actor.ask(wire.Drain(on=True)).reason == "kind"


def test_a_routing_id_of_ones_own_is_refused(broker: Any) -> None:
    stranger = broker.stranger(broker.actors, routing_id=b"actor-7")
    assert stranger.ask(wire.Stat()).reason == "identity"


def test_an_acknowledgement_names_what_it_means(make_broker: Callable[..., Any]) -> None:
    for policy in ("group", "always", "interval", "never"):
        broker = make_broker(durability=policy)
        broker.learner(order(0))
        actor = broker.actor()
        assert actor.store(lease_of(actor), b"x").durability == policy
        broker.stop()
        shutil.rmtree(broker.folder)


def test_payload_files_are_deleted_when_the_oldest_kept_checkpoint_covers_them(make_broker: Callable[..., Any]) -> None:
    broker = make_broker(journal_file_bytes=100)
    learner, actor = broker.learner(*(order(i) for i in range(4))), broker.actor()
    for lease in actor.ask(wire.LeaseRequest(num_members=4)).leases:
        actor.store(lease, bytes(200))
    commit = wire.Commit(epoch=1, checkpoint="c", consumed_below=4, consumed=[], oldest_kept_below=2)
    assert learner.ask(commit).kind == "done"
    learner.ask(wire.Stat())  # files go after the reply; the next turn is after that
    assert len(list(broker.folder.glob("payload-*.bin"))) == 2


def test_everything_is_there_after_a_restart(broker: Any) -> None:
    learner, actor = broker.learner(order(0), order(1)), broker.actor()
    first, second = actor.ask(wire.LeaseRequest(num_members=2)).leases
    actor.store(first, b"first")
    broker.stop()
    broker.start()
    actor, learner = broker.actor(), broker.stranger(broker.learners)
    assert learner.hello("learner").epoch == 1  # the same process: the same epoch, no resume needed
    assert actor.store(second, b"second").kind == "stored"
    assert [learner.ask(wire.Fetch(epoch=1, received=r)).group for r in ("", "g-0")] == ["g-0", "g-1"]
    assert learner.payload == b"second"


def test_a_taken_port_is_a_setup_error_that_names_it(broker: Any, tmp_path: Path) -> None:
    with (
        broker.another(tmp_path / "other") as server,
        pytest.raises(SetupError, match=rf"{broker.ports[0]}.*broker\.actor_port"),
    ):
        server.bind("127.0.0.1", actor_port=broker.ports[0], learner_port=0)
