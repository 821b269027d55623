"""Rollouts with the scripted engine over a tiny environment: no model, no broker."""

import asyncio
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from matpo import Environment, Task, tool
from matpo.errors import ConfigError, InfraError
from matpo.plugins import reward as reward_component
from matpo.settings import RunFile
from matpo.testing import byte_tokenizer
from matpo.wire import Lease, OrderedTask
from matpo_actor.chat import Chat
from matpo_actor.engines.base import Sampled
from matpo_actor.engines.scripted import ScriptedEngine, load_script
from matpo_actor.roles import resolve
from matpo_actor.rollout import play

TOKENIZER = byte_tokenizer()
CHAT = Chat(TOKENIZER)


class Capitals(Environment):
    """One question; `lookup` answers it."""

    def tasks(self, split):
        return [Task(id="t", environment="capitals", question="Capital of Peru?", data={"answer": "Lima"})]

    @tool
    def lookup(self, country: str) -> str:
        """The capital of a country."""
        if country == "Mordor":
            raise KeyError("no such country")
        return {"Peru": "Lima", "Long": "x" * 5000}[country]

    @tool(timeout_s=0.05)
    def hang(self) -> str:
        """Never comes back in time."""
        time.sleep(0.5)
        return "late"

    @tool
    async def meet(self, number: int) -> str:
        """Comes back when two are here."""
        self.both = getattr(self, "both", None) or asyncio.Barrier(2)
        await self.both.wait()
        return f"met {number}"

    def reward(self, task, episode):
        return float(episode.answer == task.data["answer"])


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def run_file(*, planner=None, worker=None, **rollout):
    roles = {
        "planner": {"calls": ["worker"], "prompt": "PLANNER", **(planner or {})},
        "worker": {"calls": ["lookup", "hang", "meet"], "prompt": "WORKER", **(worker or {})},
    }
    return RunFile.model_validate({"run": {"name": "t", "folder": Path("unused")}, "roles": roles, "rollout": rollout})


LEASE = Lease(
    lease="l",
    group="g-00000000",
    member=1,
    attempt=0,
    task=OrderedTask(id="t", environment="capitals", question="Capital of Peru?", data={"answer": "Lima"}),
)


async def played(policy, *, environment=None, file=None, chat=CHAT, engine=None):
    engine = engine or ScriptedEngine(policy, TOKENIZER, version=3, logprob=-0.5)
    return await play(
        LEASE, environment=environment or Capitals(), engine=engine, chat=chat, run_file=file or run_file()
    )


def script(*, planner, worker=()):
    """A policy that says these turns in order, for each role; the last one for ever."""
    said = {"PLANNER": list(planner), "WORKER": list(worker)}

    def policy(prompt):
        turns = said["PLANNER" if "PLANNER" in prompt else "WORKER"]
        return turns.pop(0) if len(turns) > 1 else turns[0]

    return policy


GOOD = {
    "planner": [call("worker", subtask="Find it."), "Lima"],
    "worker": [call("lookup", country="Peru"), "It is Lima."],
}


async def test_a_planner_that_delegates_once_gets_its_reward():
    episode = await played(script(**GOOD))
    planner, worker = episode.segments
    assert (episode.id, episode.answer, episode.reward) == ("g-00000000.1.0", "Lima", 1.0)
    assert (planner.role, planner.parent, worker.role, worker.parent) == ("planner", -1, "worker", 0)
    assert (planner.num_turns, planner.num_calls, planner.num_malformed_calls) == (2, 1, 0)
    assert {s.termination for s in episode.segments} == {"answer"}


async def test_only_sampled_tokens_carry_a_log_prob_and_a_version():
    for segment in (await played(script(**GOOD))).segments:
        for sampled, logprob, version in zip(segment.sampled, segment.logprobs, segment.versions, strict=True):
            assert (logprob, version) == ((-0.5, 3) if sampled else (0.0, -1))


async def test_the_recorded_sampled_tokens_are_what_was_said_stop_token_included():
    for segment, said in zip((await played(script(**GOOD))).segments, (GOOD["planner"], GOOD["worker"]), strict=True):
        ids = segment.token_ids[segment.sampled].tolist()
        assert TOKENIZER.decode(ids) == "".join(text + "<|im_end|>" for text in said)


