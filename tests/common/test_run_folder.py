"""matpo.run_folder: whose folder it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from matpo.errors import ConfigError, SetupError
from matpo.run_folder import claim
from matpo.settings import RunFile, load_run_file
from matpo.testing import tiny_model, write_run_file


@pytest.fixture
def run_file(tmp_path: Path) -> RunFile:
    return load_run_file(write_run_file(tmp_path / "run.toml", model=tiny_model(tmp_path / "m")))


def of_another(run_file: RunFile, section: str, **values: object) -> RunFile:
    return run_file.model_copy(update={section: getattr(run_file, section).model_copy(update=values)})


def test_the_same_run_claims_its_folder_again(run_file: RunFile) -> None:
    assert claim(run_file) == claim(run_file)


def test_a_folder_of_another_run_is_refused_and_untouched(run_file: RunFile) -> None:
    claim(run_file)
    before = (run_file.run.folder / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"belongs to run 'test'.*'other'.*new folder"):
        claim(of_another(run_file, "run", name="other"))
    assert (run_file.run.folder / "run.json").read_bytes() == before


def test_a_folder_of_another_model_is_refused(run_file: RunFile, tmp_path: Path) -> None:
    claim(run_file)
    other = tiny_model(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="belongs to model"):
        claim(of_another(run_file, "model", path=str(other)))


@pytest.mark.parametrize("text", ["", "{}", "[1"])
def test_a_run_json_that_is_none_is_refused(run_file: RunFile, text: str) -> None:
    run_file.run.folder.mkdir()
    (run_file.run.folder / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="no identity"):
        claim(run_file)


def test_processes_that_claim_at_once_agree(run_file: RunFile) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({identity.id for identity in pool.map(claim, [run_file] * 16)}) == 1
    assert [p.name for p in run_file.run.folder.iterdir()] == ["run.json"]


def test_a_folder_that_cannot_be_made_is_a_setup_error(run_file: RunFile) -> None:
    run_file.run.folder.write_text("a file")
    with pytest.raises(SetupError, match=r"run\.folder"):
        claim(run_file)
