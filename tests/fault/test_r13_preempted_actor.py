"""R13: a preempted actor saves what it finished, and gives the rest back at once.

Real actor processes, one after the other, get SIGTERM at random moments: while they start, while they play, and while
the broker is stopped for a moment so that finished episodes pile up. Each has 10 s. The environment is the witness: it
writes down the id of each episode that it scores, which is the instant at which an episode is finished. Afterwards the
broker has every one of them, and whatever else was ordered is leased again by the first who asks, long before any lease
would have run out.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from tests.fault.forking import ForkServer, Life
from tests.fault.harness import RUN, SOAK, Place, episode_of, orders_of

from matpo import snapshot, wire
from matpo.settings import load_run_file
from matpo.testing import tiny_model, write_run_file
from matpo_broker.tables import accounting

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1800 if SOAK else 120)]

MOMENTS = ("starting", "busy", "busy", "stalled")
SIGTERMS = 100 if SOAK else 12
DRAIN_S = 10.0
LEASE_S = 60.0  # nothing in this test waits for a lease to run out
GROUP_SIZE = 4
GROUPS = 40  # of each life: more than it can play
NUM_MEMBERS = 16
START_S = 0.5  # SIGTERM while starting comes within this, once the actor can hear it

# The reward has no await: between its line and the outbox nothing else of the actor runs.
PLUGIN = '''
import asyncio, os, random
from pathlib import Path
from matpo import Environment, tool

FINISHED = os.open(Path(__file__).with_name("finished"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

class Slow(Environment):
    def tasks(self, split):
        return []

    @tool(max_concurrent=1000)
    async def think(self, about: str) -> str:
        """Take some time."""
        await asyncio.sleep(random.expovariate(5))
        return "done"

    async def reward(self, task, episode):
        os.write(FINISHED, f"{episode.id}\\n".encode())
        return 1.0
'''
SCRIPT = [
    {"when": "<tool_response>\ndone", "say": "Here it is."},
    {"say": "<tool_call>" + json.dumps({"name": "think", "arguments": {"about": "it"}}) + "</tool_call>"},
]


def prepare(place: Place) -> None:
    """An environment, a script, a snapshot to start from, and the run file of all that."""
    (place.folder / "slow.py").write_text(PLUGIN)
    (place.folder / "finished").touch()
    (place.folder / "script.jsonl").write_text("\n".join(json.dumps(line) for line in SCRIPT))
    model = tiny_model(place.folder / "model")
    place.run_file = write_run_file(
        place.folder / "run.toml",
        model=model,
        name=RUN,
        environment={"name": "slow", "plugin": f"{place.folder / 'slow.py'}:Slow"},
        broker={
            "actor_port": place.ports[0],
            "learner_port": place.ports[1],
            "lease_s": LEASE_S,
            "heartbeat_s": 1.0,
        },
        actor={
            "engine": "scripted",
            "script": str(place.folder / "script.jsonl"),
            "num_members": NUM_MEMBERS,
            "drain_s": DRAIN_S,
        },
        roles={"planner": {"calls": ["think"]}},
    )
    run_file = load_run_file(place.run_file)
    weights = load_file(model / "model.safetensors")
    snapshot.publish(
        run_file.snapshot_folder, weights, version=0, epoch=0, update=0, model_folder=model, dtype=torch.float32
    )


@dataclass
class Preemptor:
    """Starts actors, tells them to go, and looks at what they leave."""

    place: Place
    server: ForkServer
    chance: random.Random
    num_ordered: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    slowest_exit_s: float = 0.0
    slowest_lease_s: float = 0.0
    unsaved: set[str] = field(default_factory=set)

    def one_life(self, moment: str, number: int) -> None:
        """One actor, from its start to what is left of it."""
        broker = self.place.lives[-1]
        with self.place.peer("learner", "learner") as learner:
            orders = orders_of(range(self.num_ordered, self.num_ordered + GROUPS), GROUP_SIZE)
            assert learner.ask(wire.PlaceOrders(epoch=1, orders=orders)).kind == "done"
        self.num_ordered += GROUPS
        finished_before = len(self._finished())
        log = self.place.folder / f"actor-{number}.log"
        life = self.server.start([str(self.place.run_file), "--name", f"actor-{number}"], log)
        if moment == "starting":
            self._wait_for(lambda: "actor.starting" in life.said(), life)
            time.sleep(self.chance.uniform(0, START_S))
        else:
            self._wait_for(lambda: len(self._finished()) > finished_before, life)
            time.sleep(self.chance.uniform(0, 0.8))
        if moment == "stalled":
            broker.send_signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0, 0.3))
        assert not life.is_over, f"the actor ended by itself with {life.wait()}: {life.said()}"
        life.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        if moment == "stalled":
            time.sleep(self.chance.uniform(0, 2.0))
            broker.send_signal(signal.SIGCONT)
        self.codes[life.wait(DRAIN_S + 10)] += 1
        self.slowest_exit_s = max(self.slowest_exit_s, time.monotonic() - told_s)
        self._check(finished_before)

    def _check(self, finished_before: int) -> None:
        """What was finished is stored, and the rest can be leased now."""
        ledger = accounting(self.place.journal)
        stored = set(ledger.stored.values())
        finished = self._finished()
        self.unsaved |= set(finished) - stored
        self.counts["finished"] += len(finished) - finished_before
        unfinished = set(ledger.members) - ledger.stored.keys()
        asked_s = time.monotonic()
        with self.place.peer("actor", "next") as peer:
            leases = peer.ask(wire.LeaseRequest(num_members=len(unfinished) + 1)).leases
            self.slowest_lease_s = max(self.slowest_lease_s, time.monotonic() - asked_s)
            assert {(lease.group, lease.member) for lease in leases} == unfinished
            self.counts["given_back"] += sum(lease.attempt > 0 for lease in leases)
            for lease in leases:
                assert peer.ask(*episode_of(lease, 100)).kind == "stored"

    def _finished(self) -> list[str]:
        return (self.place.folder / "finished").read_text().splitlines()

    def _wait_for(self, condition: Callable[[], bool], life: Life) -> None:
        until_s = time.monotonic() + 30
        while not condition():
            assert not life.is_over, f"the actor ended by itself with {life.wait()}: {life.said()}"
            assert time.monotonic() < until_s, f"the actor does not get on: {life.said()}"
            time.sleep(0.002)


def test_an_actor_that_is_told_to_go_stores_what_it_finished_and_gives_the_rest_back_at_once(
    make_place: Callable[..., Place], report: Callable[..., None]
) -> None:
    seed = int(os.environ.get("MATPO_SEED", random.SystemRandom().randrange(2**31)))
    began_s = time.monotonic()
    place = make_place()
    prepare(place)
    place.start()
    place.learner(0, GROUP_SIZE).close()
    with ForkServer("actor") as server:
        preemptor = Preemptor(place, server, random.Random(seed))
        for number in range(SIGTERMS):
            preemptor.one_life(MOMENTS[number % len(MOMENTS)], number)
    ledger = accounting(place.journal)
    report(
        "R13", sigterms=SIGTERMS, exit_0=preemptor.codes[0], finished=preemptor.counts["finished"],
        unsaved=len(preemptor.unsaved), given_back=preemptor.counts["given_back"],
        slowest_exit_s=preemptor.slowest_exit_s, slowest_lease_s=preemptor.slowest_lease_s,
        seconds=time.monotonic() - began_s, seed=seed,
    )  # fmt: skip
    assert preemptor.unsaved == set()
    assert preemptor.codes == {0: SIGTERMS}
    assert preemptor.slowest_exit_s <= DRAIN_S
    assert preemptor.slowest_lease_s <= 1.0
    assert ledger.dropped == {}
    assert len(ledger.stored) == preemptor.num_ordered * GROUP_SIZE
    assert min(preemptor.counts["finished"], preemptor.counts["given_back"]) > SIGTERMS
