"""R2: what was acknowledged is never lost on a power cut.

A store works on a recording disk; every state that a power cut may leave of it (crash_images.py) is opened by a store
again. It must hold every acknowledged episode, byte for byte, invent nothing, and go on working. And the simulator
itself is tested: stores that break one rule of durability each (the mutants) must be caught.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from tests.fault.crash_images import Event, Image, RecordedStore, RecordingDisk, images
from tests.fault.harness import SOAK

from matpo import wire
from matpo.errors import JournalError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker import store as store_module
from matpo_broker.journal import Journal, Recovered, Sealed, file_numbers, hash_file, path_of, record_end
from matpo_broker.members import Rules
from matpo_broker.store import Store, TurnLostError
from matpo_broker.tables import LEDGER_NAME, open_read_only, stored_rows

LIMIT = 400 if SOAK else 40  # choices after each operation
MUTANT_LIMIT = 12
SEEDS = 10 if SOAK else 1
ROUNDS = 3
GROUPS = 100
SPARE_GROUPS = 4  # never stored by the workload: the recovered store goes on with them
RULES = Rules(run="r", lease_s=100.0, max_attempts=99, credit_bytes=2**40)

# As long as a test with processes: not part of the fast gate.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(7200 if SOAK else 120)]


def settings(durability: str = "group") -> BrokerSettings:
    return BrokerSettings.model_validate(
        {"durability": durability, "journal_file_bytes": 4000, "ballast_bytes": 2**20, "max_attempts": 99}
    )


def payload_of(episode: str) -> bytes:
    draw = random.Random(episode)
    return draw.randbytes(draw.choice([0, 10, 300, 700, 1500, 2500]))


class KilledError(Exception):
    """The process ends here."""


class Workload:
    """A store's life on a recording disk: turns, rolls, a released file, kills, restarts, a lost turn."""

    def __init__(
        self,
        folder: Path,
        disk: RecordingDisk,
        store: type[RecordedStore],
        *,
        seed: int,
        ack_early: bool,
        release_early: bool,
    ) -> None:
        self.folder = folder
        self.disk = disk
        self.draw = random.Random(seed)
        self.plan = ["killed in write", "release", "turn lost", "killed in commit", "restart", "release"] * ROUNDS
        self.draw.shuffle(self.plan)
        self.store_type = store
        self.ack_early = ack_early
        self.release_early = release_early
        self.sent: set[str] = set()
        self.num_acked = 0
        self.leases: list[wire.Lease] = []

    def run(self) -> None:
        self.open()
        hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1)
        self.epoch = self.store.ledger.greet_learner(hello)
        task = wire.OrderedTask(id="t", environment="e", question="q")
        orders = [wire.Order(group=f"g-{i}", index=i, group_size=2, task=task) for i in range(GROUPS + SPARE_GROUPS)]
        self.store.ledger.place(wire.PlaceOrders(epoch=self.epoch, orders=orders))
        self.store.commit(0.0)
        self.leases = self.store.ledger.members.lease("a", GROUPS * 2, 0.0)[0]
        self.store.commit(0.0)
        for what in self.plan:
            {
                "release": self.release,
                "restart": self.restart,
                "killed in write": lambda: self.killed_in("write"),
                "killed in commit": lambda: self.killed_in("commit"),
                "turn lost": self.turn_lost,
            }.get(what, lambda: None)()
            for _ in range(self.draw.randrange(1, 4)):
                self.turn(self.draw.choice([1, 1, 2, 3, 5]))
        self.store.close()

    def open(self) -> None:
        self.store = self.store_type(self.folder, RULES, settings(), Metrics("broker"), now_s=0.0, disk=self.disk)

    def put(self, num_episodes: int) -> tuple[str, ...]:
        episodes = []
        for lease in self.leases[:num_episodes]:
            message = message_of(lease)
            self.sent.add(message.episode)
            self.store.put(message, "a", payload_of(message.episode))
            episodes.append(message.episode)
        return tuple(episodes)

    def turn(self, num_episodes: int) -> None:
        episodes = self.put(num_episodes)
        if self.ack_early:
            self.disk.log.append(Event("ack", episodes=episodes))
        self.store.commit(0.0)
        self.disk.log.append(Event("ack", episodes=episodes))
        del self.leases[:num_episodes]
        self.num_acked += len(episodes)

    def restart(self) -> None:
        self.store.close()
        self.open()

    def release(self) -> None:
        """A checkpoint covers every group that is whole."""
        below = self.num_acked // 2
        names = tuple(f"g-{group}.{member}.0" for group in range(below) for member in range(2))
        covered = wire.Commit(
            epoch=self.epoch, checkpoint="c", consumed_below=below, consumed=[], oldest_kept_below=below
        )
        files = [file for file in self.store.ledger.cover(covered) if file != self.store.current_file]
        self.store.ledger.forget_files(files)
        if self.release_early:
            self.store.release(files)
        self.disk.log.append(Event("dropped", episodes=names))
        self.store.commit(0.0)
        self.store.release(files)

    def killed_in(self, where: str) -> None:
        """The process dies in the middle of a commit; another one goes on with its files."""

        def die(*_: object) -> None:
            raise KilledError

        self.put(2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(KilledError))
            if where == "write":
                self.disk.sync = die  # type: ignore[method-assign]
                stack.callback(self.disk.__dict__.pop, "sync")
            else:
                self.store.ledger.commit = die  # type: ignore[method-assign]
            self.store.commit(0.0)
        self.store.ledger.close()
        self.store._journal.close()
        self.open()

    def turn_lost(self) -> None:
        """The disk is full in the middle of a write."""

        def half(descriptor: int, buffers: Iterable[bytes | memoryview], offset: int) -> None:
            data = b"".join(buffers)
            RecordingDisk.write(self.disk, descriptor, [data[: len(data) // 2]], offset)
            raise OSError(errno.ENOSPC, "No space left on device")

        self.put(3)
        self.disk.write = half  # type: ignore[method-assign]
        with pytest.raises(TurnLostError):
            self.store.commit(0.0)
        del self.disk.write
        self.store.tick(0.0)
        assert not self.store.is_full


def message_of(lease: wire.Lease) -> wire.StoreEpisode:
    episode = f"{lease.group}.{lease.member}.{lease.attempt}"
    payload = payload_of(episode)
    return wire.StoreEpisode(
        lease=lease.lease,
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        episode=episode,
        num_bytes=len(payload),
        crc32c=wire.crc32c(payload),
    )


# ---- the judge


def problem_with(image: Image, folder: Path, sent: set[str]) -> str | None:
    """What a store makes of an image that it must not; None: all is well."""
    image.write(folder)
    try:
        store = Store(folder, RULES, settings("never"), Metrics("broker"), now_s=0.0)
    except (JournalError, OSError, sqlite3.Error) as error:
        return f"it does not start: {error}"
    try:
        return _problem(image, store, folder, sent)
    except (JournalError, OSError, sqlite3.Error) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        store.close()


def _problem(image: Image, store: Store, folder: Path, sent: set[str]) -> str | None:
    known = _payload_files(folder)
    if lost := image.acked - known.keys():
        return f"lost: {sorted(lost)}"
    if gone := {episode for episode in image.acked - image.dropped if known[episode] is None}:
        return f"deleted: {sorted(gone)}"
    if invented := known.keys() - sent:
        return f"invented: {sorted(invented)}"
    rows = list(stored_rows(folder / LEDGER_NAME))
    for row in rows:
        if store.read(row.episode, row.location) != payload_of(row.episode):
            return f"other bytes: {row.episode}"
    ends: dict[int, int] = {}
    for row in rows:
        end = record_end(row.episode, row.location)
        ends[row.location.file] = max(end, ends.get(row.location.file, 0))
    if {number: path_of(folder, number).stat().st_size for number in file_numbers(folder)} != ends:
        return "files are not as long as their rows say"
    for number, sealed in store.ledger.sealed_files().items():
        if hash_file(path_of(folder, number)) != sealed:
            return f"file {number} is not what its seal says"
    if set(store.ledger.sealed_files()) != set(ends):
        return "a file is not sealed"
    return _goes_on(store, has_orders=image.ledger is not None and bool(known))


def _payload_files(folder: Path) -> dict[str, int | None]:
    with closing(open_read_only(folder / LEDGER_NAME)) as db:
        return dict(db.execute("SELECT episode, file FROM episodes"))


def _goes_on(store: Store, *, has_orders: bool) -> str | None:
    leases, _ = store.ledger.members.lease("after", 1, 0.0)
    if not leases:
        return "nothing to lease" if has_orders else None
    message = message_of(leases[0])
    payload = payload_of(message.episode)
    if not store.put(message, "after", payload):
        return "a fresh lease is stored already"
    store.commit(0.0)
    (location,) = [row.location for row in store.ledger.last_records() if row.episode == message.episode]
    if store.read(message.episode, location) != payload:
        return "cannot read what it stored"
    return None


# ---- the mutants


class NoSync(RecordingDisk):
    """A disk whose fdatasync does nothing."""

    def sync(self, descriptor: int) -> None:
        pass


class NoFolderSync(RecordingDisk):
    """Names of files are not synced."""

    def sync_folder(self, path: Path) -> None:
        pass


class NewestSynced(RecordingDisk):
    """Only the newest file is synced, not the one that was rolled in the same turn."""

    def sync(self, descriptor: int) -> None:
        if self._files[descriptor] == self._num_files - 1:
            super().sync(descriptor)


class SealedShort(RecordingDisk):
    """A sealed file is cut by one byte too many."""

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        super().truncate(descriptor, num_bytes - 1)


class LedgerFirst(RecordedStore):
    """The ledger is committed before the payloads are on disk."""

    def commit(self, now_s: float) -> None:
        with self._turn(now_s):
            self.ledger.commit()
            self._flush(sync=True)


class SizeTrusted(Journal):
    """Recovery takes each file as long as it is."""

    def recover(self, ends: Mapping[int, int], sealed: Iterable[int] = ()) -> Recovered:
        sizes = {number: path_of(self._folder, number).stat().st_size for number in file_numbers(self._folder)}
        return super().recover({**ends, **{n: size for n, size in sizes.items() if n in ends}}, list(sealed))


class OrphansKept(Journal):
    """Recovery leaves files alone that no row knows."""

    def recover(self, ends: Mapping[int, int], sealed: Iterable[int] = ()) -> Recovered:
        sizes = {number: path_of(self._folder, number).stat().st_size for number in file_numbers(self._folder)}
        return super().recover({**sizes, **ends}, list(sealed))


class SealBlessed(Journal):
    """A file's hash is taken of what is found in it, before it is synced: nothing is read back wrong, ever."""

    def flush(self, *, sync: bool) -> list[Sealed]:
        return [Sealed(number=s.number, num_bytes=s.num_bytes, crc32c=0) for s in super().flush(sync=sync)]


def lives(
    folder: Path,
    *,
    seed: int = 0,
    disk: type[RecordingDisk] = RecordingDisk,
    store: type[RecordedStore] = RecordedStore,
    ack_early: bool = False,
    release_early: bool = False,
) -> Workload:
    workload = Workload(folder / "real", disk(), store, seed=seed, ack_early=ack_early, release_early=release_early)
    workload.run()
    return workload


MUTANTS: dict[str, Callable[[Path], Workload]] = {
    "fsync does nothing": lambda folder: lives(folder, disk=NoSync),
    "acknowledged before the sync": lambda folder: lives(folder, ack_early=True),
    "names are not synced": lambda folder: lives(folder, disk=NoFolderSync),
    "the ledger is committed first": lambda folder: lives(folder, store=LedgerFirst),
    "files are deleted before the commit": lambda folder: lives(folder, release_early=True),
    "a rolled file is not synced": lambda folder: lives(folder, disk=NewestSynced),
    "a sealed file is cut too short": lambda folder: lives(folder, disk=SealedShort),
}
JOURNAL_MUTANTS = {  # these are at work in the recovery too
    "recovery trusts a file's length": SizeTrusted,
    "recovery keeps unknown files": OrphansKept,
    "a seal has another hash": SealBlessed,
}


def judged(workload: Workload, folder: Path, limit: int) -> Iterator[str | None]:
    """The problem with each crash image of a workload, None where all is well."""
    for number, image in enumerate(images(workload.disk.log, limit=limit)):
        place = folder / f"image-{number}"
        found = problem_with(image, place, workload.sent)
        yield found and f"image {number}, after operation {image.after}: {found}"
        shutil.rmtree(place)


# ---- the tests


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a file system: these tests need a disk that is quick, not one that is there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


def test_every_crash_image_holds_what_was_acknowledged_and_every_mutant_is_caught(
    folder: Path, monkeypatch: pytest.MonkeyPatch, report: Callable[..., None]
) -> None:
    problems: list[str] = []
    num_images = 0
    for seed in range(SEEDS):
        place = new(folder / f"seed-{seed}")
        for found in judged(lives(place, seed=seed), place, LIMIT):
            num_images += 1
            problems += [found] if found else []
    assert not problems, problems[:5]
    caught: dict[str, str | None] = {}
    for name, make in MUTANTS.items():
        place = new(folder / name)
        caught[name] = next(filter(None, judged(make(place), place, MUTANT_LIMIT)), None)
    for name, journal in JOURNAL_MUTANTS.items():
        place = new(folder / name)
        monkeypatch.setattr(store_module, "Journal", journal)
        caught[name] = next(filter(None, judged(lives(place), place, MUTANT_LIMIT)), None)
    num_caught = sum(1 for found in caught.values() if found)
    report("R2", images=num_images, lost=len(problems), mutants_caught=f"{num_caught}/{len(caught)}")
    assert None not in caught.values(), caught
    assert num_images >= 2000


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder
