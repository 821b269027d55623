"""A published-weights folder: atomic commit, verify, newest. Written by the learner, read by the actors.

    snapshots/LATEST                 the newest version as text; replaced atomically (a file: NFS caches symlinks)
    snapshots/v000123/               model.safetensors, config.json, tokenizer files, manifest.json

Rules kept here, each with a test in tests/common/test_snapshot.py:
1. A version folder appears whole or not at all: files fsynced, manifest written last, folder fsynced, then renamed.
2. Whoever reads trusts the manifest and hashes, never the pointer: the pointer only saves a directory listing.
3. A manifest of an older learner epoch, an older version, or another model is never followed.
4. The LM head is written out, and config.json says tie_word_embeddings = false: an engine that reloads tied weights may
   update the embedding and leave the head at the old version, silently.
5. A learner whose epoch is older than what is published publishes nothing.

transformers' AutoModelForCausalLM.from_pretrained loads a version folder as it is.
SnapshotError.reason is one of: missing, torn, hash, fingerprint, backwards, epoch, exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file

from matpo.errors import ConfigError, SnapshotError

MANIFEST_VERSION: Literal[1] = 1
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
# What decides which tensors a model has and what its token ids mean. Weights, dtype and tying do not.
ARCHITECTURE_KEYS = (
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps",
    "attention_bias", "sliding_window", "layer_types",
)  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_VERSION_FOLDER = re.compile(r"v(\d{6,})")
_READ_BYTES = 1 << 20


class Tensor(BaseModel):
    """One tensor of a snapshot: Hugging Face name, torch dtype without the prefix, shape, BLAKE2b-128 of its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: str
    shape: list[int]
    blake2b: str


class File(BaseModel):
    """One file of a snapshot, the manifest itself left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # no slash: nothing outside the folder
    num_bytes: int
    blake2b: str


class Manifest(BaseModel):
    """What a version folder holds. Its presence is the commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_version: Literal[1] = MANIFEST_VERSION
    version: int = Field(ge=0)
    epoch: int = Field(ge=0)  # of the learner that published it
    update: int = Field(ge=0)  # optimizer batches behind these weights
    dtype: str
    fingerprint: str  # of architecture and vocabulary
    created_at: str  # ISO 8601, UTC
    tensors: list[Tensor]
    files: list[File]


def version_folder(folder: Path, version: int) -> Path:
    """Where a version lives."""
    return folder / f"v{version:06d}"


def versions(folder: Path) -> list[int]:
    """Versions whose folder exists, rising. Reads the directory; not a check."""
    if not folder.is_dir():
        return []
    matches = (_VERSION_FOLDER.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def fingerprint(model_folder: Path) -> str:
    """A short hash of architecture and vocabulary. Equal for any weights, dtype and tying of one model.

    Raises ConfigError when the folder holds no readable config.json.
    """
    try:
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {model_folder / 'config.json'}: {error}. Name a folder that transformers can load."
        ) from None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps({key: config.get(key) for key in ARCHITECTURE_KEYS}, sort_keys=True).encode())
    for name in VOCABULARY_FILES:
        if (model_folder / name).is_file():
            digest.update(name.encode() + (model_folder / name).read_bytes())
    return digest.hexdigest()


