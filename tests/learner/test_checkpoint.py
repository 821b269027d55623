"""matpo_learner.checkpoint: whole or not at all, and of this run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from matpo.errors import CheckpointError
from matpo.run_folder import Identity
from matpo_learner import checkpoint
from matpo_learner.orders import Book

IDENTITY = Identity(name="r", id="abc", fingerprint="f", schema_version=1, created_at="")


def save(
    folder: Path, update: int, *, keep: int = 10, run: str = "abc", fingerprint: str = "f", consumed: int = 2
) -> Path:
    staged = checkpoint.prepare(folder, 1)
    (staged / "rank0").mkdir()
    (staged / "rank0" / "state.safetensors").write_bytes(b"state %d" % update)
    meta = checkpoint.Meta(
        run=run,
        fingerprint=fingerprint,
        epoch=1,
        version=update + 1,
        update=update,
        cursor=9,
        consumed_below=update,
        consumed=list(range(update + 1, update + 1 + consumed)),
        log_bytes={"learner": 5},
    )
    return checkpoint.commit(folder, meta, keep=keep)


def newest(folder: Path) -> int | None:
    found = checkpoint.load_newest(folder, IDENTITY)
    return found[1].update if found else None


def test_without_any_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None


def test_the_newest_is_loaded_with_what_it_covers(tmp_path: Path) -> None:
    for update in (2, 10):
        save(tmp_path, update)
    found = checkpoint.load_newest(tmp_path, IDENTITY)
    assert found is not None
    path, meta = found
    assert (path / "rank0" / "state.safetensors").read_bytes() == b"state 10"
    assert (meta.version, meta.log_bytes) == (11, {"learner": 5})
    assert meta.book() == Book(cursor=9, consumed_below=10, consumed={11, 12})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for update in range(5):
        save(tmp_path, update, keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["c000003-000005", "c000004-000006"]
    assert checkpoint.oldest_kept(tmp_path) == 3


def test_a_later_one_of_the_same_update_wins_and_the_earlier_one_stays(tmp_path: Path) -> None:
    first, second = save(tmp_path, 4, consumed=9), save(tmp_path, 4, consumed=10)
    assert [path.name for path in checkpoint.found(tmp_path)] == [first.name, second.name]
    found = checkpoint.load_newest(tmp_path, IDENTITY)
    assert found is not None
    assert found[0] == second


def test_a_checkpoint_of_an_earlier_format_is_not_taken_for_none(tmp_path: Path) -> None:
    save(tmp_path, 4).rename(tmp_path / "c000004")
    with pytest.raises(CheckpointError, match="none of the 1"):
        newest(tmp_path)


def test_names_are_compared_as_numbers(tmp_path: Path) -> None:
    for update in (999_999, 1_000_000):
        save(tmp_path, update)
    assert newest(tmp_path) == 1_000_000


def test_what_was_not_committed_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (checkpoint.prepare(tmp_path, 1) / "state").write_bytes(b"half")
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("name", ["meta.json", "rank0/state.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 2)
    path = save(tmp_path, 4) / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert newest(tmp_path) == 2


def test_a_torn_checkpoint_is_replaced_by_a_sound_one_of_the_same_update(tmp_path: Path) -> None:
    (save(tmp_path, 4) / "meta.json").unlink()
    save(tmp_path, 4)
    assert newest(tmp_path) == 4


def test_when_none_is_whole_the_learner_does_not_start_over(tmp_path: Path) -> None:
    (save(tmp_path, 4) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1") as caught:
        newest(tmp_path)
    assert caught.value.reason == "torn"


@pytest.mark.parametrize(("field", "word"), [("run", "another run"), ("fingerprint", "another model")])
def test_a_checkpoint_of_another_run_or_model_is_refused(tmp_path: Path, field: str, word: str) -> None:
    save(tmp_path, 4, **{field: "other"})
    with pytest.raises(CheckpointError, match=word) as caught:
        newest(tmp_path)
    assert caught.value.reason == field


def test_a_checkpoint_under_another_name_is_torn(tmp_path: Path) -> None:
    shutil.move(save(tmp_path, 4), tmp_path / "c000009-000009")
    with pytest.raises(CheckpointError, match="names another one"):
        checkpoint.verify(tmp_path / "c000009-000009")
