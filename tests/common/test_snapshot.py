"""matpo.snapshot: a version is there whole or not at all, and nothing else is ever followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from matpo import snapshot
from matpo.errors import ConfigError, SnapshotError
from matpo.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tensors(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


def publish(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    model: Path,
    version: int = 0,
    *,
    epoch: int = 1,
    **changes: torch.dtype,
) -> Path:
    dtype = changes.get("dtype", torch.float32)
    return snapshot.publish(
        folder, tensors, version=version, epoch=epoch, update=version, model_folder=model, dtype=dtype
    )


def reason(folder: Path, version: int = 0, *, fingerprint: str | None = None, **wanted: int) -> str:
    with pytest.raises(SnapshotError) as caught:
        snapshot.verify(folder, version, fingerprint=fingerprint, **wanted)
    return caught.value.reason


def test_a_published_version_is_loaded_by_transformers_with_the_same_logits(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    published = publish(folder, tensors, model)
    ids = torch.arange(12)[None]
    one = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    other = AutoModelForCausalLM.from_pretrained(published)(ids).logits
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(AutoTokenizer.from_pretrained(published)) == len(AutoTokenizer.from_pretrained(model))


def test_the_lm_head_is_written_out_and_not_tied(folder: Path, tensors: dict[str, torch.Tensor], model: Path) -> None:
    assert snapshot.LM_HEAD not in tensors
    published = publish(folder, tensors, model)
    assert snapshot.LM_HEAD in load_file(published / snapshot.WEIGHTS)
    assert json.loads((published / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(published)
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()


def test_weights_are_written_in_the_dtype_that_is_served(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    published = publish(folder, tensors, model, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(published / snapshot.WEIGHTS).values()} == {torch.bfloat16}
    assert snapshot.read_manifest(folder, 0).dtype == "bfloat16"


def test_a_sound_version_is_verified_and_its_hashes_are_those_of_the_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    publish(folder, tensors, model)
    manifest = snapshot.verify(folder, 0, fingerprint=snapshot.fingerprint(model))
    hashes = {t.name: t.blake2b for t in manifest.tensors}
    loaded = snapshot.load_tensors(folder, 0)
    assert hashes == {name: snapshot.tensor_hash(tensor) for name, tensor in loaded.items()}


def test_the_pointer_names_the_newest_version(folder: Path, tensors: dict[str, torch.Tensor], model: Path) -> None:
    assert snapshot.newest(folder) is None
    publish(folder, tensors, model, 0)
    publish(folder, tensors, model, 3)
    assert snapshot.newest(folder) == 3
    assert snapshot.versions(folder) == [0, 3]


@pytest.mark.parametrize("version", [2, 3])
def test_a_version_that_does_not_rise_is_not_published(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path, version: int
) -> None:
    publish(folder, tensors, model, 3)
    with pytest.raises(SnapshotError, match="only rise"):
        publish(folder, tensors, model, version)


def test_an_older_learner_publishes_nothing(folder: Path, tensors: dict[str, torch.Tensor], model: Path) -> None:
    publish(folder, tensors, model, 0, epoch=2)
    with pytest.raises(SnapshotError, match="taken over"):
        publish(folder, tensors, model, 1, epoch=1)
    assert snapshot.newest(folder) == 0


def test_a_version_of_an_older_epoch_is_not_followed(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    publish(folder, tensors, model, 5, epoch=1)
    assert reason(folder, 5, min_epoch=2) == "epoch"


@pytest.mark.parametrize("loaded", [5, 6])
def test_a_version_that_is_not_newer_is_not_followed(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path, loaded: int
) -> None:
    publish(folder, tensors, model, 5)
    assert reason(folder, 5, min_version=loaded) == "backwards"


def test_a_version_of_another_model_is_not_followed(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    publish(folder, tensors, model)
    assert reason(folder, fingerprint="another") == "fingerprint"


def test_a_version_that_is_not_there_is_missing(folder: Path) -> None:
    assert reason(folder) == "missing"


@pytest.mark.parametrize("name", [snapshot.WEIGHTS, "config.json", "tokenizer.json"])
def test_a_flipped_byte_is_found(folder: Path, tensors: dict[str, torch.Tensor], model: Path, name: str) -> None:
    path = publish(folder, tensors, model) / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert reason(folder) == "hash"


@pytest.mark.parametrize("name", [snapshot.WEIGHTS, "manifest.json"])
def test_a_file_that_is_cut_off_is_found(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path, name: str
) -> None:
    path = publish(folder, tensors, model) / name
    os.truncate(path, path.stat().st_size // 2)
    assert reason(folder) == "torn"


def test_a_missing_file_is_found(folder: Path, tensors: dict[str, torch.Tensor], model: Path) -> None:
    (publish(folder, tensors, model) / "tokenizer.json").unlink()
    assert reason(folder) == "torn"


def test_a_symlink_is_not_followed(folder: Path, tensors: dict[str, torch.Tensor], model: Path, tmp_path: Path) -> None:
    path = publish(folder, tensors, model) / snapshot.WEIGHTS
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert reason(folder) == "torn"


def test_a_manifest_that_names_a_file_outside_is_torn(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    path = publish(folder, tensors, model) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = "../../config.json"
    path.write_text(json.dumps(manifest))
    assert reason(folder) == "torn"


def test_a_manifest_of_another_version_is_torn(folder: Path, tensors: dict[str, torch.Tensor], model: Path) -> None:
    publish(folder, tensors, model).rename(snapshot.version_folder(folder, 9))
    assert reason(folder, 9) == "torn"


@pytest.mark.parametrize("text", ["", "x", "12 13", "-"])
def test_a_torn_pointer_is_no_pointer(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "LATEST").write_text(text)
    assert snapshot.newest(folder) is None


def test_after_a_crash_the_newest_version_is_found_without_the_pointer(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    publish(folder, tensors, model, 0)
    publish(folder, tensors, model, 1)
    (folder / "LATEST").unlink()
    snapshot.version_folder(folder, 2).mkdir()  # no manifest: never committed
    last = snapshot.newest_published(folder)
    assert last is not None
    assert last.version == 1


def test_fingerprints_tell_models_apart_but_not_dtype_or_tying(model: Path, tmp_path: Path) -> None:
    same = tiny_model(tmp_path / "same", seed=7, tie_word_embeddings=False)
    wider = tiny_model(tmp_path / "wider", intermediate_size=160)
    other_words = tiny_model(tmp_path / "words")
    (other_words / "tokenizer.json").write_text(
        (other_words / "tokenizer.json").read_text().replace("im_end", "im_fin")
    )
    assert snapshot.fingerprint(same) == snapshot.fingerprint(model)
    assert snapshot.fingerprint(wider) != snapshot.fingerprint(model)
    assert snapshot.fingerprint(other_words) != snapshot.fingerprint(model)


def test_a_snapshot_has_the_fingerprint_of_its_model(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    assert snapshot.fingerprint(publish(folder, tensors, model, dtype=torch.bfloat16)) == snapshot.fingerprint(model)


def test_a_model_without_embedding_is_not_published(folder: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        publish(folder, {"x": torch.zeros(1)}, model)
    assert snapshot.versions(folder) == []


def test_only_versions_that_are_old_and_not_among_the_newest_are_collected(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path
) -> None:
    for version in range(4):
        publish(folder, tensors, model, version)
    (folder / ".tmp-v9-dead").mkdir()
    now_s = time.time()
    assert snapshot.collect(folder, keep=2, grace_s=60, now_s=now_s) == []
    assert snapshot.collect(folder, keep=2, grace_s=60, now_s=now_s + 61) == [0, 1]
    assert sorted(p.name for p in folder.iterdir()) == ["LATEST", "v000002", "v000003"]


KILLED = """
import sys, os, signal
from pathlib import Path
import torch
from matpo import snapshot
from safetensors.torch import load_file

folder, model, calls = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
real = os.fsync
def fsync(descriptor):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
tensors = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
snapshot.publish(folder, tensors, version=1, epoch=1, update=1, model_folder=model, dtype=torch.float32)
"""


@pytest.mark.processes
@pytest.mark.parametrize("calls", range(12))
def test_a_learner_killed_at_any_sync_leaves_the_old_version_or_the_new_one(
    folder: Path, tensors: dict[str, torch.Tensor], model: Path, calls: int
) -> None:
    publish(folder, tensors, model, 0)
    subprocess.run([sys.executable, "-c", KILLED, str(folder), str(model), str(calls)], check=False, timeout=60)
    newest = snapshot.newest(folder)
    assert newest in (0, 1)
    for version in snapshot.versions(folder):
        snapshot.verify(folder, version, fingerprint=snapshot.fingerprint(model))
