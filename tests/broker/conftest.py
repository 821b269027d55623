"""A broker's server on a thread, and a raw peer, for tests that need real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from matpo import wire
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.clock import PatientClock
from matpo_broker.gate import Gate
from matpo_broker.members import Rules
from matpo_broker.server import Server
from matpo_broker.store import Store


class Peer:
    """A DEALER socket that can also send what no peer of ours would."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, routing_id: bytes = b"") -> None:
        self.socket = context.socket(zmq.DEALER)
        if routing_id:
            self.socket.routing_id = routing_id
        self.socket.linger = 0
        self.socket.rcvtimeo = 5000
        self.socket.connect(endpoint)
        self.seq = 0

    def send(self, message: wire.AnyMessage, payload: bytes = b"") -> int:
        self.seq += 1
        self.socket.send_multipart(wire.encode(message.model_copy(update={"seq": self.seq}), payload))
        return self.seq

    def receive(self) -> tuple[Any, bytes]:
        message, payload = wire.decode(self.socket.recv_multipart())
        return message, bytes(payload)

    def ask(self, message: wire.AnyMessage, payload: bytes = b"") -> Any:
        seq = self.send(message, payload)
        reply, self.payload = self.receive()
        assert reply.seq == seq
        return reply

    def hello(self, peer: str, *, incarnation: str = "i1", **fields: object) -> Any:
        values = {"peer": peer, "name": peer, "incarnation": incarnation, "run": "r", "schema_version": 1, **fields}
        return self.ask(wire.Hello.model_validate(values))

    def store(self, lease: wire.Lease, payload: bytes, **changes: object) -> Any:
        message = wire.StoreEpisode(
            lease=lease.lease,
            group=lease.group,
            member=lease.member,
            attempt=lease.attempt,
            episode=f"{lease.group}.{lease.member}.{lease.attempt}",
            num_bytes=len(payload),
            crc32c=wire.crc32c(payload),
        )
        return self.ask(message.model_copy(update=changes), payload)


class Broker:
    """Server, ledger and journal in one folder; `stop` and `start` are a restart."""

    def __init__(self, folder: Path, context: zmq.Context[Any], **settings: object) -> None:
        self.folder = folder
        self.keys: Path | None = None
        self.settings = BrokerSettings.model_validate({"max_payload_bytes": 100_000, **settings})
        self.metrics = Metrics("broker")
        self.peers: list[Peer] = []
        self.ports = (0, 0)
        self._context = context

    def start(self) -> None:
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        assert self._bound.wait(10)

    def _live(self) -> None:
        with self.another(self.folder) as self.server:
            actors, learners = self.ports
            self.actors, self.learners = self.server.bind("127.0.0.1", actor_port=actors, learner_port=learners)
            self.ports = (int(self.actors.rpartition(":")[2]), int(self.learners.rpartition(":")[2]))
            self._bound.set()
            self.server.serve()

    @contextmanager
    def another(self, folder: Path) -> Iterator[Server]:
        """A server of these settings that listens nowhere yet."""
        settings = self.settings
        rules = Rules(
            run="r",
            lease_s=settings.lease_s,
            max_attempts=settings.max_attempts,
            max_deliveries=settings.max_deliveries,
            credit_bytes=settings.credit_bytes,
        )
        clock = PatientClock(time.monotonic)
        store = Store(folder, rules, settings, self.metrics, now_s=clock())
        server = Server(settings, store, Gate(self.keys, self.metrics), self.metrics, clock=clock)
        yield server
        server.close(linger_s=0)
        store.close()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.server.stop()
            self._thread.join(10)
        assert not self._thread.is_alive()

    def actor(self, **fields: Any) -> Peer:
        peer = self.stranger(self.actors)
        assert isinstance(peer.hello("actor", **fields), wire.Welcome)
        return peer

    def learner(self, *orders: wire.Order, **fields: Any) -> Peer:
        peer = self.stranger(self.learners)
        epoch = peer.hello("learner", **fields).epoch
        assert peer.ask(wire.Resume(epoch=epoch, checkpoint="", consumed_below=0, consumed=[])).kind == "done"
        assert peer.ask(wire.PlaceOrders(epoch=epoch, orders=list(orders))).kind == "done"
        return peer

    def stranger(self, endpoint: str, **options: Any) -> Peer:
        self.peers.append(Peer(self._context, endpoint, **options))
        return self.peers[-1]

    def counts(self) -> dict[str, int | float | str]:
        reply = self.stranger(self.learners).ask(wire.Stat())
        assert isinstance(reply, wire.StatReply)
        return reply.counts


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    context: zmq.Context[Any] = zmq.Context()
    brokers: list[Broker] = []

    def make(**settings: object) -> Broker:
        brokers.append(Broker(tmp_path / "journal", context, **settings))
        brokers[-1].start()
        return brokers[-1]

    yield make
    for broker in brokers:
        for peer in broker.peers:
            peer.socket.close()
        broker.stop()
    context.term()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    return make_broker()
