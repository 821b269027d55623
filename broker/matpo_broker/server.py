"""Two ROUTER sockets and one loop around the ledger and the journal. Decides nothing: the ledger does.

One turn: take what has arrived (bounded) -> let the ledger decide, append payloads -> one fdatasync -> one ledger
commit -> send every reply. So nothing is acknowledged that is not on disk; and if the disk says no, nothing is
acknowledged at all: OSError and sqlite3.Error leave `turn` with the replies unsent, and the process must end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import zmq

from matpo import logs, wire
from matpo.errors import JournalError, ProtocolError, RefusedError, SetupError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.journal import Journal
from matpo_broker.ledger import Ledger

TURN_MESSAGES = 512  # per socket; the other socket and the sync wait for no more than this
TURN_BYTES = 64 * 2**20
MAX_WAIT_S = 30.0  # a request is parked no longer, whatever it asks for
REPORT_S = 1.0  # between two updates of the gauges
FRAME_SLACK_BYTES = 2**20  # a payload a little too large is refused with a message, a much larger one cut off

_ACTOR_KINDS = (wire.LeaseRequest, wire.StoreEpisode, wire.Heartbeat, wire.Release)
_LEARNER_KINDS = (wire.Resume, wire.PlaceOrders, wire.Fetch, wire.Commit, wire.SnapshotNotice)

log = logs.get()


Address = tuple["zmq.Socket[bytes]", bytes]  # the socket, and the identity that ROUTER gave the connection


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One connection that said hello. `key` names its process in the ledger."""

    hello: wire.Hello
    key: str
    heard_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Parked:
    """A lease or fetch request that waits for something to hand out."""

    address: Address
    message: wire.LeaseRequest | wire.Fetch
    until_s: float


