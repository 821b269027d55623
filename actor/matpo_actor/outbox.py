"""Finished episodes on their way to the broker: kept until it says that they are stored.

Rules kept here; each has a test in tests/actor/test_outbox.py:
1. An episode leaves only when the broker has stored it, or says that it never will.
2. No answer, or "later", means: send again. Sending twice is safe, the broker stores a member once.
3. Above `max_bytes` the outbox is full; the actor then takes no new leases.
4. Not more is on its way than the broker's window says; one episode always may be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from matpo import logs
from matpo.errors import ProtocolError, RefusedError, TryAgainError
from matpo.metrics import Metrics
from matpo.wire import AnyMessage, Stored, StoreEpisode

MAX_ON_WAY = 64  # episodes without an answer: enough to share messages and the broker's fsync
log = logs.get()

Request = Callable[[StoreEpisode, bytes], Awaitable[tuple[AnyMessage, bytes]]]


class Outbox:
    """See the module. `request` sends one episode and returns the broker's answer (Link.request).

    `on_change` is called whenever an episode has left, `on_refused(lease, reason)` when it was given up.
    """

    def __init__(
        self,
        request: Request,
        *,
        max_bytes: int,
        metrics: Metrics,
        retry_s: float = 1.0,
        on_change: Callable[[], None] = lambda: None,
        on_refused: Callable[[str, str], None] = lambda lease, reason: None,
    ) -> None:
        self._request = request
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._retry_s = retry_s
        self._on_change = on_change
        self._on_refused = on_refused
        self._items: dict[str, tuple[StoreEpisode, bytes]] = {}
        self._window = (max_bytes, MAX_ON_WAY)  # bytes and episodes
        self._sent_bytes = self._num_sent = 0  # and not answered yet
        self._left = asyncio.Event()  # something of that has been answered
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def leases(self) -> list[str]:
        """Leases of what is still here: they have to be kept alive."""
        return [message.lease for message, _ in self._items.values()]

    @property
    def num_bytes(self) -> int:
        """Payload bytes that are still here."""
        return sum(len(payload) for _, payload in self._items.values())

    @property
    def is_full(self) -> bool:
        """Whether the actor should stop taking leases."""
        return self.num_bytes >= self._max_bytes

    def set_window(self, num_bytes: int, num_episodes: int) -> None:
        """The broker's credit: what may be on its way without an answer. Counts from the next send on."""
        self._window = (num_bytes, min(num_episodes, MAX_ON_WAY))

    def put(self, message: StoreEpisode, payload: bytes) -> None:
        """Take a finished episode."""
        self._items[message.episode] = (message, payload)
        self._waiting.put_nowait(message.episode)
        self._empty.clear()
        self._metrics.set("unacked_episodes", len(self._items))

    async def run(self) -> None:
        """Send for ever. May be cancelled and called again: what is still here is sent again."""
        self._waiting = asyncio.Queue()
        for episode in self._items:
            self._waiting.put_nowait(episode)
        async with asyncio.TaskGroup() as senders:
            while True:  # in order: a large one would wait for ever behind small ones that still fit
                message, payload = self._items[await self._waiting.get()]
                while not self._has_room(len(payload)):
                    self._left.clear()
                    await self._left.wait()
                self._sent_bytes += len(payload)
                self._num_sent += 1
                sending = senders.create_task(self._send(message, payload))
                sending.add_done_callback(partial(self._answered, len(payload)))

    async def flush(self) -> None:
        """Send until nothing is left. Cancel it to give up; not while `run` is running."""
        sending = asyncio.create_task(self.run())
        empty = asyncio.create_task(self._empty.wait())
        try:
            await asyncio.wait({sending, empty}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            sending.cancel()
            empty.cancel()
            await asyncio.gather(sending, empty, return_exceptions=True)

    def _answered(self, num_bytes: int, _: object) -> None:
        self._sent_bytes -= num_bytes
        self._num_sent -= 1
        self._left.set()

    def _has_room(self, num_bytes: int) -> bool:
        max_bytes, max_episodes = self._window
        fits = self._sent_bytes + num_bytes <= max_bytes and self._num_sent < max_episodes
        return fits or self._num_sent == 0

    async def _send(self, message: StoreEpisode, payload: bytes) -> None:
        while True:
            try:
                reply, _ = await self._request(message, payload)
            except TryAgainError as error:
                log.warning("outbox.retry", episode=message.episode, why=str(error))
                await asyncio.sleep(self._retry_s)
            except RefusedError as error:
                if error.retry_after_s is None:
                    log.warning("outbox.refused", episode=message.episode, reason=error.reason, why=str(error))
                    self._forget(message, "refused")
                    self._on_refused(message.lease, error.reason)
                    return
                await asyncio.sleep(error.retry_after_s)
            else:
                if not isinstance(reply, Stored) or reply.episode != message.episode:
                    raise ProtocolError(f"want Stored({message.episode}), got {reply!r}", reason="reply")
                self._forget(message, "stored")
                return

    def _forget(self, message: StoreEpisode, outcome: str) -> None:
        del self._items[message.episode]
        self._metrics.count("episodes_total", outcome=outcome)
        self._metrics.set("unacked_episodes", len(self._items))
        if not self._items:
            self._empty.set()
        self._on_change()
