"""R9: a full disk is a pause.

A broker of its own file system (a tmpfs in a private mount namespace), four actors that store as fast as they can, and
somebody else's file that takes what space there is. The broker must not end, must lose nothing that it acknowledged,
must go on answering heartbeats, leases and commits with 0 bytes free, and must store again soon after space returns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.fault.harness import RUN, Life, Peer, Place, episode_of, payload_of, stored_bytes

from matpo import wire

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

DISK_BYTES = 96 * 2**20
BALLAST_BYTES = 8 * 2**20
EPISODE_BYTES = 100_000
NUM_ACTORS = 4
MAX_RESUME_S = 2.0


class Disk:
    """The broker's own file system, seen from outside through /proc/PID/root."""

    def __init__(self, place: Place) -> None:
        self._folder = place.journal.parent
        self._folder.mkdir()
        self._files = 0

    def command(self) -> list[str]:
        flags = ["-m"] if os.geteuid() == 0 else ["-r", "-m"]
        shell = f'mount -t tmpfs -o size={DISK_BYTES} none "$0" && exec "$@"'
        command = ["unshare", *flags, "sh", "-c", shell, str(self._folder)]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True, timeout=20)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this machine permits no private mounts (unshare -m)")
        return command

    def attach(self, life: Life) -> None:
        self.root = Path(f"/proc/{life.pid}/root", *self._folder.parts[1:])

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def free_bytes(self) -> int:
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def fill(self) -> int:
        """Take every byte; returns how many are free then."""
        self._files += 1
        with (self.root / f"somebody-elses-{self._files}").open("wb", buffering=0) as file:
            for size in (2**20, 4096):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
            return self.free_bytes

    def empty(self) -> None:
        for path in self.root.glob("somebody-elses-*"):
            path.unlink()


class Guest:
    """A peer that says hello again when the broker asks for it, as matpo.link does: after a lost turn it forgot."""

    def __init__(self, place: Place, kind: str, name: str) -> None:
        self.peer: Peer = place.peer(kind, name)
        self.slowest_s = 0.0
        self._hello = wire.Hello.model_validate(
            {"peer": kind, "name": name, "incarnation": "1", "run": RUN, "schema_version": 1}
        )

    def ask(self, message: wire.AnyMessage, payload: bytes = b"") -> Any:
        began_s = time.monotonic()
        reply = self.peer.ask(message, payload)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
        if reply.kind == "refused" and reply.reason == "hello_first":
            welcome = self.peer.ask(self._hello)
            return self.ask(message, payload) if welcome.kind == "welcome" else welcome
        return reply

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()


class Actor:
    """Leases and stores, on a thread. A refused episode is sent again when the broker said."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        self.acked: dict[str, float] = {}  # episode -> when
        self.refused: list[float] = []
        self.problems: list[str] = []
        self._place = place
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(60)

    def _run(self) -> None:
        with Guest(self._place, "actor", self.name) as peer:
            while not self._stop.is_set():
                reply = peer.ask(wire.LeaseRequest(num_members=4, wait_s=1.0))
                if reply.kind == "refused":
                    self._again(reply)
                for lease in getattr(reply, "leases", []):
                    message, payload = episode_of(lease, EPISODE_BYTES)
                    while not self._stop.is_set():
                        answer = peer.ask(message, payload)
                        if answer.kind == "stored":
                            self.acked[message.episode] = time.monotonic()
                            break
                        self.refused.append(time.monotonic())
                        self._again(answer)

    def _again(self, refused: wire.Refused) -> None:
        if refused.reason != "disk_full" or refused.retry_after_s is None:
            self.problems.append(f"{refused.reason}: {refused.message}")
        self._stop.wait(refused.retry_after_s or 0.1)


@contextmanager
def working(actors: list[Actor]) -> Iterator[None]:
    for actor in actors:
        actor.thread.start()
    try:
        yield
    finally:
        for actor in actors:
            actor.stop()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> float:
    """Seconds until the condition holds."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began_s


