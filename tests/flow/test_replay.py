"""`matpo replay` of real runs: broker and learner processes, a scripted actor in the test."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.broker.journals import journal
from tests.fault.forking import ForkServer, Life
from tests.flow.test_learner_process import ended, forked, lines, playing, run_file_of, started, until
from transformers import AutoModelForCausalLM

from matpo import snapshot
from matpo.settings import load_run_file
from matpo.testing import tiny_model
from matpo_ops.summary import read_lines

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
async def recorded(learners: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a finished run: five updates, a checkpoint after 2, 4 and 5, every episode kept.

    Its learner was killed and resumed, so version numbers jump, and some tokens are of weights that were lost.
    """
    folder = tmp_path_factory.mktemp("recorded")
    path = run_file_of(folder)
    with started("matpo_broker", str(path)):
        async with playing(load_run_file(path)):
            keep = ("--set", "learner.keep_checkpoints=3")
            with forked(learners, path, *keep) as learner:
                await until(lambda: len(lines(load_run_file(path), "learner")) >= 3 or learner.is_over)
                learner.kill()
            with forked(learners, path, *keep, "--resume") as learner:
                assert await ended(learner) == 0
    return path


@pytest.fixture
def matpo(operators: ForkServer, tmp_path: Path) -> Callable[..., Life]:
    """matpo("replay", ...) runs the command to its end."""
    count = itertools.count()

    def run(*arguments: str | Path) -> Life:
        life = operators.start([str(argument) for argument in arguments], tmp_path / f"said-{next(count)}")
        life.wait(200)
        return life

    return run


@pytest.fixture
def replay(matpo: Callable[..., Life]) -> Callable[..., dict[str, Any]]:
    """replay(path, out, ...): the figures of a replay."""

    def run(path: Path, out: Path, *arguments: str | Path) -> dict[str, Any]:
        done = matpo("replay", path, "--out", out, *arguments)
        assert done.wait() == 0, done.said()
        return figures_of(done)

    return run


@pytest.fixture
def refused(matpo: Callable[..., Life]) -> Callable[..., str]:
    """refused(path, out, ...): what is said about a replay that cannot be."""

    def run(path: Path, out: Path, *arguments: str | Path) -> str:
        done = matpo("replay", path, "--out", out, *arguments)
        assert done.wait() in (2, 4), done.said()
        assert "Traceback" not in done.said()
        assert not out.exists()
        return done.said()

    return run


def figures_of(done: Life) -> dict[str, Any]:
    last = done.said().splitlines()[-1]
    assert last.startswith("replay: ")
    found: dict[str, Any] = json.loads(last.removeprefix("replay: "))
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_replay_with_the_settings_of_the_run_makes_its_weights_bit_for_bit(
    replay: Callable[..., dict[str, Any]], recorded: Path, tmp_path: Path
) -> None:
    run_file = load_run_file(recorded)
    before = {p: p.read_bytes() for p in run_file.run.folder.rglob("*") if p.is_file() and "ledger" not in p.name}
    figures = replay(recorded, tmp_path / "out")
    assert (figures["updates"], figures["same_as_live"]) == (5, True)
    newest = snapshot.newest(run_file.snapshot_folder)
    assert newest is not None
    live = snapshot.load_tensors(run_file.snapshot_folder, newest)
    ours = tensors(tmp_path / "out" / "model")
    assert all(torch.equal(ours[name], tensor) for name, tensor in live.items())
    # The lines of learner.jsonl are those of the run, but for the clock.
    timed = {"seconds", "time_s", "groups_dropped"}
    rows = list(read_lines(tmp_path / "out" / "metrics" / "learner.jsonl"))
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows] == [
        {k: row[k] for k in rows[0] if k not in timed} for row in lines(run_file, "learner")
    ]
    assert before == {p: p.read_bytes() for p in before}


