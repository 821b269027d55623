"""A peer's end of the broker's pipe: requests and replies over one ZeroMQ DEALER socket, on asyncio.

Rules kept here; each has a test in tests/common/test_link.py:
1. After every (re)connect the hello goes first, then every unanswered request again: a broker may be restarted.
2. A request ends with its reply, RefusedError, or TryAgainError after its time-out; asking again is then safe.
3. A reply that comes too late is given back: leases are released, a group is fetched again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from matpo import logs, wire
from matpo.errors import PeerError, ProtocolError, RefusedError, TryAgainError

Reply = tuple[wire.AnyMessage, bytes]
HELLO_S = 10.0  # an unanswered hello is repeated after this
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    frames: list[bytes | memoryview]
    reply: asyncio.Future[Reply]


class Link:
    """One connection to the broker at `endpoint` ("tcp://127.0.0.1:5710"), for one actor, learner or operator.

    `on_notice` gets what the broker sends unasked (SnapshotNotice). `welcome` is the newest reply to our hello.
    """

    def __init__(
        self, endpoint: str, hello: wire.Hello, *, on_notice: Callable[[wire.AnyMessage], None] | None = None
    ) -> None:
        self.endpoint = endpoint
        self.welcome: wire.Welcome | None = None
        self._hello = hello
        self._on_notice = on_notice
        self._seq = 0
        self._pending: dict[int, _Request] = {}
        self._greeted = False  # on the connection of now: only then do requests go out
        self._greeting: asyncio.Task[None] | None = None
        self._broken: Exception | None = None
        self._received_group = ""
        self._one_fetch = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context: zmq.asyncio.Context | None = None

    async def connect(self, timeout_s: float) -> wire.Welcome:
        """Open the socket and greet the broker. Raises TryAgainError when it does not answer, RefusedError."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # SNDHWM 0: what is unanswered is bounded by the caller (outbox bytes), not by the socket.
        for option, value in (
            (zmq.LINGER, 0), (zmq.IMMEDIATE, 1), (zmq.SNDHWM, 0), (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2000), (zmq.HANDSHAKE_IVL, 5000), (zmq.HEARTBEAT_IVL, 5000),
            (zmq.HEARTBEAT_TIMEOUT, 15000),
        ):  # fmt: skip
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._socket.connect(self.endpoint)
        self._start(self._watch())
        self._start(self._receive())
        self._first_welcome: asyncio.Future[wire.Welcome] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._first_welcome
        except TimeoutError:
            raise self._silent("hello", timeout_s) from None

    async def request(self, message: wire.AnyMessage, payload: bytes = b"", *, timeout_s: float = 30) -> Reply:
        """Send a request and wait for its reply: `timeout_s`, plus what the broker may hold it (`wait_s`).

        Raises RefusedError when the broker says no, TryAgainError (reason "timeout") when it says nothing. Asking again
        is safe: the broker knows orders, leases and episodes by id.
        """
        if self.welcome is not None and len(payload) > self.welcome.max_payload_bytes:
            raise RefusedError(
                f"payload of {len(payload)} bytes, the broker takes {self.welcome.max_payload_bytes}. "
                "Raise broker.max_payload_bytes, or make episodes shorter.",
                reason="payload_size",
            )
        timeout_s += getattr(message, "wait_s", 0.0)
        if isinstance(message, wire.Fetch):
            return await self._fetch(message, timeout_s)
        if isinstance(message, wire.Resume):
            self._received_group = ""  # every group may come again
        if isinstance(message, wire.PlaceOrders) and len(message.orders) > 1:
            return await self._place(message, timeout_s)
        return await self._exchange(message, payload, timeout_s)

    async def close(self) -> None:
        """Close the socket; requests in flight end with TryAgainError."""
        if self._context is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(TryAgainError(f"the link to {self.endpoint} was closed", reason="closed"))
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.destroy(linger=0)
        self._context = None

    # ---- requests

    async def _fetch(self, message: wire.Fetch, timeout_s: float) -> Reply:
        async with self._one_fetch:  # the broker repeats its last delivery until `received` names it
            asked = message.model_copy(update={"received": self._received_group})
            reply, payload = await self._exchange(asked, b"", timeout_s)
            if isinstance(reply, wire.GroupReady):
                self._received_group = reply.group
            return reply, payload

    async def _place(self, message: wire.PlaceOrders, timeout_s: float) -> Reply:
        """Orders in as many messages as their tasks need."""
        if len(wire.encode(message)[0]) <= wire.MAX_HEADER_BYTES - 64:
            return await self._exchange(message, b"", timeout_s)
        half = len(message.orders) // 2
        for part in (message.orders[:half], message.orders[half:]):
            reply = await self.request(message.model_copy(update={"orders": part}), timeout_s=timeout_s)
        return reply

    async def _exchange(self, message: wire.AnyMessage, payload: bytes, timeout_s: float) -> Reply:
        if self._broken is not None:
            raise self._broken
        if self._context is None:
            raise TryAgainError(f"the link to {self.endpoint} is not open", reason="closed")
        self._seq += 1
        seq = self._seq
        frames = wire.encode(message.model_copy(update={"seq": seq}), payload)
        if len(frames[0]) > wire.MAX_HEADER_BYTES:
            raise ProtocolError(
                f"{message.kind} message with a header of {len(frames[0])} bytes, at most {wire.MAX_HEADER_BYTES}. "
                "Keep large material in the environment, not in Task.data.",
                reason="header_size",
            )
        request = _Request(frames=frames, reply=asyncio.get_running_loop().create_future())
        self._pending[seq] = request
        try:
            async with asyncio.timeout(timeout_s):
                if self._greeted or isinstance(message, wire.Hello):
                    await self._send(request)
                reply, body = await request.reply
        except TimeoutError:
            raise self._silent(message.kind, timeout_s) from None
        finally:
            del self._pending[seq]
        if isinstance(reply, wire.Refused):
            raise RefusedError(reply.message, reason=reply.reason, retry_after_s=reply.retry_after_s)
        return reply, body

    async def _send(self, request: _Request) -> None:
        try:
            await self._socket.send_multipart(request.frames, flags=zmq.NOBLOCK)
        except zmq.Again:  # the connection just went; it goes out with the next one
            self._greeted = False

    def _silent(self, kind: str, timeout_s: float) -> TryAgainError:
        return TryAgainError(
            f"no answer to {kind} from the broker at {self.endpoint} within {timeout_s:g} s. "
            "Is it running, and is that its address?",
            reason="timeout",
        )

    # ---- background

    async def _watch(self) -> None:
        """Follow the connection: greet on each new one."""
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            self._greeted = False
            if event == zmq.EVENT_DISCONNECTED:
                log.warning("broker.disconnected", endpoint=self.endpoint)
                continue
            if self._greeting is not None:
                self._greeting.cancel()  # its hello went down with the old connection
            self._greeting = self._start(self._greet())

    async def _greet(self) -> None:
        """The hello until it is answered, then everything that is unanswered, in order."""
        while True:
            try:
                reply, _ = await self._exchange(self._hello, b"", HELLO_S)
                break
            except TryAgainError:
                continue
            except PeerError as error:
                self._fail(error)
                return
        if not isinstance(reply, wire.Welcome):
            self._fail(
                ProtocolError(f"{self.endpoint} answered hello with {reply.kind}. Is it a broker?", reason="kind")
            )
            return
        self.welcome = reply
        self._greeted = True
        if not self._first_welcome.done():
            self._first_welcome.set_result(reply)
        for seq, request in sorted(self._pending.items()):
            if seq in self._pending:
                await self._send(request)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                reply, payload = wire.decode(frames)
            except ProtocolError as error:
                # A broker of another release answers nothing that we could wait for.
                self._fail(ProtocolError(f"from {self.endpoint}: {error}", reason=error.reason))
                continue
            request = self._pending.get(reply.seq)
            if isinstance(reply, wire.Refused) and reply.reason == "hello_first":
                if self._greeting is None or self._greeting.done():
                    self._greeted = False
                    self._greeting = self._start(self._greet())
            elif request is not None and not request.reply.done():
                request.reply.set_result((reply, bytes(payload)))
            elif isinstance(reply, wire.Leases) and reply.leases:
                self._start(self._give_back([lease.lease for lease in reply.leases]))
            elif reply.seq == 0 and isinstance(reply, wire.Refused):
                self._fail(RefusedError(reply.message, reason=reply.reason))
            elif reply.seq == 0 and self._on_notice is not None:
                self._on_notice(reply)

    async def _give_back(self, leases: list[str]) -> None:
        try:
            await self._exchange(wire.Release(leases=leases, infra=False, reason="late reply"), b"", 30)
        except (PeerError, TryAgainError) as error:  # they run out by themselves
            log.warning("leases.not_given_back", num_leases=len(leases), error=str(error))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A link whose background task died is dead: say so to everyone who waits, now and later.
            self._broken = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._fail(self._broken)

    def _fail(self, error: Exception) -> None:
        if not self._first_welcome.done():
            self._first_welcome.set_exception(error)
            self._first_welcome.exception()  # `connect` may have given up: then nobody else looks at it
        for request in self._pending.values():
            if not request.reply.done():
                request.reply.set_exception(error)
