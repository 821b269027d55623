"""R6: each episode moves the weights exactly once per checkpoint lineage, however often the learner is killed.

The real learner is killed -9 again and again: while it starts, in a step, in a publish, between a publish and its line
in trained.jsonl, in a checkpoint, between a checkpoint and the moment that the broker hears of it. After each kill what
the newest checkpoint covers is compared with the broker's ledger, and at the end each episode that the broker ever
stored stands in trained.jsonl once. That is the learner's own word; the weights are the proof. They and AdamW's moments
are equal, bit for bit, to those of a run of the same episodes that nobody killed, and so are each update's figures.

Some lives are told to stop (SIGTERM) at a random moment of an update instead: they finish it, write a checkpoint of
everything up to it, and end with 0 within a bound that is stated.

What makes a run repeatable: learner.deterministic, CPU, one rank; an episode's bytes follow from its group and member
alone, and all its tokens are stamped with version 0, which is update 0 in every lineage (later numbers jump when a
learner resumes); one actor plays one member at a time in the order of the orders, so groups become whole, and are
delivered, in that order; no batch is ordered ahead; max_deliveries=0, so no group is set aside for the learners that
died with it.

A second run gives up the order, and so the comparison of weights: a batch is ordered ahead, members are played in
random order, and those of every fourth group late, so that checkpoints cover groups beyond one that is still to come.
The counts have to be the same.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.fault.forking import ForkServer, Life
from tests.fault.harness import RUN, SOAK, Peer, Place, stored_bytes

from matpo import schema, wire
from matpo.episode import Episode, Segment, Task
from matpo.run_folder import claim
from matpo.settings import RunFile, load_run_file
from matpo.snapshot import load_tensors, newest_published, verify, versions
from matpo.testing import tiny_model, write_run_file
from matpo_broker.tables import accounting
from matpo_learner import checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600 if SOAK else 240)]

KILLS = 300 if SOAK else 42  # of the run that is repeated
SHUFFLED_KILLS = 60 if SOAK else 10
STOPS = 30 if SOAK else 3
STOP_S = 10.0  # one update, one snapshot and one checkpoint of this model take 0.1 s; a busy machine is slower
LATE_S = 0.2  # how long the members of a late group wait for others to overtake them
UPDATES_PER_KILL = 12  # more than a life does on average, also on a busy machine
GROUPS_PER_UPDATE = 2
GROUP_SIZE = 2
INSTANTS = ("start", "step", "publish", "published", "checkpoint", "committed")
NOT_REPEATED = {"version", "time_s", "seconds", "batch_ready", "wait_fraction", "hint"}  # of a line of learner.jsonl

PLUGIN = """
from matpo import Environment, Task

class Toy(Environment):
    def tasks(self, split):
        return [Task(id=f"{split}-{i}", environment="toy", question=f"{i}?") for i in range(7)]

    def reward(self, task, episode):
        return 0.0
