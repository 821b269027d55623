"""Two ROUTER sockets and one loop around dispatch and store. Decides nothing.

One turn: what has arrived (bounded) -> decide -> commit (payloads, one fdatasync, one ledger commit) -> every reply.
The commit runs in a thread; meanwhile the next turn's messages are received, decoded and hashed, nothing is decided.
So nothing is acknowledged that is not kept as broker.durability says; and if the disk says no, nothing is acknowledged
at all: OSError and sqlite3.Error leave `serve` with the replies unsent, and the process must end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter

import zmq
from zmq.utils.monitor import recv_monitor_message

from matpo import logs, wire
from matpo.errors import ProtocolError, RefusedError, SetupError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.dispatch import Address, Dispatch, Port, Received
from matpo_broker.gate import Gate, Identity
from matpo_broker.store import Store, TurnLostError

TURN_MESSAGES = 512  # per socket; the other socket and the sync wait for no more than this
TURN_BYTES = 16 * 2**20
REPORT_S = 1.0  # between two updates of the gauges
FRAME_SLACK_BYTES = 2**20  # a payload a little too large is refused with a message, a much larger one cut off
RECEIVE_BUFFER_BYTES = 2**20  # the kernel's, of one connection: an episode takes fewer wake-ups
NOBODY = Identity(name="", role="")
_EVENTS = {
    zmq.EVENT_ACCEPTED: "accepted",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "handshake_succeeded",
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "handshake_failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshake_failed",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake_failed",
}

log = logs.get()


class Server:
    """Serves one store until `stop`. `clock` is the broker's seconds (matpo_broker.clock)."""

    def __init__(
        self, settings: BrokerSettings, store: Store, gate: Gate, metrics: Metrics, *, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._store = store
        self._gate = gate
        self._metrics = metrics
        self._clock = clock
        self._dispatch = Dispatch(settings, store, metrics)
        self._report_at_s = 0.0
        self._valid_keys = gate.valid_keys
        self._stopping = False
        self._turn_messages = 1 if settings.durability == "always" else TURN_MESSAGES
        self._committer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._context = zmq.Context()
        gate.start(self._context)
        # A learner's replies hold whole groups, so few of them may wait in its socket.
        self._sockets: dict[Port, zmq.Socket[bytes]] = {
            "learner": self._socket(receive_hwm=64, send_hwm=16),
            # Small: what an actor sends beyond its window waits here, so this times max_payload_bytes is what it can
            # make us hold.
            "actor": self._socket(receive_hwm=4, send_hwm=1000),
        }
        self._monitors = [s.get_monitor_socket(sum(_EVENTS)) for s in self._sockets.values()]
        self._poller = zmq.Poller()
        for source in (*self._sockets.values(), *self._monitors, self._wake_read):
            self._poller.register(source, zmq.POLLIN)

    def bind(self, address: str, *, actor_port: int, learner_port: int) -> tuple[str, str]:
        """Listen; port 0 picks a free one. Returns both endpoints. Raises SetupError when a port is taken."""
        return (
            _bind(self._sockets["actor"], address, actor_port, "broker.actor_port"),
            _bind(self._sockets["learner"], address, learner_port, "broker.learner_port"),
        )

    def stop(self) -> None:
        """End `serve` after the turn in progress. Safe in a signal handler and from other threads."""
        self._wake(b"s")

    def serve(self) -> None:
        """Turn until `stop`. Raises OSError or sqlite3.Error when the disk fails; end the process then."""
        arrived: list[list[Received]] = []
        while not self._stopping:
            arrived = self._turn(arrived or self._receive(self._wait_s()))

    def close(self, *, linger_s: float = 1.0) -> None:
        """Close the sockets; replies already sent get `linger_s` to leave."""
        self._committer.shutdown()
        for socket in self._sockets.values():
            socket.disable_monitor()
        for monitor in self._monitors:
            monitor.close(linger=0)
        for socket in self._sockets.values():
            socket.close(linger=int(linger_s * 1000))
        self._gate.close()
        self._context.term()
        read, write, self._wake_read, self._wake_write = self._wake_read, self._wake_write, -1, -1
        os.close(read)
        os.close(write)

    # ---- the loop

    def _turn(self, arrived: list[list[Received]]) -> list[list[Received]]:
        """One turn. Returns what arrived for the next one while the disk was busy."""
        now_s = self._clock()
        for together in arrived:
            self._dispatch.take(together, now_s)
        if (keys := self._gate.valid_keys) is not self._valid_keys and keys is not None:
            self._valid_keys = keys
            self._dispatch.keep_keys(keys)
        self._store.ledger.members.expire(now_s)
        self._dispatch.serve_parked(now_s)
        committing = self._committer.submit(self._commit, now_s)
        committing.add_done_callback(lambda _: self._wake(b"c"))
        following = self._receive_during(committing)
        try:
            seconds = committing.result()
        except TurnLostError as error:
            self._dispatch.lose_turn(error)
        else:
            if arrived:
                self._metrics.observe("commit_seconds", seconds)
        self._flush()
        self._store.release(self._dispatch.obsolete)
        self._dispatch.clear()
        with contextlib.suppress(TurnLostError):  # said in the log; everything acknowledged is kept
            self._store.tick(now_s)
        if now_s >= self._report_at_s:
            self._report(now_s)
        return following

    def _commit(self, now_s: float) -> float:
        started_s = perf_counter()
        self._store.commit(now_s)
        return perf_counter() - started_s

    def _wake(self, why: bytes) -> None:
        with contextlib.suppress(BlockingIOError):  # full: then it is awake anyway
            if self._wake_write >= 0:
                os.write(self._wake_write, why)

    def _wait_s(self) -> float:
        now_s = self._clock()
        tick_s = min(REPORT_S, self._store.next_tick_s)
        due_s = min([self._store.ledger.members.next_deadline_s, now_s + tick_s, *self._dispatch.due_s])
        return max(0.0, due_s - now_s)

    def _receive(self, wait_s: float) -> list[list[Received]]:
        """Wait for messages, and take those that are there, up to a bound for each socket."""
        ready = self._poll(wait_s)
        self._gate.refresh()  # before anything is read: a key that was revoked counts for no further message
        arrived: list[list[Received]] = []
        for port in self._sockets:
            if self._sockets[port] in ready:
                self._drain(port, arrived, [self._turn_messages, TURN_BYTES])
        return arrived

    def _receive_during(self, committing: Future[float]) -> list[list[Received]]:
        """The same for as long as the disk is busy."""
        self._gate.refresh()
        arrived: list[list[Received]] = []
        ports = list(self._sockets)
        room = {port: [self._turn_messages, TURN_BYTES] for port in ports}  # for the whole turn, however long it takes
        while not committing.done():
            ready = self._poll(REPORT_S) if ports else ()
            if not ports:
                committing.exception()  # waits; the result is looked at by the caller
            for port in [port for port in ports if self._sockets[port] in ready]:
                if self._drain(port, arrived, room[port]):
                    ports.remove(port)
                    self._poller.unregister(self._sockets[port])
        for port in self._sockets:
            if port not in ports:
                self._poller.register(self._sockets[port], zmq.POLLIN)
        return arrived

    def _poll(self, wait_s: float) -> dict[object, int]:
        ready = dict(self._poller.poll(int(wait_s * 1000) + 1 if wait_s > 0 else 0))
        if self._wake_read in ready:
            self._stopping |= b"s" in os.read(self._wake_read, 65536)
        for monitor in self._monitors:
            if monitor in ready:
                event = _EVENTS.get(zmq.Event(recv_monitor_message(monitor)["event"]), "other")
                self._metrics.count("connections_total", event=event)
        return ready

    def _drain(self, port: Port, arrived: list[list[Received]], room: list[int]) -> bool:
        """Take what a socket has, up to what is left of `room` (messages, bytes). Returns whether that is used up."""
        while room[0] > 0 and room[1] > 0:
            try:
                frames = self._sockets[port].recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            arrived.append(self._read(port, frames))
            room[0] -= len(arrived[-1])
            room[1] -= sum(len(frame) for frame in frames)
        return True

    def _read(self, port: Port, frames: list[zmq.Frame]) -> list[Received]:
        """Who sent it, and what, its hash checked: one message, or those of a bundle."""
        address: Address = (port, frames[0].bytes)
        parts: list[bytes | memoryview] = [frame.bytes for frame in frames[1:2]]  # headers are small
        parts += [frame.buffer for frame in frames[2:]]  # large payloads are not copied on their way to the disk
        identity = NOBODY
        try:
            if not address[1].startswith(b"\0"):  # such ids are libzmq's own: nobody can take another's
                raise RefusedError("choose no routing id: it would not be yours alone", reason="identity")
            identity = self._gate.identify(frames[-1])
            found = wire.unbundle(parts, limit=self._dispatch.bundle_episodes)
        except (ProtocolError, RefusedError) as error:
            return [_refused(address, identity, wire.peek_seq(parts), error)]
        received = []
        for message_frames in found:
            try:
                message, payload = wire.decode(message_frames)
                if isinstance(message, wire.StoreEpisode):
                    wire.check_payload(message, frames[-1] if len(found) == 1 else payload)
            except ProtocolError as error:
                received.append(_refused(address, identity, wire.peek_seq(message_frames), error))
            else:
                received.append(
                    Received(address=address, identity=identity, seq=message.seq, message=message, payload=payload)
                )
        return received

    def _flush(self) -> None:
        for address, answers, payload in self._dispatch.replies:
            port, routing_id = address
            frames = wire.bundle([wire.encode(answer, payload) for answer in answers])
            try:
                self._sockets[port].send_multipart([routing_id, *frames], zmq.NOBLOCK)
            except zmq.ZMQError as error:  # gone, or not reading. Requests are idempotent: the peer asks again.
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._metrics.count("replies_undeliverable_total")
                self._dispatch.bump("replies_undeliverable")
                if error.errno == zmq.EHOSTUNREACH:
                    self._dispatch.gone(address, answers)
                continue
            self._metrics.count("bytes_total", len(payload), direction="out")

    def _report(self, now_s: float) -> None:
        self._report_at_s = now_s + REPORT_S
        self._dispatch.forget_silent(now_s)
        ready, orders_open = self._store.ledger.flow()
        self._metrics.set("groups_ready", ready)
        self._metrics.set("orders_open", orders_open)
        self._metrics.set("leases", self._store.ledger.members.num_leases)
        self._metrics.set("actors", self._dispatch.num_actors)
        self._metrics.set("journal_bytes", self._store.num_bytes)

    def _socket(self, *, receive_hwm: int, send_hwm: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        largest = max(self._settings.max_payload_bytes, wire.MAX_HEADER_BYTES) + FRAME_SLACK_BYTES
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1), (zmq.MAXMSGSIZE, largest), (zmq.RCVHWM, receive_hwm), (zmq.SNDHWM, send_hwm),
            (zmq.LINGER, 1000), (zmq.HANDSHAKE_IVL, 5000), (zmq.HEARTBEAT_IVL, 5000), (zmq.HEARTBEAT_TIMEOUT, 15000),
            (zmq.BACKLOG, 1024), (zmq.RCVBUF, RECEIVE_BUFFER_BYTES),
        ):  # fmt: skip
            socket.setsockopt(option, value)
        self._gate.protect(socket)
        return socket


def _refused(address: Address, identity: Identity, seq: int, error: ProtocolError | RefusedError) -> Received:
    error.__traceback__ = error.__context__ = None  # they would keep the frames alive
    return Received(address=address, identity=identity, seq=seq, error=error)


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
