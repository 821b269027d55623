"""Scripted episodes for the warm start, played through the actor's own rollout: the ids are those of real episodes."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matpo import schema
from matpo.episode import Episode, Task
from matpo.plugins import Environment
from matpo.settings import RunFile
from matpo.wire import Lease, OrderedTask
from matpo_actor.chat import Chat
from matpo_actor.engines.scripted import ScriptedEngine
from matpo_actor.roles import resolve
from matpo_actor.rollout import play
from matpo_actor.tools.runner import ToolRunner
from matpo_ops.tiny_policy.oracle import Flaws, Knowledge, call, policy

NUM_CORPUS_TASKS = 4000
_CALL_TAGS = re.compile("</?tool_call>")


def knowledge(tasks: Sequence[Task]) -> Knowledge:
    """Every value that an attribute has in these tasks: what a guess is drawn from."""
    values: dict[str, list[str]] = {}
    for task in tasks:
        for link in task.data["chain"]:
            values.setdefault(link["fact"].split(" of ")[0], []).append(link["answer"])
    return Knowledge(values=values)


def corpus(environment: Environment) -> Iterator[str]:
    """Texts that the tokenizer is trained on: all that a team says, is told and reads on training tasks."""
    search = environment.tools()[0].function
    for task in environment.tasks("train")[:NUM_CORPUS_TASKS]:
        yield from (environment.prompt(role) for role in ("planner", "worker", "agent"))
        yield from ("Tools: worker", "Tools: search", task.question)
        for link in task.data["chain"]:
            for name in ("worker", "search"):
                yield _CALL_TAGS.sub("", call(name, link["fact"]))
            yield from (link["fact"], str(search(query=link["fact"])), link["answer"])


def write(
    path: Path, run_file: RunFile, chat: Chat, tokenizer: Any, environment: Environment, *, flaws: Flaws, num: int
) -> list[Episode]:
    """Play `num` episodes of random training tasks and write them. The same every time for the same arguments."""
    episodes = asyncio.run(play_all(run_file, chat, tokenizer, environment, flaws=flaws, num=num))
    schema.write_episodes(path, episodes)
    return episodes


async def play_all(
    run_file: RunFile, chat: Chat, tokenizer: Any, environment: Environment, *, flaws: Flaws, num: int
) -> list[Episode]:
    """Play `num` episodes of random training tasks, one after the other."""
    tasks = environment.tasks("train")
    known = knowledge(tasks)
    rng = random.Random(f"tiny policy {run_file.run.seed} {run_file.run.name}")
    team = resolve(run_file, environment)
    tools = ToolRunner(timeout_s=run_file.rollout.tool_timeout_s)
    episodes = []
    for index in range(num):
        task = rng.choice(tasks)
        ordered = OrderedTask(id=task.id, environment=task.environment, question=task.question, data=dict(task.data))
        lease = Lease(lease=f"l-{index}", group=f"sft-{index:08d}", member=0, attempt=0, task=ordered)
        engine = ScriptedEngine(policy(flaws, known, f"{run_file.run.name} {index}"), tokenizer)
        episodes.append(
            await play(
                lease, environment=environment, engine=engine, chat=chat, run_file=run_file, team=team, tools=tools
            )
        )
    return episodes