"""


# ---- a run


def recorded_episode(lease: wire.Lease) -> Episode:
    """The episode of a group and member, always the same. In every fourth group all members fare alike: no signal."""
    made = np.random.default_rng(zlib.crc32(f"{lease.group}.{lease.member}".encode()))
    segments = []
    for index, role in enumerate(("planner", "worker")):
        length = int(made.integers(12, 40))
        sampled = np.arange(length) >= 6
        segments.append(
            Segment(
                index=index,
                parent=index - 1,
                role=role,
                token_ids=made.integers(0, 256, length, dtype=np.int32),
                sampled=sampled,
                logprobs=np.where(sampled, -5.5, 0).astype(np.float32),
                versions=np.where(sampled, 0, -1).astype(np.int32),
            )
        )
    return Episode(
        id=f"{lease.group}.{lease.member}.{lease.attempt}",
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        task=Task(**lease.task.model_dump()),
        segments=segments,
        answer="",
        reward=1.0 if int(lease.group[2:]) % 4 == 3 else float(lease.member),
    )


class Run:
    """One run folder with its broker, and an actor that plays what is ordered."""

    def __init__(self, place: Place, kills: int, *, shuffle: random.Random | None = None) -> None:
        self.place = place
        self.kills = kills
        self.num_updates = UPDATES_PER_KILL * (kills + STOPS) + 8
        self.shuffle = shuffle
        (place.folder / "toy.py").write_text(PLUGIN)
        ports = {"actor_port": place.ports[0], "learner_port": place.ports[1]}
        place.run_file = write_run_file(
            place.folder / "run.toml",
            model=tiny_model(place.folder / "model"),
            name=RUN,
            broker={**ports, "max_deliveries": 0, "journal_file_bytes": 16 * 1024},  # files are dropped as it goes on
            environment={"name": "toy", "plugin": f"{place.folder / 'toy.py'}:Toy"},
            learner={
                "num_updates": self.num_updates,
                "groups_per_update": GROUPS_PER_UPDATE,
                "group_size": GROUP_SIZE,
                "max_lag_versions": 0 if shuffle is None else 1,
                "drop_lag_versions": 10**6,
                "learning_rate": 1e-3,
                "checkpoint_every": 2 if shuffle is None else 1,
                "deterministic": True,
                "device": "cpu",
            },
        )
        self.settings: RunFile = load_run_file(place.run_file)
        self.folder = self.settings.run.folder
        self.num_lives = 0
        self.payloads: dict[str, bytes] = {}  # by episode; all that was ever sent

    def start(self, server: ForkServer) -> Life:
        self.num_lives += 1
        return server.start([str(self.place.run_file)], self.place.folder / f"learner-{self.num_lives}.log")

    def lines(self, name: str, num_bytes: int | None = None) -> list[dict[str, Any]]:
        """Of metrics/NAME.jsonl; a last line that is not whole is left out."""
        path = self.folder / "metrics" / f"{name}.jsonl"
        data = path.read_bytes()[:num_bytes] if path.exists() else b""
        return [json.loads(line) for line in data.split(b"\n")[:-1]]

    @contextmanager
    def playing(self) -> Iterator[None]:
        """A broker and an actor."""
        life = self.place.start()
        self.place.wait_ready()
        over = threading.Event()
        wrong: list[BaseException] = []

        def play() -> None:
            try:
                self._play(over)
            except BaseException as error:
                wrong.append(error)
                raise

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(30)
            life.close()
        assert not wrong, wrong

    def _play(self, over: threading.Event) -> None:
        held: list[wire.Lease] = []
        with self.place.peer("actor", "recorded") as peer:
            while not over.is_set():
                room = self.settings.learner.max_open_groups * GROUP_SIZE - len(held)
                new = peer.ask(wire.LeaseRequest(num_members=room, wait_s=LATE_S)).leases if room else []
                held = sorted([*held, *new], key=lambda lease: (lease.group, lease.member))
                ready = [lease for lease in held if self.shuffle is None or int(lease.group[2:]) % 4]
                if not ready and not new:
                    ready = [lease for lease in held if lease.group == held[0].group]
                if self.shuffle is not None:
                    self.shuffle.shuffle(ready)
                for lease in ready:
                    self._store(peer, lease)
                    held.remove(lease)

    def _store(self, peer: Peer, lease: wire.Lease) -> None:
        payload = schema.encode(recorded_episode(lease))
        message = wire.StoreEpisode(
            lease=lease.lease,
            group=lease.group,
            member=lease.member,
            attempt=lease.attempt,
            episode=f"{lease.group}.{lease.member}.{lease.attempt}",
            num_bytes=len(payload),
            crc32c=wire.crc32c(payload),
        )
        self.payloads[message.episode] = payload
        assert peer.ask(message, payload).kind == "stored"


@dataclass
class Seconds:
    """How long things take in a run that nobody kills."""

    start: float = 0.5
    step: float = 0.03
    publish: float = 0.03
    checkpoint: float = 0.03


def run_to_the_end(run: Run, server: ForkServer) -> Seconds:
    """A whole run without a fault; what its parts took, the median of all updates."""
    with run.playing():
        began_s = time.monotonic()
        life = run.start(server)
        wait_until(lambda: bool(versions(run.settings.snapshot_folder)), life)
        start_s = time.monotonic() - began_s
        assert life.wait(120) == 0, life.said()
    spent = [line["seconds"] for line in run.lines("learner")]
    publish, saved = (statistics.median([s[p] for s in spent if p in s]) for p in ("publish", "checkpoint"))
    steps = [s["wait"] + s["credit"] + s["forward_backward"] for s in spent]
    return Seconds(start=start_s, step=statistics.median(steps), publish=publish, checkpoint=saved)


def wait_until(condition: Callable[[], bool], life: Life, timeout_s: float = 60) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert not life.is_over, f"the learner ended by itself with {life.wait()}: {life.said()}"
        assert time.monotonic() < until_s, f"nothing happens any more: {life.said()}"
        time.sleep(0.0003)


# ---- kills


def things_in(folder: Path, pattern: str) -> set[tuple[str, int]]:
    """Names and change times: a folder that is left over from an earlier life is the same thing until it changes."""
    found = set()
    for path in folder.glob(pattern):
        try:
            found.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:
            continue
    return found


@dataclass
class Killer:
    """Kills lives at instants of all kinds, and counts what the kills left behind."""

    run: Run
    seconds: Seconds
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)
    slowest_stop_s: float = 0.0

    def _part(self, instant: str) -> float:
        """How far into the instant's span to kill: at random, and evenly over the kills of one kind."""
        self.tries[instant] += 1
        return (self.tries[instant] - self.chance.random()) / (self.run.kills / len(INSTANTS))

    def kill(self, life: Life, instant: str) -> None:
        """Wait for the instant, and kill."""
        snapshots, checkpoints = self.run.settings.snapshot_folder, self.run.settings.checkpoint_folder
        span_s, where, pattern = {
            "start": (self.seconds.start, None, ""),
            "step": (self.seconds.step, None, ""),
            "publish": (self.seconds.publish, snapshots, ".tmp-v*"),
            "published": (0.002, snapshots, "v*"),
            "checkpoint": (self.seconds.checkpoint, checkpoints, ".tmp-c*"),
            "committed": (0.001, checkpoints, "c*"),
        }[instant]
        cut = {"in_publish": (snapshots, ".tmp-v*"), "in_checkpoint": (checkpoints, ".tmp-c*")}
        known = {name: things_in(*place) for name, place in cut.items()}
        if instant != "start":
            self._let_it_work(life)
        if where is not None:
            before = things_in(where, pattern)
            wait_until(lambda: bool(things_in(where, pattern) - before), life)
        time.sleep(span_s * self._part(instant))
        assert not life.is_over, f"the learner ended by itself with {life.wait()}: {life.said()}"
        life.kill()
        self.counts["kills"] += 1
        for name, place in cut.items():
            self.counts[name] += bool(things_in(*place) - known[name])

    def stop(self, life: Life) -> None:
        """SIGTERM somewhere in an update: it has to end in order, soon, with everything covered."""
        self._let_it_work(life)
        time.sleep((self.seconds.step + self.seconds.publish) * self.chance.random())
        life.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        assert life.wait(STOP_S) == 0, life.said()
        self.counts["stops"] += 1
        self.slowest_stop_s = max(self.slowest_stop_s, time.monotonic() - began_s)
        found = checkpoint.load_newest(self.run.settings.checkpoint_folder, claim(self.run.settings))
        assert found is not None
        assert found[1].log_bytes["trained"] == (self.run.folder / "metrics" / "trained.jsonl").stat().st_size

    def _let_it_work(self, life: Life) -> None:
        """Until it trains: its first snapshot is there, and up to two updates are written down."""
        snapshots, metrics = self.run.settings.snapshot_folder, self.run.folder / "metrics"
        known = things_in(snapshots, "v*")
        wait_until(lambda: bool(things_in(snapshots, "v*") - known), life)
        for _ in range(self.chance.randrange(3)):
            line = things_in(metrics, "learner.jsonl")
            wait_until(lambda line=line: things_in(metrics, "learner.jsonl") != line, life)  # type: ignore[misc]


