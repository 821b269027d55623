"""`matpo-broker keys`: what it prints, what it never prints, how it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from matpo import security
from matpo_broker.keys import app

Run = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def keys(tmp_path: Path, folder: Path) -> Run:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[run]\nname = "r"\nfolder = "{tmp_path}/run"\n[model]\npath = "{tmp_path}/model"\n'
        f'[security]\nkeys = "{folder}"\n'
    )

    def run(command: str, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [command, str(run_file), *arguments])
        assert done.exit_code == code, done.output
        for path in folder.glob("*.key"):
            secret = re.search(r'secret = "(.*)"', path.read_text())
            assert secret is not None
            assert secret[1] not in done.output
        return done.output

    return run


def names(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()[1:]]


def test_new_makes_the_broker_s_pair_and_one_key_per_role_and_says_where(keys: Run, folder: Path) -> None:
    output = keys("new")
    assert output.splitlines()[:4] == [f"made  {folder}/{n}.key" for n in ("broker", "actor", "learner", "operator")]
    assert "scp" in output


def test_new_with_role_and_name_adds_one_that_is_in_one_file(keys: Run, folder: Path) -> None:
    keys("new")
    output = keys("new", "--role", "actor", "--name", "spot-7")
    assert output.splitlines()[0] == f"made  {folder}/spot-7.key"
    assert 'key_file = "spot-7.key"' in output
    assert names(keys("list")) == ["actor", "learner", "operator", "spot-7"]


def test_list_shows_names_roles_fingerprints_and_times_as_a_table_or_json(keys: Run, folder: Path) -> None:
    keys("new")
    keys("revoke", "actor")
    entries = security.load_entries(folder)
    found = json.loads(keys("list", "--json"))
    assert [set(row) for row in found] == [{"name", "role", "fingerprint", "created", "revoked"}] * 3
    assert [row["fingerprint"] for row in found] == [entry.fingerprint for entry in entries]
    assert [bool(row["revoked"]) for row in found] == [True, False, False]
    header, first, *_ = keys("list").splitlines()
    assert header.split() == ["name", "role", "fingerprint", "created", "revoked"]
    assert first.split() == [entries[0].name, entries[0].role, entries[0].fingerprint, *first.split()[3:]]


def test_revoke_names_whose_key_ended(keys: Run) -> None:
    keys("new")
    assert keys("revoke", "learner").startswith("revoked  learner  learner  ")


def test_rotate_says_what_must_be_copied_again(keys: Run, folder: Path) -> None:
    keys("new")
    assert f"made  {folder}/learner.key" in keys("rotate", "learner")
    (folder / "operator.key").unlink()
    output = keys("rotate", "broker")
    assert output.splitlines()[:3] == [f"made  {folder}/{n}.key" for n in ("broker", "actor", "learner")]
    assert "restart the broker, copy these files again" in output
    assert "Rotate operator too" in output


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("list",), "there are no keys in"),
        (("revoke", "actor"), "no keys in"),
        (("rotate", "broker"), "no keys in"),
        (("new", "--role", "actor", "--name", "spot-7"), "no keys in"),
        (("new", "--role", "actor"), "want both"),
        (("new", "--role", "boss", "--name", "b"), "one of actor, learner, operator"),
    ],
)
def test_without_keys_or_with_wrong_words_it_is_one_clear_line_and_code_2(
    keys: Run, command: tuple[str, ...], says: str
) -> None:
    output = keys(*command, code=2)
    assert says in output
    assert len(output.splitlines()) == 1


def test_unknown_and_existing_names_are_one_clear_line_and_code_2(keys: Run) -> None:
    keys("new")
    for command, says in (
        (("new",), "already"),
        (("new", "--role", "actor", "--name", "actor"), "key named actor already"),
        (("revoke", "nobody"), "Valid: actor, learner, operator"),
        (("rotate", "nobody"), "Valid: actor, learner, operator"),
    ):
        output = keys(*command, code=2)
        assert says in output
        assert len(output.splitlines()) == 1


def test_new_tells_what_was_revoked_and_does_not_bring_it_back(keys: Run) -> None:
    keys("new")
    keys("revoke", "learner")
    assert "revoked since: learner. Add one with --role" in keys("new", code=2)
    assert "made" in keys("new", "--role", "learner", "--name", "learner")
    assert "revoked since" not in keys("new", code=2)


def test_a_run_file_without_a_folder_for_keys_says_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'[run]\nname = "r"\nfolder = "{tmp_path}/run"\n')
    done = CliRunner().invoke(app, ["new", str(tmp_path / "run.toml")])
    assert done.exit_code == 2
    assert "[security]" in done.output


def test_help_of_each_command_has_an_example() -> None:
    for command in ("new", "list", "revoke", "rotate"):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"}).output
        assert f"matpo-broker keys {command} RUN.TOML" in shown