class RandomIds:
    """An engine that samples ids of which many would come back differently from text, and records them."""

    version = 0

    def __init__(self):
        self.rng, self.said = random.Random(0), []

    async def generate(self, prompt_ids, *, max_tokens, stop_ids, seed=None):
        ids = [self.rng.randrange(256) for _ in range(30)]  # any bytes: mostly not UTF-8
        ids += TOKENIZER(call("worker", subtask="x"))["input_ids"] if len(self.said) < 3 else []
        ids += list(stop_ids)[: self.rng.randrange(2)] if len(self.said) < 3 else list(stop_ids)
        self.said.append((list(prompt_ids), ids))
        return Sampled(token_ids=ids, logprobs=[-1.0] * len(ids), versions=[0] * len(ids), finish="stop")


async def test_the_ids_that_were_sampled_are_the_ids_that_are_trained():
    """Defect 4: text was rendered and tokenised again."""
    engine = RandomIds()
    file = run_file(worker={"calls": ["worker"], "max_turns": 1}, planner={"max_turns": 8})
    episode = await played(None, engine=engine, file=file)
    assert sum(s.num_sampled for s in episode.segments) == sum(len(ids) for _, ids in engine.said)
    for prompt, ids in engine.said:
        whole = [*prompt, *ids]
        assert any(s.token_ids[: len(whole)].tolist() == whole for s in episode.segments)


async def test_a_workers_tokens_stay_out_of_the_planners_context():
    secret = [call("lookup", country="Peru"), "<think>SECRET</think>It is Lima." + call("lookup", country="SECRET")]
    episode = await played(
        script(planner=GOOD["planner"], worker=secret), file=run_file(worker={"max_turns": 2, "summary_tokens": 0})
    )
    shown = TOKENIZER.decode(episode.segments[0].token_ids)
    assert "It is Lima." in shown
    assert "SECRET" not in shown


async def test_a_box_in_a_workers_reply_earns_nothing():
    """Defect 5: a worker's answer in the transcript was scored as the planner's."""

    class Boxed(Capitals):
        def extract_answer(self, text):
            return text.rpartition("\\boxed{")[2].rpartition("}")[0]

    policy = script(planner=[call("worker", subtask="Find it."), "I do not know."], worker=["\\boxed{Lima}"])
    assert (await played(policy, environment=Boxed())).reward == 0.0
    policy = script(planner=[call("worker", subtask="Find it."), "\\boxed{Lima}"], worker=["\\boxed{Lima}"])
    assert (await played(policy, environment=Boxed())).reward == 1.0


async def test_an_episode_without_a_worker_is_an_episode():
    """Defect 5: a batch with no worker call crashed."""
    episode = await played(script(planner=["Lima"]))
    assert (len(episode.segments), episode.reward) == (1, 1.0)


async def test_quotes_in_a_subtask_reach_the_worker_whole():
    """Defect 5: quotes truncated the prompt."""
    subtask = 'Who said "veni, vidi" in \\"Rome\\"? </tool_call>'
    episode = await played(script(planner=[call("worker", subtask=subtask), "Lima"], worker=["?"]))
    assert subtask in TOKENIZER.decode(episode.segments[1].token_ids)


async def test_a_subtask_that_is_too_long_for_the_worker_is_an_error_message():
    """Defect 5: a worker prompt longer than the planner's crashed."""
    file = run_file(worker={"max_context_tokens": 400}, planner={"max_turn_tokens": 2000})
    episode = await played(script(planner=[call("worker", subtask="x" * 600), "Lima"]), file=file)
    assert len(episode.segments) == 1
    assert "too long for the worker" in TOKENIZER.decode(episode.segments[0].token_ids)


async def test_a_malformed_call_comes_back_as_a_message_and_is_counted():
    """Defect 6: it ended the rollout."""
    episode = await played(script(planner=["<tool_call>{oops</tool_call>", "Lima"]))
    (planner,) = episode.segments
    assert "could not be read" in TOKENIZER.decode(planner.token_ids)
    assert (planner.num_turns, planner.num_calls, planner.num_malformed_calls, episode.reward) == (2, 1, 1, 1.0)