def what_is_wrong(run: Run, counts: Counter[str]) -> list[str]:
    """Compare what the newest checkpoint covers with the broker's ledger, with nobody running but the broker."""
    found = checkpoint.load_newest(run.settings.checkpoint_folder, claim(run.settings))
    meta = found[1] if found else None
    covered = run.lines("trained", meta.log_bytes["trained"] if meta else 0)
    every = run.lines("trained")
    counts["undone_groups"] += len(every) - len(covered)
    wrong: list[str] = []
    groups = [line["group"] for line in covered]
    wrong += [f"{name} stands {n} times in one lineage" for name, n in Counter(groups).items() if n > 1]
    consumed = {i for i in range(meta.cursor) if meta.book().is_consumed(i)} if meta else set()
    if {line["index"] for line in covered} != consumed:
        wrong.append(f"the checkpoint covers {sorted(consumed)}, trained.jsonl {groups}")
    by_update = Counter(line["update"] for line in covered if line["fate"] == "trained")
    if by_update != dict.fromkeys(range(1, (meta.update if meta else 0) + 1), GROUPS_PER_UPDATE):
        wrong.append(f"groups by update: {by_update} in a checkpoint of update {meta}")
    ledger = accounting(run.place.journal)
    wrong += [f"the broker forgot {group}, no checkpoint covers it" for group in set(ledger.committed) - set(groups)]
    counts["with_gaps"] += bool(meta and meta.consumed)
    counts["unheard_checkpoints"] += bool(set(groups) - set(ledger.committed))
    oldest = checkpoint.oldest_kept(run.settings.checkpoint_folder)
    needed = {episode for (group, _), episode in ledger.stored.items() if int(group[2:]) >= oldest}
    wrong += [f"the payload of {episode} is gone" for episode in needed - stored_bytes(run.place.journal).keys()]
    return wrong


