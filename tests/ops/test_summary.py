"""The account of a run: every episode id from order to update."""

import json
from pathlib import Path

import pytest

from matpo.errors import DataError
from matpo_broker.tables import Accounting
from matpo_ops.summary import account, compare, plot, read_lines
from matpo_ops.up import sparkline, who_waits

GROUPS = ["g-0", "g-1", "g-2", "g-3"]


def ledger() -> Accounting:
    members = [(group, member) for group in GROUPS for member in range(2)]
    return Accounting(
        orders=GROUPS,
        members=members,
        stored={(group, member): f"{group}.{member}.0" for group, member in members},
        whole=GROUPS,
        delivered=[],
        committed=[],
        dropped={},
    )


def line(group: str, fate: str, *episodes: str) -> dict:
    return {"group": group, "fate": fate, "episodes": [f"{group}.{e}.0" for e in (episodes or ("0", "1"))]}


def test_every_stored_episode_is_trained_without_signal_dropped_or_waiting() -> None:
    found = compare(ledger(), [line("g-0", "trained"), line("g-1", "zero_signal"), line("g-2", "stale")], 2)
    assert (found.episodes_trained, found.episodes_without_signal) == (2, 2)
    assert (found.episodes_dropped, found.episodes_waiting) == (2, 2)
    assert (found.episodes_lost, found.episodes_twice, found.episodes_invented) == (0, 0, 0)


def test_an_episode_that_its_trained_group_leaves_out_is_lost() -> None:
    assert compare(ledger(), [line("g-0", "trained", "1")], 3).episodes_lost == 1


def test_more_stored_groups_than_can_be_open_are_lost_and_not_waiting() -> None:
    found = compare(ledger(), [line("g-3", "trained")], 2)
    assert (found.episodes_lost, found.episodes_waiting) == (2, 4)


def test_an_episode_in_two_updates_is_counted_as_twice() -> None:
    assert compare(ledger(), [line("g-0", "trained"), line("g-0", "trained")], 2).episodes_twice == 2


def test_an_episode_that_the_broker_never_stored_is_counted_as_invented() -> None:
    assert compare(ledger(), [line("g-0", "trained", "0", "1", "7")], 2).episodes_invented == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is it a run folder"):
        account(tmp_path, max_open=2)


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert [entry["a"] for entry in read_lines(path)] == [1, 2]


def test_the_curves_become_a_png(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = [{"update": i, "reward": i / 10, "lag_mean": 0.5, "lag_max": 1} for i in range(1, 6)]
    (tmp_path / "metrics" / "learner.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    plot(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([0.5] * 1000)) <= 60


def test_the_bottleneck_is_named_from_measured_waits() -> None:
    assert "add actors" in who_waits([{"seconds": {"wait": 9.0, "publish": 1.0}}])
    assert "more actors will not help" in who_waits([{"seconds": {"wait": 0.1, "publish": 9.9}}])


def test_a_run_in_which_no_group_has_a_signal_is_accounted_for_and_no_episode_is_lost() -> None:
    found = compare(ledger(), [line(group, "zero_signal") for group in GROUPS], 2)
    assert (found.groups_zero_signal, found.groups_trained, found.groups_open) == (4, 0, 0)
    assert (found.episodes_without_signal, found.episodes_lost, found.episodes_waiting) == (8, 0, 0)


def test_groups_that_come_without_a_signal_are_not_called_missing() -> None:
    assert who_waits([], groups_came=12) == "12 groups came, no update yet"
    assert who_waits([]) == "waiting for the first groups"
