"""The watchdog: what it says and when. The time is given."""

import threading
from contextlib import closing
from itertools import pairwise

import pytest
import structlog

from matpo.metrics import Metrics
from matpo_learner.waits import FIRST_LINE_S, MAX_PAUSE_S, InProgress, Reason, Waits

BROKER = Reason(who="broker", why="it has not answered yet")
DISK = Reason(who="disk", why="a checkpoint is being written")


def told(waits: InProgress, until_s: int) -> list[int]:
    """The seconds at which something is said, looked at once a second."""
    return [now for now in range(until_s) if waits.line(float(now)) is not None]


def test_a_wait_is_told_of_at_growing_intervals_from_ten_seconds_on() -> None:
    waits = InProgress(warn_after_s=1e9)
    waits.begin(lambda: BROKER, 0.0)
    assert told(waits, 100) == [10, 20, 40, 80]


def test_a_long_wait_is_told_of_at_least_every_ten_minutes() -> None:
    waits = InProgress(warn_after_s=1e9)
    waits.begin(lambda: BROKER, 0.0)
    seconds = told(waits, 5000)
    assert max(b - a for a, b in pairwise(seconds)) == MAX_PAUSE_S


def test_a_line_is_a_warning_once_the_wait_has_lasted_long() -> None:
    waits = InProgress(warn_after_s=30.0)
    waits.begin(lambda: BROKER, 0.0)
    lines = [line for now in range(50) if (line := waits.line(float(now)))]
    assert [(line.waited_s, line.is_warning) for line in lines] == [(10.0, False), (20.0, False), (40.0, True)]


def test_why_is_asked_anew_for_each_line() -> None:
    answers = iter([BROKER, Reason(who="actors", why="none is connected")])
    waits = InProgress(warn_after_s=1e9)
    waits.begin(lambda: next(answers), 0.0)
    lines = [line.reason.who for now in range(30) if (line := waits.line(float(now)))]
    assert lines == ["broker", "actors"]


def test_the_innermost_wait_is_told_of_and_its_end_brings_back_the_outer_one() -> None:
    waits = InProgress(warn_after_s=1e9)
    waits.begin(lambda: BROKER, 0.0)
    waits.begin(lambda: DISK, 5.0)
    assert waits.line(14.0) is None
    line = waits.line(15.0)
    assert line is not None
    assert (line.reason, line.waited_s) == (DISK, 10.0)
    waits.end()
    assert waits.now(16.0) == (BROKER, 16.0)
    waits.end()
    assert (waits.now(17.0), waits.line(1000.0)) == (None, None)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("learner")


def value(metrics: Metrics, name: str, who: str) -> float | None:
    return metrics.registry.get_sample_value(f"matpo_learner_{name}", {"who": who})


def test_the_gauges_show_the_wait_in_progress_and_nothing_after_it(metrics: Metrics) -> None:
    with closing(Waits({"start": lambda: BROKER}, metrics, warn_after_s=1e9)) as waits:
        with waits.on("start"):
            waits.look(1e12)
            assert value(metrics, "waiting_seconds", "broker") == pytest.approx(1e12, rel=1e-3)
        waits.look(1e12)
        assert value(metrics, "waiting_seconds", "broker") == 0
        total = value(metrics, "waited_seconds_total", "broker")
        assert total is not None
        assert 0 <= total < 60


def test_a_line_names_who_is_waited_for_and_why(metrics: Metrics) -> None:
    with (
        closing(Waits({"checkpoint": lambda: DISK}, metrics, warn_after_s=1.0)) as waits,
        waits.on("checkpoint"),
        structlog.testing.capture_logs() as logged,
    ):
        waits.look(1e12)
    (line,) = [entry for entry in logged if entry["event"] == "learner.waiting"]
    assert (line["who"], line["why"], line["log_level"]) == (DISK.who, DISK.why, "warning")
    assert line["waited_s"] >= FIRST_LINE_S


def test_a_phase_that_waits_for_nobody_is_not_looked_at(metrics: Metrics) -> None:
    with (
        closing(Waits({}, metrics, warn_after_s=1.0)) as waits,
        waits.on("credit"),
        structlog.testing.capture_logs() as logged,
    ):
        waits.look(1e12)
    assert logged == []


def test_close_ends_the_thread(metrics: Metrics) -> None:
    before = threading.active_count()
    with closing(Waits({}, metrics, warn_after_s=1.0)):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
