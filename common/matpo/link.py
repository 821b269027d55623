"""A peer's end of the broker's pipe: requests and replies over one ZeroMQ DEALER socket, on asyncio.

Rules kept here; each has a test in tests/common/test_link.py:
1. After every (re)connect the hello goes first, then every unanswered request again: a broker may be restarted.
2. A request ends with its reply, RefusedError, or TryAgainError after its time-out; asking again is then safe.
3. A reply that comes too late is given back: leases are released, a group is fetched again.
4. A refusal for now (`retry_after_s`: a full disk, for example) is asked again until the request's time-out.
5. Why a connection does not come about (a wrong key, no keys, no broker) is in the error and in the log, and it is
   tried again for ever: keys can be mended while we wait.
6. Episodes that are there to be sent at the same moment share messages, as far as the broker's welcome allows it; each
   has its own answer. Nothing waits for company.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from matpo import logs, security, wire
from matpo.errors import PeerError, ProtocolError, RefusedError, TryAgainError

Reply = tuple[wire.AnyMessage, bytes]
HELLO_S = 10.0  # an unanswered hello is repeated after this
REOPEN_S = 2.0  # between two connections that the broker refuses for the key
MIN_RETRY_S = 0.01
# libzmq gives a connection up after these two, for ever; after any other failure it connects again by itself.
_GIVEN_UP = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_FAILED = _GIVEN_UP | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
_MECHANISM_MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    seq: int
    frames: list[bytes | memoryview]
    together: bool  # it may share a message with others
    reply: asyncio.Future[Reply]


class Link:
    """One connection to the broker at `endpoint` ("tcp://127.0.0.1:5710"), for one actor, learner or operator.

    `on_notice` gets what the broker sends unasked (SnapshotNotice). `welcome` is the newest reply to our hello.
    With `keys` (see matpo.security) the connection is encrypted, and only to the broker that they name.
    """

    def __init__(
        self,
        endpoint: str,
        hello: wire.Hello,
        *,
        on_notice: Callable[[wire.AnyMessage], None] | None = None,
        keys: security.ClientKeys | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.welcome: wire.Welcome | None = None
        self._hello = hello
        self._keys = keys
        self._trouble = ""  # why there is no connection, as far as we know
        self._on_notice = on_notice
        self._seq = 0
        self._pending: dict[int, _Request] = {}
        self._posted: list[_Request] = []  # they go out together, in the next turn of the event loop
        self._greeted = False  # on the connection of now: only then do requests go out
        self._greeting: asyncio.Task[None] | None = None
        self._broken: Exception | None = None
        self._received_group = ""
        self._one_fetch = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context: zmq.asyncio.Context | None = None

    @property
    def trouble(self) -> str:
        """Why there is no connection, as far as we know; empty when we know nothing."""
        return self._trouble

    async def connect(self, timeout_s: float) -> wire.Welcome:
        """Open the socket and greet the broker. Raises TryAgainError when it does not answer, RefusedError."""
        self._context = zmq.asyncio.Context()
        self._trouble, self._posted = "", []
        self._open(self._context)
        self._start(self._watch(self._context))
        self._first_welcome: asyncio.Future[wire.Welcome] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._first_welcome
        except TimeoutError:
            raise self._silent("hello", timeout_s) from None

    async def request(self, message: wire.AnyMessage, payload: bytes = b"", *, timeout_s: float = 30) -> Reply:
        """Send a request and wait for its reply: `timeout_s`, plus what the broker may hold it (`wait_s`).

        Raises RefusedError when the broker says no for good; TryAgainError when it says nothing (reason "timeout"), or
        no for now to the last (its reason). Asking again is safe: the broker knows orders, leases and episodes by id.
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
        return await self._ask(message, payload, timeout_s)

    async def close(self) -> None:
        """Close the socket; requests in flight end with TryAgainError."""
        if self._context is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(TryAgainError(f"the link to {self.endpoint} was closed", reason="closed"))
        self._shut()
        self._context.destroy(linger=0)
        self._context = None

    # ---- requests

    async def _fetch(self, message: wire.Fetch, timeout_s: float) -> Reply:
        async with self._one_fetch:  # the broker repeats its last delivery until `received` names it
            asked = message.model_copy(update={"received": self._received_group})
            reply, payload = await self._ask(asked, b"", timeout_s)
            if isinstance(reply, wire.GroupReady):
                self._received_group = reply.group
            return reply, payload

    async def _place(self, message: wire.PlaceOrders, timeout_s: float) -> Reply:
        """Orders in as many messages as their tasks need."""
        if len(wire.encode(message)[0]) <= wire.MAX_HEADER_BYTES - 64:
            return await self._ask(message, b"", timeout_s)
        half = len(message.orders) // 2
        for part in (message.orders[:half], message.orders[half:]):
            reply = await self.request(message.model_copy(update={"orders": part}), timeout_s=timeout_s)
        return reply

    async def _ask(self, message: wire.AnyMessage, payload: bytes, timeout_s: float) -> Reply:
        """`_exchange`, again as long as the broker refuses for now."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + timeout_s
        while True:
            try:
                return await self._exchange(message, payload, max(end_s - clock(), 0.0))
            except RefusedError as error:
                if error.retry_after_s is None:
                    raise
                pause_s, left_s = max(error.retry_after_s, MIN_RETRY_S), end_s - clock()
                await asyncio.sleep(min(pause_s, left_s))
                if pause_s >= left_s:
                    raise TryAgainError(
                        f"the broker at {self.endpoint} refused {message.kind} for {timeout_s:g} s: {error}",
                        reason=error.reason,
                    ) from None

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
        together = isinstance(message, wire.StoreEpisode)
        request = _Request(seq=seq, frames=frames, together=together, reply=asyncio.get_running_loop().create_future())
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
        if not request.together:
            await self._send_frames(request.frames)
            return
        if not self._posted:
            self._start(self._send_posted())  # it runs when all that is ready now has been posted
        self._posted.append(request)

    async def _send_posted(self) -> None:
        posted, self._posted = self._posted, []
        for together in self._bundles([request for request in posted if request.seq in self._pending]):
            if self._greeted:  # else they go out with the next connection
                await self._send_frames(wire.bundle(together))

    def _bundles(self, requests: Iterable[_Request]) -> Iterator[list[list[bytes | memoryview]]]:
        """Frames of requests, in order, in bundles that the broker takes."""
        assert self.welcome is not None
        max_bytes = min(wire.BUNDLE_BYTES, self.welcome.max_payload_bytes)
        together: list[list[bytes | memoryview]] = []
        num_bytes = 0
        for request in requests:
            num_bytes += len(request.frames[1])
            if together and (num_bytes > max_bytes or len(together) == self.welcome.bundle_episodes):
                yield together
                together, num_bytes = [], len(request.frames[1])
            together.append(request.frames)
        if together:
            yield together

    async def _send_frames(self, frames: list[bytes | memoryview]) -> None:
        try:
            await self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:  # the connection just went; it goes out with the next one
            self._greeted = False

    def _silent(self, kind: str, timeout_s: float) -> TryAgainError:
        return TryAgainError(
            f"no answer to {kind} from the broker at {self.endpoint} within {timeout_s:g} s. "
            + (self._trouble or "Is it running, and is that its address?"),
            reason="timeout",
        )

    # ---- the connection

    def _open(self, context: zmq.asyncio.Context) -> None:
        self._socket = context.socket(zmq.DEALER)
        # SNDHWM 0: what is unanswered is bounded by the caller (outbox bytes), not by the socket.
        for option, value in (
            (zmq.LINGER, 0), (zmq.IMMEDIATE, 1), (zmq.SNDHWM, 0), (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2000), (zmq.HANDSHAKE_IVL, 5000), (zmq.HEARTBEAT_IVL, 5000),
            (zmq.HEARTBEAT_TIMEOUT, 15000),
        ):  # fmt: skip
            self._socket.setsockopt(option, value)
        if self._keys is not None:
            self._socket.curve_publickey = self._keys.public.encode()
            self._socket.curve_secretkey = self._keys.secret.encode()
            self._socket.curve_serverkey = self._keys.broker.encode()
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._socket.connect(self.endpoint)
        self._receiver = self._start(self._receive())

    def _shut(self) -> None:
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    async def _watch(self, context: zmq.asyncio.Context) -> None:
        """Follow the connection: greet on each new one; say why there is none."""
        while True:
            happened = await recv_monitor_message(self._monitor)
            event, was_greeted = happened["event"], self._greeted
            self._greeted = False
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._trouble = ""
                if self._greeting is not None:
                    self._greeting.cancel()  # its hello went down with the old connection
                self._greeting = self._start(self._greet())
            elif event & _FAILED:
                self._explain(event, int(happened["value"]))
            elif was_greeted:
                log.warning("broker.disconnected", endpoint=self.endpoint)
            if event & _GIVEN_UP:
                users = [task for task in (self._receiver, self._greeting) if task is not None]
                for task in users:
                    task.cancel()
                await asyncio.gather(*users, return_exceptions=True)
                self._shut()
                await asyncio.sleep(REOPEN_S)
                self._open(context)

    def _explain(self, event: int, value: int) -> None:
        """The likely cause of a handshake that failed. What libzmq 4.3.5 tells a client is tested in test_link.py."""
        keys = self._keys
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            who = f"{keys.name}, fingerprint {security.fingerprint(keys.public)}" if keys else "none"
            trouble = (
                f"It refuses our key ({who}): revoked, rotated, or unknown to it. "
                "Compare with `matpo-broker keys list RUN.TOML`, and copy the key file again."
            )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MECHANISM_MISMATCH:
            trouble = (
                "It uses no keys, and we do. Set security.keys for the broker too, and start it again."
                if keys
                else "It wants a key, and we have none. Set security.keys or security.key_file."
            )
        elif keys:
            trouble = (
                f"The connection ends before it is authenticated. Most likely the key file of {keys.name} is for "
                "another broker, or the broker's key was rotated: copy the key file again. Or that is no broker."
            )
        else:
            trouble = "The connection ends during the handshake. Is that a broker, and does it want a key?"
        if trouble != self._trouble:
            log.warning("broker.handshake_failed", endpoint=self.endpoint, why=trouble)
        self._trouble = trouble

    # ---- background

    async def _greet(self) -> None:
        """The hello until it is answered, then everything that is unanswered, in order."""
        while True:
            try:
                reply, _ = await self._exchange(self._hello, b"", HELLO_S)
                break
            except TryAgainError:
                continue
            except PeerError as error:
                if not isinstance(error, RefusedError) or error.retry_after_s is None:
                    self._fail(error)
                    return
                self._trouble = f"It refuses our hello for now: {error}"
                await asyncio.sleep(max(error.retry_after_s, MIN_RETRY_S))
        if not isinstance(reply, wire.Welcome):
            self._fail(
                ProtocolError(f"{self.endpoint} answered hello with {reply.kind}. Is it a broker?", reason="kind")
            )
            return
        self.welcome = reply
        self._greeted, self._trouble = True, ""
        if not self._first_welcome.done():
            self._first_welcome.set_result(reply)
        for seq, request in sorted(self._pending.items()):
            if seq in self._pending:
                await self._send(request)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                replies = [wire.decode(each) for each in wire.unbundle(frames)]
            except ProtocolError as error:
                # A broker of another release answers nothing that we could wait for.
                self._fail(ProtocolError(f"from {self.endpoint}: {error}", reason=error.reason))
                continue
            for reply, payload in replies:
                self._take(reply, bytes(payload))

    def _take(self, reply: wire.AnyMessage, payload: bytes) -> None:
        request = self._pending.get(reply.seq)
        if isinstance(reply, wire.Refused) and reply.reason == "hello_first":
            if self._greeting is None or self._greeting.done():
                self._greeted = False
                self._greeting = self._start(self._greet())
        elif request is not None and not request.reply.done():
            request.reply.set_result((reply, payload))
        elif isinstance(reply, wire.Leases) and reply.leases:
            self._start(self._give_back([lease.lease for lease in reply.leases]))
        elif reply.seq == 0 and isinstance(reply, wire.Refused):
            self._fail(RefusedError(reply.message, reason=reply.reason))
        elif reply.seq == 0 and self._on_notice is not None:
            self._on_notice(reply)

    async def _give_back(self, leases: list[str]) -> None:
        try:
            await self._ask(wire.Release(leases=leases, infra=False, reason="late reply"), b"", 30)
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