def kill_it_again_and_again(run: Run, server: ForkServer, seconds: Seconds, chance: random.Random) -> Killer:
    """As many lives that are killed as the run says, some that are stopped, and one that ends by itself.

    Returns what they left behind."""
    killer = Killer(run, seconds, chance)
    instants = [INSTANTS[number % len(INSTANTS)] for number in range(run.kills)] + ["stop"] * STOPS
    chance.shuffle(instants)
    with run.playing():
        for instant in instants:
            life = run.start(server)
            if instant == "stop":
                killer.stop(life)
            else:
                killer.kill(life, instant)
            wrong = what_is_wrong(run, killer.counts)
            assert wrong == [], f"after a kill in {instant}: {wrong}"
        last = run.start(server)
        assert last.wait(120) == 0, last.said()
    return killer


# ---- the judge


def contributions(run: Run) -> Counter[str]:
    """How often each episode that the broker stored, or that the learner names, was consumed in the last lineage."""
    found = checkpoint.load_newest(run.settings.checkpoint_folder, claim(run.settings))
    assert found is not None
    assert found[1].update == run.num_updates
    lines = run.lines("trained", found[1].log_bytes["trained"])
    assert lines == run.lines("trained")  # the last checkpoint covers everything
    assert all(line["fate"] == ("zero_signal" if line["index"] % 4 == 3 else "trained") for line in lines)
    assert all(len(line["episodes"]) == GROUP_SIZE for line in lines)
    return Counter(episode for line in lines for episode in line["episodes"])


def final_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Weights, moments and the random state of the last checkpoint, and the weights of the newest snapshot."""
    saved = load_file(checkpoint.found(run.settings.checkpoint_folder)[-1] / "state.safetensors")
    newest = newest_published(run.settings.snapshot_folder)
    assert newest is not None
    assert newest.update == run.num_updates
    verify(run.settings.snapshot_folder, newest.version, fingerprint=None)
    served = load_tensors(run.settings.snapshot_folder, newest.version)
    return {**saved, **{f"snapshot/{name}": tensor for name, tensor in served.items()}}


def figures(run: Run) -> list[dict[str, Any]]:
    """Of every update, what does not depend on clocks and version numbers."""
    return [{name: v for name, v in row.items() if name not in NOT_REPEATED} for row in run.lines("learner")]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Count:
    """Episodes that did not come to exactly one contribution."""

    episodes: int
    twice: int
    lost: int
    invented: int

    @classmethod
    def of(cls, run: Run) -> Count:
        used, stored = contributions(run), set(accounting(run.place.journal).stored.values())
        assert stored == run.payloads.keys()
        return cls(
            episodes=len(used),
            twice=sum(times != 1 for times in used.values()),
            lost=len(stored - used.keys()),
            invented=len(used.keys() - stored),
        )


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("learner") as started:
        yield started


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("MATPO_SEED", random.SystemRandom().randrange(2**31)))


def test_each_episode_moves_the_weights_once_however_often_the_learner_is_killed(
    make_place: Callable[..., Place], server: ForkServer, seed: int, report: Callable[..., None]
) -> None:
    began_s = time.monotonic()
    unfaulted, faulted = Run(make_place(), KILLS), Run(make_place(), KILLS)
    seconds = run_to_the_end(unfaulted, server)
    killer = kill_it_again_and_again(faulted, server, seconds, random.Random(seed))
    counts = killer.counts
    count, ours, theirs = Count.of(faulted), final_tensors(faulted), final_tensors(unfaulted)
    different = [name for name in theirs if name not in ours or bits(ours[name]) != bits(theirs[name])]
    report(
        "R6", **counts, updates=faulted.num_updates, **vars(count), tensors=len(theirs),
        tensors_different=len(different), slowest_stop_s=killer.slowest_stop_s,
        seconds=time.monotonic() - began_s, seed=seed,
    )  # fmt: skip
    assert (count.twice, count.lost, count.invented) == (0, 0, 0)
    assert faulted.payloads == unfaulted.payloads  # else the comparison says nothing
    assert ours.keys() == theirs.keys()
    assert different == []
    assert figures(faulted) == figures(unfaulted)
    assert (counts["kills"], counts["stops"]) == (KILLS, STOPS)
    assert min(counts["in_publish"], counts["in_checkpoint"]) > 0


def test_each_episode_counts_once_when_groups_come_out_of_order_and_the_learner_is_killed(
    make_place: Callable[..., Place], server: ForkServer, seed: int, report: Callable[..., None]
) -> None:
    began_s = time.monotonic()
    run = Run(make_place(), SHUFFLED_KILLS, shuffle=random.Random(seed))
    counts = kill_it_again_and_again(run, server, Seconds(), random.Random(seed)).counts
    count = Count.of(run)
    report(
        "R6 out of order", **counts, updates=run.num_updates, **vars(count),
        seconds=time.monotonic() - began_s, seed=seed,
    )  # fmt: skip
    assert (count.twice, count.lost, count.invented) == (0, 0, 0)
    consumed = [line["index"] for line in run.lines("trained")]
    assert consumed != sorted(consumed)  # with_gaps: how often the newest checkpoint had such a hole after a kill