@dataclass
class Answers:
    """What became of requests: how many, which refusals, how slow."""

    num: int = 0
    refused: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def answers(place: Place, epoch: int, rounds: int, *, order_bytes: int = 0) -> Answers:
    """Ask what actors and a learner ask, again and again. With `order_bytes` the ledger has to grow for each round."""
    found = Answers()
    with Guest(place, "actor", "bystander") as actor, Guest(place, "learner", "learner") as learner:

        def ask(guest: Guest, message: wire.AnyMessage) -> Any:
            reply = guest.ask(message)
            found.num += 1
            found.refused += [reply.reason] if reply.kind == "refused" else []
            return reply

        for i in range(rounds):
            leased = ask(actor, wire.LeaseRequest(num_members=1))
            names = [lease.lease for lease in getattr(leased, "leases", [])]
            ask(actor, wire.Heartbeat(leases=names, policy_version=0))
            ask(actor, wire.Release(leases=names, infra=False, reason="bystander"))
            ask(learner, wire.SnapshotNotice(epoch=epoch, version=i))
            ask(learner, wire.Commit(epoch=epoch, checkpoint=f"c{i}", consumed_below=0, consumed=[]))
            if order_bytes:
                task = wire.OrderedTask(id="t", environment="e", question="q" * order_bytes)
                order = wire.Order(group=f"large-{i}", index=1_000_000 + i, group_size=1, task=task)
                ask(learner, wire.PlaceOrders(epoch=epoch, orders=[order]))
        found.slowest_s = max(actor.slowest_s, learner.slowest_s)
    return found


def test_a_full_disk_is_a_pause(make_place: Callable[..., Place], report: Callable[..., None]) -> None:
    place = make_place(
        ballast_bytes=BALLAST_BYTES, journal_file_bytes=4 * 2**20, credit_bytes=2**40, lease_s=60.0, heartbeat_s=1.0
    )
    disk = Disk(place)
    life = place.start(under=disk.command())
    place.wait_ready()
    disk.attach(life)
    with place.learner(num_groups=2000, group_size=1) as learner:
        epoch = learner.welcome.epoch
    actors = [Actor(place, f"a{i}") for i in range(NUM_ACTORS)]
    with working(actors):
        until(lambda: all(len(actor.acked) >= 5 for actor in actors), "the actors store")
        assert disk.fill() == 0
        full_s = time.monotonic()
        until(lambda: all(actor.refused for actor in actors), "every actor is refused")
        assert place.counts()["disk_full"] == 1
        at_0 = answers(place, epoch, 50)
        assert disk.free_bytes == 0
        # More than was set aside for the ledger: what it cannot note is refused, to be asked again.
        beyond = answers(place, epoch, 60, order_bytes=500_000)
        num_acked = sum(len(actor.acked) for actor in actors)
        disk.empty()
        free_s = time.monotonic()
        until(lambda: all(max(actor.acked.values()) > free_s for actor in actors), "storing goes on")
        resumed_s = max(min(s for s in actor.acked.values() if s > free_s) - free_s for actor in actors)
        until(lambda: sum(len(actor.acked) for actor in actors) >= num_acked + 50, "storing goes on")
    assert not life.is_over
    assert place.counts()["disk_full"] == 0
    acked = {episode for actor in actors for episode in actor.acked}
    # SQLite follows links in a path to our own file system, so it gets a copy; nobody changes the journal now.
    found = stored_bytes(shutil.copytree(disk.journal, place.folder / "copy", ignore=lambda *_: ["ballast"]))
    lost = [e for e in acked if found.get(e) != payload_of(e, EPISODE_BYTES)]
    problems = [problem for actor in actors for problem in actor.problems]
    report(
        "R9",
        acked=len(acked),
        lost=len(lost),
        refused=sum(len(actor.refused) for actor in actors),
        pause_s=free_s - full_s,
        answered_at_0_free=f"{at_0.num - len(at_0.refused)}/{at_0.num}",
        slowest_s=at_0.slowest_s,
        beyond_what_was_set_aside=f"{beyond.num - len(beyond.refused)}/{beyond.num}",
        resumed_s=resumed_s,
    )
    assert not lost
    assert not problems, problems[:3]
    assert not at_0.refused
    assert set(beyond.refused) == {"disk_full"}
    assert resumed_s <= MAX_RESUME_S
    life.send_signal(15)
    assert life.wait() == 0, life.log.read_text()
