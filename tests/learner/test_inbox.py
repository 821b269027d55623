"""matpo_learner.inbox: whole, sound groups in, from a scripted broker on a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq

from matpo import schema, wire
from matpo.episode import Episode, Segment, Task
from matpo.errors import RefusedError
from matpo_learner.inbox import Inbox, unpack
from matpo_learner.orders import Book, OrderStream

TASKS = [Task(id=f"t{i}", environment="toy", question="?") for i in range(3)]
STREAM = OrderStream(TASKS, seed=0, group_size=2)


def payload_of(index: int, member: int, **changes: Any) -> bytes:
    sampled = np.array([False, True])
    segment = Segment(
        index=0,
        parent=-1,
        role="planner",
        token_ids=np.array([1, changes.pop("token", 2)], np.int32),
        sampled=sampled,
        logprobs=np.array([0, -1], np.float32),
        versions=np.array([-1, changes.pop("version", 0)], np.int32),
    )
    values: dict[str, Any] = {"group": f"g-{index:08d}", "member": member, "attempt": 0, "task": STREAM.task(index)}
    values |= changes
    name = f"{values['group']}.{values['member']}.{values['attempt']}"
    return schema.encode(Episode(id=name, segments=[segment], answer="", reward=1.0, **values))


def group_of(index: int, payloads: list[bytes] | None = None) -> tuple[wire.GroupReady, bytes]:
    payloads = [payload_of(index, member) for member in range(2)] if payloads is None else payloads
    episodes = [
        wire.DeliveredEpisode(
            episode=f"g-{index:08d}.{member}.0", member=member, attempt=0, num_bytes=len(p), crc32c=wire.crc32c(p)
        )
        for member, p in enumerate(payloads)
    ]
    return wire.GroupReady(group=f"g-{index:08d}", index=index, episodes=episodes), b"".join(payloads)


def judge(message: wire.GroupReady, payload: bytes) -> tuple[str, str]:
    delivery = unpack(message, payload, stream=STREAM, group_size=2, vocab_size=10, published=3)
    assert (delivery.group is None) == bool(delivery.fate)
    return delivery.fate, delivery.reason


def test_a_whole_sound_group_is_given() -> None:
    message, payload = group_of(1)
    delivery = unpack(message, payload, stream=STREAM, group_size=2, vocab_size=10, published=3)
    assert delivery.group is not None
    assert [e.id for e in delivery.group.episodes] == ["g-00000001.0.0", "g-00000001.1.0"]
    assert b"".join(delivery.payloads) == payload


def test_a_group_that_the_broker_gave_up_is_dropped_with_its_reason() -> None:
    message = wire.GroupReady(group="g-00000001", index=1, episodes=[], dropped="attempts")
    assert judge(message, b"") == ("dropped", "attempts")


BAD_GROUPS: dict[str, tuple[str, list[bytes]]] = {
    "a missing member": ("members", [payload_of(1, 0)]),
    "a member too many": ("members", [payload_of(1, 0), payload_of(1, 1), payload_of(1, 2)]),
    "a member of another group": ("ids", [payload_of(1, 0), payload_of(2, 1)]),
    "a member in another's place": ("ids", [payload_of(1, 1), payload_of(1, 0)]),
    "another task": ("task", [payload_of(1, 0), payload_of(1, 1, task=Task(id="x", environment="", question=""))]),
    "a task of another environment": (
        "task",
        [payload_of(1, 0), payload_of(1, 1, task=replace(STREAM.task(1), environment="other"))],
    ),
    "a token beyond the vocabulary": ("vocabulary", [payload_of(1, 0), payload_of(1, 1, token=10)]),
    "a version that is not published": ("versions", [payload_of(1, 0), payload_of(1, 1, version=4)]),
    "garbage": ("framing", [payload_of(1, 0), b"garbage"]),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_a_group_with_one_bad_episode_is_invalid_as_a_whole(name: str) -> None:
    reason, payloads = BAD_GROUPS[name]
    assert judge(*group_of(1, payloads)) == ("invalid", reason)


def test_a_payload_that_was_changed_on_the_way_is_invalid() -> None:
    message, payload = group_of(1)
    assert judge(message, payload[:-1] + b"x") == ("invalid", "payload_hash")
    assert judge(message, payload + b"x") == ("invalid", "payload_size")


class ScriptedBroker:
    """Answers one learner on a real socket. `groups` are handed out in order, then again from the start if `again`."""

    def __init__(self, groups: list[int]) -> None:
        self.groups = groups
        self.received: list[wire.AnyMessage] = []
        self.fetched = 0
        self.refuse: wire.Refused | None = None
        self.silent = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def kinds(self) -> list[str]:
        return [m.kind for m in self.received if m.kind != "fetch"]

    def _serve(self) -> None:
        while not self._ends.is_set():
            if not self._socket.poll(20):
                continue
            peer, *frames = self._socket.recv_multipart()
            message, _ = wire.decode(frames)
            self.received.append(message)
            if not self.silent.is_set():
                reply, payload = self._answer(message)
                self._socket.send_multipart(
                    [peer, *wire.encode(reply.model_copy(update={"seq": message.seq}), payload)]
                )

    def _answer(self, message: wire.AnyMessage) -> tuple[wire.AnyMessage, bytes]:
        if isinstance(message, wire.Hello):
            return wire.Welcome(
                epoch=7,
                heartbeat_s=1.0,
                lease_s=9.0,
                snapshot_version=-1,
                durability="none",
                max_payload_bytes=1 << 20,
                window_bytes=1 << 20,
                window_episodes=64,
            ), b""
        if isinstance(message, wire.Fetch):
            if self.refuse is not None:
                return self.refuse, b""
            if self.fetched < len(self.groups):
                self.fetched += 1
                return group_of(self.groups[self.fetched - 1])
            time.sleep(0.02)
            return wire.NoGroup(orders_open=1, members_open=2, members_leased=0, actors=0), b""
        return wire.Done(), b""


@pytest.fixture
def connect() -> Iterator[Callable[..., tuple[ScriptedBroker, Inbox]]]:
    opened: list[tuple[ScriptedBroker, Inbox]] = []

    def open_both(groups: list[int], *, prefetch: int = 8, book: Book | None = None) -> tuple[ScriptedBroker, Inbox]:
        broker = ScriptedBroker(groups)
        hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1)
        inbox = Inbox(
            f"tcp://127.0.0.1:{broker.port}",
            hello,
            stream=STREAM,
            group_size=2,
            vocab_size=10,
            prefetch=prefetch,
        )
        opened.append((broker, inbox))
        inbox.start()
        inbox.published = 0
        inbox.resume("", book or Book())
        return broker, inbox

    yield open_both
    for broker, inbox in opened:
        inbox.stop()
        broker.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


Connect = Callable[..., tuple[ScriptedBroker, Inbox]]


def test_groups_are_given_once_however_often_they_are_delivered(connect: Connect) -> None:
    _, inbox = connect([1, 2, 1, 2, 3])
    taken = [inbox.take(5) for _ in range(3)]
    assert [d.index for d in taken if d] == [1, 2, 3]
    assert inbox.take(0.1) is None


def test_what_the_checkpoint_covers_is_not_given_again(connect: Connect) -> None:
    _, inbox = connect([0, 1, 2, 3], book=Book(cursor=4, consumed_below=1, consumed={2}))
    assert [d.index for d in (inbox.take(5), inbox.take(5)) if d] == [1, 3]


def test_the_oldest_waiting_group_goes_first(connect: Connect) -> None:
    broker, inbox = connect([5, 3, 4])
    wait_until(lambda: broker.fetched == 3 and len(inbox._waiting) == 3)
    assert [d.index for d in (inbox.take(5), inbox.take(5), inbox.take(5)) if d] == [3, 4, 5]


def test_no_more_than_prefetch_groups_wait(connect: Connect) -> None:
    broker, inbox = connect(list(range(10)), prefetch=2)
    wait_until(lambda: broker.fetched == 2)
    assert inbox.take(5) is not None
    wait_until(lambda: broker.fetched == 3)
    assert inbox.take(0) is not None
    wait_until(lambda: broker.fetched == 4)
    assert broker.fetched == 4


def test_messages_go_out_in_order_with_the_epoch_of_the_welcome(connect: Connect) -> None:
    broker, inbox = connect([])
    inbox.notice(0)
    inbox.place([0, 1])
    inbox.commit("c000001", Book(cursor=2, consumed_below=1), oldest_kept_below=1)
    inbox.stop()
    assert broker.kinds() == ["hello", "resume", "snapshot", "orders", "commit"]
    assert {m.epoch for m in broker.received if hasattr(m, "epoch")} == {7}


def test_an_invalid_group_is_quarantined_at_the_broker(connect: Connect) -> None:
    broker, inbox = connect([])
    message, payload = group_of(1, [payload_of(1, 0), b"garbage"])
    inbox._loop.call_soon_threadsafe(inbox._receive, message, payload)
    assert (delivery := inbox.take(5)) is not None
    assert delivery.fate == "invalid"
    inbox.stop()
    (asked,) = [m for m in broker.received if isinstance(m, wire.Quarantine)]
    assert (asked.group, asked.reason) == ("g-00000001", "framing")


def test_what_was_trained_is_said_and_the_goodbye_is_last(connect: Connect) -> None:
    broker, inbox = connect([])
    inbox.trained([3, 5])
    inbox.say_goodbye()
    inbox.stop()
    assert broker.kinds() == ["hello", "resume", "trained", "goodbye"]
    assert [m.indices for m in broker.received if isinstance(m, wire.Trained)] == [[3, 5]]


def test_the_broker_is_told_which_tokens_are_too_old(connect: Connect) -> None:
    broker, inbox = connect([])
    inbox.min_version = 4
    wait_until(lambda: any(m.min_version == 4 for m in broker.received if isinstance(m, wire.Fetch)))


def test_open_orders_are_placed_again_after_a_resume(connect: Connect) -> None:
    broker, inbox = connect([], book=Book(cursor=4, consumed_below=1, consumed={2}))
    inbox.stop()
    placed = [order.index for m in broker.received if isinstance(m, wire.PlaceOrders) for order in m.orders]
    assert placed == [1, 3]


def test_a_refusal_for_good_ends_the_learner(connect: Connect) -> None:
    broker, inbox = connect([])
    broker.refuse = wire.Refused(reason="fenced", message="epoch 7 is over")
    wait_until(lambda: inbox._failure is not None)
    with pytest.raises(RefusedError, match="epoch 7 is over"):
        inbox.take(5)


def test_a_refusal_for_now_is_asked_again(connect: Connect) -> None:
    broker, inbox = connect([])
    broker.refuse = wire.Refused(reason="busy", message="later", retry_after_s=0.01)
    wait_until(lambda: len([m for m in broker.received if m.kind == "fetch"]) > 2)
    broker.groups.append(1)
    broker.refuse = None
    assert inbox.take(5) is not None


def test_who_is_waited_for_is_said_in_words(connect: Connect) -> None:
    _, inbox = connect([])
    assert "matpo-broker" in inbox.waits_for().why
    wait_until(lambda: inbox._idle is not None)
    waits_for = inbox.waits_for()
    assert waits_for.who == "actors"
    assert waits_for.why == "actors: none is connected, 2 members are ordered. Start matpo-actor."
