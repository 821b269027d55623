"""The store: committed is kept, uncommitted is gone, a full disk is a pause, a broken one is the end."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path

import pytest

from matpo import wire
from matpo.errors import JournalError, RefusedError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.disk import Disk
from matpo_broker.journal import hash_file
from matpo_broker.members import Rules
from matpo_broker.store import BALLAST_NAME, RETRY_S, Store, TurnLostError
from matpo_broker.tables import LEDGER_NAME, open_read_only, stored_rows

MIB = 2**20


class TestDisk(Disk):
    """Writes down what it is asked; fills up and breaks on demand."""

    __test__ = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.free: int | None = None  # None: what the real disk has
        self.broken: dict[str, int] = {}  # method -> errno

    def _do(self, method: str, what: str = "") -> None:
        self.log.append(f"{method} {what}".strip())
        if method in self.broken:
            raise OSError(self.broken[method], os.strerror(self.broken[method]))

    def free_bytes(self, folder: Path) -> int:
        return super().free_bytes(folder) if self.free is None else self.free

    def create(self, path: Path) -> int:
        self._do("create", path.name)
        return super().create(path)

    def allocate(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self._do("allocate")
        super().allocate(descriptor, offset, num_bytes)

    def write(self, descriptor: int, buffers: Iterable[bytes | memoryview], offset: int) -> None:
        if "write" in self.broken:  # half of it gets there
            super().write(descriptor, [b"".join(buffers)[:50]], offset)
        self._do("write")
        super().write(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        self._do("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name)
        super().sync(descriptor)

    def sync_folder(self, path: Path) -> None:
        self._do("sync_folder")
        super().sync_folder(path)

    def unlink(self, path: Path) -> None:
        self._do("unlink", path.name)
        super().unlink(path)


class Case:
    """A store in a folder, an order of many members, and the hands to store them."""

    def __init__(self, folder: Path, disk: Disk | None = None, **settings: object) -> None:
        self.folder = folder
        self.disk = disk
        self.settings = BrokerSettings.model_validate({"ballast_bytes": MIB, **settings})
        self.metrics = Metrics("broker")
        self.rules = Rules(run="r", lease_s=100.0, max_attempts=3, credit_bytes=2**40)
        self.open()

    def open(self) -> None:
        self.store = Store(self.folder, self.rules, self.settings, self.metrics, now_s=0.0, disk=self.disk)

    def reopen(self) -> None:
        self.store.close()
        self.open()

    def die(self) -> None:
        """As kill -9 does it: nothing is flushed, nothing is sealed. The next one starts."""
        self.store.ledger.close()
        self.store._journal.close()
        self.open()

    def order(self, group_size: int = 8, groups: int = 1) -> None:
        hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1)
        self.epoch = self.store.ledger.greet_learner(hello)
        task = wire.OrderedTask(id="t", environment="e", question="q")
        orders = [wire.Order(group=f"g-{i}", index=i, group_size=group_size, task=task) for i in range(groups)]
        self.store.ledger.place(wire.PlaceOrders(epoch=self.epoch, orders=orders))
        self.store.commit(0.0)

    def lease(self, num_members: int = 1) -> list[wire.Lease]:
        leases, _ = self.store.ledger.members.lease("a", num_members, 0.0)
        self.store.commit(0.0)
        return leases

    def put(self, lease: wire.Lease, payload: bytes) -> bool:
        return self.store.put(message(lease, payload), "a", payload)

    def stored(self) -> dict[str, bytes]:
        rows = list(stored_rows(self.folder / LEDGER_NAME))
        return {row.episode: self.store.read(row.episode, row.location) for row in rows}

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"matpo_broker_{name}", labels)


def message(lease: wire.Lease, payload: bytes) -> wire.StoreEpisode:
    return wire.StoreEpisode(
        lease=lease.lease,
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        episode=f"{lease.group}.{lease.member}.{lease.attempt}",
        num_bytes=len(payload),
        crc32c=wire.crc32c(payload),
    )


@pytest.fixture
def disk() -> TestDisk:
    return TestDisk()


@pytest.fixture
def case(tmp_path: Path, disk: TestDisk) -> Iterator[Case]:
    case = Case(tmp_path / "journal", disk)
    yield case
    with contextlib.suppress(OSError, sqlite3.Error):  # closed by the test already
        case.store.close()


# ---- committing


def test_payloads_are_on_disk_before_the_ledger_knows_them(case: Case, disk: TestDisk) -> None:
    case.order()
    leases = case.lease(2)
    disk.log.clear()
    for lease in leases:
        case.put(lease, b"x" * 1000)
    assert disk.log == ["create payload-00000000.bin", "allocate"]
    ledger = case.store.ledger
    commit = ledger.commit
    ledger.commit = lambda: (disk.log.append("ledger"), commit())  # type: ignore[method-assign,func-returns-value]
    case.store.commit(0.0)
    assert disk.log[2:] == ["write", "sync payload-00000000.bin", "sync_folder", "ledger"]


def test_a_restart_keeps_what_was_committed_and_invents_nothing(case: Case, disk: TestDisk) -> None:
    case.order()
    kept, lost = case.lease(2)
    case.put(kept, b"kept")
    case.store.commit(0.0)
    case.put(lost, b"lost")
    case.die()
    assert case.stored() == {"g-0.0.0": b"kept"}
    assert case.put(kept, b"kept") is False
    assert case.put(lost, b"lost") is True
    case.store.commit(0.0)
    assert case.stored() == {"g-0.0.0": b"kept", "g-0.1.0": b"lost"}
    assert case.metric("durability", policy="group") == 1


def test_each_payload_file_is_sealed_with_its_hash_at_a_roll_at_a_close_and_after_a_kill(tmp_path: Path) -> None:
    case = Case(tmp_path / "journal", journal_file_bytes=1000)
    case.order()
    for i, lease in enumerate(case.lease(3)):
        case.put(lease, bytes([i]) * 600)
    case.store.commit(0.0)
    assert list(case.store.ledger.sealed_files()) == [0]
    case.reopen()
    assert list(case.store.ledger.sealed_files()) == [0, 1]
    case.put(case.lease()[0], b"y" * 600)
    case.store.commit(0.0)
    case.die()
    sealed = case.store.ledger.sealed_files()
    assert sealed == {n: hash_file(case.folder / f"payload-{n:08d}.bin") for n in range(3)}
    case.store.close()


def test_released_files_are_deleted_and_their_hashes_forgotten(tmp_path: Path) -> None:
    case = Case(tmp_path / "journal", journal_file_bytes=1000)
    case.order(group_size=2, groups=2)
    for lease in case.lease(4):
        case.put(lease, b"x" * 600)
    case.store.commit(0.0)
    covered = wire.Commit(epoch=case.epoch, checkpoint="c", consumed_below=1, consumed=[], oldest_kept_below=1)
    files = case.store.ledger.cover(covered)
    assert files == [0]
    case.store.ledger.forget_files(files)
    case.store.commit(0.0)
    case.store.release(files)
    assert [path.name for path in sorted(case.folder.glob("payload-*"))] == ["payload-00000001.bin"]
    case.reopen()
    assert list(case.store.ledger.sealed_files()) == [1]
    assert list(case.stored()) == ["g-1.0.0", "g-1.1.0"]
    case.store.close()


@pytest.mark.parametrize("dies", [False, True])
def test_a_file_that_is_sealed_in_the_turn_that_forgets_it_leaves_no_hash_behind(tmp_path: Path, dies: bool) -> None:
    case = Case(tmp_path / "journal", journal_file_bytes=500)
    case.order()
    for lease in case.lease(2):
        case.put(lease, b"x" * 600)
    case.store.ledger.forget_files([0])
    case.store.commit(0.0)
    if dies:
        case.die()
    else:
        case.store.release([0])
    case.store.commit(0.0)
    assert not (case.folder / "payload-00000000.bin").exists()
    assert 0 not in case.store.ledger.sealed_files()
    case.store.close()


def test_a_folder_with_payloads_but_an_empty_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    case = Case(tmp_path / "journal")
    case.order()
    case.put(case.lease()[0], b"precious")
    case.store.close()
    for path in case.folder.glob(f"{LEDGER_NAME}*"):
        path.unlink()
    with pytest.raises(JournalError, match="its ledger is empty"):
        case.open()
    assert (case.folder / "payload-00000000.bin").read_bytes().endswith(b"precious")
    with pytest.raises(JournalError, match="its ledger is empty"):  # and not "in use": the lock was given back
        case.open()


def test_every_file_of_a_store_is_readable_by_its_owner_only(case: Case) -> None:
    case.order()
    case.put(case.lease()[0], b"x")
    case.store.commit(0.0)
    names = {BALLAST_NAME, "lock", "payload-00000000.bin", *(LEDGER_NAME + end for end in ("", "-wal", "-shm"))}
    assert {path.name for path in case.folder.iterdir()} == names
    assert {path.stat().st_mode & 0o777 for path in case.folder.iterdir()} == {0o600}
    assert case.folder.stat().st_mode & 0o777 == 0o700


def test_damage_is_counted_and_costs_only_its_own_record(case: Case) -> None:
    case.order()
    for lease in case.lease(2):
        case.put(lease, b"x" * 100)
    case.store.commit(0.0)
    case.store.close()
    path = case.folder / "payload-00000000.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1  # the file's magic
    data[60] ^= 1  # the first record
    path.write_bytes(data)
    case.open()
    first, second = stored_rows(case.folder / LEDGER_NAME)
    with pytest.raises(JournalError, match="the bytes are not those"):
        case.store.read(first.episode, first.location)
    assert case.store.read(second.episode, second.location) == b"x" * 100
    assert [case.metric("journal_errors_total", reason=r) for r in ("magic", "hash")] == [1, 1]


def test_a_damaged_record_that_is_played_again_leaves_the_rest_of_its_file_alone(tmp_path: Path) -> None:
    for index_of_damage in range(3):
        for is_sealed in (True, False):
            case = Case(tmp_path / f"journal-{index_of_damage}-{is_sealed}")
            case.order(group_size=3)
            for lease in case.lease(3):
                case.put(lease, bytes([lease.member]) * 100)
            case.store.commit(0.0)
            if is_sealed:
                case.reopen()
            case.store.ledger.members.reopen(0, index_of_damage)
            case.store.commit(0.0)
            for _ in range(2):
                case.reopen()
                rest = {f"g-0.{i}.0": bytes([i]) * 100 for i in range(3) if i != index_of_damage}
                assert case.stored() == rest
                sealed = case.store.ledger.sealed_files()
                assert sealed == {n: hash_file(case.folder / f"payload-{n:08d}.bin") for n in sealed}
            case.store.close()


# ---- durability policies


def test_interval_syncs_payloads_then_ledger_every_interval_and_deletes_files_only_then(
    tmp_path: Path, disk: TestDisk
) -> None:
    case = Case(tmp_path / "journal", disk, durability="interval", sync_interval_s=1.0, journal_file_bytes=500)
    case.order(group_size=1, groups=3)
    leases = case.lease(3)
    disk.log.clear()
    for lease in leases[:2]:
        case.put(lease, b"x" * 600)
        case.store.commit(0.5)
    assert not [line for line in disk.log if line.startswith("sync")]
    assert case.store.next_tick_s == 1.0
    covered = wire.Commit(epoch=case.epoch, checkpoint="c", consumed_below=1, consumed=[], oldest_kept_below=1)
    files = case.store.ledger.cover(covered)
    case.store.ledger.forget_files(files)
    case.store.commit(0.6)
    case.store.release(files)
    case.store.tick(0.9)
    assert (case.folder / "payload-00000000.bin").exists()
    disk.log.clear()
    case.store.tick(1.0)
    payloads = ["sync payload-00000000.bin", "sync payload-00000001.bin", "sync_folder"]
    assert disk.log == [*payloads, f"sync {LEDGER_NAME}-wal", "unlink payload-00000000.bin"]
    assert case.store.next_tick_s == inf
    case.put(leases[2], b"x")
    disk.log.clear()
    case.store.commit(1.5)
    assert case.store.next_tick_s == 1.0
    assert disk.log == ["write"]
    case.store.commit(2.0)  # a busy broker syncs in its commits
    assert disk.log[1:] == ["sync payload-00000002.bin", "sync_folder", f"sync {LEDGER_NAME}-wal"]
    case.reopen()
    assert list(case.store.ledger.sealed_files()) == [1, 2]
    case.store.close()


def test_interval_syncs_what_a_killed_process_left_with_the_kernel(tmp_path: Path, disk: TestDisk) -> None:
    case = Case(tmp_path / "journal", disk, durability="interval", sync_interval_s=1.0)
    case.order()
    case.put(case.lease()[0], b"x")
    case.store.commit(0.0)
    disk.log.clear()
    case.die()
    assert [line for line in disk.log if line.startswith("sync")] == ["sync payload-00000000.bin", "sync_folder"]
    case.store.tick(1.0)
    assert disk.log[-1] == f"sync {LEDGER_NAME}-wal"
    case.store.close()


def test_never_syncs_nothing(tmp_path: Path, disk: TestDisk) -> None:
    case = Case(tmp_path / "journal", disk, durability="never", journal_file_bytes=500)
    case.order()
    for lease in case.lease(3):
        case.put(lease, b"x" * 400)
        case.store.commit(0.0)
    case.reopen()
    assert len(case.stored()) == 3
    case.store.close()
    assert not [line for line in disk.log if line.startswith("sync ")]


# ---- a full disk


def test_a_full_disk_refuses_episodes_until_there_is_room_again(case: Case, disk: TestDisk) -> None:
    case.order()
    stored, refused = case.lease(2)
    case.put(stored, b"x")
    case.store.commit(0.0)
    disk.free = MIB - 1  # under the low-water mark
    case.store.tick(1.0)
    assert case.store.is_full
    assert case.metric("disk_full") == 1
    with pytest.raises(RefusedError, match="Free space") as caught:
        case.put(refused, b"y")
    assert (caught.value.reason, caught.value.retry_after_s) == ("disk_full", RETRY_S)
    assert case.put(stored, b"x") is False  # a duplicate is known, disk or no disk
    assert case.lease(1)  # and the ledger goes on
    disk.free = 2 * MIB - 1
    case.store.tick(2.0)
    assert case.store.is_full
    disk.free = 2 * MIB
    assert case.put(refused, b"y") is True  # at once, not at the next tick
    assert not case.store.is_full
    assert case.metric("disk_full") == 0
    case.store.commit(2.0)
    assert len(case.stored()) == 2


def test_a_pause_after_which_the_ballast_is_gone_ends_when_there_is_room_for_it_too(case: Case, disk: TestDisk) -> None:
    case.order()
    case.put(case.lease(1)[0], b"x")
    disk.broken["write"] = errno.ENOSPC
    with pytest.raises(TurnLostError):
        case.store.commit(0.0)
    disk.broken.clear()
    assert not (case.folder / BALLAST_NAME).exists()
    disk.free = 3 * MIB - 1
    case.store.tick(1.0)
    assert case.store.is_full
    disk.free = 3 * MIB
    case.store.tick(1.0)
    assert not case.store.is_full
    assert (case.folder / BALLAST_NAME).stat().st_blocks * 512 == MIB


def test_an_episode_that_alone_does_not_fit_is_refused_and_smaller_ones_are_not(case: Case, disk: TestDisk) -> None:
    case.order()
    large, small = case.lease(2)
    disk.free = 3 * MIB
    with pytest.raises(RefusedError, match="Free space"):
        case.put(large, b"x" * 4 * MIB)
    assert not case.store.is_full
    assert case.put(small, b"x")
    case.store.commit(0.0)
    assert list(case.stored()) == ["g-0.1.0"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_flush_that_finds_the_disk_full_loses_the_turn_as_a_whole(case: Case, disk: TestDisk, code: int) -> None:
    case.order()
    before, lost, after = case.lease(3)
    case.put(before, b"a" * 100)
    case.store.commit(0.0)
    case.put(lost, b"b" * 100)
    ledger = case.store.ledger
    disk.broken["write"] = code  # half of it is written, then this
    with pytest.raises(TurnLostError) as caught:
        case.store.commit(7.0)
    disk.broken.clear()
    assert (caught.value.reason, caught.value.retry_after_s) == ("disk_full", RETRY_S)
    assert case.store.ledger is not ledger
    assert case.store.ledger.members.next_deadline_s == 7.0 + 100.0  # leases are kept, with fresh deadlines
    assert case.stored() == {"g-0.0.0": b"a" * 100}
    assert case.put(lost, b"b" * 100)
    assert case.put(after, b"c" * 100)
    case.store.commit(7.0)
    assert case.stored() == {"g-0.0.0": b"a" * 100, "g-0.1.0": b"b" * 100, "g-0.2.0": b"c" * 100}
    case.reopen()
    sealed = case.store.ledger.sealed_files()
    assert sealed == {n: hash_file(case.folder / f"payload-{n:08d}.bin") for n in (0, 1)}


@pytest.mark.parametrize("method", ["write", "sync", "allocate"])
def test_a_broken_disk_is_not_waited_for(case: Case, disk: TestDisk, method: str) -> None:
    case.order()
    (lease,) = case.lease(1)
    disk.broken[method] = errno.EIO

    def turn() -> None:
        case.put(lease, b"x")
        case.store.commit(0.0)

    with pytest.raises(OSError, match="Input/output error"):
        turn()
    assert not case.store.is_full
    disk.broken.clear()


def test_a_store_starts_on_a_full_disk_that_has_a_ballast(tmp_path: Path, disk: TestDisk) -> None:
    case = Case(tmp_path / "journal", disk)
    case.order()
    (lease,) = case.lease(1)
    case.store.close()
    disk.free = 0
    case.open()
    assert case.store.is_full
    with pytest.raises(RefusedError):
        case.put(lease, b"x")
    disk.free = None
    assert case.put(lease, b"x")
    case.store.close()


def test_a_ballast_of_another_size_or_with_holes_is_mended(tmp_path: Path) -> None:
    case = Case(tmp_path / "journal")
    case.store.close()
    ballast = case.folder / BALLAST_NAME
    for size in (3 * MIB, MIB):
        ballast.unlink()
        with ballast.open("wb") as file:
            file.truncate(size)
        case.open()
        assert (ballast.stat().st_size, ballast.stat().st_blocks * 512) == (MIB, MIB)
        case.store.close()


FILL = """
import os, sys
with open(sys.argv[1], "wb", 0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
"""


def on_a_tiny_disk(tmp_path: Path, name: str, num_bytes: int) -> None:
    """Run one function of this file in a process with a file system of its own; it gets the folder."""
    flags = "-m" if os.geteuid() == 0 else "-rm"
    if subprocess.run(["unshare", flags, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine permits no private mounts")
    shell = f'mount -t tmpfs -o size={num_bytes} none "$1" && exec "$2" -c "$3" "$1" "$4"'
    program = (
        "import importlib.util, pathlib, sys;"
        "spec = importlib.util.spec_from_file_location('tests_of_the_store', sys.argv[2]);"
        "module = importlib.util.module_from_spec(spec);"
        "sys.modules[spec.name] = module;"
        "spec.loader.exec_module(module);"
        f"module.{name}(pathlib.Path(sys.argv[1]))"
    )
    command = ["unshare", flags, "sh", "-c", shell, "sh", str(tmp_path), sys.executable, program, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def fill(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", FILL, str(folder / f"fill-{len(list(folder.iterdir()))}")], check=True)
    assert Disk().free_bytes(folder) == 0


def test_at_0_bytes_free_the_ledger_goes_on_and_what_it_cannot_note_is_a_lost_turn(tmp_path: Path) -> None:
    on_a_tiny_disk(tmp_path, "ledger_on_a_full_disk", 64 * MIB)


def ledger_on_a_full_disk(folder: Path) -> None:
    case = Case(folder / "journal", ballast_bytes=8 * MIB)
    case.order(group_size=1, groups=200)
    stored, later = case.lease(2)
    case.put(stored, b"x" * 100)
    case.store.commit(0.0)
    fill(folder)
    # Nobody looks at the disk here. What does not make the ledger larger: as much of it as you like.
    for _ in range(200):
        case.store.ledger._db.execute("UPDATE orders SET task = randomblob(length(task))")
        case.store.commit(0.0)
    assert not case.store.is_full
    # What does: as much as was set aside, WAL and ballast, and then as before.
    kept, lost = [], 0
    for i in range(150):
        case.store.ledger._db.execute("UPDATE orders SET task = randomblob(200000) WHERE idx = ?", (i,))
        try:
            case.store.commit(0.0)
        except TurnLostError:
            lost += 1
            assert case.store.is_full
            assert not (folder / "journal" / BALLAST_NAME).exists()
            assert case.stored() == {"g-0.0.0": b"x" * 100}
            wal = folder / "journal" / f"{LEDGER_NAME}-wal"
            assert wal.stat().st_blocks * 512 >= 8 * MIB  # nothing was given back that another could have taken
        else:
            kept.append(i)
    assert lost > 0
    assert len(kept) * 200_000 > 10 * MIB
    large = case.store.ledger._db.execute("SELECT idx FROM orders WHERE length(task) = 200000").fetchall()
    assert [index for (index,) in large] == kept
    for path in folder.glob("fill-*"):
        path.unlink()
    case.store.tick(1.0)
    assert not case.store.is_full
    case.put(later, b"y" * 100)
    case.store.commit(1.0)
    case.reopen()
    assert len(case.stored()) == 2
    case.store.close()


def test_a_ledger_whose_wal_is_full_uses_it_again_after_a_lost_turn(tmp_path: Path) -> None:
    on_a_tiny_disk(tmp_path, "wal_on_a_full_disk", 16 * MIB)


def wal_on_a_full_disk(folder: Path) -> None:
    case = Case(folder / "journal", ballast_bytes=MIB)  # less than SQLite lets its WAL grow to by itself
    case.order(group_size=1, groups=200)
    fill(folder)
    kept, lost = 0, 0
    for _ in range(300):
        case.store.ledger._db.execute("UPDATE orders SET task = randomblob(length(task))")
        try:
            case.store.commit(0.0)
            kept += 1
        except TurnLostError:
            lost += 1
            if Disk().free_bytes(folder):
                fill(folder)  # somebody else takes the ballast
    assert lost >= 2, (kept, lost)
    assert kept >= 200, (kept, lost)
    case.store.close()


def test_a_store_closes_and_starts_again_on_a_disk_full_to_the_last_byte(tmp_path: Path) -> None:
    on_a_tiny_disk(tmp_path, "restart_on_a_full_disk", 12 * MIB)


def restart_on_a_full_disk(folder: Path) -> None:
    case = Case(folder / "journal")
    case.order(group_size=1, groups=100)
    leases = case.lease(100)
    for i, lease in enumerate(leases[:20]):
        case.put(lease, bytes([i]) * 1000)
        case.store.commit(0.0)
    fill(folder)
    case.store.close()
    fill(folder)  # closing gave some back
    case.open()
    assert case.store.is_full
    assert len(case.stored()) == 20
    case.store.ledger.members.heartbeat("a", [lease.lease for lease in leases[20:]], 1.0)
    case.store.ledger.members.release("a", [leases[99].lease], infra=False)
    case.store.commit(1.0)
    for path in folder.glob("fill-*"):
        path.unlink()
    case.put(leases[20], b"y")
    case.store.commit(2.0)
    assert len(case.stored()) == 21
    case.store.close()


def test_reads_of_a_second_connection_do_not_disturb_the_store(case: Case) -> None:
    case.order()
    (lease,) = case.lease(1)
    with contextlib.closing(open_read_only(case.folder / LEDGER_NAME)) as db:
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM orders").fetchone()
        case.put(lease, b"x")
        case.store.commit(0.0)
    assert case.stored() == {"g-0.0.0": b"x"}
