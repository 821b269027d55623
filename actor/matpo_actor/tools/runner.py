"""Run one tool call. Whatever the tool does, the model gets an observation: a slow or broken tool is not a crash.

Rules kept here; each has a test in tests/actor/test_tools.py:
1. A call ends within its time-out, also when the tool hangs in a thread.
2. No more calls of a tool run at once than it allows; a thread that hangs still counts.
3. An exception of the tool becomes text. InfraError passes through: the tool's server is down, not the model wrong.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from matpo import logs
from matpo.errors import InfraError
from matpo.metrics import Metrics
from matpo.plugins import Tool, ToolArgumentError

Outcome = Literal["ok", "error", "timeout", "refused"]
Result = TypeVar("Result")
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What the model is shown of one call. `refused`: its arguments do not fit."""

    text: str
    outcome: Outcome


class ToolRunner:
    """Runs tools of one process, with its own concurrency limits."""

    def __init__(self, *, timeout_s: float, metrics: Metrics | None = None) -> None:
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._slots: dict[str, asyncio.Semaphore] = {}

    async def call(self, tool: Tool, arguments: Mapping[str, Any]) -> Observation:
        """Check the arguments, run the tool, return what to show. Raises InfraError only if the tool does."""
        started = time.monotonic()
        timeout_s = tool.timeout_s if tool.timeout_s is not None else self._timeout_s
        limit = asyncio.timeout(timeout_s)
        try:
            checked = tool.bind_arguments(arguments)
            async with limit:
                text = str(await self._run(tool, checked))
            observation = Observation(text=text.encode(errors="replace").decode(), outcome="ok")  # no lone surrogates
        except ToolArgumentError as error:
            observation = Observation(text=f"error: {error}", outcome="refused")
        except InfraError:
            raise
        # A tool is the user's code: anything it raises is something the model should see, not a crash of the actor.
        except Exception as error:  # noqa: BLE001
            if limit.expired():
                observation = Observation(
                    text=f"error: {tool.name} took longer than {timeout_s:g} s", outcome="timeout"
                )
            else:
                log.debug("tool.raised", tool=tool.name, error=repr(error))
                observation = Observation(text=f"error: {type(error).__name__}: {error}", outcome="error")
        if self._metrics is not None:
            self._metrics.count("tool_calls_total", tool=tool.name, outcome=observation.outcome)
            self._metrics.observe("tool_seconds", time.monotonic() - started, tool=tool.name)
        return observation

    async def _run(self, tool: Tool, arguments: Mapping[str, Any]) -> Any:
        slot = self._slots.setdefault(tool.name, asyncio.Semaphore(tool.max_concurrent))
        if inspect.iscoroutinefunction(tool.function):
            async with slot:
                return await tool.function(**arguments)
        await slot.acquire()
        result = await in_thread(lambda: tool.function(**arguments), on_end=slot.release)
        return await result if inspect.isawaitable(result) else result


async def in_thread(function: Callable[[], Result], *, on_end: Callable[[], None] | None = None) -> Result:
    """Run a function in a daemon thread of its own; `on_end` is called on the loop when it really ended.

    Not asyncio.to_thread: an executor's thread that hangs would keep the process from exiting.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def finish(result: Result | None, error: BaseException | None) -> None:
        if on_end is not None:
            on_end()
        if future.done():  # cancelled: nobody waits any more
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        elif isinstance(error, StopIteration) or not isinstance(error, Exception):
            # a future refuses the first; the others (SystemExit) are for the thread, not for the one who waits
            future.set_exception(RuntimeError(repr(error)))
        else:
            future.set_exception(error)

    def work() -> None:
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = function()
        except BaseException as caught:  # noqa: BLE001 - carried over to the one who waits
            error = caught
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:  # the loop is closed: the process is leaving
            return

    threading.Thread(target=work, daemon=True, name="matpo-call").start()
    return await future
