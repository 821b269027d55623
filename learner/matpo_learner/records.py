"""What a run leaves behind for people: JSON lines and Prometheus metrics of every update. Decides nothing.

    metrics/learner.jsonl    one line per update: reward, lag, loss, diagnostics by role and lag, where the time went
    metrics/trained.jsonl    one line per consumed group: what became of it, and in which update

Both are true as far as the checkpoint that the learner resumed from, and are cut there: each group stands once.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matpo.episode import Group
from matpo.metrics import Metrics
from matpo_learner.deepspeed_engine import StepReport
from matpo_learner.diagnostics import Diagnostics
from matpo_learner.judge import MAX_COMPONENTS
from matpo_learner.waits import Waits

OTHER = "other"
BY_ROLE_AND_LAG = {
    "ess_ratio": "ess",
    "role_tokens": "num_tokens",
    "role_log_ratio_nats": "log_ratio",
    "role_kl_nats": "kl",
    "role_truncated_ratio": "truncated",
    "role_masked_ratio": "masked",
    "role_entropy_nats": "entropy",
    "role_advantage_mean": "advantage",
    "role_advantage_std": "advantage_std",
    "role_advantage_abs": "advantage_abs",
}
"""Metric with labels role and lag -> attribute of Diagnostics. Roles come from the run file, lags are six buckets."""


class JsonLines:
    """An append-only file of JSON lines that can be cut back."""

    def __init__(self, path: Path, *, num_bytes: int) -> None:
        """Open the file and cut it to `num_bytes`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(num_bytes)

    def write(self, **fields: Any) -> None:
        """Append one line; visible to readers at once."""
        self._file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Make what is written durable; returns the length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Stopwatch:
    """Seconds of the current update by phase; the watchdog looks at each phase while it lasts."""

    def __init__(self, metrics: Metrics | None, waits: Waits | None = None) -> None:
        self._metrics, self._waits = metrics, waits
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block."""
        began_s = time.monotonic()
        with self._waits.on(name) if self._waits else nullcontext():
            yield
        took_s = time.monotonic() - began_s
        self._spent_s[name] += took_s
        if self._metrics is not None:
            self._metrics.observe("step_seconds", took_s, phase=name)

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        spent_s = {name: round(value, 4) for name, value in self._spent_s.items()}
        self._spent_s.clear()
        return spent_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one episode earned: all that is kept of a group without signal."""

    reward: float
    components: Mapping[str, float]


def outcomes(group: Group) -> list[Outcome]:
    """What each of its episodes earned."""
    return [Outcome(reward=e.reward, components=e.reward_components) for e in group.episodes]


def summarise(
    groups: Sequence[Group], zero_signal: Sequence[Sequence[Outcome]], lags: Sequence[int], report: StepReport
) -> dict[str, Any]:
    """The numbers of one update, flat.

    `reward` is over every sound group that came in for this update, those without signal too: a policy that always
    succeeds has no signal left, and must not look worse for it. `reward_trained` is over the trained ones only.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    trained = [one for group in groups for one in outcomes(group)]
    everyone = trained + [one for group in zero_signal for one in group]
    overall = asdict(report.overall)
    overall.pop("num_tokens")
    return {
        "reward": _mean([one.reward for one in everyone]),
        "reward_trained": _mean([one.reward for one in trained]),
        "reward_components": _components(everyone),
        "lag_mean": _mean(lags),
        "lag_max": max(lags, default=0),
        "groups_trained": len(groups),
        "groups_zero_signal": len(zero_signal),
        "episodes_trained": len(episodes),
        "segments_mean": _mean([len(e.segments) for e in episodes]),
        "tokens_trained": report.num_tokens,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        **overall,
        "engine_gap": asdict(report.engine_gap) if report.engine_gap else None,
        "by_role_and_lag": _nested(report.by_role_and_lag),
    }


def _components(everyone: Sequence[Outcome]) -> dict[str, float]:
    """Mean of each part of the reward over the episodes that have it.

    Names are the actors' words: only the MAX_COMPONENTS that most episodes have stand alone, the rest are "other".
    """
    counted = Counter(name for one in everyone for name in one.components)
    kept = set(sorted(counted, key=lambda name: (-counted[name], name))[:MAX_COMPONENTS])
    values: defaultdict[str, list[float]] = defaultdict(list)
    for one in everyone:
        for name, value in one.components.items():
            values[name if name in kept else OTHER].append(value)
    return {name: _mean(values[name]) for name in sorted(values)}


def _nested(cells: Mapping[tuple[str, str], Diagnostics]) -> dict[str, dict[str, dict[str, float]]]:
    """{"planner": {"3-4": {"ess": 0.98, ...}}}: only what has tokens."""
    found: defaultdict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (role, bucket), part in cells.items():
        # Six digits: people and plots read these, and live views read the whole file again and again.
        found[role][bucket] = {name: float(f"{value:.6g}") for name, value in asdict(part).items()}
    return dict(found)


def export(metrics: Metrics, row: Mapping[str, Any], lags: Sequence[int], environment: str, report: StepReport) -> None:
    """The same numbers as Prometheus metrics."""
    metrics.set("policy_version", row["version"])
    metrics.set("published_version", row["version"])
    metrics.count("groups_trained_total", row["groups_trained"])
    metrics.count("tokens_trained_total", report.num_tokens)
    for lag in lags:
        metrics.observe("batch_lag_versions", lag)
    metrics.observe("importance_ratio", report.overall.ratio)
    for name in (*BY_ROLE_AND_LAG, "engine_gap_nats", "reward"):
        metrics.clear(name)  # a cell without tokens has no value, not the one of an earlier update
    for (role, bucket), part in report.by_role_and_lag.items():
        for name, attribute in BY_ROLE_AND_LAG.items():
            metrics.set(name, getattr(part, attribute), role=role, lag=bucket)
    if report.engine_gap is not None:
        metrics.set("engine_gap_nats", report.engine_gap.mean, stat="mean")
        metrics.set("engine_gap_nats", report.engine_gap.max, stat="max")
    metrics.set("truncated_ratio", report.overall.truncated)
    metrics.set("masked_ratio", report.overall.masked)
    metrics.set("kl_nats", report.overall.kl)
    metrics.set("reference_kl_nats", report.overall.reference_kl)
    metrics.set("entropy_nats", report.overall.entropy)
    metrics.set("grad_norm", report.grad_norm)
    for component, value in {**row["reward_components"], "reward": row["reward"]}.items():
        metrics.set("reward", value, environment=environment, component=component)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
