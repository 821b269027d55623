"""R11: a restart does not replay the world.

A broker with a backlog of stored episodes is killed -9 under load; the next one answers within five seconds, and what
Python itself needs to start is measured beside it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from tests.fault.harness import SOAK, Life, Peer, Place, delivered, episode_of, payload_of

from matpo import wire

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1200 if SOAK else 150)]

BACKLOG_BYTES = (4 if SOAK else 1) * 2**30
PAYLOAD_BYTES = 128 * 1024
GROUP_SIZE = 8
NUM_ACTORS = 4
MAX_READY_S = 5.0
RESTARTS = 5


@pytest.fixture
def big_place(make_place: Callable[..., Place]) -> Iterator[Place]:
    """A place whose backlog is not kept after the test."""
    place = make_place(credit_bytes=2 * BACKLOG_BYTES)
    yield place
    place.close()
    shutil.rmtree(place.journal)


def fill(place: Place) -> list[Peer]:
    """Store the backlog from a few actors at once; the last messages of each have no answer yet."""
    actors = [place.peer("actor", f"a{number}") for number in range(NUM_ACTORS)]
    num_acked, unanswered = 0, dict.fromkeys(range(NUM_ACTORS), 0)
    while num_acked * PAYLOAD_BYTES < BACKLOG_BYTES:
        for number, actor in enumerate(actors):
            while unanswered[number] > 0:
                assert actor.receive()[0].kind == "stored"
                unanswered[number] -= 1
                num_acked += 1
            for lease in actor.ask(wire.LeaseRequest(num_members=16)).leases:
                actor.send(*episode_of(lease, PAYLOAD_BYTES))
                unanswered[number] += 1
    return actors


def start_and_wait(place: Place) -> tuple[Life, float]:
    started_s = time.monotonic()
    life = place.start()
    place.wait_ready()
    return life, time.monotonic() - started_s


def test_a_broker_that_was_killed_with_a_large_backlog_answers_again_within_5_seconds(
    big_place: Place, make_place: Callable[..., Place], report: Callable[..., None]
) -> None:
    bare = make_place()
    bare_s = []
    for _ in range(3):
        life, seconds = start_and_wait(bare)
        life.kill()
        bare_s.append(seconds)
    life, _ = start_and_wait(big_place)
    num_groups = BACKLOG_BYTES // PAYLOAD_BYTES // GROUP_SIZE + 100  # some stay open
    big_place.learner(num_groups, GROUP_SIZE).close()
    filling_s = time.monotonic()
    fill(big_place)
    filling_s = time.monotonic() - filling_s
    ready_s = []
    for _ in range(RESTARTS):
        life.kill()
        life, seconds = start_and_wait(big_place)
        ready_s.append(seconds)
    stored = int(big_place.counts()["episodes_stored"])
    size = sum(path.stat().st_blocks * 512 for path in big_place.journal.glob("payload-*"))
    report(
        "R11", backlog_gib=size / 2**30, episodes=stored, restarts=RESTARTS, slowest_ready_s=max(ready_s),
        bare_start_s=min(bare_s), filled_in_s=filling_s,
    )  # fmt: skip
    assert stored * PAYLOAD_BYTES >= BACKLOG_BYTES
    assert max(ready_s) <= MAX_READY_S
    check_some(big_place)


def check_some(place: Place) -> None:
    """It serves what it has: the first groups come with the right bytes."""
    learner, received = place.peer("learner", "learner"), ""
    for _ in range(20):
        reply = learner.ask(wire.Fetch(epoch=1, wait_s=5, received=received))
        assert reply.kind == "group"
        episodes = dict(delivered(reply, learner.payload))
        assert len(episodes) == GROUP_SIZE
        assert all(payload == payload_of(name, PAYLOAD_BYTES) for name, payload in episodes.items())
        received = reply.group