async def test_a_planner_may_not_use_a_workers_tool():
    """Defect 7: there were no permissions."""
    episode = await played(script(planner=[call("lookup", country="Peru"), "Lima"]))
    (planner,) = episode.segments
    shown = TOKENIZER.decode(planner.token_ids)
    assert "you may not call lookup. You may call: worker" in shown
    assert (planner.num_calls, planner.num_malformed_calls) == (1, 1)


@pytest.mark.parametrize("arguments", [{}, {"subtask": 3}, {"subtask": " "}, {"subtask": "x", "more": 1}])
async def test_a_delegation_without_a_subtask_is_malformed(arguments):
    episode = await played(script(planner=[call("worker", **arguments), "Lima"]))
    assert (len(episode.segments), episode.segments[0].num_malformed_calls) == (1, 1)


@pytest.mark.parametrize(
    ("said", "shown", "malformed"),
    [
        (call("lookup", country="Mordor"), "KeyError", 0),
        (call("lookup", town="Lima"), "country: Field required", 1),
        (call("hang"), "took longer than 0.05 s", 0),
        (call("lookup", country="Long"), "x" * 64 + " [cut]", 0),
    ],
)
async def test_trouble_with_a_tool_is_an_observation(said, shown, malformed):
    episode = await played(script(planner=GOOD["planner"], worker=[said, "?"]), file=run_file(reply_tokens=64))
    worker = episode.segments[1]
    assert shown in TOKENIZER.decode(worker.token_ids)
    assert worker.num_malformed_calls == malformed


async def test_calls_of_one_message_run_at_the_same_time_and_answer_in_order():
    both = call("meet", number=1) + call("meet", number=2)
    episode = await played(script(planner=GOOD["planner"], worker=[both, "done"]))
    shown = TOKENIZER.decode(episode.segments[1].token_ids)
    assert shown.index("met 1") < shown.index("met 2")


async def test_depth_and_number_of_segments_are_limited():
    deep = run_file(worker={"calls": ["worker"]}, max_segments=3)
    again = call("worker", subtask="Again.")
    episode = await played(script(planner=[again, again, again, "Lima"], worker=[again, "?"]), file=deep)
    assert [s.role for s in episode.segments] == ["planner", "worker", "worker"]
    assert "limited to a depth of 2" in TOKENIZER.decode(episode.segments[1].token_ids)
    assert "has used its 3 segments" in TOKENIZER.decode(episode.segments[0].token_ids)


async def test_when_turns_run_out_the_agent_still_gets_to_answer_with_the_last_reply_in_sight():
    def policy(prompt):
        return (
            "It is Lima."
            if prompt.endswith("answer now.<|im_end|>\n<|im_start|>assistant\n")
            else call("lookup", country="Peru")
        )

    def both(prompt):
        return script(planner=["Lima"])(prompt) if "It is Lima." in prompt else call("worker", subtask="Find it.")

    file = run_file(worker={"max_turns": 1})
    episode = await played(lambda p: both(p) if "PLANNER" in p else policy(p), file=file)
    worker = episode.segments[1]
    assert (worker.termination, worker.num_turns, episode.reward) == ("max_turns", 2, 1.0)
    assert "<tool_response>\nLima\n</tool_response>" in TOKENIZER.decode(worker.token_ids)


@pytest.mark.parametrize("summary_tokens", [0, 32])
@pytest.mark.parametrize("context", range(400, 640, 23))
async def test_a_context_is_never_longer_than_its_limit(context, summary_tokens):
    """Whatever is said: endless turns, endless calls, long replies."""
    limits = {"max_context_tokens": context, "summary_tokens": summary_tokens, "max_turns": 50, "max_turn_tokens": 200}
    for said in ("blah " * 100, call("lookup", country="Long"), call("lookup", country="Peru") * 5):
        file = run_file(worker=limits, reply_tokens=100)
        episode = await played(script(planner=GOOD["planner"], worker=[said]), file=file)
        if len(episode.segments) == 2:
            worker = episode.segments[1]
            assert worker.num_tokens <= context
            assert worker.termination == "max_tokens"
            assert worker.num_sampled > 0


async def test_a_question_that_does_not_fit_is_an_episode_without_a_sampled_token():
    episode = await played(script(planner=["Lima"]), file=run_file(planner={"max_context_tokens": 100}))
    assert (episode.segments[0].termination, episode.num_sampled, episode.reward) == ("max_tokens", 0, 0.0)


