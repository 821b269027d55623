"""Rank 0's diary: a line per consumed group, a line per update, and what is pending for the next one. Decides nothing.

What goes into a line and a metric is in matpo_learner.records. The caller holds the fence while anything is written.

Rules kept here, each with a test in tests/learner/test_diary.py:
1. Of a group without signal only its rewards are kept, for the means of the next line.
2. What is pending is part of a checkpoint: a diary that is opened with it goes on as if it had never been closed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from matpo import logs
from matpo.episode import Group
from matpo.metrics import Metrics
from matpo.settings import RunFile
from matpo_learner import bad_batches, records
from matpo_learner.checkpoint import Pending
from matpo_learner.deepspeed_engine import StepReport
from matpo_learner.hint import VERDICTS, WINDOW_UPDATES, hint
from matpo_learner.records import Outcome

LOGS = ("learner", "trained")
BAD_BATCHES = "bad_batches"
log = logs.get()


class Diary:
    """learner.jsonl, trained.jsonl and bad_batches/ of a run folder."""

    def __init__(self, run_file: RunFile, metrics: Metrics, *, covered: Mapping[str, int], pending: Pending) -> None:
        """Cut both logs back to `covered`, their bytes at the checkpoint that `pending` is of."""
        self._metrics = metrics
        self._settings = run_file.learner
        self._environment = run_file.environment.name
        self.bad_batches = run_file.run.folder / BAD_BATCHES
        folder = run_file.run.folder / "metrics"
        self._logs = {n: records.JsonLines(folder / f"{n}.jsonl", num_bytes=covered.get(n, 0)) for n in LOGS}
        self._zero_signal = [
            [Outcome(reward=reward, components=components) for reward, components in group]
            for group in pending.zero_signal
        ]
        self._dropped, self._bad_updates = pending.dropped, pending.bad_updates
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW_UPDATES)
        self._hinted = ""

    @property
    def num_zero_signal(self) -> int:
        """Groups without signal since the last update."""
        return len(self._zero_signal)

    @property
    def num_dropped(self) -> int:
        """Groups dropped since the last update."""
        return self._dropped

    def consumed(self, group: str, index: int, fate: str, episodes: Sequence[str], *, reason: str, update: int) -> None:
        """One group is done: it was trained in `update`, or dropped while that was being collected."""
        self._logs["trained"].write(
            update=update, group=group, index=index, fate=fate, reason=reason, episodes=list(episodes)
        )

    def no_signal(self, group: Group) -> None:
        """Count a group whose rewards say nothing."""
        self._metrics.count("zero_signal_groups_total")
        self._zero_signal.append(records.outcomes(group))

    def dropped(self, group: str, fate: str, reason: str, **fields: int) -> None:
        """Count a group that cannot be trained."""
        # The label is the fate, which is one of five: a peer's words must not become label values.
        self._metrics.count("groups_dropped_total", reason=fate)
        self._dropped += 1
        log.warning("group.dropped", group=group, fate=fate, reason=reason, **fields)

    def not_finite(self, groups: Sequence[Group], report: StepReport, *, update: int, version: int) -> None:
        """Count an update of which something was not finite, and keep what it was made of."""
        self._bad_updates += 1
        self._metrics.count("bad_updates_total")
        what = {
            "version": version,
            "loss": self._settings.loss,
            "learning_rate": report.learning_rate,
            "minibatches": {str(index): why for index, why in report.skipped.items()},
        }
        folder = bad_batches.save(self.bad_batches, groups, what, update=update)
        log.error("update.not_finite", update=update, minibatches=dict(report.skipped), batch=str(folder))

    def updated(
        self,
        groups: Sequence[Group],
        lags: Sequence[int],
        report: StepReport,
        *,
        update: int,
        version: int,
        batch_ready: bool,
        seconds: Mapping[str, float],
    ) -> None:
        """The weights moved: a line of learner.jsonl, metrics, the hint. `lags` has one number per episode."""
        row: dict[str, Any] = {
            "update": update,
            "version": version,
            "time_s": round(time.time(), 3),
            **records.summarise(groups, self._zero_signal, lags, report),
            "groups_dropped": self._dropped,
            "bad_updates": self._bad_updates,
            "batch_ready": batch_ready,
            "seconds": seconds,
        }
        row |= self._hint(row)
        self._zero_signal, self._dropped, self._bad_updates = [], 0, 0
        self._logs["learner"].write(**row)
        records.export(self._metrics, row, lags, self._environment, report)
        shown = ("reward", "lag_mean", "loss", "kl", "ess", "grad_norm", "groups_zero_signal", "tokens_trained")
        numbers = {name: round(row[name], 4) for name in shown}
        log.info("update.done", update=update, version=version, **numbers, seconds=seconds)

    def _hint(self, row: dict[str, Any]) -> dict[str, Any]:
        """What would make the run faster, for this line of learner.jsonl; logged now and then, and when it changes."""
        self._recent.append(row)
        found = hint(list(self._recent))
        self._metrics.set("wait_ratio", found.wait_fraction)
        for verdict in VERDICTS:
            self._metrics.set("hint", verdict == found.verdict, verdict=verdict)
        if found.verdict != self._hinted or row["update"] % WINDOW_UPDATES == 0:
            log.info("learner.hint", verdict=found.verdict, why=found.sentence, num_updates=found.num_updates)
        self._hinted = found.verdict
        return {"wait_fraction": round(found.wait_fraction, 4), "hint": found.verdict}

    def pending(self) -> Pending:
        """What belongs into the next line."""
        return Pending(
            zero_signal=[[(one.reward, dict(one.components)) for one in group] for group in self._zero_signal],
            dropped=self._dropped,
            bad_updates=self._bad_updates,
        )

    def sync(self) -> dict[str, int]:
        """Make both logs durable; returns their bytes."""
        return {name: file.sync() for name, file in self._logs.items()}

    def close(self) -> None:
        """Close both logs."""
        for file in self._logs.values():
            file.close()
