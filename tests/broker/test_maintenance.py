"""verify and compact on real journal folders: damage is found and named, space comes back, a kill loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from matpo import wire
from matpo.errors import JournalError, RefusedError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.disk import Disk
from matpo_broker.journal import path_of, read_episodes, record_head
from matpo_broker.maintenance import compact, verify
from matpo_broker.members import Rules
from matpo_broker.store import Store
from matpo_broker.tables import LEDGER_NAME, accounting, open_read_only, stored_rows

SIZE = 10_000  # of a payload
FILE_BYTES = 8 * SIZE  # eight records in each payload file


class Journalist:
    """A store with groups of two members each, and a learner that consumes some."""

    def __init__(self, folder: Path, groups: int = 20) -> None:
        self.folder = folder
        self.store = self.open()
        hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1)
        self.epoch = self.store.ledger.greet_learner(hello)
        self.store.ledger.resume(self.resume(0))
        if groups:
            self.order(0, groups)

    def open(self) -> Store:
        settings = BrokerSettings(journal_file_bytes=FILE_BYTES, ballast_bytes=2**20)
        rules = Rules(run="r", lease_s=100.0, max_attempts=3, credit_bytes=2**40)
        self.store = Store(self.folder, rules, settings, Metrics("broker"), now_s=0.0)
        return self.store

    def resume(self, below: int) -> wire.Resume:
        return wire.Resume(epoch=self.epoch, checkpoint="c", consumed_below=below, consumed=[])

    def order(self, first: int, end: int) -> None:
        task = wire.OrderedTask(id="t", environment="e", question="q" * 500)
        orders = [wire.Order(group=f"g-{i}", index=i, group_size=2, task=task) for i in range(first, end)]
        self.store.ledger.place(wire.PlaceOrders(epoch=self.epoch, orders=orders))
        self.store.commit(0.0)

    def play(self, num_members: int = 1000) -> None:
        leases, _ = self.store.ledger.members.lease("a", num_members, 0.0)
        for lease in leases:
            payload = payload_of(f"{lease.group}.{lease.member}.{lease.attempt}")
            message = wire.StoreEpisode(
                lease=lease.lease, group=lease.group, member=lease.member, attempt=lease.attempt,
                episode=f"{lease.group}.{lease.member}.{lease.attempt}", num_bytes=len(payload),
                crc32c=wire.crc32c(payload), num_tokens=7,
            )  # fmt: skip
            self.store.put(message, "a", payload)
            self.store.commit(0.0)

    def train(self, below: int, oldest_kept: int, *, quarantine: str = "") -> None:
        """Fetch everything that is ready; a checkpoint consumes what is below."""
        while (group := self.store.ledger.fetch(wire.Fetch(epoch=self.epoch, received=self.last()))) is not None:
            self.received = group.group
            if group.group == quarantine:
                self.store.ledger.set_aside(wire.Quarantine(epoch=self.epoch, group=quarantine, reason="nan"))
        self.store.ledger.cover(
            wire.Commit(
                epoch=self.epoch,
                checkpoint=f"c{below}",
                consumed_below=below,
                consumed=[],
                oldest_kept_below=oldest_kept,
            )
        )  # its files stay: compaction is to find them
        self.store.commit(0.0)

    def last(self) -> str:
        return getattr(self, "received", "")

    def close(self) -> None:
        self.store.close()


def payload_of(episode: str) -> bytes:
    return (episode.encode() + b"|") * (SIZE // (len(episode) + 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def half_done(folder: Path) -> Journalist:
    """20 groups in 5 files, of which every checkpoint covers 11; g-3 is quarantined; closed."""
    journalist = Journalist(folder)
    journalist.play()
    journalist.train(13, 11, quarantine="g-3")
    journalist.close()
    return journalist


def compacted(folder: Path, disk: Disk | None = None) -> object:
    return compact(folder, "r", file_bytes=FILE_BYTES, disk=disk)


def groups_of(folder: Path) -> set[str]:
    """Groups whose payloads are all there and right."""
    found: dict[str, int] = {}
    for stored in read_episodes(folder):
        assert stored.payload == payload_of(stored.episode)
        found[stored.group] = found.get(stored.group, 0) + 1
    assert set(found.values()) <= {2}
    return set(found)


NEEDED = {"g-3", *(f"g-{i}" for i in range(11, 20))}


# ---- verify


def test_a_sound_journal_has_no_damage(half_done: Journalist) -> None:
    found = verify(half_done.folder)
    assert (found.damage, found.unknown) == ([], [])
    assert (found.orders, found.episodes, found.files, found.sealed_files) == (20, 40, 5, 5)
    assert found.bytes == sum(len(payload_of(f"g-{i}.{m}.0")) for i in range(20) for m in range(2))


def test_every_record_that_is_damaged_is_named_by_file_byte_and_episode(half_done: Journalist) -> None:
    rows = {row.episode: row.location for row in stored_rows(half_done.folder / LEDGER_NAME)}
    for episode in ("g-0.0.0", "g-7.1.0"):
        flip(path_of(half_done.folder, rows[episode].file), rows[episode].offset + 200)
    found = verify(half_done.folder).damage
    assert [(d.file, d.offset, d.episode, d.reason) for d in found if d.reason != "sealed"] == [
        (path_of(half_done.folder, rows[name].file).name, rows[name].offset, name, "hash")
        for name in ("g-0.0.0", "g-7.1.0")
    ]
    assert {d.file for d in found if d.reason == "sealed"} == {d.file for d in found}


def test_any_flipped_byte_of_a_payload_file_is_found(half_done: Journalist) -> None:
    path = path_of(half_done.folder, 1)
    for at in (*range(60), *range(60, path.stat().st_size, 997)):
        flip(path, at)
        assert verify(half_done.folder).damage, at
        flip(path, at)
    assert verify(half_done.folder).damage == []


def test_a_file_that_is_cut_or_gone_is_damage(half_done: Journalist) -> None:
    os.truncate(path_of(half_done.folder, 0), 5 * SIZE)
    path_of(half_done.folder, 2).unlink()
    found = verify(half_done.folder).damage
    assert {(d.file, d.reason) for d in found} == {
        ("payload-00000000.bin", "torn"), ("payload-00000000.bin", "sealed"),
        ("payload-00000002.bin", "missing"), ("payload-00000002.bin", "sealed"),
    }  # fmt: skip


def test_a_file_that_the_ledger_does_not_know_is_told_and_is_no_damage(half_done: Journalist) -> None:
    path_of(half_done.folder, 99).write_bytes(b"MATPOJ1\n")
    found = verify(half_done.folder)
    assert (found.unknown, found.damage) == (["payload-00000099.bin"], [])


def test_a_damaged_ledger_is_damage(half_done: Journalist) -> None:
    path = half_done.folder / LEDGER_NAME
    content = bytearray(path.read_bytes())
    content[4096 * 2 : 4096 * 6] = os.urandom(4096 * 4)
    path.write_bytes(content)
    assert {d.file for d in verify(half_done.folder).damage} == {LEDGER_NAME}


def test_a_ledger_row_that_is_gone_is_damage(half_done: Journalist) -> None:
    with contextlib.closing(sqlite3.connect(half_done.folder / LEDGER_NAME)) as db, db:
        db.execute("DELETE FROM episodes WHERE idx = 15 AND member = 1")
    assert [d.message for d in verify(half_done.folder).damage] == [
        "ledger.sqlite: g-15 is whole, but 1 of its 2 episodes are there"
    ]


def test_a_payload_that_was_deleted_too_early_is_damage(half_done: Journalist) -> None:
    with contextlib.closing(sqlite3.connect(half_done.folder / LEDGER_NAME)) as db, db:
        db.execute("UPDATE episodes SET file = NULL WHERE idx = 15 AND member = 1")
    assert "g-15.1.0 is needed" in verify(half_done.folder).damage[0].message


def test_verify_changes_nothing(half_done: Journalist) -> None:
    before = {path.name: path.read_bytes() for path in half_done.folder.iterdir()}
    verify(half_done.folder)
    assert {name: (half_done.folder / name).read_bytes() for name in before} == before


def test_verify_works_beside_a_running_broker(folder: Path) -> None:
    journalist = Journalist(folder)
    journalist.play(17)  # two sealed files, and one that grows
    found = verify(folder)
    assert (found.damage, found.unknown, found.episodes, found.files) == ([], [], 17, 3)
    removed = []

    def progress(done: int, total: int) -> None:
        if not removed:  # the broker lets go of what verify is about to read, and goes on storing
            journalist.play()
            journalist.train(13, 11)
            files = [0, 1]
            journalist.store.ledger.forget_files(files)
            journalist.store.commit(0.0)
            journalist.store.release(files)
            removed.append(files)

    assert verify(folder, progress).damage == []
    assert not path_of(folder, 1).exists()
    journalist.close()


def test_progress_ends_at_the_total(half_done: Journalist) -> None:
    seen: list[tuple[int, int]] = []
    verify(half_done.folder, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_journal_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there"):
        verify(tmp_path)
    with pytest.raises(JournalError, match="no journal there"):
        compact(tmp_path, "r", file_bytes=FILE_BYTES)


# ---- compact


def test_compact_gives_the_space_of_covered_groups_back_and_keeps_every_needed_payload(half_done: Journalist) -> None:
    done = compact(half_done.folder, "r", file_bytes=FILE_BYTES)
    # File 0 has g-0 .. g-3: g-3 moves. File 1 is dead. File 2 has g-8 .. g-11: g-11 moves. 3 and 4 stay.
    assert (done.files_deleted, done.files_rewritten) == (3, 2)
    assert (done.orders_forgotten, done.episodes_forgotten, done.damage) == (10, 20, [])
    assert done.bytes_after < done.bytes_before - 19 * SIZE
    assert groups_of(half_done.folder) == NEEDED
    assert (verify(half_done.folder).damage, verify(half_done.folder).unknown) == ([], [])
    assert done.bytes_after == sum(
        path.stat().st_size for path in half_done.folder.iterdir() if path.suffix == ".bin" or LEDGER_NAME in path.name
    )


def test_what_compact_forgets_stays_in_the_counts(half_done: Journalist) -> None:
    before = half_done.open().ledger.counts()
    half_done.close()
    compacted(half_done.folder)
    assert half_done.open().ledger.counts() == before
    half_done.order(20, 30)
    half_done.play()
    half_done.train(25, 24)
    before = half_done.store.ledger.counts()
    half_done.close()
    compacted(half_done.folder)
    assert half_done.open().ledger.counts() == before
    half_done.close()


def test_compact_twice_changes_nothing_more(half_done: Journalist) -> None:
    compacted(half_done.folder)
    again = compact(half_done.folder, "r", file_bytes=FILE_BYTES)
    assert (again.orders_forgotten, again.files_deleted, again.bytes_after) == (0, 0, again.bytes_before)


def test_after_compact_orders_are_known_and_too_old_a_checkpoint_is_refused(half_done: Journalist) -> None:
    compacted(half_done.folder)
    ledger = half_done.open().ledger
    half_done.order(0, 20)  # known, all of them
    assert ledger.members.lease("a", 10, 0.0) == ([], "")
    with pytest.raises(RefusedError) as refused:
        ledger.resume(half_done.resume(5))
    assert refused.value.reason == "forgotten"
    ledger.resume(half_done.resume(11))
    delivered = ledger.fetch(wire.Fetch(epoch=half_done.epoch))
    assert delivered is not None
    assert delivered.group == "g-11"
    half_done.close()


def test_compact_while_a_broker_has_the_folder_is_refused(folder: Path) -> None:
    journalist = Journalist(folder)
    with pytest.raises(JournalError) as refused:
        compacted(folder)
    assert refused.value.reason == "locked"
    journalist.close()


def test_a_file_with_a_damaged_record_is_left_as_it_is_and_told(half_done: Journalist) -> None:
    row = next(row for row in stored_rows(half_done.folder / LEDGER_NAME) if row.episode == "g-11.0.0")
    flip(path_of(half_done.folder, row.location.file), row.location.offset + 500)
    done = compact(half_done.folder, "r", file_bytes=FILE_BYTES)
    assert [(d.file, d.reason) for d in done.damage] == [("payload-00000002.bin", "hash")]
    assert {d.episode for d in verify(half_done.folder).damage} == {"", "g-11.0.0"}
    assert path_of(half_done.folder, 0).exists() is False


def test_compact_begins_with_what_a_crash_left(half_done: Journalist) -> None:
    name = b"g-19.1.0"
    with path_of(half_done.folder, 4).open("ab") as file:
        file.write(record_head(name.decode(), 10, 0) + b"torn")
    compacted(half_done.folder)
    assert groups_of(half_done.folder) == NEEDED
    assert verify(half_done.folder).damage == []


def test_a_payload_file_keeps_all_of_its_ledger_rows_or_loses_all(folder: Path) -> None:
    journalist = Journalist(folder, groups=0)
    for first, end in ((1, 16), (0, 1), (16, 20)):  # g-0, the one that is covered, ends a file that stays
        journalist.order(first, end)
        journalist.play()
    journalist.train(1, 1)
    journalist.close()
    done = compact(folder, "r", file_bytes=FILE_BYTES)
    assert (done.files_deleted, done.orders_forgotten) == (0, 0)
    journalist.open().close()  # recovery finds the end of each file by its last row
    assert verify(folder).damage == []


class CrashingDisk(Disk):
    """Dies before, in the middle of, or after the n-th thing that it is asked to do."""

    def __init__(self, dies_at: int) -> None:
        self.left = dies_at

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash

    def write(self, descriptor: int, buffers: Iterable[bytes | memoryview], offset: int) -> None:
        whole = b"".join(buffers)
        half = len(whole) // 2
        self._step()
        super().write(descriptor, [whole[:half]], offset)
        self._step()
        super().write(descriptor, [whole[half:]], offset + half)
        self._step()

    def sync(self, descriptor: int) -> None:
        self._step()
        super().sync(descriptor)
        self._step()

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)
        self._step()

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._step()
        super().truncate(descriptor, num_bytes)
        self._step()

    def sync_folder(self, path: Path) -> None:
        self._step()
        super().sync_folder(path)

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)


class Crash(BaseException):
    """The process is gone: nothing after it is done, no transaction is committed."""


def crashes(folder: Path, build: Callable[[], Journalist]) -> Iterator[int]:
    for step in range(1, 100):
        for path in folder.iterdir() if folder.exists() else ():
            path.unlink()
        build()
        try:
            compacted(folder, CrashingDisk(step))
        except Crash:
            yield step
        else:
            return


def test_a_crash_at_any_step_of_compact_loses_nothing_that_is_needed(folder: Path) -> None:
    def build() -> Journalist:
        journalist = Journalist(folder, groups=16)
        journalist.play()
        journalist.train(13, 11, quarantine="g-3")
        journalist.close()
        return journalist

    needed = {group for group in NEEDED if int(group[2:]) < 16}
    steps = 0
    for step in crashes(folder, build):
        steps = step
        assert needed <= groups_of(folder), step
        assert verify(folder).damage == [], step
        journalist = Journalist.__new__(Journalist)
        journalist.folder = folder
        journalist.open().close()  # the broker starts, and the same is there
        assert needed <= groups_of(folder), step
        assert (verify(folder).damage, verify(folder).unknown) == ([], []), step
        compacted(folder)
        assert groups_of(folder) == needed, step
    assert steps >= 20


COMPACT = "import sys; from pathlib import Path; from matpo_broker.maintenance import compact\n"
COMPACT += f"print('go', flush=True); compact(Path(sys.argv[1]), 'r', file_bytes={FILE_BYTES})"


@pytest.mark.processes
def test_kill_9_at_any_time_of_compact_loses_nothing_that_is_needed(half_done: Journalist) -> None:
    killed = 0
    for turn in range(8):
        child = subprocess.Popen([sys.executable, "-c", COMPACT, str(half_done.folder)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.004 * turn)  # no condition to await: the instant is the point
        child.send_signal(signal.SIGKILL)
        killed += child.wait(20) == -signal.SIGKILL
        child.stdout.close()
        assert groups_of(half_done.folder) >= NEEDED
        assert verify(half_done.folder).damage == []
    assert killed >= 1
    compacted(half_done.folder)
    assert groups_of(half_done.folder) == NEEDED


def test_what_was_forgotten_is_counted_in_the_account(half_done: Journalist) -> None:
    before = accounting(half_done.folder)
    compacted(half_done.folder)
    after = accounting(half_done.folder)
    assert after.compacted_below == 11
    assert len(after.orders) + after.groups_compacted == len(before.orders)
    assert len(after.stored) + after.episodes_compacted == len(before.stored)
    assert after.groups_compacted > 0


def test_a_needed_order_is_never_forgotten(half_done: Journalist) -> None:
    compacted(half_done.folder)
    with contextlib.closing(open_read_only(half_done.folder / LEDGER_NAME)) as db:
        left = {group for (group,) in db.execute("SELECT grp FROM orders")}
        assert db.execute("SELECT value FROM meta WHERE key = 'compacted_below'").fetchone() == (11,)
    assert left == NEEDED


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
