"""matpo_learner.publisher: versions only rise, and lag is counted in updates."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from matpo import snapshot
from matpo.errors import CheckpointError
from matpo.settings import RunFile, load_run_file
from matpo.testing import tiny_model, write_run_file
from matpo_learner.publisher import Lineage, Publisher


@pytest.fixture
def run_file(tmp_path: Path) -> RunFile:
    return load_run_file(write_run_file(tmp_path / "run.toml", model=tiny_model(tmp_path / "m")))


def publisher(run_file: RunFile, epoch: int, update: int, known: int = -1) -> Publisher:
    return Publisher(run_file, epoch=epoch, update=update, known_version=known)


def publish(one: Publisher, run_file: RunFile, update: int) -> int:
    return one.publish(load_file(run_file.model_folder / "model.safetensors").items(), update=update)


def test_a_new_run_begins_at_version_0(run_file: RunFile) -> None:
    one = publisher(run_file, epoch=1, update=0)
    assert [publish(one, run_file, update) for update in range(3)] == [0, 1, 2]


def test_after_a_resume_versions_go_on_above_everything_published(run_file: RunFile) -> None:
    first = publisher(run_file, epoch=1, update=0)
    for update in range(4):
        publish(first, run_file, update)
    second = publisher(run_file, epoch=2, update=1)  # updates 2 and 3 are lost
    assert [publish(second, run_file, update) for update in (1, 2)] == [4, 5]
    assert snapshot.read_manifest(run_file.snapshot_folder, 5).update == 2


def test_a_version_that_somebody_else_knows_of_is_not_used_again(run_file: RunFile) -> None:
    assert publish(publisher(run_file, epoch=2, update=3, known=7), run_file, 3) == 8


def test_weights_of_another_update_than_announced_are_not_published(run_file: RunFile) -> None:
    with pytest.raises(ValueError, match="update 0"):
        publish(publisher(run_file, epoch=1, update=0), run_file, 1)


def test_a_manifest_says_what_stands_behind_it(run_file: RunFile) -> None:
    publish(publisher(run_file, epoch=3, update=0), run_file, 0)
    manifest = snapshot.verify(
        run_file.snapshot_folder, 0, fingerprint=snapshot.fingerprint(run_file.model_folder), min_epoch=3
    )
    assert (manifest.epoch, manifest.update, manifest.dtype) == (3, 0, "float32")


def test_lag_is_counted_in_updates_across_resumes(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path / "l.json")
    lineage.begin(0, 0)  # versions 0..5 are updates 0..5
    lineage.begin(6, 2)  # resumed at update 2: version 6 is update 2 again
    lineage.begin(9, 4)  # versions 6..8 are updates 2..4, resumed at 4
    again = Lineage(tmp_path / "l.json")
    assert [again.update_of(version) for version in range(12)] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 5, 6]
    assert again.lag(update=6, min_version=2) == 4
    assert again.lag(update=4, min_version=5) == 0  # from an update that was lost: ahead, not behind
    assert again.lag(update=4, min_version=-1) == 0  # no sampled token


@pytest.mark.parametrize("update", range(8))
@pytest.mark.parametrize("max_lag", range(4))
def test_every_version_below_the_oldest_admissible_one_lags_more(tmp_path: Path, update: int, max_lag: int) -> None:
    lineage = Lineage(tmp_path / "l.json")
    for version, at in ((0, 0), (6, 2), (9, 4)):
        lineage.begin(version, at)
    admissible = [version for version in range(30) if lineage.lag(update, version) <= max_lag]
    assert lineage.oldest_within(update, max_lag) == admissible[0]


def test_a_branch_that_published_nothing_makes_room_for_the_next(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path / "l.json")
    lineage.begin(0, 0)
    lineage.begin(30, 5)  # killed before version 30 was there; its checkpoint is torn, so the next one is older
    lineage.begin(30, 4)
    assert [Lineage(tmp_path / "l.json").update_of(version) for version in (29, 30, 31)] == [29, 4, 5]


def test_a_damaged_lineage_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text("[[0, 0], [")
    with pytest.raises(CheckpointError, match="damaged"):
        Lineage(tmp_path / "l.json")
