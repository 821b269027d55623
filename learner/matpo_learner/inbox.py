"""The learner's end of the pipe: orders and commits out, whole validated groups in. One thread with its own event loop.

Rules kept here, each with a test in tests/learner/test_inbox.py:
1. What `take` gives is whole: every member once, each payload's hash and every rule of matpo.schema checked, and played
   for the task that was ordered. Anything else is given as invalid, with the reason, so that it is counted.
2. A group is given once per process, whatever the broker repeats.
3. At most `prefetch` groups wait here; the lowest index goes first.
4. While the broker is gone, everything waits and is sent again, in order; `waits_for` says why nothing comes.
5. A refusal that asking again cannot mend ends the learner: `take` raises it.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from typing import TypeVar

from matpo import logs, schema, wire
from matpo.episode import Episode, Group, Task
from matpo.errors import DataError, EpisodeError, ProtocolError, RefusedError, TryAgainError
from matpo.link import Link
from matpo.security import ClientKeys
from matpo_learner.orders import Book, OrderStream
from matpo_learner.waits import Reason

FETCH_WAIT_S = 2.0
REPLY_S = 30.0
CONNECT_S = 10.0
MAX_BACK_OFF_S = 5.0
FLUSH_S = 10.0
IDLE_S = 0.5
SILENT_S = 2 * FETCH_WAIT_S + 5.0  # a broker that has nothing says so every FETCH_WAIT_S
ORDERS_PER_MESSAGE = 1024
log = logs.get()
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Delivery:
    """One group as it arrived. `group` is None when it cannot be trained; `fate` says why: dropped or invalid."""

    index: int
    id: str
    group: Group | None
    payloads: Sequence[bytes] = ()  # of its episodes, as encoded: other ranks decode them too
    fate: str = ""
    reason: str = ""


def unpack(
    message: wire.GroupReady, payload: bytes, *, stream: OrderStream, group_size: int, vocab_size: int, published: int
) -> Delivery:
    """Check one delivered group. Never raises for what a peer sent: the delivery says what is wrong with it."""
    if message.dropped:
        return Delivery(index=message.index, id=message.group, group=None, fate="dropped", reason=message.dropped)
    try:
        payloads = _split(message.episodes, payload)
        episodes = [schema.decode(p, vocab_size=vocab_size, published_version=published) for p in payloads]
        _check_group(message, episodes, task=stream.task(message.index), group_size=group_size)
    except (DataError, ProtocolError) as error:
        log.warning("group.invalid", group=message.group, reason=error.reason, error=str(error))
        return Delivery(index=message.index, id=message.group, group=None, fate="invalid", reason=error.reason)
    group = Group(id=message.group, episodes=tuple(episodes))
    return Delivery(index=message.index, id=message.group, group=group, payloads=payloads)


def _split(delivered: Iterable[wire.DeliveredEpisode], payload: bytes) -> list[bytes]:
    parts, at = [], 0
    for episode in delivered:
        part = payload[at : at + episode.num_bytes]
        wire.check_payload(episode, part)
        parts.append(part)
        at += episode.num_bytes
    if at != len(payload):
        raise ProtocolError(f"group payload of {len(payload)} bytes, its episodes have {at}", reason="payload_size")
    return parts


def _check_group(message: wire.GroupReady, episodes: Sequence[Episode], *, task: Task, group_size: int) -> None:
    for said, episode in zip(message.episodes, episodes, strict=True):
        if (episode.id, episode.group, episode.member) != (said.episode, message.group, said.member):
            raise EpisodeError(f"{said.episode} of {message.group} holds episode {episode.id}", reason="ids")
        found = episode.task
        if (found.id, found.environment) != (task.id, task.environment):
            raise EpisodeError(
                f"{episode.id} was played for task {found.id} of {found.environment}, ordered was {task.id} of "
                f"{task.environment}",
                reason="task",
            )
    if sorted(episode.member for episode in episodes) != list(range(group_size)):
        raise EpisodeError(f"{message.group} does not hold each of its {group_size} members once", reason="members")


def _wait(future: Future[_Result], idle: Callable[[], None]) -> _Result:
    while True:
        done, _ = wait_for_futures([future], timeout=IDLE_S)
        if done:
            return future.result()
        idle()


class Inbox:
    """Talks to the broker. `start` first, `resume` second; then place, take and commit in any order; `stop` last.

    Every method is called from the learner's main thread and none but start and resume waits for the broker.
    """

    def __init__(
        self,
        endpoint: str,
        hello: wire.Hello,
        *,
        stream: OrderStream,
        group_size: int,
        vocab_size: int,
        prefetch: int,
        keys: ClientKeys | None = None,
    ) -> None:
        self.published = -1  # newest version that a token may be stamped with; the learner raises it
        self.min_version = -1  # oldest version that is not too stale to train on; the learner raises it
        self.epoch = 0
        self._stream = stream
        self._group_size = group_size
        self._vocab_size = vocab_size
        self._prefetch = prefetch
        self._hello = hello
        self._endpoint = endpoint
        self._keys = keys
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._started: Future[wire.Welcome] = Future()
        self._resumed: Future[None] = Future()
        self._changed = threading.Condition()  # guards _waiting and _failure
        self._waiting: list[tuple[int, str, Delivery]] = []  # heap by index
        self._seen: set[int] = set()
        self._done_below = 0
        self._failure: BaseException | None = None
        self._idle: wire.NoGroup | None = None  # why the broker had nothing
        self._unreachable = False
        self._trouble = ""
        self._answered_s = time.monotonic()

    # ---- for the main thread

    def start(self, idle: Callable[[], None] = lambda: None) -> wire.Welcome:
        """Connect; waits for the broker as long as it takes. Raises RefusedError when it does not want us.

        `idle` is called about every IDLE_S meanwhile; what it raises ends the wait.
        """
        self._thread.start()
        welcome = _wait(self._started, idle)
        self.epoch = welcome.epoch
        return welcome

    def resume(self, checkpoint: str, book: Book, idle: Callable[[], None] = lambda: None) -> None:
        """Say what is consumed; every other group comes again. Open orders are placed again, should they be lost.

        Waits for the broker as `start` does.
        """
        self._seen, self._done_below = set(book.consumed), book.consumed_below
        self._post(
            wire.Resume(
                epoch=self.epoch,
                checkpoint=checkpoint,
                consumed_below=book.consumed_below,
                consumed=sorted(book.consumed),
            )
        )
        _wait(self._resumed, idle)
        self.place(book.open())

    def place(self, indices: Sequence[int]) -> None:
        """Place orders."""
        for at in range(0, len(indices), ORDERS_PER_MESSAGE):
            orders = [self._stream.order(index) for index in indices[at : at + ORDERS_PER_MESSAGE]]
            self._post(wire.PlaceOrders(epoch=self.epoch, orders=orders))

    def commit(self, checkpoint: str, book: Book, *, oldest_kept_below: int) -> None:
        """Say that a durable checkpoint covers what is consumed."""
        self._post(
            wire.Commit(
                epoch=self.epoch,
                checkpoint=checkpoint,
                consumed_below=book.consumed_below,
                consumed=sorted(book.consumed),
                oldest_kept_below=oldest_kept_below,
            )
        )

    def notice(self, version: int) -> None:
        """Tell of a snapshot, and accept tokens of its version."""
        self._post(wire.SnapshotNotice(epoch=self.epoch, version=version))

    def trained(self, indices: Sequence[int]) -> None:
        """Say that these groups went through an update: they do no harm."""
        self._post(wire.Trained(epoch=self.epoch, indices=list(indices)))

    def quarantine(self, group: str, reason: str) -> None:
        """Ask the broker to set a group aside whose content is invalid."""
        self._post(wire.Quarantine(epoch=self.epoch, group=group, reason=reason))

    def say_goodbye(self) -> None:
        """The last message: this learner ends in order."""
        self._post(wire.Goodbye())

    def take(self, timeout_s: float) -> Delivery | None:
        """The waiting group with the lowest index; None when none came in time. Raises what ended the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._failure, timeout_s)
            if self._failure is not None:
                raise self._failure
            delivery = heapq.heappop(self._waiting)[2] if self._waiting else None
        if delivery is None:
            return None
        self._loop.call_soon_threadsafe(self._room.set)
        return delivery

    def stop(self) -> None:
        """Send what is still to be sent (for a while), then end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(FLUSH_S + CONNECT_S)

    def _post(self, message: wire.AnyMessage) -> None:
        if self._failure is not None:
            raise self._failure
        self._loop.call_soon_threadsafe(self._outgoing.put_nowait, message)

    @property
    def num_waiting(self) -> int:
        """Groups that are here and were not taken yet."""
        return len(self._waiting)

    def waits_for(self) -> Reason:
        """Who has to move before the next group can come. From any thread."""
        idle, silent_s = self._idle, time.monotonic() - self._answered_s
        if self._unreachable or idle is None:
            trouble = self._trouble or "it has not answered yet. Start matpo-broker."
            return Reason(who="broker", why=f"the broker at {self._endpoint}: {trouble}")
        if silent_s > SILENT_S:
            return Reason(who="broker", why=f"the broker at {self._endpoint} has not answered for {silent_s:.0f} s")
        if idle.actors == 0:
            why = f"none is connected, {idle.members_open} members are ordered. Start matpo-actor."
            return Reason(who="actors", why=f"actors: {why}")
        if idle.members_leased:
            playing = f"{idle.actors} actors, which play {idle.members_leased} members"
            return Reason(who="members", why=f"{playing}; {idle.members_open} more are ordered")
        if idle.members_open:
            none_taken = f"{idle.members_open} members are ordered, none is taken. Look at their logs."
            return Reason(who="leases", why=f"{idle.actors} actors: {none_taken}")
        return Reason(who="orders", why="orders: the broker has none that is open")

    # ---- the thread

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._main())
        except Exception as error:  # noqa: BLE001 - outermost loop of this thread: the main thread raises it again
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            for future in (self._started, self._resumed):
                if not future.done():
                    future.set_exception(error)
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._outgoing: asyncio.Queue[wire.AnyMessage] = asyncio.Queue()
        self._stopping = asyncio.Event()
        self._room = asyncio.Event()
        welcome = await self._first_welcome()
        if welcome is None:
            return
        self._started.set_result(welcome)
        try:
            sender, fetcher = asyncio.create_task(self._send()), asyncio.create_task(self._fetch())
            stopping = asyncio.create_task(self._stopping.wait())
            done, _ = await asyncio.wait({sender, fetcher, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                sent = asyncio.create_task(self._outgoing.join())
                await asyncio.wait({sent, sender}, timeout=FLUSH_S, return_when=asyncio.FIRST_COMPLETED)
            pending = asyncio.all_tasks() - {asyncio.current_task()}
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            failures = [error for task in done if (error := task.exception())]  # all of them are looked at
            if failures:
                raise failures[0]
        finally:
            await self._link.close()

    async def _first_welcome(self) -> wire.Welcome | None:
        """None: told to stop before the broker was there."""
        connecting = asyncio.create_task(self._patiently(self._connect))
        stopping = asyncio.create_task(self._stopping.wait())
        done, pending = await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return connecting.result() if connecting in done else None

    async def _connect(self) -> wire.Welcome:
        link = Link(self._endpoint, self._hello, keys=self._keys)
        try:
            welcome = await link.connect(timeout_s=CONNECT_S)
        except BaseException:  # also when cancelled
            await link.close()
            raise
        self._link = link
        return welcome

    async def _send(self) -> None:
        while True:
            message = await self._outgoing.get()
            await self._patiently(lambda m=message: self._link.request(m, timeout_s=REPLY_S))  # type: ignore[misc]
            if isinstance(message, wire.Resume):
                self._resumed.set_result(None)
            self._outgoing.task_done()

    async def _fetch(self) -> None:
        await asyncio.wrap_future(self._resumed)
        while True:
            while len(self._waiting) >= self._prefetch:
                self._room.clear()
                await self._room.wait()
            fetch = wire.Fetch(epoch=self.epoch, wait_s=FETCH_WAIT_S, min_version=self.min_version)
            message, payload = await self._patiently(lambda f=fetch: self._link.request(f, timeout_s=REPLY_S))  # type: ignore[misc]
            if isinstance(message, wire.GroupReady):
                self._receive(message, payload)
            elif isinstance(message, wire.NoGroup):
                self._idle = message

    def _receive(self, message: wire.GroupReady, payload: bytes) -> None:
        if message.index < self._done_below or message.index in self._seen:
            return
        delivery = unpack(
            message,
            payload,
            stream=self._stream,
            group_size=self._group_size,
            vocab_size=self._vocab_size,
            published=self.published,
        )
        if delivery.fate == "invalid":
            self._outgoing.put_nowait(wire.Quarantine(epoch=self.epoch, group=delivery.id, reason=delivery.reason))
        with self._changed:
            self._seen.add(message.index)
            heapq.heappush(self._waiting, (delivery.index, delivery.id, delivery))
            self._changed.notify_all()

    async def _patiently(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Try until it works. Only a refusal for good gets out."""
        back_off_s = 0.2
        while True:
            try:
                result = await attempt()
            except TryAgainError as error:
                if not self._unreachable:
                    log.warning("broker.unreachable", endpoint=self._endpoint, error=str(error))
                self._unreachable, self._trouble = True, str(error)
            except RefusedError as error:
                if error.retry_after_s is None:
                    raise
                back_off_s = max(back_off_s, error.retry_after_s)
            else:
                if self._unreachable:
                    log.info("broker.back", endpoint=self._endpoint)
                self._unreachable, self._answered_s = False, time.monotonic()
                return result
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, MAX_BACK_OFF_S)
