"""matpo_learner.publisher: versions only rise, and each holds what was announced."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from matpo import snapshot
from matpo.settings import RunFile, load_run_file
from matpo.testing import tiny_model, write_run_file
from matpo_learner import lineage
from matpo_learner.publisher import Publisher


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


def test_the_lineage_is_on_disk_before_the_first_snapshot_of_a_process(run_file: RunFile) -> None:
    publisher(run_file, epoch=1, update=0)
    publisher(run_file, epoch=2, update=3, known=7)
    assert snapshot.versions(run_file.snapshot_folder) == []
    assert lineage.read(run_file.run.folder / lineage.FILE).branches == ((0, 0), (8, 3))
