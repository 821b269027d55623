"""Whole runs with real processes: they end, they survive kill -9 of every part, and every episode is accounted for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matpo.testing import tiny_model, write_run_file
from matpo_ops.processes import Child, Fleet, fleet_of, wait_for_exit
from matpo_ops.summary import account, read_lines

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

# A random model cannot answer anything, so the reward is a property that its random text has half of the time.
COIN = '''
import zlib
from matpo import Environment, Task, tool

class Coin(Environment):
    def tasks(self, split):
        return [Task(id=f"{split}-{i}", environment="coin", question=f"Question {i}?") for i in range(50)]

    @tool
    def search(self, query: str) -> str:
        """Find something."""
        return "nothing"

    def reward(self, task, episode):
        return float(zlib.crc32(episode.answer.encode()) % 2)
'''
LIMITS = {"max_turns": 2, "max_turn_tokens": 16, "max_context_tokens": 1024, "summary_tokens": 0}
ROLES = {"planner": {"calls": ["worker"], **LIMITS}, "worker": {"calls": ["search"], **LIMITS}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


def run_file_of(folder: Path, model: Path, **learner: object) -> Path:
    (folder / "coin.py").write_text(COIN)
    return write_run_file(
        folder / "run.toml",
        model=model,
        name="flow",
        environment={"plugin": f"{folder / 'coin.py'}:Coin"},
        roles=ROLES,
        actor={"num_members": 8, "num_threads": 1, "snapshot_poll_s": 0.2},
        learner={
            "groups_per_update": 2,
            "group_size": 4,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "num_threads": 1,
            **learner,
        },
    )


@pytest.fixture
def start() -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def start_fleet(run_path: Path, *, num_actors: int = 1) -> Fleet:
        fleet = fleet_of(run_path, run_path.parent / "flow", num_actors=num_actors, overrides=[])
        fleets.append(fleet)
        fleet.start()
        return fleet

    yield start_fleet
    for fleet in fleets:
        fleet.stop(grace_s=20)


def child(fleet: Fleet, name: str) -> Child:
    return next(c for c in fleet.children if c.name == name)


def kill(target: Child) -> None:
    assert target.process is not None
    os.kill(target.process.pid, signal.SIGKILL)
    target.process.wait(10)


def wait_for_updates(folder: Path, count: int, fleet: Fleet) -> None:
    wait_for(lambda: len(list(read_lines(folder / "metrics" / "learner.jsonl"))) >= count, fleet)


def wait_for(condition: Callable[[], bool], fleet: Fleet, *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        for c in fleet.children:
            assert c.exit_code is None, f"{c.name} ended with {c.exit_code}:\n{c.tail(40)}"
        assert time.monotonic() < deadline, "\n\n".join(f"{c.name}:\n{c.tail()}" for c in fleet.children)
        time.sleep(0.2)


def assert_everything_is_accounted_for(folder: Path) -> None:
    found = account(folder, max_open=4)
    assert (found.episodes_lost, found.episodes_twice, found.episodes_invented) == (0, 0, 0)
    assert found.episodes_trained == found.groups_trained * 4


def test_a_run_trains_all_its_updates_and_ends(tmp_path: Path, model: Path, start) -> None:
    fleet = start(run_file_of(tmp_path, model, num_updates=4), num_actors=2)
    assert wait_for_exit(child(fleet, "learner"), 120) == 0, child(fleet, "learner").tail(40)
    updates = list(read_lines(tmp_path / "flow" / "metrics" / "learner.jsonl"))
    assert [u["update"] for u in updates] == [1, 2, 3, 4]
    assert all(u["lag_mean"] >= 0 for u in updates)
    assert account(tmp_path / "flow", max_open=4).groups_trained == 4 * 2
    assert_everything_is_accounted_for(tmp_path / "flow")


def test_the_run_goes_on_when_each_part_is_killed(tmp_path: Path, model: Path, start) -> None:
    run_path = run_file_of(tmp_path, model, num_updates=12)
    folder = tmp_path / "flow"
    fleet = start(run_path, num_actors=1)
    wait_for_updates(folder, 3, fleet)

    late = fleet_of(run_path, folder, num_actors=2, overrides=[]).children[-1]
    late.start()
    fleet.children.append(late)  # a second actor joins
    kill(child(fleet, "actor-1"))
    child(fleet, "actor-1").start()
    kill(child(fleet, "broker"))
    child(fleet, "broker").start()
    wait_for_updates(folder, 7, fleet)
    kill(late)
    fleet.children.remove(late)
    kill(child(fleet, "learner"))
    child(fleet, "learner").start()
    assert wait_for_exit(child(fleet, "learner"), 150) == 0, child(fleet, "learner").tail(40)
    updates = [u["update"] for u in read_lines(folder / "metrics" / "learner.jsonl")]
    assert updates == list(range(1, 13))
    assert_everything_is_accounted_for(folder)


def test_a_second_broker_on_the_same_journal_is_refused(tmp_path: Path, model: Path, start) -> None:
    run_path = run_file_of(tmp_path, model, num_updates=1000)
    fleet = start(run_path, num_actors=0)
    wait_for(lambda: "broker ready" in child(fleet, "broker").tail(100), fleet)
    second = fleet_of(run_path, tmp_path / "second", num_actors=0, overrides=[]).children[0]
    second.start()
    assert wait_for_exit(second, 30) in (3, 4)
    assert len(second.tail().splitlines()) <= 3


def test_matpo_up_drains_on_a_signal_and_resumes(tmp_path: Path, model: Path) -> None:
    run_path = run_file_of(tmp_path, model, num_updates=1000)
    folder = tmp_path / "flow"
    command = [sys.executable, "-m", "matpo_ops", "up", str(run_path)]
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(read_lines(folder / "metrics" / "learner.jsonl"))) < 2 and time.monotonic() < deadline:
        assert up.poll() is None, (tmp_path / "up.log").read_text()
        time.sleep(0.2)
    up.send_signal(signal.SIGTERM)
    assert up.wait(90) == 0, (tmp_path / "up.log").read_text()
    assert "Start the same run file again to resume" in (tmp_path / "up.log").read_text()
    assert processes_of(run_path) == []
    assert_everything_is_accounted_for(folder)
    done = len(list(read_lines(folder / "metrics" / "learner.jsonl")))
    finished = subprocess.run(
        [*command, "--set", f"learner.num_updates={done + 1}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [u["update"] for u in read_lines(folder / "metrics" / "learner.jsonl")] == list(range(1, done + 2))


def processes_of(run_path: Path) -> list[str]:
    """Command lines of live processes that name this run file."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(run_path) in command:
                found.append(command)
    return found
