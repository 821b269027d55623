"""R15: clock jumps do no harm. Leases are counted in time that the broker was awake, and wall time means nothing."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.fault.harness import Place

import matpo_broker
from matpo import wire
from matpo.metrics import Metrics
from matpo_broker.clock import MAX_STEP_S, PatientClock
from matpo_broker.ledger import Ledger
from matpo_broker.members import Rules

LEASE_S = 60.0
HOUR_S = 3600.0


class Turns:
    """A ledger that turns as the broker does, under a clock that the test moves: it jumps while the broker sleeps."""

    def __init__(self, num_members: int) -> None:
        self.source_s = 1000.0
        self.clock = PatientClock(lambda: self.source_s)
        rules = Rules(run="r", lease_s=LEASE_S, max_attempts=3, credit_bytes=2**30)
        self.ledger = Ledger(":memory:", rules, Metrics("broker"), now_s=self.clock())
        hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1)
        epoch = self.ledger.greet_learner(hello)
        task = wire.OrderedTask(id="t", environment="e", question="q")
        order = wire.Order(group="g-0", index=0, group_size=num_members, task=task)
        self.ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order]), self.clock())
        leases, _ = self.ledger.members.lease("a", num_members, self.clock())
        self.leases = [lease.lease for lease in leases]

    def turn(self, passed_s: float, *, heartbeat: bool = False) -> int:
        """One turn of the broker, so long after the last one. Returns how many leases are left."""
        self.source_s += passed_s
        now_s = self.clock()
        if heartbeat:
            assert self.ledger.members.heartbeat("a", self.leases, now_s) == []
        self.ledger.members.expire(now_s)
        return self.ledger.counts()["members_leased"]


@pytest.mark.parametrize("jump_s", [LEASE_S + 1, HOUR_S, 1000 * HOUR_S, -HOUR_S])
def test_no_lease_is_lost_when_the_clock_jumps_between_two_turns(jump_s: float) -> None:
    turns = Turns(100)
    assert turns.turn(1.0) == 100
    assert turns.turn(jump_s) == 100  # the actors' heartbeats are still on their way
    assert turns.turn(0.5, heartbeat=True) == 100


def test_leases_get_back_the_time_that_the_broker_slept() -> None:
    turns = Turns(100)
    awake_s = 0.0
    while turns.turn(1.0) == 100:
        awake_s += 1.0
        if awake_s in (10, 20, 30):
            assert turns.turn(HOUR_S) == 100
            awake_s += MAX_STEP_S  # what a jump counts for
    assert LEASE_S - 1 <= awake_s <= LEASE_S
    assert turns.turn(0) == 0  # silence while the broker is awake still ends them, all of them


def test_many_jumps_do_not_add_up_for_actors_that_renew() -> None:
    turns = Turns(100)
    for _ in range(50):
        assert turns.turn(HOUR_S) == 100
        assert turns.turn(0.5, heartbeat=True) == 100


def test_orders_do_not_expire_because_the_broker_slept() -> None:
    source_s = 0.0
    clock = PatientClock(lambda: source_s)
    rules = Rules(run="r", lease_s=LEASE_S, max_attempts=3, credit_bytes=2**30, max_order_age_s=600.0)
    ledger = Ledger(":memory:", rules, Metrics("broker"), now_s=clock())
    epoch = ledger.greet_learner(wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1))
    task = wire.OrderedTask(id="t", environment="e", question="q")
    orders = [wire.Order(group=f"g-{i}", index=i, group_size=1, task=task) for i in range(20)]
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=orders), clock())
    source_s += 10 * HOUR_S
    ledger.members.expire(clock())
    assert ledger.counts()["groups_dropped"] == 0


def test_wall_time_decides_nothing_in_the_broker() -> None:
    # A process cannot set the clock of a test machine; that nothing asks for it can be seen. Keys note when they were
    # made, for people.
    found = []
    for path in Path(matpo_broker.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (ast.unparse(node) in {"time.time", "time.time_ns"} or (
                node.attr in {"now", "utcnow", "today"} and "date" in ast.unparse(node.value)
            )):  # fmt: skip
                found.append(path.name)
    assert set(found) <= {"keys.py"}


@pytest.mark.processes
def test_no_lease_of_a_live_actor_is_lost_when_the_broker_is_stopped_for_longer_than_a_lease(
    make_place: Callable[..., Place], report: Callable[..., None]
) -> None:
    lease_s, actors, leases = 4.0, 3, 20
    place = make_place(lease_s=lease_s, heartbeat_s=0.5)
    life = place.start()
    place.wait_ready()
    place.learner(actors * leases, 1).close()
    with ExitStack() as stack:
        holders = [stack.enter_context(holder(place, f"a{i}", leases)) for i in range(actors)]
        for one in holders:
            assert len(said(one)["leased"]) == leases
            assert said(one)["lost"] == []
        life.send_signal(signal.SIGSTOP)
        started_s = time.monotonic()
        while time.monotonic() - started_s < lease_s + 2:
            time.sleep(0.1)  # the passing of time is what is tested
        life.send_signal(signal.SIGCONT)
        stopped_s = time.monotonic() - started_s
        # Watch for another whole lease: none may end late either.
        until_s = time.monotonic() + lease_s + 1
        lost = 0
        while time.monotonic() < until_s:
            lost += sum(len(said(one)["lost"]) for one in holders)
        stored = 0
        for one in holders:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.close()
            answers = [line["answer"] for line in map(json.loads, one.stdout or ()) if "answer" in line]
            stored += answers.count("stored")
            assert one.wait(20) == 0
    counts = place.counts()
    report("R15", leases=actors * leases, lease_s=lease_s, broker_stopped_s=stopped_s, lost=lost, stored=stored)
    assert (lost, stored, counts["episodes_stored"]) == (0, actors * leases, actors * leases)


def holder(place: Place, name: str, leases: int) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("harness.py")
    command = [sys.executable, str(program), "holder", str(place.ports[0]), name, str(leases)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line
