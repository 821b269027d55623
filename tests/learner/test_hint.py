"""More actors or a faster learner: from plain numbers."""

from typing import Any

import pytest

from matpo_learner.hint import WINDOW_UPDATES, hint


def update(wait_s: float, busy_s: float, *, ready: bool = False) -> dict[str, Any]:
    return {
        "seconds": {"wait": wait_s, "forward_backward": 0.8 * busy_s, "publish": 0.2 * busy_s},
        "batch_ready": ready,
    }


@pytest.mark.parametrize(
    ("wait_s", "busy_s", "verdict"),
    [(9, 1, "add_actors"), (51, 49, "add_actors"), (49, 51, "balanced"), (11, 89, "balanced"), (9, 91, "learner")],
)
def test_the_share_of_time_that_groups_are_waited_for_decides(wait_s: float, busy_s: float, verdict: str) -> None:
    found = hint([update(wait_s, busy_s)] * 3)
    assert (found.verdict, found.num_updates) == (verdict, 3)
    assert found.wait_fraction == pytest.approx(wait_s / (wait_s + busy_s))


def test_batches_that_lie_ready_are_no_reason_for_actors_however_long_one_wait_was() -> None:
    assert hint([update(100, 1), *[update(0.1, 1, ready=True)] * 9]).verdict == "balanced"
    assert hint([update(100, 1), *[update(0.1, 1)] * 9]).verdict == "add_actors"


def test_only_the_last_updates_count() -> None:
    assert hint([update(1000, 1), *[update(0, 1)] * WINDOW_UPDATES]).verdict == "learner"


def test_a_window_over_all_updates_counts_all() -> None:
    updates = [update(1000, 1), *[update(0, 1)] * WINDOW_UPDATES]
    assert hint(updates, window=len(updates)).num_updates == len(updates)


def test_without_an_update_nothing_is_claimed() -> None:
    assert (hint([]).verdict, hint([], window=0).wait_fraction) == ("unknown", 0.0)


def test_the_sentence_says_what_to_do() -> None:
    assert hint([update(9, 1)]).sentence == "the learner waits for groups 90% of the time: add actors"
    assert "more actors will not help" in hint([update(0, 1)]).sentence
