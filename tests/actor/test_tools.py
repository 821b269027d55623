"""Tool calls: whatever happens, the model gets an observation, in time."""

import asyncio
import threading
import time

import pytest

from matpo import tool
from matpo.errors import InfraError
from matpo.metrics import Metrics
from matpo.plugins import as_tool
from matpo_actor.tools.runner import ToolRunner


async def called(function, *, timeout_s=5.0, metrics=None, **arguments):
    return await ToolRunner(timeout_s=timeout_s, metrics=metrics).call(as_tool(function), arguments)


async def test_a_sync_tool_runs_in_a_thread_of_its_own():
    @tool
    def where() -> str:
        return threading.current_thread().name

    assert (await called(where)).text == "matpo-call"


async def test_a_result_that_is_no_text_is_made_text():
    @tool
    async def number() -> int:
        return 3

    assert (await called(number)).text == "3"


async def test_a_lone_surrogate_cannot_get_into_an_episode():
    @tool
    def odd() -> str:
        return "a\ud800b"

    assert (await called(odd)).text == "a?b"


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError("mine"), StopIteration("x"), SystemExit("x")])
async def test_an_exception_of_the_tool_is_an_observation(error):
    @tool
    def fails() -> str:
        raise error

    observation = await called(fails)
    assert (observation.outcome, observation.text[:6]) == ("error", "error:")


async def test_a_tool_that_says_infra_error_fails_the_episode():
    @tool
    def search() -> str:
        raise InfraError("the search server is down")

    with pytest.raises(InfraError, match="is down"):
        await called(search)


async def test_arguments_that_do_not_fit_are_refused_and_named():
    @tool
    def add(a: int, b: int = 0) -> str:
        return str(a + b)

    assert (await called(add, a="2")).text == "2"
    observation = await called(add, a="two", c=1)
    assert observation.outcome == "refused"
    assert "a: " in observation.text
    assert "c: " in observation.text


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_hanging_tool_ends_at_its_time_out(kind):
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hang() -> str:
        release.wait(10)
        return "late"

    @tool(timeout_s=0.05)
    async def hang_async() -> str:
        await asyncio.sleep(10)
        return "late"

    began = time.monotonic()
    observation = await called(hang if kind == "sync" else hang_async)
    release.set()
    assert observation.outcome == "timeout"
    assert time.monotonic() - began < 5


async def test_no_more_calls_run_at_once_than_the_tool_allows():
    running, most = 0, 0

    @tool(max_concurrent=3)
    async def busy() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return ""

    runner, built = ToolRunner(timeout_s=5), as_tool(busy)
    await asyncio.gather(*(runner.call(built, {}) for _ in range(12)))
    assert most == 3


async def test_a_thread_that_hangs_keeps_its_place_until_it_ends():
    release = threading.Event()

    @tool(max_concurrent=1, timeout_s=0.05)
    def hang() -> str:
        release.wait(10)
        return "done"

    runner, built = ToolRunner(timeout_s=5), as_tool(hang)
    threads = threading.active_count()
    outcomes = [(await runner.call(built, {})).outcome for _ in range(3)]
    assert outcomes == ["timeout"] * 3
    assert threading.active_count() == threads + 1
    release.set()
    for _ in range(100):  # the place comes free on the loop, shortly after the thread ends
        observation = await runner.call(built, {})
        if observation.outcome == "ok":
            break
    assert observation.text == "done"


async def test_calls_are_counted_by_tool_and_outcome():
    @tool
    def fine() -> str:
        return ""

    metrics = Metrics("actor")
    await called(fine, metrics=metrics)
    labels = {"tool": "fine", "outcome": "ok"}
    assert metrics.registry.get_sample_value("matpo_actor_tool_calls_total", labels) == 1
