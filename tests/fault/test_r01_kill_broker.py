"""R1: what the broker acknowledged is never lost when it is killed.

Four actors and a learner keep a broker busy with tiny payload files, so that appends, rolls, commits and file drops
follow each other within milliseconds, and it is killed -9 at random instants, also while it starts. After each kill the
journal folder is read without a broker. Half of the promise is what is not there: nothing that nobody sent.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fault.harness import (
    SOAK,
    Forks,
    GoneError,
    Life,
    Peer,
    Place,
    delivered,
    episode_of,
    orders_of,
    payload_of,
    stored_bytes,
)

from matpo import wire
from matpo_broker.tables import accounting

pytestmark = [pytest.mark.processes, pytest.mark.timeout(7200 if SOAK else 240)]

ROUND_KILLS = 40  # then a fresh folder: the checker reads all of it after each kill
ROUNDS = 250 if SOAK else 5
DURABILITIES = ("group", "group", "always", "interval", "never")  # kill -9 loses nothing that the kernel has
COMMAND_EVERY = 20  # of the lives, one in so many is the command itself; the others are forked
NUM_PRODUCERS = 4
GROUP_SIZE = 4
ORDERS_AHEAD = 200
COMMIT_GROUPS = 8
LEASE_S = 3.0  # leases whose reply died with a broker come again after this


class Load:
    """What was sent, acknowledged, delivered and committed so far, by threads that outlive each broker."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.life = 0  # raised by each kill: then every peer opens a new connection
        self.is_over = False
        self.places_orders = True
        self.sent: set[str] = set()
        self.acked: set[str] = set()
        self.already_stored = 0  # sent again after a kill, and the broker had it: killed between commit and ack
        self.num_ordered = 0
        self.received: set[int] = set()
        self.committed_below = 0  # acknowledged
        self.may_be_forgotten_below = 0  # asked for
        self.wrong: list[str] = []
        works: list[tuple[Callable[..., None], str]] = []
        for n in range(NUM_PRODUCERS):  # half of them send bundles
            works.append((self._produce if n % 2 else self._produce_together, f"a{n}"))
        works.append((self._learn, "learner"))
        self.threads = [threading.Thread(target=self._keep, args=work) for work in works]

    def _keep(self, work: Callable[..., None], name: str) -> None:
        """Do the work on one connection after the other."""
        state: dict[Any, Any] = {}
        while not self.is_over:
            life = self.life

            def gone(life: int = life) -> bool:
                return self.is_over or self.life != life

            try:
                kind = "learner" if name == "learner" else "actor"
                with self.place.peer(kind, name, is_over=gone) as peer:
                    while not gone():
                        work(peer, state)
            except GoneError:
                continue
            except Exception as error:
                self.wrong.append(f"{name}: {error!r}")
                raise

    def _produce_together(self, peer: Peer, unanswered: dict[str, tuple[wire.StoreEpisode, bytes]]) -> None:
        self._produce(peer, unanswered, together=True)

    def _produce(
        self, peer: Peer, unanswered: dict[str, tuple[wire.StoreEpisode, bytes]], *, together: bool = False
    ) -> None:
        """Lease some members and store them all at once; first again what has no answer."""
        if not unanswered:
            reply = peer.ask(wire.LeaseRequest(num_members=8, wait_s=0.2))
            for lease in reply.leases:
                message, payload = episode_of(lease)
                unanswered[message.episode] = (message, payload)
        self.sent.update(unanswered)
        if together and unanswered and len(unanswered) <= peer.welcome.bundle_episodes:
            seqs = peer.send_together(unanswered.values())
        else:
            seqs = [peer.send(*each) for each in unanswered.values()]
        waiting = dict(zip(seqs, unanswered, strict=True))
        while waiting:
            reply, _ = peer.receive()
            name = waiting.pop(reply.seq, "")
            if reply.kind == "stored":
                self.acked.add(reply.episode)
                self.already_stored += reply.duplicate
            elif name and reply.reason != "lease_lost":  # a broker may be dead for longer than a lease
                self.wrong.append(f"{name}: {reply}")
            unanswered.pop(name, None)

    def _learn(self, peer: Peer, state: dict[str, Any]) -> None:
        """Keep orders ahead, fetch what is whole, commit now and then so that payload files are dropped."""
        epoch = peer.welcome.epoch
        if epoch != 1:
            self.wrong.append(f"the learner's epoch rose to {epoch} without a new learner")
        if not state:
            assert peer.ask(wire.Resume(epoch=epoch, checkpoint="", consumed_below=0, consumed=[])).kind == "done"
            state.update(received="", uncommitted=0, kept_below=0, checkpoints=0)
        wanted = len(self.received) + ORDERS_AHEAD
        if self.places_orders and self.num_ordered < wanted:
            orders = orders_of(range(self.num_ordered, wanted), GROUP_SIZE)
            assert peer.ask(wire.PlaceOrders(epoch=epoch, orders=orders)).kind == "done"
            self.num_ordered = wanted
        reply = peer.ask(wire.Fetch(epoch=epoch, wait_s=0.05, received=state["received"]))
        if reply.kind == "group":
            self._take(reply, peer.payload)
            state["received"] = reply.group
            state["uncommitted"] += 1
        if state["uncommitted"] >= COMMIT_GROUPS:
            self._commit(peer, epoch, state)

    def _take(self, reply: wire.GroupReady, body: bytes) -> None:
        episodes = dict(delivered(reply, body))
        if reply.dropped or len(episodes) != GROUP_SIZE:
            self.wrong.append(f"{reply.group} came with {len(episodes)} episodes, dropped={reply.dropped!r}")
        if reply.index in self.received:
            self.wrong.append(f"{reply.group} came twice")
        self.wrong += [f"{name} arrived altered" for name, got in episodes.items() if got != payload_of(name)]
        self.received.add(reply.index)

    def _commit(self, peer: Peer, epoch: int, state: dict[str, Any]) -> None:
        # Not up to num_ordered: orders whose reply died with a broker may have been taken all the same.
        below = next(index for index in itertools.count() if index not in self.received)
        commit = wire.Commit(
            epoch=epoch,
            checkpoint=f"c{state['checkpoints']}",
            consumed_below=below,
            consumed=sorted(index for index in self.received if index > below),
            oldest_kept_below=state["kept_below"],
        )
        self.may_be_forgotten_below = state["kept_below"]
        assert peer.ask(commit).kind == "done"
        self.committed_below = below
        state.update(uncommitted=0, kept_below=below, checkpoints=state["checkpoints"] + 1)


