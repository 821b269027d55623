"""R10: a poison group cannot stall training. It kills three learners, is set aside, and every other group is trained.

As a program this file is a learner: it trains batches, writes checkpoints, and dies of one group, when that arrives or
when it is in an update.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.fault.harness import RUN, GoneError, Place, episode_of, orders_of, payload_of

from matpo import wire
from matpo.link import Link
from matpo_broker.tables import LEDGER_NAME, open_read_only

pytestmark = pytest.mark.processes

DIED = 9
GROUP_SIZE = 2


# ---- the learner


class Learner:
    """Trains `batch` groups at a time. Its checkpoint is a JSON list of the indices that it has consumed."""

    def __init__(self, port: int, folder: Path, poison: str, dies: str, batch: int, target: int) -> None:
        self.folder = folder
        self.poison, self.dies, self.batch, self.target = poison, dies, batch, target
        hello = wire.Hello(peer="learner", name="l", incarnation=str(os.getpid()), run=RUN, schema_version=1)
        self.link = Link(f"tcp://127.0.0.1:{port}", hello)
        checkpoint = folder / "checkpoint.json"
        self.consumed: set[int] = set(json.loads(checkpoint.read_text())) if checkpoint.exists() else set()
        self.ordered = 0

    async def run(self) -> None:
        """Until every index below `target` is trained, or given up by the broker."""
        self.epoch = (await self.link.connect(30)).epoch
        await self.ask(wire.Resume(checkpoint="c", consumed_below=0, consumed=sorted(self.consumed), epoch=self.epoch))
        while not self.consumed.issuperset(range(self.target)):
            await self.order_ahead()
            await self.update([await self.receive() for _ in range(self.batch)])
        await self.ask(wire.Goodbye())
        await self.link.close()

    async def order_ahead(self) -> None:
        """Two batches more than what is consumed, as the real one does: some are always on their way."""
        end = len(self.consumed) + 2 * self.batch + 1
        if end > self.ordered:
            await self.ask(wire.PlaceOrders(epoch=self.epoch, orders=orders_of(range(end), GROUP_SIZE)))
            self.ordered = end

    async def receive(self) -> wire.GroupReady:
        while True:
            reply, _ = await self.link.request(wire.Fetch(epoch=self.epoch, wait_s=1.0))
            if not isinstance(reply, wire.GroupReady):
                continue
            if reply.dropped:
                self.note("tombstones", f"{reply.group} {reply.dropped}")
                self.consumed.add(reply.index)
                await self.order_ahead()
                continue
            self.note("deliveries", reply.group)
            if self.dies == "receive" and reply.group == self.poison:
                os._exit(DIED)
            return reply

    async def update(self, groups: list[wire.GroupReady]) -> None:
        if self.poison in {group.group for group in groups}:
            os._exit(DIED)
        await self.ask(wire.Trained(epoch=self.epoch, indices=[group.index for group in groups]))
        self.consumed |= {group.index for group in groups}
        new = self.folder / "checkpoint.new"
        new.write_text(json.dumps(sorted(self.consumed)))
        new.rename(self.folder / "checkpoint.json")
        for group in groups:
            self.note("trained", group.group)
        below = next(i for i in range(self.ordered + 1) if i not in self.consumed)
        rest = sorted(i for i in self.consumed if i >= below)
        await self.ask(wire.Commit(epoch=self.epoch, checkpoint="c", consumed_below=below, consumed=rest))

    async def ask(self, message: wire.AnyMessage) -> None:
        reply, _ = await self.link.request(message)
        assert isinstance(reply, wire.Done)

    def note(self, what: str, line: str) -> None:
        with (self.folder / what).open("a") as file:
            file.write(line + "\n")


def lines(folder: Path, what: str) -> list[str]:
    path = folder / what
    return path.read_text().splitlines() if path.exists() else []


# ---- the test's side


@contextmanager
def playing(place: Place) -> Iterator[None]:
    """An actor that plays one group at a time, and the next one when the learner has taken what was ready."""
    over = threading.Event()

    def play() -> None:
        actor = place.peer("actor", "a")
        try:
            while not over.is_set():
                for lease in actor.ask(wire.LeaseRequest(num_members=GROUP_SIZE, wait_s=0.2)).leases:
                    assert actor.ask(*episode_of(lease)).kind in ("stored", "refused")
                while unsuspected(place) > 0 and not over.wait(0.01):
                    pass
        except GoneError:
            if not over.is_set():
                raise
        finally:
            actor.close()

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(20)


def unsuspected(place: Place) -> int:
    """Groups that are ready and killed nobody yet. Suspects come last: a learner that is fed faster never gets one."""
    with contextlib.closing(open_read_only(place.journal / LEDGER_NAME)) as db:
        ready = "state = 'whole' AND consumed = 0 AND delivered IS NULL AND strikes = 0"
        return int(db.execute(f"SELECT count(*) FROM orders WHERE {ready}").fetchone()[0])


def operator(place: Place, *command: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "matpo_broker", *command, "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("dies", "batch"), [("receive", 1), ("receive", 4), ("update", 4)])
def test_a_group_that_kills_its_learner_is_set_aside_after_three_deliveries_and_the_rest_is_trained(
    place: Place, tmp_path: Path, report: Callable[..., None], dies: str, batch: int
) -> None:
    poison, target = "g-00000005", 24
    place.start()
    place.wait_ready()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fault.test_r10_poison_group", str(place.ports[1]), str(tmp_path)]
    command += [poison, dies, str(batch), str(target)]
    deaths = 0
    with playing(place):
        while (code := subprocess.run(command, check=False, cwd=root, timeout=60).returncode) != 0:
            assert code == DIED
            deaths += 1
            assert deaths <= 3
    deliveries, trained = Counter(lines(tmp_path, "deliveries")), Counter(lines(tmp_path, "trained"))
    others = {f"g-{i:08d}" for i in range(target)} - {poison}
    quarantined = operator(place, "quarantine", "ls", str(place.run_file))["rows"]
    report(
        "R10", dies_in=dies, batch=batch, deliveries=deliveries[poison],
        trained=f"{len(others & trained.keys())}/{len(others)}", quarantined=len(quarantined),
    )  # fmt: skip
    assert (deaths, deliveries[poison]) == (3, 3)
    assert lines(tmp_path, "tombstones") == [f"{poison} quarantined"]
    assert others <= trained.keys()
    assert poison not in trained
    assert set(trained.values()) == {1}  # each moved the weights of this lineage once
    assert [(row["group"], row["reason"]) for row in quarantined] == [(poison, "deliveries")]
    assert place.counts()["groups_dropped"] == 0
    consumed = operator(place, "peek", str(place.run_file), "--state", "consumed", "--limit", "4096")["rows"]
    assert others <= {row["group"] for row in consumed}


def test_people_can_give_a_poison_group_another_chance_or_let_it_go(place: Place, tmp_path: Path) -> None:
    place.start()
    place.wait_ready()
    place.learner(1, GROUP_SIZE, incarnation="first").close()
    actor = place.peer("actor", "a")
    for lease in actor.ask(wire.LeaseRequest(num_members=GROUP_SIZE)).leases:
        assert actor.ask(*episode_of(lease)).kind == "stored"
    group, run_file = "g-00000000", str(place.run_file)

    def deaths(name: str) -> Any:
        """Three learners take the group and are never heard of again; the fourth gets what there is for it."""
        for life in range(4):
            learner = place.learner(1, GROUP_SIZE, incarnation=f"{name}{life}")
            reply = learner.ask(wire.Fetch(epoch=learner.welcome.epoch))
            learner.close()
        return reply

    tombstone = deaths("a")
    assert (tombstone.group, tombstone.dropped, tombstone.episodes) == (group, "quarantined", [])
    (row,) = operator(place, "quarantine", "ls", run_file)["rows"]
    assert (row["group"], row["strikes"], row["reason"]) == (group, 3, "deliveries")
    operator(place, "quarantine", "show", run_file, group, "--out", str(tmp_path / "out"))
    assert {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        name: payload_of(name) for name in (f"{group}.{member}.0" for member in range(GROUP_SIZE))
    }
    operator(place, "quarantine", "requeue", run_file, group)
    assert deaths("b").dropped == "quarantined"  # three chances more, then the same
    operator(place, "quarantine", "purge", run_file, group, "--yes")
    assert operator(place, "quarantine", "ls", run_file)["rows"] == []
    learner = place.learner(1, GROUP_SIZE, incarnation="last")
    reply = learner.ask(wire.Fetch(epoch=learner.welcome.epoch))
    assert (reply.group, reply.dropped) == (group, "purged")


def test_a_goodbye_is_no_death(place: Place) -> None:
    place.start()
    place.wait_ready()
    place.learner(1, 1, incarnation="first").close()
    actor = place.peer("actor", "a")
    for lease in actor.ask(wire.LeaseRequest(num_members=1)).leases:
        actor.ask(*episode_of(lease))
    for life in range(6):
        learner = place.learner(1, 1, incarnation=str(life))
        reply = learner.ask(wire.Fetch(epoch=learner.welcome.epoch))
        assert (reply.group, reply.dropped) == ("g-00000000", "")
        assert learner.ask(wire.Goodbye()).kind == "done"
        learner.close()


if __name__ == "__main__":
    port, folder, poison, dies, batch, target = sys.argv[1:]
    asyncio.run(Learner(int(port), Path(folder), poison, dies, int(batch), int(target)).run())
