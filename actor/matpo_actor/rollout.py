"""Play one member: planner -> worker -> ... -> answer, and its reward. No broker, no files.

Rules kept here; each has a test in tests/actor/test_rollout.py:
1. Whatever the model writes is data. A call that does not parse or is not permitted comes back to it as a message.
2. A worker's tokens never enter the caller's context: only its final reply does, without thinking and calls, cut.
3. Only the planner's own last message is scored.
4. Every sampled token is recorded as sampled, with its log-prob and version; everything else is masked.
5. When turns or context run out there is still room for one final answer.
6. An episode ends at its deadline, as it stands; cancelling it leaves nothing running.
Only trouble that is not the model's raises: InfraError.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import zlib
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from matpo.episode import UNSAMPLED_VERSION, Episode, Message, Segment, Task, Termination
from matpo.errors import InfraError
from matpo.metrics import Metrics
from matpo.plugins import Environment
from matpo.settings import RunFile
from matpo.wire import Lease
from matpo_actor.calls import Call, CallError
from matpo_actor.chat import Chat
from matpo_actor.engines.base import Engine, Sampled
from matpo_actor.roles import Role, Team, resolve
from matpo_actor.tools.runner import ToolRunner, in_thread

MIN_TURN_TOKENS = 8  # with less room than this a turn is not worth starting
MIN_REPLY_TOKENS = 16  # a reply is not cut to less than this to make it fit


async def play(
    lease: Lease,
    *,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    run_file: RunFile,
    team: Team | None = None,
    tools: ToolRunner | None = None,
    metrics: Metrics | None = None,
    actor: str = "",
) -> Episode:
    """Play and score one member. `team`, `tools` are made from the run file unless given (share them between episodes).

    Raises InfraError when engine, tool server or reward failed: the member should be tried again elsewhere.
    """
    rollout = run_file.rollout
    run = _Run(
        lease=lease,
        task=Task(**lease.task.model_dump()),
        engine=engine,
        chat=chat,
        run_file=run_file,
        team=team or resolve(run_file, environment),
        tools=tools or ToolRunner(timeout_s=rollout.tool_timeout_s, metrics=metrics),
        metrics=metrics,
    )
    limit = asyncio.timeout(rollout.episode_deadline_s)
    try:
        async with limit:
            last_message = await run.segment(rollout.root, run.task.question, parent=-1, depth=1)
    except TimeoutError as error:
        if not limit.expired():
            raise InfraError(f"a time-out inside the engine: {error}", reason="engine") from error
        last_message = ""
        if not any(r.sampled_any for r in run.records):
            raise InfraError(
                f"no turn was finished in rollout.episode_deadline_s={rollout.episode_deadline_s:g}", reason="deadline"
            ) from error
    segments = tuple(record.segment(default="deadline") for record in run.records)
    episode = Episode(
        id=f"{lease.group}.{lease.member}.{lease.attempt}",
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        task=run.task,
        segments=segments,
        answer="",
        reward=0.0,
        actor=actor,
        wall_s=run.now_s(),
    )
    return await _scored(episode, last_message, environment, timeout_s=rollout.tool_timeout_s)


@dataclass(kw_only=True)
class _Record:
    """One segment while it grows."""

    index: int
    parent: int
    role: Role
    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    termination: Termination | None = None
    num_turns: int = 0
    num_calls: int = 0
    num_malformed_calls: int = 0

    @property
    def sampled_any(self) -> bool:
        return any(self.sampled)

    def add_given(self, ids: Sequence[int]) -> None:
        n = len(ids)
        self.token_ids += ids
        self.sampled += [False] * n
        self.logprobs += [0.0] * n
        self.versions += [UNSAMPLED_VERSION] * n

    def add_sampled(self, turn: Sampled) -> None:
        self.num_turns += 1
        self.token_ids += turn.token_ids
        self.sampled += [True] * len(turn.token_ids)
        self.logprobs += [min(value, 0.0) for value in turn.logprobs]  # rounding may leave +1e-8
        self.versions += turn.versions

    def segment(self, *, default: Termination) -> Segment:
        return Segment(
            index=self.index,
            parent=self.parent,
            role=self.role.name,
            token_ids=np.asarray(self.token_ids, dtype=np.int32),
            sampled=np.asarray(self.sampled, dtype=np.bool_),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            versions=np.asarray(self.versions, dtype=np.int32),
            trainable=self.role.settings.trainable,
            termination=self.termination or default,
            num_turns=self.num_turns,
            num_calls=self.num_calls,
            num_malformed_calls=self.num_malformed_calls,
            messages=tuple(self.messages),
        )


@dataclass(kw_only=True)
class _Run:
    """What all segments of one episode share."""

    lease: Lease
    task: Task
    engine: Engine
    chat: Chat
    run_file: RunFile
    team: Team
    tools: ToolRunner
    metrics: Metrics | None
    records: list[_Record] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def now_s(self) -> float:
        return time.monotonic() - self.started

    async def segment(self, name: str, request: str, *, parent: int, depth: int) -> str:
        """Play one role to its end; returns the text of its last message."""
        role = self.team.roles[name]
        settings = role.settings
        prompt = self.chat.opening(role.prompt, request, role.schemas)
        record = _Record(index=len(self.records), parent=parent, role=role)
        room = settings.max_context_tokens - self._reserved(role)
        if room - len(prompt) < MIN_TURN_TOKENS and parent >= 0:
            return f"error: this subtask is too long for the {name} (roles.{name}.max_context_tokens)"
        self.records.append(record)
        record.add_given(prompt)
        record.messages += [
            Message(role="system", content=role.prompt, at_s=self.now_s()),
            Message(role="user", content=request, at_s=self.now_s()),
        ]
        if self.metrics is not None:
            self.metrics.count("segments_total", role=name)
        if room - len(prompt) < 1:  # a question that does not fit: an episode without a sampled token
            record.termination = "max_tokens"
            return ""
        return await self._turns(record, room=room, depth=depth)

    async def _turns(self, record: _Record, *, room: int, depth: int) -> str:
        settings = record.role.settings
        while True:
            left = room - len(record.token_ids)
            text, ended = await self._turn(record, max_tokens=min(settings.max_turn_tokens, left))
            turn = self.chat.parse(text)
            if not turn.attempts and ended:
                record.termination = "answer"
                return turn.text
            last_turn = record.num_turns >= settings.max_turns
            closes: Termination | None = "max_turns" if last_turn else None
            if not turn.attempts or len(record.token_ids) + MIN_TURN_TOKENS > room:
                closes = "max_tokens"
            if closes is not None and settings.summary_tokens == 0:
                record.num_calls += len(turn.attempts)
                record.num_malformed_calls += len(turn.errors)
                record.termination = closes
                return turn.text
            replies = await self._answer_calls(record, turn.attempts, depth=depth)
            fitting = self._fit(replies, ended=ended, room=room - len(record.token_ids) - MIN_TURN_TOKENS)
            if closes is not None or fitting is None:
                return await self._summary(record, replies, ended=ended, why=closes or "max_tokens")
            record.add_given(fitting)

    async def _turn(self, record: _Record, *, max_tokens: int) -> tuple[str, bool]:
        """One LLM call: (what it said, whether it ended by itself)."""
        began = self.now_s()
        lease = self.lease  # a seed per turn, so that a deterministic engine repeats the episode
        place = (
            f"{self.run_file.run.seed} {lease.group}.{lease.member}.{lease.attempt} {record.index} {record.num_turns}"
        )
        sampled = await self.engine.generate(
            list(record.token_ids),
            max_tokens=max_tokens,
            stop_ids=self.chat.stop_ids,
            seed=zlib.crc32(place.encode()),
        )
        record.add_sampled(sampled)
        text = self.chat.decode(sampled.token_ids)
        took = self.now_s() - began
        record.messages.append(Message(role="assistant", content=text, at_s=began, took_s=took))
        if self.metrics is not None:
            self.metrics.observe("turn_seconds", took, role=record.role.name)
            self.metrics.count("tokens_generated_total", len(sampled.token_ids), role=record.role.name)
        return text, bool(sampled.token_ids) and sampled.token_ids[-1] in self.chat.stop_ids

    async def _answer_calls(
        self, record: _Record, attempts: Sequence[Call | CallError], *, depth: int
    ) -> list[tuple[str, str]]:
        """Run the calls of one message at the same time; (name, reply) in their order."""
        began = self.now_s()
        record.num_calls += len(attempts)
        replies = await _together([self._answer(record, attempt, depth=depth) for attempt in attempts])
        took = self.now_s() - began
        record.messages += [Message(role=f"tool:{n}", content=t, at_s=began, took_s=took) for n, t in replies]
        return replies

    async def _answer(self, record: _Record, attempt: Call | CallError, *, depth: int) -> tuple[str, str]:
        role = record.role
        if isinstance(attempt, CallError):
            record.num_malformed_calls += 1
            return "error", f"error: {attempt.message}"
        if attempt.name in role.delegates:
            reply = await self._delegate(record, attempt, depth=depth)
        elif attempt.name in role.tools:
            observation = await self.tools.call(role.tools[attempt.name], attempt.arguments)
            record.num_malformed_calls += observation.outcome == "refused"
            reply = observation.text
        else:
            record.num_malformed_calls += 1
            allowed = ", ".join(role.settings.calls) or "nothing"
            return "error", f"error: you may not call {attempt.name[:64]}. You may call: {allowed}"
        return attempt.name, self.chat.cut(reply, self.run_file.rollout.reply_tokens)

    async def _delegate(self, record: _Record, call: Call, *, depth: int) -> str:
        rollout = self.run_file.rollout
        subtask = call.arguments.get("subtask")
        if not isinstance(subtask, str) or not subtask.strip() or len(call.arguments) > 1:
            record.num_malformed_calls += 1
            return f"error: {call.name} takes one argument, subtask, a text that is not empty"
        if depth >= rollout.max_depth:
            return f"error: delegation is limited to a depth of {rollout.max_depth}"
        if len(self.records) >= rollout.max_segments:
            return f"error: this episode has used its {rollout.max_segments} segments. Answer with what you have"
        if rollout.worker_sees_question:
            subtask = f"The user's question: {self.task.question}\n\nYour subtask: {subtask}"
        return await self.segment(call.name, subtask, parent=record.index, depth=depth + 1) or "(no reply)"

    def _fit(
        self, replies: Sequence[tuple[str, str]], *, ended: bool, room: int, request: str | None = None
    ) -> list[int] | None:
        """Ids of the replies, cut further until they fit; None when they do not."""
        budget = self.run_file.rollout.reply_tokens
        ids = self.chat.continuation(replies, ended=ended, request=request)
        while len(ids) > room:
            budget //= 2
            if budget < MIN_REPLY_TOKENS:
                return None
            cut = [(name, self.chat.cut(text, budget)) for name, text in replies]
            ids = self.chat.continuation(cut, ended=ended, request=request)
        return ids

    async def _summary(
        self, record: _Record, replies: Sequence[tuple[str, str]], *, ended: bool, why: Termination
    ) -> str:
        """The final-summary turn, in the room that was kept for it. What it calls is not run."""
        settings = record.role.settings
        room = settings.max_context_tokens - settings.summary_tokens - len(record.token_ids)
        ids = self._fit(replies, ended=ended, room=room, request=settings.summary_request) if replies else None
        if ids is None:
            ids = self.chat.request(settings.summary_request, ended=ended)
        record.add_given(ids)
        record.messages.append(Message(role="user", content=settings.summary_request, at_s=self.now_s()))
        text, _ = await self._turn(record, max_tokens=settings.summary_tokens)
        turn = self.chat.parse(text)
        record.num_calls += len(turn.attempts)
        record.num_malformed_calls += len(turn.attempts)
        record.termination = why
        return turn.text

    def _reserved(self, role: Role) -> int:
        """Tokens kept for the final-summary turn and its request."""
        if role.settings.summary_tokens == 0:
            return 0
        return role.settings.summary_tokens + len(self.chat.request(role.settings.summary_request, ended=False))


async def _together(coroutines: Sequence[Coroutine[Any, Any, tuple[str, str]]]) -> list[tuple[str, str]]:
    """Await all; if one raises, the others are cancelled and gone before it is raised."""
    tasks = [asyncio.create_task(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _scored(episode: Episode, last_message: str, environment: Environment, *, timeout_s: float) -> Episode:
    """The episode with its answer and reward. Raises InfraError: a reward that fails is never a zero."""
    try:
        async with asyncio.timeout(timeout_s):
            episode = replace(episode, answer=environment.extract_answer(last_message))
            result = await _call(environment.reward, episode)
            parts = dict(result) if isinstance(result, Mapping) else {"reward": result}
            for name in dir(type(environment)):
                if hasattr(getattr(type(environment), name), "__matpo_reward__"):
                    parts[name] = await _call(getattr(environment, name), episode)
        parts = {name: float(value) for name, value in parts.items()}
        reward = parts.pop("reward")
    except InfraError:
        raise
    except TimeoutError as error:
        raise InfraError(f"the reward took longer than {timeout_s:g} s", reason="reward_timeout") from error
    # The reward is the user's code: whatever it raises fails this episode only, and is tried again elsewhere.
    except Exception as error:
        raise InfraError(f"the reward failed: {type(error).__name__}: {error}", reason="reward") from error
    if not all(math.isfinite(value) for value in [reward, *parts.values()]):
        raise InfraError(f"the reward is not finite: {reward}, {parts}", reason="reward")
    return replace(episode, reward=reward, reward_components=parts)


async def _call(function: Any, episode: Episode) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(episode.task, episode)
    result = await in_thread(lambda: function(episode.task, episode))
    return await result if inspect.isawaitable(result) else result