class Server:
    """Serves one ledger and journal until `stop`. `clock` is monotonic seconds."""

    def __init__(
        self,
        settings: BrokerSettings,
        ledger: Ledger,
        journal: Journal,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._journal = journal
        self._metrics = metrics
        self._clock = clock
        self._peers: dict[Address, Peer] = {}
        self._parked: dict[tuple[Address, str], Parked] = {}  # by peer and kind, oldest first
        self._replies: list[tuple[Address, wire.AnyMessage, bytes]] = []
        self._unsynced = False
        self._obsolete: list[int] = []
        self._report_at_s = 0.0
        self._counters: dict[str, int] = {}
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()
        self._context = zmq.Context()
        # A learner's replies hold whole groups, so few of them may wait in its socket.
        self._actors = self._socket(receive_hwm=8, send_hwm=1000)
        self._learners = self._socket(receive_hwm=64, send_hwm=16)
        self._poller = zmq.Poller()
        for source in (self._actors, self._learners, self._wake_read):
            self._poller.register(source, zmq.POLLIN)

    def bind(self, address: str, *, actor_port: int, learner_port: int) -> tuple[str, str]:
        """Listen; port 0 picks a free one. Returns both endpoints. Raises SetupError when a port is taken."""
        return (
            _bind(self._actors, address, actor_port, "broker.actor_port"),
            _bind(self._learners, address, learner_port, "broker.learner_port"),
        )

    def stop(self) -> None:
        """End `serve` after the turn in progress. Safe in a signal handler and from other threads."""
        if self._wake_write >= 0:
            os.write(self._wake_write, b"x")

    def serve(self) -> None:
        """Turn until `stop`. Raises OSError or sqlite3.Error when the disk fails; end the process then."""
        while not self._stopping:
            self.turn()

    def close(self, *, linger_s: float = 1.0) -> None:
        """Close the sockets; replies already sent get `linger_s` to leave."""
        for socket in (self._actors, self._learners):
            socket.close(linger=int(linger_s * 1000))
        self._context.term()
        read, write, self._wake_read, self._wake_write = self._wake_read, self._wake_write, -1, -1
        os.close(read)
        os.close(write)

    # ---- the loop

    def turn(self) -> None:
        """One turn of the loop. Returns after at most REPORT_S when nothing happens."""
        arrived = self._drain()
        now_s = self._clock()
        started_s = perf_counter()
        for address, frames in arrived:
            self._answer(address, frames, now_s)
        self._ledger.expire(now_s)
        self._serve_parked(now_s)
        if self._unsynced:
            self._sync()
        self._ledger.commit()
        if arrived:
            self._metrics.observe("commit_seconds", perf_counter() - started_s)
        self._flush()
        if self._obsolete:
            self._journal.remove(self._obsolete)
            self._obsolete = []
        if now_s >= self._report_at_s:
            self._report(now_s)

    def _sync(self) -> None:
        started_s = perf_counter()
        self._journal.sync()
        self._metrics.observe("fsync_seconds", perf_counter() - started_s)
        self._unsynced = False

    def _drain(self) -> list[tuple[Address, list[bytes]]]:
        now_s = self._clock()
        due_s = min(
            [self._ledger.next_deadline_s, now_s + REPORT_S, *(parked.until_s for parked in self._parked.values())]
        )
        ready = dict(self._poller.poll(max(0, int((due_s - now_s) * 1000) + 1)))
        if self._wake_read in ready:
            os.read(self._wake_read, 64)
            self._stopping = True
        arrived: list[tuple[Address, list[bytes]]] = []
        for socket in (self._learners, self._actors):
            num_bytes = num_messages = 0
            while socket in ready and num_messages < TURN_MESSAGES and num_bytes < TURN_BYTES:
                try:
                    identity, *frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                arrived.append(((socket, identity), frames))
                num_messages += 1
                num_bytes += sum(len(frame) for frame in frames)
        return arrived

    def _flush(self) -> None:
        for (socket, identity), message, payload in self._replies:
            try:
                socket.send_multipart([identity, *wire.encode(message, payload)], zmq.NOBLOCK)
            except zmq.ZMQError as error:  # gone, or not reading. Requests are idempotent: the peer asks again.
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._bump("replies_undeliverable")
                if error.errno == zmq.EHOSTUNREACH:
                    self._peers.pop((socket, identity), None)
                continue
            self._metrics.count("bytes_total", len(payload), direction="out")
        self._replies.clear()

    # ---- one message

    def _answer(self, address: Address, frames: list[bytes], now_s: float) -> None:
        try:
            message, payload = wire.decode(frames)
        except ProtocolError as error:
            self._refuse(address, wire.peek_seq(frames), error.reason, str(error))
            return
        try:
            self._dispatch(address, message, bytes(payload), now_s)
        except ProtocolError as error:
            self._refuse(address, message.seq, error.reason, str(error), kind=message.kind)
        except RefusedError as error:
            self._refuse(address, message.seq, error.reason, str(error), error.retry_after_s, kind=message.kind)

    def _dispatch(self, address: Address, message: wire.AnyMessage, payload: bytes, now_s: float) -> None:
        if isinstance(message, wire.Hello):
            self._reply(address, message, self._welcome(address, message, now_s))
            return
        if isinstance(message, wire.Stat):
            self._reply(address, message, wire.StatReply(counts=self._stat()))
            return
        peer = self._peers.get(address)
        if peer is None:
            raise RefusedError("say hello first", reason="hello_first", retry_after_s=0.0)
        self._peers[address] = replace(peer, heard_s=now_s)
        if isinstance(message, wire.Goodbye):
            self._ledger.depart(peer.key)
            del self._peers[address]
            self._reply(address, message, wire.Done())
        elif peer.hello.peer == "actor" and isinstance(message, _ACTOR_KINDS):
            self._from_actor(address, peer, message, payload, now_s)
        elif peer.hello.peer == "learner" and isinstance(message, _LEARNER_KINDS):
            self._from_learner(address, message, now_s)
        else:
            raise ProtocolError(f"{peer.hello.peer} {peer.hello.name} may not send {message.kind}", reason="kind")

    def _from_actor(self, address: Address, peer: Peer, message: wire.AnyMessage, payload: bytes, now_s: float) -> None:
        if isinstance(message, wire.StoreEpisode):
            self._reply(address, message, self._store(peer, message, payload))
        elif isinstance(message, wire.LeaseRequest):
            self._ledger.check_peer(peer.hello)  # the learner may have come after this actor's hello
            self._park(address, message, now_s)
        elif isinstance(message, wire.Heartbeat):
            lost = self._ledger.heartbeat(peer.key, message.leases, now_s)
            window_bytes, window_episodes = self._window()
            alive = wire.Alive(
                lost=lost,
                snapshot_version=self._ledger.snapshot_version,
                window_bytes=window_bytes,
                window_episodes=window_episodes,
            )
            self._reply(address, message, alive)
        elif isinstance(message, wire.Release):
            self._ledger.release(peer.key, message.leases, infra=message.infra)
            log.info("leases.released", actor=peer.hello.name, num_leases=len(message.leases), why=message.reason[:200])
            self._reply(address, message, wire.Done())

    def _from_learner(self, address: Address, message: wire.AnyMessage, now_s: float) -> None:
        if isinstance(message, wire.Fetch):
            self._park(address, message, now_s)
            return
        if isinstance(message, wire.Resume):
            self._ledger.resume(message)
        elif isinstance(message, wire.PlaceOrders):
            self._ledger.place(message)
        elif isinstance(message, wire.Commit):
            files = [file for file in self._ledger.cover(message) if file != self._journal.current_file]
            self._ledger.forget_files(files)
            self._obsolete += files
        elif isinstance(message, wire.SnapshotNotice):
            self._ledger.announce(message)
            notice = message.model_copy(update={"seq": 0})
            actors = [where for where, peer in self._peers.items() if peer.hello.peer == "actor"]
            self._replies += [(where, notice, b"") for where in actors]
        self._reply(address, message, wire.Done())

    def _welcome(self, address: Address, hello: wire.Hello, now_s: float) -> wire.Welcome:
        if (address[0] is self._actors) != (hello.peer == "actor"):
            raise RefusedError(
                f"this is not the port for a {hello.peer}. Actors use broker.actor_port, others broker.learner_port.",
                reason="port",
            )
        self._ledger.check_peer(hello)
        epoch = self._ledger.greet_learner(hello) if hello.peer == "learner" else self._ledger.epoch
        self._peers[address] = Peer(hello=hello, key=f"{hello.name}/{hello.incarnation}", heard_s=now_s)
        log.info("peer.hello", peer=hello.peer, name=hello.name, incarnation=hello.incarnation)
        window_bytes, window_episodes = self._window()
        return wire.Welcome(
            epoch=epoch,
            heartbeat_s=self._settings.heartbeat_s,
            lease_s=self._settings.lease_s,
            snapshot_version=self._ledger.snapshot_version,
            durability=self._settings.durability,
            max_payload_bytes=self._settings.max_payload_bytes,
            window_bytes=window_bytes,
            window_episodes=window_episodes,
        )

    def _window(self) -> tuple[int, int]:
        """One actor's credit: its share of what may be on the way."""
        actors = max(1, self._num_actors())
        return self._settings.window_bytes // actors, max(1, self._settings.window_episodes // actors)

    def _store(self, peer: Peer, message: wire.StoreEpisode, payload: bytes) -> wire.Stored:
        self._metrics.count("bytes_total", len(payload), direction="in")
        if len(payload) > self._settings.max_payload_bytes:
            raise RefusedError(
                f"{message.episode} has {len(payload)} bytes, at most {self._settings.max_payload_bytes}. "
                "Raise broker.max_payload_bytes, or make episodes shorter.",
                reason="payload_size",
            )
        wire.check_payload(message, payload)
        new = self._ledger.admit(message)
        if new:
            location = self._journal.append(message.episode, payload, message.crc32c)
            self._unsynced = True
            self._ledger.record(message, peer.key, location)
        self._metrics.count("episodes_total", result="stored" if new else "duplicate")
        return wire.Stored(episode=message.episode, durability=self._settings.durability, duplicate=not new)

    # ---- parked requests

    def _park(self, address: Address, message: wire.LeaseRequest | wire.Fetch, now_s: float) -> None:
        """Every lease and fetch goes through here and is served at the end of the turn. A peer's newer one replaces its
        older one of the same kind: the peer gave up waiting for that."""
        until_s = now_s + min(message.wait_s, MAX_WAIT_S)
        self._parked.pop((address, message.kind), None)
        self._parked[address, message.kind] = Parked(address=address, message=message, until_s=until_s)

    def _serve_parked(self, now_s: float) -> None:
        paused: str | None = None  # once there is no member for one actor, there is none for the next
        for key, parked in list(self._parked.items()):
            address, message = parked.address, parked.message
            reply: wire.GroupReady | wire.NoGroup | wire.Leases
            payload = b""
            try:
                if isinstance(message, wire.Fetch):
                    reply, payload = self._deliver(message)
                    empty = isinstance(reply, wire.NoGroup)
                elif (peer := self._peers.get(address)) is not None:
                    leases: list[wire.Lease] = []
                    if paused is None:
                        leases, why = self._ledger.lease(peer.key, message.num_members, now_s)
                        paused = None if leases else why
                    reply, empty = wire.Leases(leases=leases, paused=paused or ""), not leases
                else:  # said goodbye meanwhile
                    del self._parked[key]
                    continue
            except RefusedError as error:
                del self._parked[key]
                self._refuse(address, message.seq, error.reason, str(error), kind=message.kind)
                continue
            if not empty or now_s >= parked.until_s:
                del self._parked[key]
                self._reply(address, message, reply, payload)

    def _deliver(self, message: wire.Fetch) -> tuple[wire.GroupReady | wire.NoGroup, bytes]:
        """The next group with its payloads. One that is damaged on disk becomes a tombstone, not wrong bytes."""
        delivery = self._ledger.fetch(message)
        if delivery is None:
            _, orders_open, members_open, members_leased = self._ledger.flow()
            return wire.NoGroup(
                orders_open=orders_open,
                members_open=members_open,
                members_leased=members_leased,
                actors=self._num_actors(),
            ), b""
        try:
            payloads = [self._journal.read(row.episode, row.location) for row in delivery.episodes]
        except JournalError as error:
            log.error("journal.damaged", reason=error.reason, error=str(error))
            self._ledger.drop(delivery.index, "damaged")
            delivery = replace(delivery, episodes=[], dropped="damaged")
            payloads = []
        episodes = [
            wire.DeliveredEpisode(
                episode=row.episode,
                member=row.member,
                attempt=row.attempt,
                num_bytes=row.location.num_bytes,
                crc32c=row.location.crc32c,
            )
            for row in delivery.episodes
        ]
        ready = wire.GroupReady(group=delivery.group, index=delivery.index, episodes=episodes, dropped=delivery.dropped)
        return ready, b"".join(payloads)

    # ---- small things

    def _reply(self, address: Address, to: wire.AnyMessage, message: wire.AnyMessage, payload: bytes = b"") -> None:
        self._replies.append((address, message.model_copy(update={"seq": to.seq}), payload))

    def _refuse(
        self, address: Address, seq: int, reason: str, text: str, retry_after_s: float | None = None, kind: str = ""
    ) -> None:
        self._metrics.count("refusals_total", reason=reason)
        self._bump(f"refused_{reason}")
        if kind == "episode":
            self._metrics.count("episodes_total", result="refused")
        if reason != "hello_first":
            peer = self._peers.get(address)
            log.warning("message.refused", reason=reason, kind=kind, peer=peer.hello.name if peer else "?", error=text)
        refused = wire.Refused(seq=seq, reason=reason, message=text, retry_after_s=retry_after_s)
        self._replies.append((address, refused, b""))

    def _stat(self) -> dict[str, int | float | str]:
        return {
            **self._ledger.counts(),
            **self._counters,
            "actors": self._num_actors(),
            "journal_bytes": self._journal.num_bytes,
            "parked": len(self._parked),
        }

    def _bump(self, counter: str) -> None:
        self._counters[counter] = self._counters.get(counter, 0) + 1

    def _num_actors(self) -> int:
        return len({peer.key for peer in self._peers.values() if peer.hello.peer == "actor"})

    def _report(self, now_s: float) -> None:
        """Gauges, and an end to peers that went without a goodbye."""
        self._report_at_s = now_s + REPORT_S
        waiting = {address for address, _ in self._parked}
        silent = [a for a, peer in self._peers.items() if now_s - peer.heard_s > self._settings.lease_s]
        for address in set(silent) - waiting:
            peer = self._peers.pop(address)  # it says hello again when it comes back
            if peer.hello.peer == "actor":
                log.warning("actor.silent", actor=peer.hello.name, silent_s=round(now_s - peer.heard_s, 1))
        ready, orders_open, _, leased = self._ledger.flow()
        self._metrics.set("groups_ready", ready)
        self._metrics.set("orders_open", orders_open)
        self._metrics.set("leases", leased)
        self._metrics.set("actors", self._num_actors())
        self._metrics.set("journal_bytes", self._journal.num_bytes)

    def _socket(self, *, receive_hwm: int, send_hwm: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        largest = max(self._settings.max_payload_bytes, wire.MAX_HEADER_BYTES) + FRAME_SLACK_BYTES
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1), (zmq.MAXMSGSIZE, largest), (zmq.RCVHWM, receive_hwm), (zmq.SNDHWM, send_hwm),
            (zmq.LINGER, 1000), (zmq.HANDSHAKE_IVL, 5000), (zmq.HEARTBEAT_IVL, 5000), (zmq.HEARTBEAT_TIMEOUT, 15000),
            (zmq.BACKLOG, 1024),
        ):  # fmt: skip
            socket.setsockopt(option, value)
        return socket


def _bind(socket: zmq.Socket[bytes], address: str, port: int, setting: str) -> str:
    try:
        socket.bind(f"tcp://{address}:{port or '*'}")
    except zmq.ZMQError as error:
        raise SetupError(
            f"cannot listen on {address}:{port}: {error.strerror}. Stop what uses it, or set {setting} to another.",
            reason="port_in_use" if error.errno == zmq.EADDRINUSE else "bind",
        ) from error
    endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return endpoint
