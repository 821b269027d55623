"""matpo_learner.fence: one learner writes, the newest."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from matpo.errors import RefusedError
from matpo_learner.fence import Fence


def test_an_older_learner_may_not_write_any_more_once_a_newer_one_has_taken_over(tmp_path: Path) -> None:
    older = Fence(tmp_path, 1)
    with older.held():
        pass
    newer = Fence(tmp_path, 2)
    with pytest.raises(RefusedError, match="epoch 2 has taken over") as caught, older.held():
        raise AssertionError("it wrote")
    assert (caught.value.reason, caught.value.retry_after_s) == ("fenced", None)
    with newer.held():
        pass


def test_an_older_learner_cannot_take_over_and_changes_nothing(tmp_path: Path) -> None:
    newer = Fence(tmp_path, 2)
    with pytest.raises(RefusedError, match="learner epoch 1 is over"):
        Fence(tmp_path, 1)
    with newer.held():
        pass


def test_an_epoch_survives_its_learner(tmp_path: Path) -> None:
    Fence(tmp_path, 7).close()
    with pytest.raises(RefusedError):
        Fence(tmp_path, 6)
    Fence(tmp_path, 7).close()  # the same learner, once more
    Fence(tmp_path, 10**12).close()


def test_whoever_takes_over_waits_until_a_write_in_progress_is_complete(tmp_path: Path) -> None:
    older = Fence(tmp_path, 1)
    seen: list[str] = []
    waits = threading.Event()

    def take_over() -> None:
        Fence(tmp_path, 2, idle=waits.set)
        seen.append("taken over")

    with older.held(), older.held():
        thread = threading.Thread(target=take_over)
        thread.start()
        assert waits.wait(10)
        with older.held():
            seen.append("written")
    thread.join(10)
    assert seen == ["written", "taken over"]


def test_what_idle_raises_ends_the_wait(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    older = Fence(tmp_path, 1)
    with older.held(), pytest.raises(InterruptedError):
        Fence(tmp_path, 2, idle=stop)
    with older.held():
        pass
