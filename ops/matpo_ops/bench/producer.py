"""One process that makes load: a few connections, each with a bounded window of episodes on the way.

    python -m matpo_ops.bench.producer '{"kind": "broker", "name": "p-0", "run_file": "run.toml", ...}'

It says "ready" when every connection stands, waits for one line {"begin_s": ..., "end_s": ...} (monotonic seconds),
sends from then on, and ends with one line: what was acknowledged between the two instants, with each latency.

Rules; each has a test in tests/ops/test_bench.py:
1. It costs as little as it can: it stands for many machines, and shares the cores with what is measured. So headers
   are packed directly and payloads are made, and their CRC32C computed, once.
2. It ends when its parent does: the end of its standard input ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgpack
import zmq

from matpo import heap, wire
from matpo.security import Role, client_keys
from matpo.settings import load_run_file

NUM_PAYLOADS = 8
LEASES_AHEAD = 2  # windows
RUN = "bench"
SCHEMA_VERSION = 1
HELLO_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one process does. `address`: the broker's run file, or Redis's "host:port"."""

    kind: Literal["broker", "redis"]
    address: str
    name: str
    payload_bytes: int
    window: int  # episodes on the way, of each connection
    connections: int = 1
    certificate: str = ""  # redis: use TLS, and trust this file
    trim: bool = True  # redis: keep only the newest entries; no consumer does it


class Connection(Protocol):
    """One producer. `acked` has (sent, acknowledged) in monotonic seconds; `source` is what zmq.Poller can watch."""

    source: Any
    acked: list[tuple[float, float]]

    def fill(self) -> None:
        """Send until the window is full."""

    def receive(self) -> None:
        """Take what has arrived."""

    def close(self) -> None:
        """Drop the connection."""


class BrokerConnection:
    """An actor, as the broker sees it: leases members and stores their episodes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], spec: Spec, name: str) -> None:
        self.acked: list[tuple[float, float]] = []
        self.source = connect(context, Path(spec.address), "actor")
        self._window = spec.window
        self._payloads = payloads_of(spec.payload_bytes)
        self._leases: deque[dict[str, Any]] = deque()
        self._sent: dict[int, float] = {}
        self._seq = 0
        self._asked = False
        hello = wire.Hello(peer="actor", name=name, incarnation=name, run=RUN, schema_version=SCHEMA_VERSION)
        self.source.send_multipart(wire.encode(hello))
        welcome, _ = wire.decode(self.source.recv_multipart())
        if not isinstance(welcome, wire.Welcome):
            raise SystemExit(f"the broker answered hello with {welcome}")
        self._bundle = max(1, min(welcome.bundle_episodes, wire.BUNDLE_BYTES // spec.payload_bytes))

    def fill(self) -> None:
        """Store an episode for each lease in hand, as an actor's link would, and ask for more in time."""
        while num_ready := min(len(self._leases), self._window - len(self._sent), self._bundle):
            header, payload = wire.bundle([self._episode(self._leases.popleft()) for _ in range(num_ready)])
            self.source.send(header, zmq.SNDMORE)
            self.source.send(payload, copy=False)
        if not self._asked and len(self._leases) < LEASES_AHEAD * self._window:
            self._asked = True
            self._seq += 1
            request = wire.LeaseRequest(seq=self._seq, num_members=LEASES_AHEAD * self._window, wait_s=10.0)
            self.source.send_multipart(wire.encode(request))

    def receive(self) -> None:
        """Count what was stored, keep what was leased."""
        while True:
            try:
                frames = self.source.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for header, _ in wire.unbundle(frames):
                self._take(msgpack.unpackb(header))

    def close(self) -> None:
        """Drop the connection."""
        self.source.close()

    def _take(self, reply: dict[str, Any]) -> None:
        if reply["kind"] == "stored":
            self.acked.append((self._sent.pop(reply["seq"]), time.monotonic()))
        elif reply["kind"] == "leases":
            self._asked = False
            self._leases.extend(reply["leases"])
        else:
            raise SystemExit(f"the broker answered {reply}")

    def _episode(self, lease: dict[str, Any]) -> tuple[bytes, bytes]:
        self._seq += 1
        payload, crc = self._payloads[self._seq % NUM_PAYLOADS]
        self._sent[self._seq] = time.monotonic()
        return episode_header(self._seq, lease, len(payload), crc), payload


