"""What a run did: its curves from metrics/*.jsonl, and an account by id of every episode from order to update."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matpo.errors import DataError
from matpo_broker.tables import Accounting, accounting

USED = ("trained", "zero_signal")
TAIL_UPDATES = 5  # the end of a curve is the mean of its last points: one batch is noisy


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Every episode id followed from order to update. Nothing lost: lost == 0. Nothing twice: twice == 0."""

    groups_ordered: int
    groups_open: int  # ordered ahead, not yet consumed when the run ended
    groups_trained: int
    groups_zero_signal: int
    groups_dropped: int
    episodes_stored: int
    episodes_trained: int
    episodes_without_signal: int
    episodes_dropped: int  # stale, invalid or given up, each counted by reason in the logs
    episodes_waiting: int  # stored, of groups that no update consumed before the run ended
    episodes_lost: int
    episodes_twice: int
    episodes_invented: int  # consumed, but the broker never stored them
    groups_compacted: int = 0  # in none of the above: `matpo-broker compact` has forgotten their ids, a checkpoint ...
    episodes_compacted: int = 0  # ... covers them

    def as_json(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that may still be growing: an unfinished last line is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def account(folder: Path, *, max_open: int) -> Account:
    """Compare the broker's ledger with the learner's record of consumed groups, by id.

    `max_open` is how many groups the learner keeps ordered at one time, (1 + max_lag_versions) batches. Of the groups
    that no update consumed, only so many, the newest, can be waiting; the episodes of others are lost.

    Raises DataError when the run has no ledger.
    """
    if not (folder / "journal").is_dir():
        raise DataError(f"{folder} holds no journal: is it a run folder?")
    return compare(accounting(folder / "journal"), list(read_lines(folder / "metrics" / "trained.jsonl")), max_open)


def compare(ledger: Accounting, consumed: Sequence[dict[str, Any]], max_open: int) -> Account:
    """The account of a ledger and the consumed groups (`fate`: trained, zero_signal, or why it was dropped).

    Groups that `matpo-broker compact` has forgotten are only counted.
    """
    if ledger.compacted_below:
        consumed = [line for line in consumed if line["index"] >= ledger.compacted_below]
    fate_of_group = {line["group"]: line["fate"] for line in consumed}
    uses = Counter(episode for line in consumed for episode in line["episodes"])
    may_wait = set([group for group in ledger.orders if group not in fate_of_group][-max_open:])
    ends: Counter[str] = Counter()
    for (group, _), episode in ledger.stored.items():
        fate = fate_of_group.get(group)
        if fate is None:
            ends["waiting" if group in may_wait else "lost"] += 1
        elif fate in USED:
            ends[fate if episode in uses else "lost"] += 1
        else:
            ends["dropped"] += 1
    fates = Counter(fate_of_group.values())
    invented = uses.keys() - set(ledger.stored.values())
    return Account(
        groups_ordered=len(ledger.orders),
        groups_open=len(set(ledger.orders) - fate_of_group.keys()),
        groups_trained=fates["trained"],
        groups_zero_signal=fates["zero_signal"],
        groups_dropped=sum(n for fate, n in fates.items() if fate not in USED),
        episodes_stored=len(ledger.stored),
        episodes_trained=ends["trained"],
        episodes_without_signal=ends["zero_signal"],
        episodes_dropped=ends["dropped"],
        episodes_waiting=ends["waiting"],
        episodes_lost=ends["lost"],
        episodes_twice=sum(n > 1 for n in uses.values()),
        episodes_invented=len(invented),
        groups_compacted=ledger.groups_compacted,
        episodes_compacted=ledger.episodes_compacted,
    )


def plot(folder: Path, path: Path) -> None:
    """Write a PNG of the reward and lag curves of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    updates = list(read_lines(folder / "metrics" / "learner.jsonl"))
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    x = [line["update"] for line in updates]
    top.plot(
        x, [line["reward"] for line in updates], color="#1f6f8b", label="training reward (all groups that arrived)"
    )
    top.set_ylim(0, 1.02)
    top.set_ylabel("mean reward")
    top.grid(alpha=0.3)
    top.legend(loc="lower right")
    bottom.plot(x, [line["lag_mean"] for line in updates], color="#b5651d", label="mean")
    bottom.plot(x, [line["lag_max"] for line in updates], color="#b5651d", alpha=0.35, label="largest")
    bottom.set_ylabel("lag (policy versions)")
    bottom.set_xlabel("update")
    bottom.grid(alpha=0.3)
    bottom.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def end_of(updates: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of `key` over the last TAIL_UPDATES updates; 0.0 when there are none."""
    tail = [line[key] for line in updates[-TAIL_UPDATES:]]
    return sum(tail) / len(tail) if tail else 0.0