class Checker:
    """Compares a journal folder, read without a broker, with what the peers know."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.lost: set[str] = set()
        self.invented: set[str] = set()
        self.altered: set[str] = set()
        self.checks = 0

    def check(self) -> None:
        load, journal = self._load, self._load.place.journal
        acked, committed_below = set(load.acked), load.committed_below  # first: acks go on arriving
        found = accounting(journal)
        payloads = stored_bytes(journal)
        stored, kept_from = set(found.stored.values()), f"g-{load.may_be_forgotten_below:08d}"
        self.lost |= acked - stored
        self.lost |= {name for name in acked - payloads.keys() if name >= kept_from}
        self.invented |= stored - load.sent
        self.altered |= {name for name, payload in payloads.items() if payload != payload_of(name)}
        for group in {f"g-{index:08d}" for index in range(committed_below)} - set(found.committed):
            load.wrong.append(f"the commit of {group} is forgotten")
        if found.dropped or found.quarantined:
            load.wrong.append(f"given up: {found.dropped} {found.quarantined}")
        self.checks += 1


def kill_it_again_and_again(
    load: Load, checker: Checker, forks: Forks, chance: random.Random, first: Life
) -> tuple[int, int]:
    """Kill ROUND_KILLS brokers, one in four while it starts. Returns (kills during the start, lives of the command)."""
    place, life, starting_kills, commands = load.place, first, 0, 1
    start_s = 0.5
    for number in range(ROUND_KILLS):
        started_s = time.monotonic()
        if number % 4 == 3:
            time.sleep(chance.uniform(0, 1.3 * start_s))
            starting_kills += 1
        else:
            place.wait_ready()
            is_forked = number % COMMAND_EVERY != 0
            start_s = time.monotonic() - started_s if is_forked else start_s
            acks, until_s = len(load.acked), started_s + 20
            while len(load.acked) == acks:  # under load, and not before
                assert time.monotonic() < until_s, f"nothing is stored any more: {life.log.read_text()[-3000:]}"
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.1))
        assert not life.is_over, f"the broker ended by itself: {life.log.read_text()[-3000:]}"
        life.kill()
        load.life += 1
        checker.check()
        is_command = (number + 1) % COMMAND_EVERY == 0
        commands += is_command
        life = place.start(forks=None if is_command else forks)
    return starting_kills, commands


def finish(load: Load) -> None:
    """No more orders: every group that was ordered is delivered, once."""
    load.places_orders = False
    load.place.wait_ready()
    until_s = time.monotonic() + 30
    while set(range(load.num_ordered)) - load.received and time.monotonic() < until_s and not load.wrong:
        time.sleep(0.01)
    load.is_over = True
    for thread in load.threads:
        thread.join(30)
    missing = set(range(load.num_ordered)) - load.received
    if missing:
        load.wrong.append(f"never delivered: {sorted(missing)[:10]} of {load.num_ordered}")


def test_no_acknowledged_episode_is_lost_altered_or_invented_when_the_broker_is_killed_at_random_instants(
    make_place: Callable[..., Place], forks: Forks, report: Callable[..., None]
) -> None:
    seed = int(os.environ.get("MATPO_SEED", random.SystemRandom().randrange(2**31)))
    chance = random.Random(seed)
    total: dict[str, int] = dict.fromkeys(
        ("kills", "at_start", "commands", "acked", "lost", "invented", "altered", "already_stored", "files_dropped"), 0
    )
    wrong: list[str] = []
    began_s = time.monotonic()
    for number in range(ROUNDS):
        durability = DURABILITIES[number % len(DURABILITIES)]
        place = make_place(
            durability=durability, journal_file_bytes=64 * 1024, lease_s=LEASE_S, heartbeat_s=LEASE_S / 3
        )
        first = place.start()
        load = Load(place)
        checker = Checker(load)
        for thread in load.threads:
            thread.start()
        try:
            at_start, commands = kill_it_again_and_again(load, checker, forks, chance, first)
            finish(load)
        finally:
            load.is_over = True
            for thread in load.threads:
                thread.join(30)
        place.lives[-1].kill()
        checker.check()
        files = sorted(place.journal.glob("payload-*.bin"))
        counted = {
            "kills": ROUND_KILLS, "at_start": at_start, "commands": commands, "acked": len(load.acked),
            "lost": len(checker.lost), "invented": len(checker.invented), "altered": len(checker.altered),
            "already_stored": load.already_stored, "files_dropped": number_of(files[-1]) + 1 - len(files),
        }  # fmt: skip
        total = {name: total[name] + value for name, value in counted.items()}
        wrong += load.wrong + [f"{name} was lost" for name in sorted(checker.lost)]
        place.close()
        if wrong:
            break
        shutil.rmtree(place.folder)
    report("R1", **total, seconds=time.monotonic() - began_s, seed=seed)
    assert wrong == []
    assert (total["lost"], total["invented"], total["altered"]) == (0, 0, 0)
    assert total["kills"] >= 200
    assert total["files_dropped"] > 0


def number_of(path: Path) -> int:
    return int(path.stem.removeprefix("payload-"))
