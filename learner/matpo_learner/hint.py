"""What would make a run faster: more actors, or a faster learner. From measured waits, by plain numbers.

Rules kept here, each with a test in tests/learner/test_hint.py:
1. A learner that waits for groups most of the time needs more actors; one that hardly waits is the bottleneck itself.
2. Groups that lie ready when an update begins are no reason for actors, however long an earlier wait was.
3. Only the last updates count: what a start costs is soon forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

WINDOW_UPDATES = 10
WAITS_FRACTION = 0.5  # above: add actors
BUSY_FRACTION = 0.1  # below: the learner is the bottleneck

Verdict = Literal["unknown", "add_actors", "learner", "balanced"]
VERDICTS: tuple[Verdict, ...] = ("unknown", "add_actors", "learner", "balanced")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hint:
    """Over the last `num_updates`: the share of time in which the learner waited for groups, and what that means."""

    verdict: Verdict
    wait_fraction: float
    num_updates: int

    @property
    def sentence(self) -> str:
        """For people."""
        share = f"the learner waits for groups {self.wait_fraction:.0%} of the time"
        return {
            "unknown": "no update yet",
            "add_actors": f"{share}: add actors",
            "learner": f"{share}: it is the bottleneck, more actors will not help",
            "balanced": f"{share}: balanced",
        }[self.verdict]


def hint(updates: Sequence[Mapping[str, Any]], *, window: int = WINDOW_UPDATES) -> Hint:
    """From lines of learner.jsonl (`seconds` by phase, `batch_ready`), of which the last `window` count."""
    recent = updates[-window:] if window else []
    total = sum(sum(line["seconds"].values()) for line in recent)
    if not total:
        return Hint(verdict="unknown", wait_fraction=0.0, num_updates=len(recent))
    waited = sum(line["seconds"].get("wait", 0.0) for line in recent) / total
    # A batch that lay there whole when the learner came for it was made by actors that were fast enough.
    ready = sum(bool(line.get("batch_ready")) for line in recent) / len(recent)
    verdict: Verdict = "balanced"
    if waited > WAITS_FRACTION and ready <= 0.5:
        verdict = "add_actors"
    elif waited < BUSY_FRACTION:
        verdict = "learner"
    return Hint(verdict=verdict, wait_fraction=waited, num_updates=len(recent))