async def test_an_episode_ends_at_its_deadline_as_it_stands():
    async def slow(prompt):
        if "PLANNER" in prompt:
            return GOOD["planner"][0]
        return await asyncio.sleep(30, "too late")

    episode = await played(slow, file=run_file(episode_deadline_s=0.2))
    assert [s.termination for s in episode.segments] == ["deadline", "deadline"]
    assert (episode.answer, episode.reward) == ("", 0.0)
    assert episode.segments[0].num_sampled > 0


async def test_an_engine_that_finishes_no_turn_before_the_deadline_is_an_infra_error():
    async def stuck(prompt):
        await asyncio.sleep(30)

    with pytest.raises(InfraError, match="no turn was finished"):
        await played(stuck, file=run_file(episode_deadline_s=0.1))


async def test_cancelling_an_episode_leaves_nothing_running():
    begun, ended = asyncio.Event(), []

    async def policy(prompt):
        if "PLANNER" in prompt:
            return call("worker", subtask="a") + call("worker", subtask="b")
        begun.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(prompt)

    task = asyncio.create_task(played(policy))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 2
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_broken_engine_is_an_infra_error_and_stops_the_other_calls():
    cancelled = []

    async def policy(prompt):
        if "PLANNER" in prompt:
            return call("worker", subtask="breaks") + call("worker", subtask="waits")
        if "breaks" in prompt:
            await asyncio.sleep(0)
            raise InfraError("the engine is gone", reason="engine")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(InfraError, match="the engine is gone"):
        await played(policy)
    assert cancelled == [True]


async def test_a_reward_may_have_components_and_be_async():
    class Parts(Capitals):
        async def reward(self, task, episode):
            return {"reward": 0.75, "acc": 1}

        @reward_component
        def brevity(self, task, episode):
            return len(episode.answer)

    episode = await played(script(planner=["Lima"]), environment=Parts())
    assert (episode.reward, episode.reward_components) == (0.75, {"acc": 1.0, "brevity": 4.0})


def hangs(task, episode):
    time.sleep(0.5)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (hangs, "took longer"),
        (lambda task, episode: 1 / 0, "ZeroDivisionError"),
        (lambda task, episode: float("nan"), "not finite"),
        (lambda task, episode: {"accuracy": 1.0}, "KeyError"),
    ],
)
async def test_a_reward_that_fails_is_an_infra_error_not_a_zero(function, says):
    environment = Capitals()
    environment.reward = function
    with pytest.raises(InfraError, match=says):
        await played(script(planner=["Lima"]), environment=environment, file=run_file(tool_timeout_s=0.1))


async def test_a_worker_sees_the_question_when_told_so():
    episode = await played(script(**GOOD), file=run_file(worker_sees_question=True))
    shown = TOKENIZER.decode(episode.segments[1].token_ids)
    assert "The user's question: Capital of Peru?\n\nYour subtask: Find it." in shown


async def test_a_frozen_role_is_recorded_as_not_trainable():
    episode = await played(script(**GOOD), file=run_file(worker={"trainable": False}))
    assert [s.trainable for s in episode.segments] == [True, False]


def test_a_role_that_calls_what_is_not_there_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r'roles.worker.calls: "browse" is neither .*lookup'):
        resolve(run_file(worker={"calls": ["browse"]}), Capitals())


def test_a_role_is_shown_to_its_caller_as_a_tool_with_a_subtask():
    team = resolve(run_file(worker={"description": "Looks things up."}), Capitals())
    (schema,) = team.roles["planner"].schemas
    assert schema["function"]["description"] == "Looks things up."
    assert list(schema["function"]["parameters"]["properties"]) == ["subtask"]


async def test_a_script_file_plays_an_episode(tmp_path):
    path = tmp_path / "script.jsonl"
    lines = [
        {"when": "WORKER", "say": "It is Lima."},
        {"when": "It is Lima", "say": "Lima"},
        {"say": call("worker", subtask="Find it.")},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert (await played(load_script(path))).reward == 1.0
    path.write_text('{"when": "("}')
    with pytest.raises(ConfigError, match=r"script.jsonl:1"):
        load_script(path)


async def test_two_hundred_episodes_at_once_are_all_complete():
    episodes = await asyncio.gather(*(played(lambda p: "Lima") for _ in range(200)))
    assert np.mean([e.reward for e in episodes]) == 1.0
