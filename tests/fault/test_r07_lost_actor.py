"""R7: a lost actor costs only what it had not finished.

Actors are real processes that lease members and renew them. Some are killed -9, some are stopped: what they held goes
to another actor at most a second after their leases ran out. A stopped one that comes back finds its leases gone, and
what it stores with them is refused; each group ends with one episode per member.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fault import harness
from tests.fault.harness import SOAK, Place, delivered, episode_of, orders_of, payload_of

from matpo import wire
from matpo_broker.tables import accounting

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900 if SOAK else 120)]

LEASE_S = 2.0
ROUNDS = 20 if SOAK else 2
NUM_VICTIMS = 6  # of each round: half of them killed, half of them stopped
MEMBERS = 4  # of each; also the size of a group


class Holder:
    """An actor process that holds leases until it is told to store what it has."""

    def __init__(self, port: int, name: str) -> None:
        command = [sys.executable, str(Path(harness.__file__)), "holder", str(port), name, str(MEMBERS)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.leases: list[wire.Lease] = []

    def wait_for_leases(self) -> None:
        self.leases = [wire.Lease.model_validate(lease) for lease in self._read()["leased"]]

    def wait_for_heartbeat(self) -> list[str]:
        """The leases that the broker says are lost."""
        lost: list[str] = self._read()["lost"]
        return lost

    def store(self) -> list[str]:
        """Let it store all that it holds. What the broker answered, by lease."""
        assert self.child.stdin is not None
        self.child.stdin.write("store\n")
        self.child.stdin.flush()
        lines = [line for line in self.child.communicate(timeout=30)[0].splitlines() if "answer" in line]
        return [json.loads(line)["answer"] for line in lines]

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        found: dict[str, Any] = json.loads(self.child.stdout.readline())
        return found


@pytest.fixture
def make_holder() -> Iterator[Callable[[int, str], Holder]]:
    holders: list[Holder] = []

    def make(port: int, name: str) -> Holder:
        holders.append(Holder(port, name))
        return holders[-1]

    yield make
    for holder in holders:
        holder.child.kill()
        holder.child.wait()
        for pipe in (holder.child.stdin, holder.child.stdout):
            assert pipe is not None
            pipe.close()


def lose_some_actors(
    place: Place, make_holder: Callable[[int, str], Holder], number: int
) -> tuple[list[float], list[str]]:
    """Kill and stop actors, and play what they held. Returns the seconds until each member was leased again, and the
    broker's answers to those that came back."""
    holders = [make_holder(place.ports[0], f"victim-{number}-{n}") for n in range(NUM_VICTIMS)]
    for holder in holders:
        holder.wait_for_leases()
    assert all(holder.wait_for_heartbeat() == [] for holder in holders)
    held = {(lease.group, lease.member) for holder in holders for lease in holder.leases}
    assert len(held) == NUM_VICTIMS * MEMBERS
    killed, stopped = holders[: NUM_VICTIMS // 2], holders[NUM_VICTIMS // 2 :]
    lost_s = time.monotonic()
    for holder in killed:
        holder.child.kill()
    for holder in stopped:
        holder.child.send_signal(signal.SIGSTOP)
    waits, again = [], []
    with place.peer("actor", f"survivor-{number}") as survivor:
        while len(again) < len(held):
            reply = survivor.ask(wire.LeaseRequest(num_members=len(held), wait_s=10))
            waits += [time.monotonic() - lost_s] * len(reply.leases)
            again += reply.leases
            survivor.ask(wire.Heartbeat(leases=[lease.lease for lease in again], policy_version=0))
        assert {(lease.group, lease.member) for lease in again} == held
        assert all(lease.attempt == 1 for lease in again)
        early, late = stopped[0], stopped[1:]  # one comes back before the others' episodes are there, the rest after it
        early.child.send_signal(signal.SIGCONT)
        answers = early.store()
        assert {survivor.ask(*episode_of(lease)).kind for lease in again} == {"stored"}
        for holder in late:
            holder.child.send_signal(signal.SIGCONT)
            answers += holder.store()
    return waits, answers


def test_the_members_of_a_lost_actor_go_to_another_within_a_second_of_their_leases_and_it_stores_nothing_more(
    make_place: Callable[..., Place], make_holder: Callable[[int, str], Holder], report: Callable[..., None]
) -> None:
    place = make_place(lease_s=LEASE_S, heartbeat_s=LEASE_S / 4)
    place.start()
    num_groups = ROUNDS * NUM_VICTIMS
    place.learner(0, MEMBERS).close()
    waits, answers = [], []
    for number in range(ROUNDS):
        orders = orders_of(range(number * NUM_VICTIMS, (number + 1) * NUM_VICTIMS), MEMBERS)
        with place.peer("learner", "learner") as learner:  # a new hello: the broker forgets who is silent for so long
            assert learner.ask(wire.PlaceOrders(epoch=1, orders=orders)).kind == "done"
        more_waits, more_answers = lose_some_actors(place, make_holder, number)
        waits += more_waits
        answers += more_answers
    groups: dict[str, dict[str, bytes]] = {}
    received = ""
    learner = place.peer("learner", "learner")
    while len(groups) < num_groups:
        reply = learner.ask(wire.Fetch(epoch=1, wait_s=5, received=received))
        assert reply.kind == "group", f"{len(groups)} of {num_groups} groups came"
        groups[reply.group] = dict(delivered(reply, learner.payload))
        received = reply.group
    refused = [answer for answer in answers if answer != "stored"]
    report(
        "R7", lost_actors=ROUNDS * NUM_VICTIMS, members=len(waits), lease_s=LEASE_S, slowest_release_s=max(waits),
        stale_stores=len(answers), refused=len(refused), groups_complete=len(groups),
    )  # fmt: skip
    assert max(waits) <= LEASE_S + 1
    assert min(waits) >= LEASE_S / 2  # not before: half a lease is the oldest that a heartbeat may be
    assert answers == ["lease_lost"] * (ROUNDS * (NUM_VICTIMS // 2) * MEMBERS)
    assert all(len(episodes) == MEMBERS for episodes in groups.values())
    assert all(payload == payload_of(name) for episodes in groups.values() for name, payload in episodes.items())
    assert len(accounting(place.journal).stored) == num_groups * MEMBERS