def episode_header(seq: int, lease: dict[str, Any], num_bytes: int, crc32c: int) -> bytes:
    """The header of a wire.StoreEpisode."""
    group, member, attempt = lease["group"], lease["member"], lease["attempt"]
    fields = {
        "v": wire.WIRE_VERSION, "seq": seq, "kind": "episode", "lease": lease["lease"], "group": group,
        "member": member, "attempt": attempt, "episode": f"{group}.{member}.{attempt}", "num_bytes": num_bytes,
        "crc32c": crc32c, "num_tokens": num_bytes // 16, "min_version": 0, "environment": "bench",
    }  # fmt: skip
    packed: bytes = msgpack.packb(fields)
    return packed


def payloads_of(num_bytes: int) -> list[tuple[bytes, int]]:
    """A few payloads that do not compress, each with its CRC32C."""
    payloads = [os.urandom(num_bytes) for _ in range(NUM_PAYLOADS)]
    return [(payload, wire.crc32c(payload)) for payload in payloads]


def connect(context: zmq.Context[zmq.Socket[bytes]], run_path: Path, role: Role) -> zmq.Socket[bytes]:
    """A DEALER at the broker of a run file, with the keys that the run file names."""
    run_file = load_run_file(run_path)
    port = run_file.broker.actor_port if role == "actor" else run_file.broker.learner_port
    socket = context.socket(zmq.DEALER)
    for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVTIMEO, int(HELLO_S * 1000))):
        socket.setsockopt(option, value)
    if keys := client_keys(run_file, role):
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.curve_serverkey = keys.broker.encode()
    socket.connect(f"tcp://{run_file.broker.host}:{port}")
    return socket


def drive(connections: list[Connection], end_s: float) -> None:
    """Keep every window full until `end_s`."""
    poller = zmq.Poller()
    by_source: dict[Any, Connection] = {}
    for connection in connections:
        source = connection.source
        by_source[source if isinstance(source, zmq.Socket) else source.fileno()] = connection
        poller.register(connection.source, zmq.POLLIN)
        connection.fill()
    poller.register(sys.stdin, zmq.POLLIN)
    while time.monotonic() < end_s:
        for source, _ in poller.poll(100):
            if source not in by_source:
                raise SystemExit("the parent is gone")
            by_source[source].receive()
            by_source[source].fill()


def report(connections: list[Connection], begin_s: float, end_s: float) -> dict[str, Any]:
    """What was acknowledged in that time: how many, and after how many milliseconds each."""
    acked = [(sent, done) for connection in connections for sent, done in connection.acked if begin_s <= done < end_s]
    return {"episodes": len(acked), "latencies_ms": [round((done - sent) * 1e3, 2) for sent, done in acked]}


def _connections(context: zmq.Context[zmq.Socket[bytes]], spec: Spec) -> list[Connection]:
    names = [f"{spec.name}-{i}" for i in range(spec.connections)]
    if spec.kind == "broker":
        return [BrokerConnection(context, spec, name) for name in names]
    from matpo_ops.bench.redis_streams import RedisConnection

    return [RedisConnection(spec) for _ in names]


def main() -> None:
    """Entry point of the process."""
    heap.keep_buffers()
    spec = Spec(**json.loads(sys.argv[1]))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    connections = _connections(context, spec)
    print("ready", flush=True)
    when = json.loads(sys.stdin.readline() or "{}")
    if when:
        drive(connections, when["end_s"])
        print(json.dumps(report(connections, when["begin_s"], when["end_s"])), flush=True)
    for connection in connections:
        connection.close()
    context.term()


if __name__ == "__main__":
    main()
