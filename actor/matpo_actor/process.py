"""One actor: leases members from the broker, plays them, sends the episodes. Disposable: it may vanish at any time.

Rules kept here; each has a test in tests/actor/test_actor_process.py:
1. As many members as the run file says are in play, unless the outbox is full or the actor drains.
2. Trouble that is not the model's gives the lease back, and the broker tries the member elsewhere.
3. Leases of members in play and of episodes not stored yet are kept alive; a member whose lease is lost is stopped.
4. Draining: no new leases, unfinished members given back, finished episodes sent, goodbye, within actor.drain_s.
5. A broker that is away is waited for. A background task that dies ends the process, and so does a dead engine.
6. While one member after another fails for such trouble, leasing slows down: attempts are not burnt in a tight loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Coroutine
from typing import Any

from matpo import logs, run_folder, wire
from matpo.episode import Episode
from matpo.errors import ConfigError, InfraError, MatpoError, ProtocolError, RefusedError, SetupError, TryAgainError
from matpo.link import Link
from matpo.metrics import Metrics
from matpo.plugins import Environment, load_environment
from matpo.schema import SCHEMA_VERSION, encode
from matpo.security import client_keys
from matpo.settings import RunFile
from matpo.snapshot import fingerprint
from matpo_actor import engines
from matpo_actor.chat import Chat, load_chat
from matpo_actor.drain import Drain
from matpo_actor.engines.base import ENGINE_DEAD, Engine
from matpo_actor.follower import Follower
from matpo_actor.outbox import Outbox
from matpo_actor.roles import Team, resolve
from matpo_actor.rollout import play
from matpo_actor.tools.runner import ToolRunner

LEASE_WAIT_S = 5.0  # the broker may hold a lease request for this long
PATIENCE_S = 10.0  # between two log lines while something is waited for
FAILURE_PAUSE_S = 0.1  # for each failure since the last episode that was finished
MAX_FAILURE_PAUSE_S = 10.0
log = logs.get()


async def run(run_file: RunFile, *, name: str | None = None) -> None:
    """Play until drained. Raises what ended the process early; what was finished has been sent then, if possible."""
    drain = Drain()
    drain.listen()
    if (run_file.run.folder / run_folder.NAME).exists():  # its snapshots are followed: it has to be this run's
        run_folder.claim(run_file)
    metrics = Metrics("actor")
    if run_file.metrics.actor_port:
        metrics.serve(run_file.metrics.host, run_file.metrics.actor_port)
    environment = load_environment(run_file.environment.name, run_file.environment.plugin, run_file.environment.options)
    chat = load_chat(run_file.model_folder, syntax=run_file.rollout.syntax, reply_role=run_file.rollout.reply_role)
    actor = _Actor(
        run_file,
        name=name or f"{socket.gethostname()}-{os.getpid()}",
        environment=environment,
        chat=chat,
        team=_checked_team(run_file, environment, chat),
        engine=engines.make(run_file),
        metrics=metrics,
        drain=drain,
    )
    await actor.run()


def _checked_team(run_file: RunFile, environment: Environment, chat: Chat) -> Team:
    """The team, after a look whether each role's own prompt fits its context and the chat template."""
    team = resolve(run_file, environment)
    for role in team.roles.values():
        num_tokens = len(chat.opening(role.prompt, "?", role.schemas))
        needed = num_tokens + role.settings.summary_tokens + 16
        if needed > role.settings.max_context_tokens:
            raise ConfigError(
                f"roles.{role.name}.max_context_tokens={role.settings.max_context_tokens}, but prompt and tools take "
                f"{num_tokens} tokens and summary_tokens={role.settings.summary_tokens} are kept free. "
                f"Set it well above {needed}."
            )
    return team