def publish(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    version: int,
    epoch: int,
    update: int,
    model_folder: Path,
    dtype: torch.dtype,
) -> Path:
    """Write one version and make it the newest. Returns its folder.

    `tensors` have Hugging Face names; floating ones are written as `dtype`. Config and tokenizer come from
    `model_folder`.

    Raises SnapshotError: `epoch` when a newer learner has published, `exists` when the version is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = version_folder(folder, version)
    _check_may_publish(folder, version, epoch)
    temporary = folder / f".tmp-v{version}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        written = _ready_to_write(tensors, dtype)
        save_file(written, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_config(model_folder, temporary, dtype)
        for name in TOKENIZER_FILES:
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, temporary / name)
        manifest = Manifest(
            version=version,
            epoch=epoch,
            update=update,
            dtype=_dtype_name(dtype),
            fingerprint=fingerprint(model_folder),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tensors=[_describe(name, tensor) for name, tensor in written.items()],
            files=[_measure(path) for path in sorted(temporary.iterdir())],
        )
        for path in temporary.iterdir():
            fsync(path)
        (temporary / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        fsync(temporary / "manifest.json")
        fsync(temporary)
        try:
            temporary.rename(final)
        except OSError as error:
            raise SnapshotError(
                f"{final} exists already: {error.strerror}. Versions only rise.", reason="exists"
            ) from None
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    replace_text(folder / "LATEST", f"{version}\n")
    return final


def newest(folder: Path) -> int | None:
    """The version that the pointer names; None before the first publish. Cheap: one small read.

    A hint only: call verify before you load.
    """
    try:
        return int((folder / "LATEST").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def newest_published(folder: Path) -> Manifest | None:
    """The highest version with a readable manifest, whatever the pointer says. For the learner, after a crash."""
    for version in reversed(versions(folder)):
        try:
            return read_manifest(folder, version)
        except SnapshotError:
            continue
    return None


def read_manifest(folder: Path, version: int) -> Manifest:
    """The manifest of a version, its content checked for form only. Raises SnapshotError (missing, torn)."""
    path = version_folder(folder, version) / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise SnapshotError(f"snapshot v{version}: {path} does not exist", reason="missing") from None
    except (OSError, ValidationError) as error:
        raise SnapshotError(f"snapshot v{version}: {path} is torn: {error}", reason="torn") from None
    if manifest.version != version:
        raise SnapshotError(f"{path} says version {manifest.version}, its folder says {version}", reason="torn")
    return manifest


def verify(
    folder: Path, version: int, *, fingerprint: str | None, min_version: int = -1, min_epoch: int = 0
) -> Manifest:
    """Check a version completely before anything is loaded from it.

    `min_version` is the version that is loaded now: the new one must be above it. `fingerprint` None accepts any model.

    Raises SnapshotError: missing, torn, hash, fingerprint, backwards or epoch.
    """
    manifest = read_manifest(folder, version)
    where = f"snapshot v{version} in {folder}"
    if version <= min_version:
        raise SnapshotError(f"{where} is not newer than v{min_version}, which is loaded", reason="backwards")
    if manifest.epoch < min_epoch:
        raise SnapshotError(
            f"{where} is of learner epoch {manifest.epoch}, epoch {min_epoch} has been seen: an old learner still runs",
            reason="epoch",
        )
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise SnapshotError(
            f"{where} is of another model ({manifest.fingerprint}, want {fingerprint}). Use the learner's model.path.",
            reason="fingerprint",
        )
    _verify_files(where, version_folder(folder, version), manifest)
    _verify_tensors(where, version_folder(folder, version), manifest)
    return manifest


def collect(folder: Path, *, keep: int, grace_s: float, now_s: float) -> list[int]:
    """Delete all but the newest `keep` versions, and torn leftovers, once older than `grace_s`. Returns what went.

    `now_s` is unix time, as file times are. The version that the pointer names always stays.
    """
    gone = []
    kept = {*versions(folder)[-keep:], newest(folder)}
    for version in versions(folder):
        path = version_folder(folder, version)
        if version not in kept and _is_older(path, now_s - grace_s):
            # Out of sight first: a reader finds all of it or nothing of it.
            hidden = folder / f".tmp-old-v{version}-{uuid.uuid4().hex}"
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
            gone.append(version)
    for path in folder.glob(".tmp-*"):
        if _is_older(path, now_s - grace_s):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return gone


def fsync(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably: readers see the old text or the new one."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


# ---- publishing


def _check_may_publish(folder: Path, version: int, epoch: int) -> None:
    last = newest_published(folder)
    if last is None:
        return
    if last.epoch > epoch:
        raise SnapshotError(
            f"learner epoch {epoch} may not publish: epoch {last.epoch} has published v{last.version}. "
            "Another learner has taken over this run; stop this one.",
            reason="epoch",
        )
    if version <= last.version:
        raise SnapshotError(
            f"v{version} is not above v{last.version}, which is published. Versions only rise.", reason="exists"
        )


def _ready_to_write(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, each with memory of its own, and the LM head spelled out."""
    written = {}
    for name, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        written[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
    if LM_HEAD not in written:
        if EMBEDDING not in written:
            raise ConfigError(
                f"the model has neither {LM_HEAD} nor {EMBEDDING}: it cannot be published. Use a causal LM."
            )
        written[LM_HEAD] = written[EMBEDDING].clone()
    return dict(sorted(written.items()))


def _write_config(model_folder: Path, target: Path, dtype: torch.dtype) -> None:
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    config["dtype"] = _dtype_name(dtype)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _describe(name: str, tensor: torch.Tensor) -> Tensor:
    return Tensor(name=name, dtype=_dtype_name(tensor.dtype), shape=list(tensor.shape), blake2b=tensor_hash(tensor))


def tensor_hash(tensor: torch.Tensor) -> str:
    """BLAKE2b-128 of a tensor's bytes, row-major. An engine can read its weights back and compare."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measure(path: Path) -> File:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return File(name=path.name, num_bytes=path.stat().st_size, blake2b=digest.hexdigest())


# ---- verifying


def _verify_files(where: str, folder: Path, manifest: Manifest) -> None:
    if folder.is_symlink():
        raise SnapshotError(f"{where}: the version folder is a symlink", reason="torn")
    if not {WEIGHTS, "config.json"} <= {file.name for file in manifest.files}:
        raise SnapshotError(f"{where}: the manifest names no weights or no config", reason="torn")
    for wanted in manifest.files:
        path = folder / wanted.name
        try:
            if path.is_symlink() or not path.is_file():
                raise SnapshotError(f"{where}: {wanted.name} is missing or not a plain file", reason="torn")
            found = _measure(path)
        except OSError as error:
            raise SnapshotError(f"{where}: cannot read {wanted.name}: {error}", reason="torn") from None
        if found.num_bytes != wanted.num_bytes:
            raise SnapshotError(
                f"{where}: {wanted.name} has {found.num_bytes} bytes, the manifest says {wanted.num_bytes}",
                reason="torn",
            )
        if found.blake2b != wanted.blake2b:
            raise SnapshotError(f"{where}: {wanted.name} does not match its hash", reason="hash")


def _verify_tensors(where: str, folder: Path, manifest: Manifest) -> None:
    """The file's hash holds, so its tensors are as written: only names and shapes are left to compare."""
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise SnapshotError(f"{where}: {WEIGHTS}: {error}", reason="torn") from None
    if found != {tensor.name: tensor.shape for tensor in manifest.tensors}:
        raise SnapshotError(f"{where}: tensors differ from those in the manifest", reason="torn")
    if LM_HEAD not in found:
        raise SnapshotError(f"{where}: no {LM_HEAD}; engines would tie it to a stale embedding", reason="torn")


def _is_older(path: Path, than_s: float) -> bool:
    try:
        return path.stat().st_mtime <= than_s
    except OSError:
        return False


def load_tensors(folder: Path, version: int) -> dict[str, Any]:
    """All tensors of a version by name, on the CPU. Call verify first."""
    with safetensors.safe_open(version_folder(folder, version) / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
