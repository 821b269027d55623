"""`matpo demo`: the main job on the embedded default, measured. Real processes, held-out tasks before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from matpo.errors import DataError
from matpo.settings import RunFile, load_run_file
from matpo.snapshot import newest, version_folder
from matpo_learner.hint import hint
from matpo_ops import up
from matpo_ops.evaluate import Evaluation, evaluate
from matpo_ops.summary import account, end_of, plot, read_lines

CONFIGS = Path(__file__).parent / "configs"


def demo_run_file(
    engine: str, single_agent: bool, folder: Path | None, overrides: Sequence[str]
) -> tuple[Path, list[str]]:
    """The demo's run file and the overrides that give this run its own folder and engine."""
    path = CONFIGS / ("demo-single-agent.toml" if single_agent else "demo.toml")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    where = folder or Path("runs") / f"demo-{stamp}"
    return path, [f'run.folder="{where}"', f'actor.engine="{engine}"', *overrides]


def run_demo(run_path: Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Evaluate, train, evaluate again, account for every id. Returns the figures, which are also in demo.json."""
    run_file = load_run_file(run_path, overrides)
    folder = run_file.run.folder
    started = time.monotonic()
    console.print(f"run folder {folder}; run file {run_path}", highlight=False)
    before = _measure(run_file, run_file.model_folder, "before", console)
    up.run(run_path, run_file, num_actors=run_file.up.num_actors, overrides=overrides, console=console)
    version = newest(run_file.snapshot_folder)
    if version is None:
        raise DataError(f"the run ended without a snapshot in {run_file.snapshot_folder}: see {folder / 'logs'}")
    snapshot = version_folder(run_file.snapshot_folder, version)
    after = _measure(run_file, snapshot, "after", console)
    figures = figures_of(run_file, before, after, time.monotonic() - started)
    (folder / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot(folder, folder / "curves.png")
    updates = list(read_lines(folder / "metrics" / "learner.jsonl"))
    console.print(f"waits     {hint(updates, window=len(updates)).sentence}", highlight=False)
    console.print(f"snapshot  {snapshot}", highlight=False)
    console.print(f"curves    {folder / 'curves.png'}", highlight=False)
    console.print(f"episodes  {run_file.journal_folder}", highlight=False)
    console.print(f"figures   {folder / 'demo.json'}", highlight=False)
    return figures


def figures_of(run_file: RunFile, before: Evaluation, after: Evaluation, wall_s: float) -> dict[str, Any]:
    """The demo's figures, from the run's own files."""
    updates = list(read_lines(run_file.run.folder / "metrics" / "learner.jsonl"))
    ledger = account(run_file.run.folder, max_open=run_file.learner.max_open_groups)
    return {
        "heldout_before": before.score.triple(),
        "heldout_after": after.score.triple(),
        # Without an update there is no mean: a policy that always succeeds has no group with a signal either.
        "train_reward_end": round(end_of(updates, "reward"), 4) if updates else None,
        "mean_lag_versions": round(sum(u["lag_mean"] for u in updates) / max(len(updates), 1), 4),
        "updates": len(updates),
        "hint": hint(updates, window=len(updates)).verdict,
        "wait_fraction": round(hint(updates, window=len(updates)).wait_fraction, 4),
        **ledger.as_json(),
        "wall_s": round(wall_s, 1),
    }


def _measure(run_file: RunFile, folder: Path, name: str, console: Console) -> Evaluation:
    with console.status(f"held-out tasks, {name}") if console.is_terminal else nullcontext():
        found = evaluate(run_file, folder, policy=name)
    score = found.score
    console.print(
        f"held-out reward {name}: {score.mean:.3f} [{score.low:.3f}, {score.high:.3f}] on {score.num_tasks} tasks"
        f" in {found.wall_s:.0f} s",
        highlight=False,
    )
    return found