class _Actor:
    def __init__(
        self,
        run_file: RunFile,
        *,
        name: str,
        environment: Environment,
        chat: Chat,
        team: Team,
        engine: Engine,
        metrics: Metrics,
        drain: Drain,
    ) -> None:
        self.run_file, self.name, self.metrics, self.drain = run_file, name, metrics, drain
        self.environment, self.chat, self.team, self.engine = environment, chat, team, engine
        self.tools = ToolRunner(timeout_s=run_file.rollout.tool_timeout_s, metrics=metrics)
        model = fingerprint(run_file.model_folder)
        hello = wire.Hello(
            peer="actor",
            name=name,
            incarnation=secrets.token_hex(8),
            run=run_file.run.name,
            schema_version=SCHEMA_VERSION,
            model=model,
        )
        self.endpoint = f"tcp://{run_file.broker.host}:{run_file.broker.actor_port}"
        self.link = Link(self.endpoint, hello, on_notice=self._on_notice, keys=client_keys(run_file, "actor"))
        self.follower = Follower(
            run_file.snapshot_folder, engine, model, poll_s=run_file.actor.snapshot_poll_s, metrics=metrics
        )
        self.outbox = Outbox(
            self.link.request,
            max_bytes=run_file.actor.outbox_bytes,
            metrics=metrics,
            on_change=self._wake,
            on_refused=self._on_refused,
        )
        self.welcome: wire.Welcome | None = None
        self.failures = 0  # of members, since the last one that was finished
        self.playing: dict[str, asyncio.Task[None]] = {}  # by lease
        self.releases: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()

    # ---- life

    async def run(self) -> None:
        log.info("actor.starting", name=self.name, engine=self.run_file.actor.engine, broker=self.endpoint)
        work = asyncio.create_task(self._work())
        leave = asyncio.create_task(self.drain.requested.wait())
        try:
            await asyncio.wait({work, leave}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.metrics.set("draining", 1)
            leave.cancel()
            work.cancel()
            results = await asyncio.gather(work, leave, return_exceptions=True)
            all_sent = await self._leave()
        cause = results[0]
        if isinstance(cause, BaseException) and not isinstance(cause, asyncio.CancelledError):
            raise _first_cause(cause)
        if not all_sent:
            raise TryAgainError(
                f"{len(self.outbox.leases)} finished episodes could not be sent to {self.endpoint} within "
                f"actor.drain_s={self.run_file.actor.drain_s:g}; their members will be played again.",
                reason="drain",
            )
        log.info("actor.left", name=self.name)

    async def _work(self) -> None:
        self.welcome = await self._connect()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_never_ends(self._heartbeats(self.welcome.heartbeat_s), "heartbeats"))
            await self._start_engine()
            await self._first_snapshot()
            tasks.create_task(_never_ends(self.follower.run(), "follower"))
            tasks.create_task(_never_ends(self.outbox.run(), "outbox"))
            log.info("actor.ready", name=self.name, policy_version=self.engine.version)
            await self._lease_for_ever(tasks)

    async def _connect(self) -> wire.Welcome:
        while True:
            try:
                welcome = await self.link.connect(PATIENCE_S)
            except TryAgainError:
                log.warning("actor.waiting", waits_for="broker", endpoint=self.endpoint, do="start matpo-broker")
                await self.link.close()
            else:
                self.outbox.set_window(welcome.window_bytes, welcome.window_episodes)
                log.info("actor.connected", endpoint=self.endpoint, durability=welcome.durability)
                return welcome

    async def _start_engine(self) -> None:
        limit_s = self.run_file.actor.engine_start_s
        try:
            async with asyncio.timeout(limit_s):
                await self.engine.start()
        except TimeoutError as error:
            raise SetupError(
                f"the engine was not ready after actor.engine_start_s={limit_s:g}. Look at its log, or raise it.",
                reason="engine_start",
            ) from error

    async def _first_snapshot(self) -> None:
        while True:
            try:
                await self.follower.first(60)
            except TryAgainError:
                folder = str(self.run_file.snapshot_folder)
                log.warning("actor.waiting", waits_for="first snapshot", folder=folder, do="start matpo-learner")
            else:
                return

    async def _leave(self) -> bool:
        """Give back, send, say goodbye, free. Returns whether every finished episode was stored."""
        unfinished = list(self.playing)
        if self.welcome is not None:
            try:
                async with asyncio.timeout(self.run_file.actor.drain_s):
                    await asyncio.gather(self._release(unfinished, infra=False, reason="drain"), self.outbox.flush())
                    await self.link.request(wire.Goodbye(), timeout_s=self.run_file.actor.drain_s)
            except (TimeoutError, MatpoError, ExceptionGroup) as error:
                log.warning("actor.left_early", unsent=len(self.outbox.leases), why=str(error) or "drain_s is over")
            if unfinished:
                self.metrics.count("episodes_total", len(unfinished), outcome="released")
        for task in self.releases:
            task.cancel()
        await self.link.close()
        with contextlib.suppress(TimeoutError, InfraError):  # a broken engine may hang; we are leaving anyway
            async with asyncio.timeout(self.run_file.actor.drain_s):
                await self.engine.close()
        self.environment.close()
        return not self.outbox.leases

    # ---- members

    async def _lease_for_ever(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            self.changed.clear()
            if self.failures:
                await asyncio.sleep(min(FAILURE_PAUSE_S * self.failures, MAX_FAILURE_PAUSE_S))
            num_free = self.run_file.actor.num_members - len(self.playing)
            if num_free <= 0 or self.outbox.is_full:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_S):
                        await self.changed.wait()
                continue
            began, idle = time.monotonic(), not self.playing
            leases = await self._ask_for(num_free)
            took_s = time.monotonic() - began
            if idle:
                self.metrics.count("credit_wait_seconds_total", took_s)
            for lease in leases:
                if lease.lease not in self.playing:  # a reply that came twice
                    self.playing[lease.lease] = tasks.create_task(self._member(lease))
            if not leases and took_s < 1.0:  # a broker that does not hold requests is not asked in a tight loop
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await self.changed.wait()

    async def _ask_for(self, num_members: int) -> list[wire.Lease]:
        request = wire.LeaseRequest(num_members=min(num_members, 4096), wait_s=LEASE_WAIT_S)
        try:
            reply, _ = await self.link.request(request)
        except TryAgainError as error:
            log.warning("actor.waiting", waits_for="leases", endpoint=self.endpoint, why=str(error))
            return []
        except RefusedError as error:
            if error.retry_after_s is None:
                raise
            await asyncio.sleep(error.retry_after_s)
            return []
        if not isinstance(reply, wire.Leases):
            raise ProtocolError(f"want leases, got {reply.kind}", reason="reply")
        if reply.paused:
            log.debug("actor.paused", why=reply.paused)
        return reply.leases

    async def _member(self, lease: wire.Lease) -> None:
        """Play one member. It stays in `playing` only if it is cancelled: whoever cancels decides about the lease."""
        episode_id = f"{lease.group}.{lease.member}.{lease.attempt}"
        try:
            episode = await play(
                lease,
                environment=self.environment,
                engine=self.engine,
                chat=self.chat,
                run_file=self.run_file,
                team=self.team,
                tools=self.tools,
                metrics=self.metrics,
                actor=self.name,
            )
            self._put(lease, episode)
            self.failures = 0
        except ConfigError:  # no other actor with this run file would do better
            raise
        except InfraError as error:
            log.warning("episode.failed", episode=episode_id, reason=error.reason, why=str(error))
            self._give_back(lease.lease, reason=error.reason)
            if error.reason == ENGINE_DEAD:
                raise
        # The episode boundary: a defect that one episode meets must not take the others with it.
        except Exception as error:
            log.exception("episode.failed", episode=episode_id, reason="unexpected")
            self._give_back(lease.lease, reason=f"unexpected: {type(error).__name__}")
        del self.playing[lease.lease]
        self._wake()

    def _put(self, lease: wire.Lease, episode: Episode) -> None:
        payload = encode(episode)
        message = wire.StoreEpisode(
            lease=lease.lease,
            group=lease.group,
            member=lease.member,
            attempt=lease.attempt,
            episode=episode.id,
            num_bytes=len(payload),
            crc32c=wire.crc32c(payload),
            num_tokens=sum(s.num_tokens for s in episode.segments),
            min_version=episode.min_version,
            environment=episode.task.environment,
        )
        self.metrics.observe("episode_seconds", episode.wall_s)
        self.metrics.count("episodes_total", outcome="finished")
        self.outbox.put(message, payload)

    def _give_back(self, lease: str, *, reason: str) -> None:
        self.failures += 1
        self.metrics.count("episodes_total", outcome="infra")
        task = asyncio.create_task(self._release([lease], infra=True, reason=reason))
        self.releases.add(task)
        task.add_done_callback(self.releases.discard)

    async def _release(self, leases: list[str], *, infra: bool, reason: str) -> None:
        """Give leases back. If the broker does not hear it, they end by themselves: nobody renews them."""
        if not leases:
            return
        try:
            await self.link.request(wire.Release(leases=leases, infra=infra, reason=reason[:1024]))
        except (TryAgainError, RefusedError) as error:
            log.warning("actor.release_failed", leases=len(leases), why=str(error))

    # ---- what the broker says

    async def _heartbeats(self, every_s: float) -> None:
        while True:
            leases = [*self.playing, *self.outbox.leases][: wire.MAX_LIST]
            message = wire.Heartbeat(leases=leases, policy_version=self.engine.version)
            try:
                reply, _ = await self.link.request(message, timeout_s=max(every_s, 1.0))
            except TryAgainError as error:
                log.warning("actor.heartbeat_lost", why=str(error))
            except RefusedError as error:
                if error.retry_after_s is None:
                    raise
            else:
                if isinstance(reply, wire.Alive):
                    self._on_alive(reply)
            await asyncio.sleep(every_s)

    def _on_alive(self, alive: wire.Alive) -> None:
        self.outbox.set_window(alive.window_bytes, alive.window_episodes)
        if alive.snapshot_version > self.engine.version:
            self.follower.notice(alive.snapshot_version)
        for lease in alive.lost:
            task = self.playing.pop(lease, None)
            if task is not None:
                log.warning("lease.lost", lease=lease)
                self.metrics.count("episodes_total", outcome="lost")
                task.cancel()
                self._wake()

    def _on_notice(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.SnapshotNotice):
            self.follower.notice(message.version)

    def _on_refused(self, lease: str, reason: str) -> None:
        if not reason.startswith("lease"):  # a lost lease needs no giving back
            self._give_back(lease, reason=f"refused: {reason}")

    def _wake(self) -> None:
        self.changed.set()


async def _never_ends(coroutine: Coroutine[Any, Any, None], name: str) -> None:
    await coroutine
    raise InfraError(f"the actor's {name} ended by itself, which it never should", reason="background")


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
