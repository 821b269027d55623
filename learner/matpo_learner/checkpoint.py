"""What the learner needs to resume, as one atomic unit: engine state and what it covers. Never called snapshot.

    checkpoints/c000020-000331/      after update 20, with 331 groups consumed: engine files, meta.json last

Rules kept here, each with a test in tests/learner/test_checkpoint.py:
1. A checkpoint appears whole or not at all: files hashed and fsynced, meta.json last, folder fsynced, then renamed.
2. The newest *valid* one is loaded; a torn one is passed over, with a warning.
3. A checkpoint of another run or another model is refused, never passed over: the user named a wrong folder.
4. Older ones go only after the new one stands, and `keep` stay.
5. A sound checkpoint is never replaced: one of the same update covers more groups, so it has another name.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from matpo import logs
from matpo.errors import CheckpointError
from matpo.run_folder import Identity
from matpo.snapshot import fsync
from matpo_learner.orders import Book

META = "meta.json"
_FOLDER = re.compile(r"c(\d{6,})(?:-(\d{6,}))?")  # format 1 had no second number: found, and refused by name
_READ_BYTES = 1 << 20
log = logs.get()


class Pending(BaseModel):
    """What was consumed since the last line of learner.jsonl and belongs into the next one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zero_signal: list[list[tuple[float, dict[str, float]]]] = []  # by group and episode: reward and its components
    dropped: int = 0
    bad_updates: int = 0


class Meta(BaseModel):
    """What a checkpoint covers. `log_bytes` says how far the run's logs are true (see matpo_learner.process)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    meta_version: Literal[1] = 1
    run: str  # Identity.id
    fingerprint: str
    epoch: int
    version: int = Field(ge=0)  # policy version of these weights
    update: int = Field(ge=0)  # optimizer batches behind them
    cursor: int = Field(ge=0)
    consumed_below: int = Field(ge=0)
    consumed: list[int]
    log_bytes: dict[str, int]
    pending: Pending = Pending()
    files: dict[str, str] = {}  # relative path -> BLAKE2b-128; filled in by commit

    @property
    def name(self) -> str:
        """The checkpoint's name, on disk and on the wire."""
        return f"c{self.update:06d}-{self.book().num_consumed:06d}"

    def book(self) -> Book:
        """Orders and consumed groups as they were."""
        return Book(cursor=self.cursor, consumed_below=self.consumed_below, consumed=set(self.consumed))


def staging(folder: Path, epoch: int) -> Path:
    """Where a learner writes its files before commit; each epoch has its own."""
    return folder / f".tmp-c{epoch}"


def prepare(folder: Path, epoch: int) -> Path:
    """An empty staging folder. What other lives have left behind goes."""
    for left in folder.glob(".tmp-c*"):
        shutil.rmtree(left, ignore_errors=True)
    path = staging(folder, epoch)
    path.mkdir(parents=True)
    return path


def commit(folder: Path, meta: Meta, *, keep: int) -> Path:
    """Make the staged files a checkpoint, and delete the oldest beyond `keep`. Returns its folder."""
    path = staging(folder, meta.epoch)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        fsync(file)
    hashes = {file.relative_to(path).as_posix(): _hash(file) for file in files}
    (path / META).write_text(meta.model_copy(update={"files": hashes}).model_dump_json(indent=1), encoding="utf-8")
    fsync(path / META)
    for inner in [*(p for p in path.rglob("*") if p.is_dir()), path]:
        fsync(inner)
    final = folder / meta.name
    if final.exists():  # a torn one of an earlier life: load_newest passed it over
        shutil.rmtree(final)
    path.rename(final)
    fsync(folder)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, by update and consumed groups, rising. Not a check."""
    if not folder.is_dir():
        return []
    matches = (_FOLDER.fullmatch(entry.name) for entry in folder.iterdir())
    return [folder / name for *_, name in sorted((int(m[1]), int(m[2] or 0), m[0]) for m in matches if m)]


def load_newest(folder: Path, identity: Identity) -> tuple[Path, Meta] | None:
    """The newest valid checkpoint of this run, its files verified; None when there is no checkpoint at all.

    Raises CheckpointError: `run` or `fingerprint` when it is another run's or model's, `torn` when none is whole.
    """
    every = found(folder)
    for path in reversed(every):
        try:
            meta = verify(path)
        except CheckpointError as error:
            log.warning("checkpoint.torn", checkpoint=path.name, error=str(error))
            continue
        for field, wanted in (("run", identity.id), ("fingerprint", identity.fingerprint)):
            if getattr(meta, field) != wanted:
                what = "model" if field == "fingerprint" else field
                raise CheckpointError(
                    f"{path} is of another {what} ({getattr(meta, field)}, want {wanted}). "
                    "Set run.folder to the run's own folder, or to a new one.",
                    reason=field,
                )
        return path, meta
    if every:
        raise CheckpointError(
            f"none of the {len(every)} checkpoints in {folder} is whole. Restore one, or start in a new run.folder.",
            reason="torn",
        )
    return None


def verify(path: Path) -> Meta:
    """Read and check one checkpoint folder. Raises CheckpointError(torn)."""
    try:
        meta = Meta.model_validate_json((path / META).read_bytes())
        damaged = [name for name, wanted in meta.files.items() if _hash(path / name) != wanted]
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} is torn: {error}", reason="torn") from None
    if damaged or meta.name != path.name:
        raise CheckpointError(f"{path} is damaged: {', '.join(damaged) or 'it names another one'}", reason="torn")
    return meta


def oldest_kept(folder: Path) -> int:
    """consumed_below of the oldest checkpoint that is kept: what is below it is needed by none."""
    below = []
    for path in found(folder):
        try:
            below.append(Meta.model_validate_json((path / META).read_bytes()).consumed_below)
        except (OSError, ValidationError):
            continue
    return min(below, default=0)


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
