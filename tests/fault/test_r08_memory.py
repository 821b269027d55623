"""R8: the broker's memory is bounded, whatever actors and learner do.

64 actors with episodes of 1 MiB and a learner that placed orders and fetches nothing. Actors that keep to their credit
are paused by it; those that do not are slowed down by TCP, once what ZeroMQ reads ahead of each connection is full. In
both cases every acknowledged episode is stored.
The bound: what the broker needs when nothing happens, plus broker.credit_bytes, plus 128 MiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from tests.fault.harness import SOAK, Life, Peer, Place, episode_of, payload_of, stored_bytes

from matpo import wire
from matpo.settings import BrokerSettings
from matpo_broker.tables import accounting

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900 if SOAK else 150)]

NUM_ACTORS = 64
PAYLOAD_BYTES = 2**20
CREDIT_BYTES = 64 * 2**20
SLACK_BYTES = 128 * 2**20
SLOTS = 4  # members that an actor plays at once; also the size of a group
STALL_S = 300 if SOAK else 60
BLAST_S = 60 if SOAK else 15


class Actor:
    """One actor: leases members, sends their episodes as its credit allows, asks again."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.unsent: list[wire.Lease] = []
        self.num_unanswered = 0
        self.acked: list[str] = []
        self.pauses = 0
        self.trouble: list[str] = []
        self._window = max(1, peer.welcome.window_bytes // PAYLOAD_BYTES)
        self._ask()

    def _ask(self) -> None:
        self.peer.send(wire.LeaseRequest(num_members=SLOTS, wait_s=0.5))

    def take(self) -> None:
        """One message from the broker, and what follows from it."""
        reply, _ = self.peer.receive()
        if reply.kind == "leases":
            self.pauses += bool(reply.paused)
            self.unsent = list(reply.leases)
            if not self.unsent:
                self._ask()
        elif reply.kind == "stored":
            self.acked.append(reply.episode)
            self.num_unanswered -= 1
            if not self.unsent and not self.num_unanswered:
                self._ask()
        else:
            self.trouble.append(repr(reply))
        while self.unsent and self.num_unanswered < self._window:
            self.peer.send(*episode_of(self.unsent.pop(), PAYLOAD_BYTES))
            self.num_unanswered += 1


def crowd(place: Place, **options: int) -> tuple[list[Peer], Life, int]:
    """A broker, 64 actors that said hello, a learner that placed orders. Returns what the broker needs at rest, too."""
    life = place.start()
    place.wait_ready()
    base_bytes = life.status("VmRSS")
    place.learner(2000, SLOTS)
    return [place.peer("actor", f"a{number}", **options) for number in range(NUM_ACTORS)], life, base_bytes


def figures(life: Life, base_bytes: int, credit_bytes: int) -> dict[str, float]:
    """The highest RSS of the process so far (the kernel counts it), against the bound."""
    peak, bound = life.status("VmHWM"), base_bytes + credit_bytes + SLACK_BYTES
    return {"base_mib": base_bytes / 2**20, "peak_mib": peak / 2**20, "bound_mib": bound / 2**20}


def check_stored(place: Place, acked: list[str]) -> int:
    """How many acknowledged episodes are not in the journal with the right bytes."""
    stored, payloads = set(accounting(place.journal).stored.values()), stored_bytes(place.journal)
    wrong = [name for name, payload in payloads.items() if payload != payload_of(name, PAYLOAD_BYTES)]
    return len(set(acked) - stored) + len(wrong)


def test_a_stalled_learner_pauses_64_actors_by_their_credit_and_the_brokers_memory_stays_bounded(
    make_place: Callable[..., Place], report: Callable[..., None]
) -> None:
    place = make_place(credit_bytes=CREDIT_BYTES)
    peers, life, base_bytes = crowd(place)
    poller = zmq.Poller()
    actors: dict[Any, Actor] = {peer.socket: Actor(peer) for peer in peers}
    for source in actors:
        poller.register(source, zmq.POLLIN)
    until_s = time.monotonic() + STALL_S
    while (now_s := time.monotonic()) < until_s or any(actor.num_unanswered for actor in actors.values()):
        assert now_s < until_s + 30, "episodes without an answer"
        for source, _ in poller.poll(100):
            actors[source].take()
    acked = [name for actor in actors.values() for name in actor.acked]
    memory, counts = figures(life, base_bytes, CREDIT_BYTES), place.counts()
    dropped = check_stored(place, acked)
    report(
        "R8", actors=NUM_ACTORS, stalled_s=STALL_S, **memory, stored_mib=len(acked) * PAYLOAD_BYTES / 2**20,
        credit_mib=CREDIT_BYTES / 2**20, pauses=sum(actor.pauses for actor in actors.values()), dropped=dropped,
    )  # fmt: skip
    assert [trouble for actor in actors.values() for trouble in actor.trouble] == []
    assert memory["peak_mib"] <= memory["bound_mib"]
    assert dropped == 0
    assert counts.get("replies_undeliverable", 0) == 0
    # Credit holds actors back: beyond it comes at most what was leased before it was used up.
    assert CREDIT_BYTES <= len(acked) * PAYLOAD_BYTES <= CREDIT_BYTES + NUM_ACTORS * SLOTS * PAYLOAD_BYTES
    assert all(actor.pauses >= STALL_S // 2 for actor in actors.values())


def test_64_actors_that_ignore_their_credit_and_read_no_answer_do_not_fill_the_brokers_memory(
    make_place: Callable[..., Place], report: Callable[..., None]
) -> None:
    place = make_place()
    peers, life, base_bytes = crowd(place, send_hwm=2)
    poller = zmq.Poller()
    held: dict[Any, list[list[Any]]] = {}
    for peer in peers:  # before anything is stored: nobody is paused yet
        leases = peer.ask(wire.LeaseRequest(num_members=SLOTS)).leases
        episodes = [episode_of(lease, PAYLOAD_BYTES) for lease in leases]
        held[peer.socket] = [[wire.encode(message)[0], payload] for message, payload in episodes]
        poller.register(peer.socket, zmq.POLLOUT)
    num_sent, until_s = 0, time.monotonic() + BLAST_S
    while time.monotonic() < until_s:
        for source, _ in poller.poll(100):
            frames = held[source][num_sent % SLOTS]
            num_sent += 1
            source.send_multipart(frames, zmq.NOBLOCK, copy=False)
        assert not life.is_over, life.log.read_text()[-2000:]
    memory = figures(life, base_bytes, BrokerSettings().credit_bytes)
    place.wait_ready()
    acked = set()
    for peer in peers:
        while peer.socket.poll(0):
            reply, _ = peer.receive()
            acked |= {reply.episode} if reply.kind == "stored" else set()
    dropped = check_stored(place, list(acked))
    report("R8", blasting_actors=NUM_ACTORS, seconds=BLAST_S, sent_mib=num_sent, **memory, dropped=dropped)
    assert num_sent > memory["bound_mib"]  # more than would fit
    assert memory["peak_mib"] <= memory["bound_mib"]
    assert dropped == 0
    assert len(acked) == NUM_ACTORS * SLOTS
