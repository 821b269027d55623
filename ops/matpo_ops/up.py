"""`matpo up`: a whole run on one machine, with one live view.

Ctrl-C (or SIGTERM) drains: actors hand back what they hold, the learner checkpoints, the broker goes last. Starting
the same run file again resumes.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from matpo.errors import MatpoError
from matpo.settings import RunFile
from matpo_learner.hint import hint
from matpo_ops.processes import Fleet, fleet_of
from matpo_ops.summary import read_lines

SPARKS = "▁▂▃▄▅▆▇█"
POLL_S = 0.5
GRACE_S = 30.0


class InterruptedRunError(MatpoError):
    """The operator stopped the run; everything was drained."""

    exit_code = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What the view shows, read from the run's own files."""

    updates: Sequence[dict[str, Any]]
    num_updates: int
    wall_s: float
    groups_came: int  # before the first update
    states: Sequence[tuple[str, str]]  # (process, state)


def run(run_path: Path, run_file: RunFile, *, num_actors: int, overrides: Sequence[str], console: Console) -> None:
    """Start everything, show it, and return when the learner has trained its last update.

    Raises SetupError when a process cannot run, InterruptedRunError after Ctrl-C.
    """
    folder = run_file.run.folder
    fleet = fleet_of(
        run_path, folder, num_actors=num_actors, overrides=overrides, actor_metrics_port=run_file.metrics.actor_port
    )
    started_s = time.monotonic()
    with _signals() as stopping:
        try:
            fleet.start()
            with _view(console) as show:
                while fleet.children[1].exit_code != 0 and not stopping:
                    fleet.watch(time.monotonic())
                    show(read_progress(run_file, fleet, started_s))
                    time.sleep(POLL_S)
                show(read_progress(run_file, fleet, started_s))
        finally:
            if stopping:
                console.print("draining: actors, then the learner, then the broker (a second Ctrl-C kills)")
            fleet.stop(grace_s=GRACE_S)
    if stopping:
        raise InterruptedRunError(f"stopped. Start the same run file again to resume; logs are in {folder / 'logs'}")


def read_progress(run_file: RunFile, fleet: Fleet, started_s: float) -> Progress:
    """Read the learner's lines and each child's state."""
    states = []
    for child in fleet.children:
        code = child.exit_code
        state = "running" if code is None else "finished" if code == 0 else f"exit {code}"
        states.append((child.name, state + (f", restarted {child.num_restarts}x" if child.num_restarts else "")))
    metrics = run_file.run.folder / "metrics"
    updates = list(read_lines(metrics / "learner.jsonl"))
    return Progress(
        updates=updates,
        num_updates=run_file.learner.num_updates,
        wall_s=time.monotonic() - started_s,
        groups_came=0 if updates else sum(1 for _ in read_lines(metrics / "trained.jsonl")),
        states=states,
    )


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Values in [0, 1] as block characters, the newest on the right, averaged down to `width` columns."""
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    means = [sum(chunk) / len(chunk) for chunk in (values[i : i + step] for i in range(0, len(values), step))]
    return "".join(SPARKS[min(int(min(max(v, 0.0), 1.0) * len(SPARKS)), len(SPARKS) - 1)] for v in means)


def who_waits(updates: Sequence[dict[str, Any]], groups_came: int = 0) -> str:
    """One sentence on the bottleneck, from the learner's measured waits of the last updates."""
    if not updates:
        return f"{groups_came} groups came, no update yet" if groups_came else "waiting for the first groups"
    return hint(updates).sentence


def tokens_per_second(line: dict[str, Any]) -> float:
    """Sampled tokens that one update trained, over its whole time, the wait for groups included."""
    return float(line["tokens_trained"]) / max(_seconds(line), 1e-9)


def _seconds(line: dict[str, Any]) -> float:
    return float(sum(line["seconds"].values()))


def line_of(progress: Progress) -> str:
    """One plain line for a place without a terminal."""
    last = progress.updates[-1]
    return (
        f"update {last['update']}/{progress.num_updates}  reward {last['reward']:.3f}  lag {last['lag_mean']:.2f}"
        f"  grad norm {last['grad_norm']:.2f}  {tokens_per_second(last):.0f} tokens/s"
        f"  {progress.wall_s:.0f} s  {hint(progress.updates).verdict.replace('_', ' ')}"
    )


def panel_of(progress: Progress) -> Group:
    """The live view."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    done = progress.updates[-1]["update"] if progress.updates else 0
    table.add_row("update", f"{done} of {progress.num_updates}    {progress.wall_s:.0f} s")
    if progress.updates:
        last = progress.updates[-1]
        table.add_row("reward", f"{last['reward']:.3f}  {sparkline([u['reward'] for u in progress.updates])}")
        table.add_row("lag", f"mean {last['lag_mean']:.2f}, largest {last['lag_max']} versions")
        table.add_row("trained", f"{tokens_per_second(last):.0f} sampled tokens/s")
    table.add_row("waits", who_waits(progress.updates, progress.groups_came))
    table.add_row("processes", "   ".join(f"{name}: {state}" for name, state in progress.states))
    return Group(Text("matpo up", style="bold"), table)


@contextmanager
def _view(console: Console) -> Iterator[Any]:
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda progress: live.update(panel_of(progress))
        return
    shown = 0

    def plain(progress: Progress) -> None:
        nonlocal shown
        if len(progress.updates) > shown:
            shown = len(progress.updates)
            console.print(line_of(progress), highlight=False, soft_wrap=True)
            sys.stdout.flush()

    yield plain


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; the second one is left to its default, which kills."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
