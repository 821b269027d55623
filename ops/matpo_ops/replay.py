"""`matpo replay`: train offline on the episodes that a run's broker recorded. No broker, no actors.

The same credit, packing, losses, importance correction and engine as the live learner's, one update per recorded batch
(matpo_ops.recorded says which). With the run's own settings and starting weights it repeats the run: on a CPU with as
many threads its weights are the run's, bit for bit. With another loss it shows what that loss makes of the same data.
Nothing is played anew: the data stay those of the live policies, and the further the replayed policy moves from them,
the less they say about it. KL and ESS measure how far that is.

Rules kept here, each with a test in tests/flow/test_replay.py:
1. Nothing of the run is changed: not its journal, not its folder, also while it is live or after it was killed.
2. The same command twice gives the same weights, bit for bit, on a CPU.
3. What was recorded by another model is refused, with the reason.
4. A journal without a batch to train is an error that says what was found in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pydantic import ValidationError

from matpo import logs, snapshot
from matpo.errors import ConfigError, DataError, MatpoError
from matpo.run_folder import NAME as IDENTITY_NAME
from matpo.run_folder import Identity
from matpo.settings import RunFile
from matpo_broker.recording import Recording
from matpo_learner import checkpoint, credit, lineage, process, records
from matpo_learner.deepspeed_engine import LearnerEngine
from matpo_learner.judge import Judge, oldest_version, vocab_size
from matpo_learner.lineage import Lineage
from matpo_learner.sft import write_model
from matpo_ops.evaluate import evaluate
from matpo_ops.recorded import Reader, Step, Tally, steps_of
from matpo_ops.summary import end_of, plot, read_lines

COLUMNS = (
    "updates", "lag_mean", "kl", "kl_end", "ess", "truncated", "masked", "entropy_end", "grad_norm", "heldout",
)  # fmt: skip
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A run folder that is read: its journal, and beside it what the learner wrote down, as far as it is there."""

    journal: Path

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.journal.parent

    def steps(self) -> list[Step] | None:
        """The updates of the live learner; None when it left no record of them."""
        metrics = self.folder / "metrics"
        if not (metrics / "trained.jsonl").exists():
            return None
        return steps_of(read_lines(metrics / "trained.jsonl"), read_lines(metrics / "learner.jsonl"))

    def lineage(self) -> Lineage:
        """Which update each version is of."""
        return lineage.read(self.folder / lineage.FILE)

    def check_model(self, model_folder: Path) -> None:
        """Raises ConfigError when another model recorded the episodes. Without run.json only their ids can tell."""
        path = self.folder / IDENTITY_NAME
        if not path.exists():
            return
        try:
            recorded = Identity.model_validate_json(path.read_bytes()).fingerprint
        except ValidationError:
            raise ConfigError(f"{path} is no identity of a run. Name a run's journal.") from None
        ours = snapshot.fingerprint(model_folder)
        if recorded != ours:
            raise ConfigError(
                f"the episodes in {self.journal} were sampled by model {recorded} (architecture and vocabulary), "
                f"model.path={model_folder} is {ours}: its token ids and log-probs mean something else. "
                "Set model.path to the model of that run."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The weights that a replay begins with, and how many updates of the run stand behind them."""

    model: Path
    update: int = 0
    checkpoint: Path | None = None


def start_of(run_file: RunFile, source: Source, name: str, scratch: Path) -> Start:
    """`name`: base (model.path), v12 (a snapshot of the run), c000020 (a checkpoint, with its optimizer), or a folder.

    A snapshot is made a model folder under `scratch` first: it has its LM head apart, the model may tie it.
    Raises ConfigError, SnapshotError or CheckpointError when it is not there or not sound.
    """
    if name == "base":
        return Start(model=run_file.model_folder)
    if name[:1] == "v" and name[1:].isdigit():
        folder, version = source.folder / "snapshots", int(name[1:])
        wanted = snapshot.fingerprint(run_file.model_folder)
        manifest = snapshot.verify(folder, version, fingerprint=wanted, min_version=-1)
        tensors = snapshot.load_tensors(folder, version)
        write_model(scratch / "start", tensors, model_folder=run_file.model_folder, dtype="float32")
        return Start(model=scratch / "start", update=manifest.update)
    if re.fullmatch(r"c\d+(-\d+)?", name):
        path = _checkpoint(source.folder / "checkpoints", name)
        return Start(model=run_file.model_folder, update=checkpoint.verify(path).update, checkpoint=path)
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(f"--start {name}: want base, v12, c000020, or a folder that transformers can load.")
    if snapshot.fingerprint(Path(name)) != snapshot.fingerprint(run_file.model_folder):
        raise ConfigError(f"--start {name} is another model than model.path={run_file.model_folder}.")
    return Start(model=Path(name))


def _checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint by its name, or the newest whose name begins with it. Raises ConfigError without one."""
    found = sorted(path for path in folder.glob(f"{name}*") if path.name == name or path.name.startswith(f"{name}-"))
    if not found:
        kept = ", ".join(sorted(path.name for path in folder.glob("c*"))) or "none"
        raise ConfigError(f"--start {name}: {folder} has no such checkpoint. It holds: {kept}.")
    return found[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What the command line says about a replay."""

    start: str = "base"  # see start_of
    by_index: bool = False  # not in the order in which the live learner trained
    with_eval: bool = False  # also measure the result on held-out tasks


def replay(run_file: RunFile, source: Source, out: Path, how: How) -> dict[str, Any]:
    """Train on a recording and write out/metrics/learner.jsonl, out/model and out/replay.json. Returns the figures.

    At most learner.num_updates updates, on one rank.
    Raises ConfigError (another model, `out` exists), JournalError (no journal, or its ledger is damaged), DataError
    (nothing to train); `out` is not left behind then.
    """
    began_s = time.monotonic()
    if out.exists():
        raise ConfigError(f"{out} exists already. Name a new folder with --out.")
    source.check_model(run_file.model_folder)
    run_file = run_file.model_copy(update={"learner": run_file.learner.model_copy(update={"num_ranks": 1})})
    try:
        with Recording(source.journal) as recording, tempfile.TemporaryDirectory(prefix="matpo-replay-") as scratch:
            _warn_if_incomplete(recording)
            steps = None if how.by_index else source.steps()
            reader = Reader(
                recording,
                run_file.learner,
                vocab_size=vocab_size(run_file.model_folder),
                check=Judge(run_file).check,
            )
            begin = start_of(run_file, source, how.start, Path(scratch))
            with closing(LearnerEngine(begin.model, run_file.learner, seed=run_file.run.seed)) as engine:
                if begin.checkpoint is not None:
                    engine.load(begin.checkpoint)
                figures = _train(run_file, engine, reader, steps, begin, source, out)
                figures |= _write(
                    run_file, engine, out, live=None if steps is None else _live(source, figures["version"])
                )
    except MatpoError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    figures = {
        "loss": run_file.learner.loss, "start": how.start, "out": str(out), **figures,
        "wall_s": round(time.monotonic() - began_s, 1),
    }  # fmt: skip
    (out / "replay.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def run(run_file: RunFile, source: Source, out: Path, how: How) -> dict[str, Any]:
    """`replay`, with curves and, if asked for, held-out accuracy [mean, low, high]. Returns the figures."""
    figures = replay(run_file, source, out, how)
    plot(out, out / "curves.png")
    if how.with_eval:
        figures["heldout"] = evaluate(run_file, out / "model", policy=figures["loss"]).score.triple()
    return figures


def compare(runs: Mapping[str, RunFile], source: Source, out: Path, how: How) -> dict[str, Any]:
    """`run` for each loss, in OUT/LOSS, from the same weights on the same data. Prints a table. Returns all figures."""
    found = {name: run(run_file, source, out / name, how) for name, run_file in runs.items()}
    columns = [name for name in COLUMNS if all(name in figures for figures in found.values())]
    rows = [["loss", *columns], *([name, *(_cell(figures[c]) for c in columns)] for name, figures in found.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return found


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    return f"{value:.4g}"


def _warn_if_incomplete(recording: Recording) -> None:
    if gone := sum(group.is_gone for group in recording.groups):
        log.warning(
            "journal.incomplete",
            groups=len(recording.groups),
            gone=gone,
            hint="a run keeps all its episodes with broker.keep_consumed = true",
        )


def _train(
    run_file: RunFile,
    engine: LearnerEngine,
    reader: Reader,
    steps: Sequence[Step] | None,
    begin: Start,
    source: Source,
    out: Path,
) -> dict[str, Any]:
    """All updates; one line of learner.jsonl each, as a live learner writes it. Returns what they add up to."""
    branches, watch = source.lineage(), records.Stopwatch(None)
    left = None if steps is None else [step for step in steps if step.update > begin.update]
    rows: list[dict[str, Any]] = []
    not_finite = 0
    with closing(records.JsonLines(out / "metrics" / "learner.jsonl", num_bytes=0)) as lines:
        batches = reader.batches(left)
        while len(rows) + not_finite < run_file.learner.num_updates:
            with watch.phase("read"):
                batch = next(batches, None)
            if batch is None:
                break
            # Of whatever branch, a version with the weights of the update before this one.
            at = branches.oldest_within(batch.update - 1, 0)
            work = process.Batch(version=at, lineage=branches, groups=batch.groups)
            report = process.update(engine, work, run_file, watch)
            if not report.num_steps:
                not_finite += 1
                continue
            trained = [credit.as_trained(group, run_file.learner) for group in batch.groups]
            lags = [branches.lag(batch.update - 1, oldest_version(g.episodes)) for g in trained for _ in g.episodes]
            rows.append(
                {
                    "update": batch.update,
                    "version": batch.version + 1,
                    "time_s": round(time.time(), 3),
                    **records.summarise(batch.groups, [records.outcomes(g) for g in batch.zero_signal], lags, report),
                    "groups_dropped": 0,
                    "seconds": watch.lap(),
                }
            )
            lines.write(**rows[-1])
            shown = {name: round(rows[-1][name], 4) for name in ("reward", "lag_mean", "loss", "kl", "ess")}
            log.info("update.done", update=batch.update, **shown)
    if not rows:
        raise DataError(f"nothing to replay in {source.journal}: {_in_words(reader.tally, steps)}", reason="empty")
    return _figures(rows, reader.tally, not_finite)


def _in_words(tally: Tally, steps: Sequence[Step] | None) -> str:
    found = {
        "without signal": tally.zero_signal,
        "given back (set broker.keep_consumed = true for the next run)": tally.gone,
        "too few for a batch": tally.left_over,
        "with a damaged record": len(tally.damage),
        **{f"invalid ({reason})": n for reason, n in tally.invalid.items()},
    }
    counted = ", ".join(f"{n} {what}" for what, n in found.items() if n)
    if counted:
        return f"{counted}."
    return "it holds no whole group." if steps is None else "the learner finished no update. Try --by-index."


def _figures(rows: Sequence[dict[str, Any]], tally: Tally, not_finite: int) -> dict[str, Any]:
    means = ("lag_mean", "kl", "ess", "truncated", "masked", "grad_norm")
    return {
        "updates": len(rows),
        "first_update": rows[0]["update"],
        "last_update": rows[-1]["update"],
        "version": rows[-1]["version"],
        "groups_trained": sum(row["groups_trained"] for row in rows),
        "groups_zero_signal": tally.zero_signal,
        "groups_gone": tally.gone,
        "groups_left_over": tally.left_over,
        "groups_invalid": dict(tally.invalid),
        "records_damaged": dict(Counter(one.reason for one in tally.damage)),
        "updates_not_finite": not_finite,
        "tokens_trained": sum(row["tokens_trained"] for row in rows),
        **{name: float(f"{mean(row[name] for row in rows):.6g}") for name in means},
        **{f"{name}_end": float(f"{end_of(rows, name):.6g}") for name in ("loss", "kl", "entropy")},
    }


def _write(run_file: RunFile, engine: LearnerEngine, out: Path, *, live: Mapping[str, str] | None) -> dict[str, Any]:
    """The final weights as a model folder, their hash, and whether they are the live learner's, by tensor."""
    tensors = dict(engine.tensors())
    dtype = getattr(torch, run_file.model.dtype)
    hashes = {name: snapshot.tensor_hash(tensor.to(dtype)) for name, tensor in tensors.items()}
    write_model(out / "model", tensors, model_folder=run_file.model_folder, dtype=run_file.model.dtype)
    digest = hashlib.blake2b(json.dumps(hashes, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {"weights": digest, "same_as_live": None if live is None else live == hashes}


def _live(source: Source, version: int) -> dict[str, str] | None:
    """Hashes of what the live learner published as a version; None when it is not kept."""
    folder = source.folder / "snapshots"
    if version not in snapshot.versions(folder):
        return None
    return {tensor.name: tensor.blake2b for tensor in snapshot.read_manifest(folder, version).tensors}