def test_another_loss_on_the_same_data_is_repeated_bit_for_bit(
    replay: Callable[..., dict[str, Any]], recorded: Path, tmp_path: Path
) -> None:
    found = [replay(recorded, tmp_path / out, "--set", "learner.loss=ppo_clip") for out in ("one", "two")]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["same_as_live"] is False
    one, two = tensors(tmp_path / "one" / "model"), tensors(tmp_path / "two" / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_replay_from_a_checkpoint_goes_on_as_the_run_did(
    replay: Callable[..., dict[str, Any]], recorded: Path, tmp_path: Path
) -> None:
    figures = replay(recorded, tmp_path / "out", "--start", "c000002")
    assert (figures["first_update"], figures["updates"], figures["same_as_live"]) == (3, 3, True)


def test_a_replay_from_a_snapshot_trains_what_came_after_it_with_a_tied_model(
    replay: Callable[..., dict[str, Any]], recorded: Path, tmp_path: Path
) -> None:
    figures = replay(recorded, tmp_path / "out", "--start", "v2")
    assert (figures["first_update"], figures["updates"]) == (3, 3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.tie_word_embeddings


def test_losses_are_compared_in_a_table(matpo: Callable[..., Life], recorded: Path, tmp_path: Path) -> None:
    done = matpo("replay", recorded, "--out", tmp_path / "out", "--compare", "tis,ppo_clip", "--by-index")
    assert done.wait() == 0, done.said()
    found = figures_of(done)
    assert {name: figures["updates"] for name, figures in found.items()} == {"tis": 5, "ppo_clip": 5}
    assert found["tis"]["weights"] != found["ppo_clip"]["weights"]
    assert [line.split()[0] for line in done.said().splitlines()[-4:-1]] == ["loss", "tis", "ppo_clip"]
    assert (tmp_path / "out" / "ppo_clip" / "curves.png").exists()


def test_a_damaged_record_and_a_cut_file_are_counted_and_the_rest_is_trained(
    replay: Callable[..., dict[str, Any]], recorded: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(load_run_file(recorded).run.folder, copy)
    path = copy / "journal" / "payload-00000000.bin"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content[:-50])
    figures = replay(recorded, tmp_path / "out", "--journal", copy / "journal")
    assert figures["records_damaged"]["hash"] == 1
    assert figures["records_damaged"].get("torn", 0) <= 1  # the last record may be of a group that was not trained
    assert 0 < figures["groups_trained"] < 10


async def test_a_live_run_is_replayed_as_far_as_it_is_and_goes_on(
    learners: ForkServer, operators: ForkServer, replay: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    path = run_file_of(tmp_path)
    run_file = load_run_file(path)
    endless = ("--set", "learner.num_updates=100000")
    with started("matpo_broker", str(path)):
        async with playing(run_file):
            with forked(learners, path, *endless) as learner:
                await until(lambda: len(lines(run_file, "learner")) >= 2 or learner.is_over)
                replaying = operators.start(["replay", str(path), "--out", str(tmp_path / "out")], tmp_path / "said")
                assert await ended(replaying) == 0
                seen = len(lines(run_file, "learner"))
                await until(lambda: len(lines(run_file, "learner")) > seen or learner.is_over)
                assert not learner.is_over
                learner.kill()
    assert json.loads((tmp_path / "out" / "replay.json").read_text())["updates"] >= 2
    replayed = replay(path, tmp_path / "after-its-death")
    assert replayed["updates"] == min(5, len(lines(run_file, "learner")))


def test_what_another_model_recorded_is_refused_with_the_reason(
    refused: Callable[..., str], recorded: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", hidden_size=32)
    message = refused(recorded, tmp_path / "out", "--set", f"model.path={other}")
    assert "were sampled by model" in message


def test_ids_beyond_the_vocabulary_are_counted_and_a_journal_of_nothing_else_is_refused(
    refused: Callable[..., str], recorded: Path, tmp_path: Path
) -> None:
    small = tiny_model(tmp_path / "small", vocab_size=40, pad_token_id=0, eos_token_id=1)
    shutil.copytree(load_run_file(recorded).journal_folder, tmp_path / "bare" / "journal")  # no run.json beside it
    message = refused(
        recorded, tmp_path / "out", "--journal", tmp_path / "bare" / "journal", "--set", f"model.path={small}"
    )
    assert "invalid (vocabulary)" in message or "invalid (token" in message


def test_a_journal_without_a_group_is_an_error_that_says_what_was_found(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    path = run_file_of(tmp_path)
    assert "no journal there" in refused(path, tmp_path / "out")
    with journal(load_run_file(path).journal_folder, {0: [b"alone"]}):
        pass
    assert "holds no whole group" in refused(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--start", "v99"), "v99"),
        (("--start", "c000099"), "c000099"),
        (("--start", "nowhere"), "want base, v12"),
        (("--set", "learner.loss=nope"), "learner.loss"),
        (("--compare", "tis,nope"), "learner.loss"),
    ],
)
def test_what_cannot_be_replayed_ends_with_one_sentence(
    refused: Callable[..., str], recorded: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(recorded, tmp_path / "out", *arguments)


def test_a_folder_that_exists_is_left_alone(matpo: Callable[..., Life], recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = matpo("replay", recorded, "--out", tmp_path / "out")
    assert done.wait() == 2
    assert "exists already" in done.said()
    assert list((tmp_path / "out").iterdir()) == []
