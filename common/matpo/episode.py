"""The vocabulary as plain frozen data: Task, Segment, Episode, Group.

No behaviour beyond what the data itself says. matpo.schema moves it to and from Arrow and checks every rule;
nothing here validates, so that a test can build what a hostile peer would send.

One real episode, K = 1, a planner that delegated once (token ids shortened):

    Episode(id="g-00000007.2.0", group="g-00000007", member=2, attempt=0, reward=1.0,
            task=Task(id="atlas-test-17", environment="atlas", question="What is the currency of ...?"),
            segments=(Segment(index=0, parent=-1, role="planner", token_ids=[5, 91, ...], ...),
                      Segment(index=1, parent=0, role="worker", token_ids=[5, 44, ...], ...)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Termination = Literal["answer", "max_turns", "max_tokens", "deadline", "error"]
"""How a segment ended: gave a reply or answer; ran out of turns; of tokens or context; of time; broke."""

UNSAMPLED_VERSION = -1
"""The policy version at a position that no policy sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question with what is needed to score its answer.

    `data` is JSON: whatever the environment's reward needs (for example {"answers": ["Sol", "PEN"]}).
    """

    id: str
    environment: str
    question: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message as a person reads it. For display only: training uses token ids."""

    role: str
    content: str
    at_s: float = 0.0  # seconds since the episode began
    took_s: float = 0.0  # of the turn or the tool call


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """One agent's token stream under one context: prompt, sampled tokens, tool output, in order.

    Shapes: every column has length T. `logprobs` and `versions` mean something only where `sampled` is true;
    elsewhere they are 0.0 and UNSAMPLED_VERSION.
    """

    index: int  # position in Episode.segments
    parent: int  # index of the segment that delegated to this one; -1 for the planner
    role: str
    token_ids: NDArray[np.int32]
    sampled: NDArray[np.bool_]  # True: a policy sampled this token, so it is trained
    logprobs: NDArray[np.float32]  # behaviour log-prob mu, natural log, <= 0
    versions: NDArray[np.int32]  # policy version that sampled the token
    trainable: bool = True  # False: a frozen role; served, never trained
    termination: Termination = "answer"
    error: str = ""  # why, when termination is "error"
    num_turns: int = 0
    num_calls: int = 0  # tool or role calls that the model attempted
    num_malformed_calls: int = 0  # of those, how many did not parse or were not permitted
    messages: Sequence[Message] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """How many of the T tokens a policy sampled."""
        return int(self.sampled.sum())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Episode:
    """The tree of segments under one planner, and its reward."""

    id: str  # "{group}.{member}.{attempt}"
    group: str
    member: int  # 0 .. K-1
    attempt: int  # 0, then +1 each time a lost lease is handed out again
    task: Task
    segments: Sequence[Segment]  # segments[0] is the planner
    answer: str  # the planner's final answer, as scored
    reward: float
    reward_components: Mapping[str, float] = field(default_factory=dict)
    actor: str = ""
    wall_s: float = 0.0

    @property
    def num_sampled(self) -> int:
        """N_i: sampled tokens of trainable segments in the whole tree."""
        return sum(s.num_sampled for s in self.segments if s.trainable)

    @property
    def min_version(self) -> int:
        """Oldest policy version of any sampled token of a trainable segment; lag is counted from it."""
        oldest = [int(s.versions[s.sampled].min()) for s in self.segments if s.trainable and s.num_sampled]
        return min(oldest, default=UNSAMPLED_VERSION)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """The K episodes of one task: the unit of advantage, of delivery and of dropping. Never shrunk silently."""

    id: str
    episodes: Sequence[Episode]

    @property
    def min_version(self) -> int:
        """Oldest policy version in the group."""
        return min(e.min_version for e in self.episodes)
