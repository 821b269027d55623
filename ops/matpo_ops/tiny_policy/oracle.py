"""Scripted policies for atlas: what a competent team would say next, and what a poor strategist would.

A policy reads nothing but the prompt's text, as a model would. It is competent in skills (calls, copying, reading
passages); `Flaws` says how often it errs in *strategy*, which is what reinforcement is to repair.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Policy = Callable[[str], str]
_MESSAGE = re.compile(r"<\|(\w+)\|>(.*?)<\|im_end\|>", re.DOTALL)
_QUESTION = re.compile(r"What is the (.+?) of ((?:the \w+ of )*)the country where (.+) is\?")
_LINKS = re.compile(r"the (\w+) of ")
_TOOLS = re.compile(r"Tools: ([\w, ]+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flaws:
    """Probabilities of each strategic mistake; the rest of the time the policy does well."""

    skip_hop: float = 0.0  # asks for the attribute of the city at once
    stop_early: float = 0.0  # answers with the country
    other_attribute: float = 0.0  # asks for another attribute of the country
    guess: float = 0.0  # a worker answers without searching


CLEAN = Flaws()
MIXED = Flaws(skip_hop=0.2, stop_early=0.3, other_attribute=0.25, guess=0.25)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """What a guess is drawn from: attribute -> plausible values."""

    values: Mapping[str, Sequence[str]]

    def guess(self, fact: str, rng: random.Random) -> str:
        """A plausible value for a fact such as "currency of Peru"."""
        return rng.choice(self.values.get(fact.split(" of ")[0]) or ["unknown"])


def policy(flaws: Flaws, knowledge: Knowledge, seed: str) -> Policy:
    """A policy whose mistakes are drawn from `seed` and the conversation's first message: the same each time."""

    def say(prompt: str) -> str:
        messages = _MESSAGE.findall(prompt)
        tools = _TOOLS.search(messages[0][1])
        request = next(text for role, text in messages if role == "user")
        replies = [text for role, text in messages if role == "tool"]
        rng = random.Random(f"{seed} {request}")
        if match := _QUESTION.match(request):
            name = tools[1].split(",")[0] if tools else "search"
            plan = ["country", *reversed(_LINKS.findall(match[2])), match[1]]
            return _lead(plan, match[3], replies, name, flaws, knowledge, rng)
        if not replies and rng.random() < flaws.guess:
            return knowledge.guess(request, rng)
        return read(request, replies[-1]) if replies else call("search", request)

    return say


def call(name: str, text: str) -> str:
    """A call of the worker (a subtask) or of the search tool (a query)."""
    key = "query" if name == "search" else "subtask"
    return "<tool_call>" + json.dumps({"name": name, "arguments": {key: text}}, ensure_ascii=False) + "</tool_call>"


def read(fact: str, passages: str) -> str:
    """The value of a fact such as "currency of Peru" in passages; "unknown" if they do not say."""
    attribute, _, subject = fact.partition(" of ")
    pattern = (
        rf"^{re.escape(subject)} is a city in (.+?)\.(?: |$)"
        if attribute == "country"
        else rf"The {re.escape(attribute)} of {re.escape(subject)} is (.+?)\.(?: |$)"
    )
    found = re.search(pattern, passages, re.MULTILINE)
    return found[1] if found else "unknown"


def _lead(
    plan: list[str],
    city: str,
    replies: Sequence[str],
    name: str,
    flaws: Flaws,
    knowledge: Knowledge,
    rng: random.Random,
) -> str:
    """The next thing that a planner (name="worker") or a single agent (name="search") says."""
    attribute = plan[-1]
    mistake = rng.choices(
        ["skip", "stop", "other", ""],
        [
            flaws.skip_hop,
            flaws.stop_early,
            flaws.other_attribute,
            1 - flaws.skip_hop - flaws.stop_early - flaws.other_attribute,
        ],
    )[0]
    if name == "search" and rng.random() < flaws.guess:
        return knowledge.guess(f"{attribute} of {city}", rng)
    if mistake == "skip":
        plan = [attribute]
    elif mistake == "stop":
        plan = plan[:-1]
    elif mistake == "other":
        plan[-1] = rng.choice([a for a in knowledge.values if a not in (attribute, "country")])
    facts: list[str] = []
    subject = city
    for step, wanted in enumerate(plan):
        facts.append(f"{wanted} of {subject}")
        if step == len(replies):
            return call(name, facts[-1])
        subject = replies[step] if name == "worker" else read(facts[-1], replies[step])
    return subject
