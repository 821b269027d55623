"""R14: a publish is atomic. The learner's publisher is killed -9 at random instants while a reader looks all the time.

Each life is a process that publishes one version after the other with matpo_learner.publisher. The reader does what an
actor does (pointer, verify, load) and more: every version folder that it can see has to be whole. All numbers in a
version's tensors are its version number, so that a mixture of two would show. Old versions are made to look old, so
that the publisher's own deleting is cut short as well.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.fault.forking import ForkServer, Life
from tests.fault.harness import SOAK

from matpo import snapshot
from matpo.errors import SnapshotError
from matpo.settings import RunFile, load_run_file
from matpo.testing import write_run_file
from matpo_learner import lineage
from matpo_learner.publisher import GRACE_S

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1800 if SOAK else 120)]

KILLS = 2000 if SOAK else 100
KEEP = 4  # versions that stay
SPAN_PUBLISHES = 2  # a life is killed within about so many publishes


@dataclass
class Reader:
    """Looks at a snapshot folder, and remembers what it saw."""

    folder: Path
    pointed: int = -1  # the version that the pointer named last
    whole: dict[int, tuple[str, int]] = field(default_factory=dict)  # by version: hashes of its tensors, its update
    wrong: list[str] = field(default_factory=list)
    looks: int = 0

    def look(self, *, at_all: bool = False) -> None:
        """Once: the pointer, the version that it names, and every folder that was not there before (or every one)."""
        self.looks += 1
        pointed = snapshot.newest(self.folder)
        if pointed is not None:
            self._load(pointed)
        if (-1 if pointed is None else pointed) < self.pointed:
            self.wrong.append(f"the pointer names v{pointed} after v{self.pointed}")
        self.pointed = self.pointed if pointed is None else pointed
        for version in snapshot.versions(self.folder):
            if at_all or version not in self.whole:
                self._load(version)

    def _load(self, version: int) -> None:
        """Verify and load a version, as an actor does, and look at every number of it."""
        try:
            manifest = snapshot.verify(self.folder, version, fingerprint=None)
            tensors = snapshot.load_tensors(self.folder, version)
        except (SnapshotError, OSError) as error:
            self.wrong.append(f"v{version} is there and not whole: {error!r}")
            return
        numbers = {number for tensor in tensors.values() for number in (tensor.min().item(), tensor.max().item())}
        if numbers != {float(version)}:
            self.wrong.append(f"v{version} is a mixture of {numbers}")
        seen = (" ".join(tensor.blake2b for tensor in manifest.tensors), manifest.update)
        if self.whole.setdefault(version, seen) != seen:
            self.wrong.append(f"v{version} has changed since it was published")

    def newest(self) -> int:
        """The highest version that is there."""
        return max(snapshot.versions(self.folder), default=-1)

    def wait_for(self, condition: Callable[[], bool], life: Life) -> None:
        """Look until the condition holds. The publisher has to live, and get on."""
        until_s = time.monotonic() + 20
        while not condition():
            assert not life.is_over, f"the publisher ended by itself with {life.wait()}: {life.said()}"
            assert time.monotonic() < until_s, f"it publishes no more: {life.said()}"
            self.look()


@dataclass
class Killer:
    """Starts publishers and kills them."""

    server: ForkServer
    run_file: RunFile
    reader: Reader
    chance: random.Random
    publish_s: float = 0.02  # measured by the lives themselves
    resumed: tuple[int, int] = (-1, 0)  # newest version when the checkpoint was chosen, and the checkpoint's update
    cut: Counter[str] = field(default_factory=Counter)  # what the kills left behind

    def one_life(self, number: int) -> None:
        """Every fourth is killed at any time from its start on, the others after their first version."""
        reader, before = self.reader, leftovers(self.reader.folder)
        first, earlier = reader.newest(), set(reader.whole)
        life = self._start(number)
        if number % 4:
            reader.wait_for(lambda: reader.newest() > first, life)
            if number % 10 == 1:
                began_s, second = time.monotonic(), reader.newest()
                reader.wait_for(lambda: reader.newest() > second, life)
                self.publish_s = (self.publish_s + time.monotonic() - began_s) / 2
        kill_s = time.monotonic() + self.chance.uniform(0, SPAN_PUBLISHES * self.publish_s)
        reader.wait_for(lambda: time.monotonic() >= kill_s, life)
        time.sleep(self.chance.uniform(0, self.publish_s))  # else the kill would always follow a look
        life.kill()
        reader.look(at_all=True)
        reader.wrong += [f"v{v} was published after v{first}" for v in reader.whole.keys() - earlier if v < first]
        self.cut["in_write"] += bool({path for path in leftovers(reader.folder) - before if "/.tmp-v" in path})
        self.cut["before_pointer"] += reader.pointed < reader.newest()

    def last_life(self) -> None:
        """Its versions come on top of all, and it clears away what the others left."""
        first, life = self.reader.newest(), self._start(KILLS + 1)
        self.reader.wait_for(lambda: self.reader.newest() >= first + 3, life)
        life.kill()
        self.reader.look()

    def _start(self, number: int) -> Life:
        manifest = snapshot.newest_published(self.reader.folder)
        if manifest and manifest.version > self.resumed[0]:  # a learner has another checkpoint only if it got on
            self.resumed = manifest.version, self.chance.randint(0, manifest.update)
        update = self.resumed[1]
        path = self.run_file.run.folder.with_name("run.toml")
        return self.server.start([str(path), str(number), str(update)], path.with_name(f"publisher-{number}.log"))


def leftovers(folder: Path) -> set[str]:
    """Folders that a kill left half written or half deleted."""
    return {str(path) for path in folder.glob(".tmp-*") if path.is_dir()}


def age(reader: Reader) -> None:
    """Make all but the newest versions, and what kills left behind, old enough to be deleted."""
    old_s = time.time() - GRACE_S - 60
    versions = [v for v in snapshot.versions(reader.folder)[:-KEEP] if v != reader.pointed]
    for path in [*(snapshot.version_folder(reader.folder, v) for v in versions), *reader.folder.glob(".tmp-*")]:
        os.utime(path, (old_s, old_s))


@pytest.fixture
def run_file(tmp_path: Path) -> RunFile:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 264, "hidden_size": 64}')
    return load_run_file(write_run_file(tmp_path / "run.toml", model=model, learner={"keep_snapshots": KEEP}))


def test_a_reader_never_sees_a_part_of_a_version_however_often_the_publisher_is_killed(
    run_file: RunFile, report: Callable[..., None]
) -> None:
    seed = int(os.environ.get("MATPO_SEED", random.SystemRandom().randrange(2**31)))
    reader, began_s = Reader(run_file.snapshot_folder), time.monotonic()
    with ForkServer("publisher") as server:
        killer = Killer(server, run_file, reader, random.Random(seed))
        for number in range(1, KILLS + 1):
            killer.one_life(number)
            assert reader.wrong == [], f"after {number} kills, seed {seed}: {reader.wrong[:5]}"
            age(reader)
        left = leftovers(reader.folder)
        killer.last_life()
    branches = lineage.read(run_file.run.folder / lineage.FILE)
    renumbered = [v for v, (_, update) in reader.whole.items() if branches.update_of(v) != update]
    report(
        "R14", kills=KILLS, **killer.cut, versions=len(reader.whole), looks=reader.looks, wrong=len(reader.wrong),
        publish_ms=1000 * killer.publish_s, seconds=time.monotonic() - began_s, seed=seed,
    )  # fmt: skip
    assert reader.wrong == []
    assert renumbered == []  # what lag is counted with says the same as the manifests
    assert not left & leftovers(reader.folder)
    assert len(snapshot.versions(reader.folder)) < len(reader.whole)
    assert killer.cut["in_write"] > 0
