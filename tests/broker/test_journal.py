"""Payload files: what is read back is what was written, or an error; and what recovery makes of them."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
import pytest

from matpo.errors import JournalError
from matpo.wire import crc32c
from matpo_broker.disk import Disk
from matpo_broker.journal import (
    CHUNK_BYTES,
    FILE_MAGIC,
    DiskFullError,
    Journal,
    Sealed,
    hash_file,
    join_crc32c,
    read_episodes,
    record_end,
    sealed_as,
)
from matpo_broker.tables import Location, StoredRow


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, file_bytes=1000)
    yield journal
    journal.close()


class SmallDisk(Disk):
    """A disk with so many bytes free for payload files; it can also lie about them, and break."""

    def __init__(self, free: int, *, lies: bool = False, error: int = errno.ENOSPC) -> None:
        self.free = free
        self.lies = lies
        self.error = error
        self.calls: list[str] = []

    def free_bytes(self, folder: Path) -> int:
        return 2**40 if self.lies else self.free

    def allocate(self, descriptor: int, offset: int, num_bytes: int) -> None:
        if num_bytes > self.free:
            raise OSError(self.error, os.strerror(self.error))
        self.free -= num_bytes
        super().allocate(descriptor, offset, num_bytes)

    def write(self, descriptor: int, buffers: Iterable[bytes | memoryview], offset: int) -> None:
        self.calls.append("write")
        super().write(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        self.calls.append("sync")
        super().sync(descriptor)

    def sync_folder(self, path: Path) -> None:
        self.calls.append("sync_folder")
        super().sync_folder(path)


def append(journal: Journal, episode: str, payload: bytes) -> Location:
    return journal.append(episode, payload, crc32c(payload))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("payload-*.bin"))


def row(episode: str, location: Location) -> StoredRow:
    return StoredRow(episode=episode, group="g", index=0, member=0, attempt=0, location=location)


# ---- appending and reading


def test_a_payload_is_read_back_before_and_after_flush(journal: Journal) -> None:
    location = append(journal, "g-0.0.0", b"abc")
    assert journal.read("g-0.0.0", location) == b"abc"
    journal.flush(sync=True)
    assert journal.read("g-0.0.0", location) == b"abc"


def test_what_was_appended_is_on_disk_after_flush_its_name_included(tmp_path: Path) -> None:
    disk = SmallDisk(2**40)
    journal = Journal(tmp_path, file_bytes=1000, disk=disk)
    disk.calls.clear()
    append(journal, "e0", b"abc")
    append(journal, "e1", b"def")
    assert journal.has_unsynced
    journal.flush(sync=True)
    assert disk.calls == ["write", "sync", "sync_folder"]
    append(journal, "e2", b"ghi")
    journal.flush(sync=False)
    assert disk.calls[3:] == ["write"]
    assert journal.has_unsynced
    journal.flush(sync=True)
    assert disk.calls[4:] == ["sync"]
    assert not journal.has_unsynced
    journal.flush(sync=True)
    assert disk.calls[5:] == []
    journal.close()


def test_payloads_of_any_buffer_and_size_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=2**20)
    payloads: list[bytes | memoryview] = [b"", b"x", memoryview(b"abc"), os.urandom(3_000_000), b"end"]
    payloads += [bytes([i % 251]) * i for i in range(2000)]  # more buffers than one pwritev takes
    places = [journal.append(f"e{i}", p, crc32c(p)) for i, p in enumerate(payloads)]
    sealed = journal.flush(sync=True)
    assert [journal.read(f"e{i}", place) for i, place in enumerate(places)] == [bytes(p) for p in payloads]
    for file in sealed:
        assert hash_file(tmp_path / f"payload-{file.number:08d}.bin") == (file.num_bytes, file.crc32c)
    journal.close()


def test_a_write_that_the_kernel_cuts_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: real(fd, [bytes(buffers[0])[:7]], offset))
    journal = Journal(tmp_path, file_bytes=10_000)
    payloads = [os.urandom(100), b"", os.urandom(64)]
    places = [append(journal, f"e{i}", p) for i, p in enumerate(payloads)]
    journal.flush(sync=True)
    assert [journal.read(f"e{i}", place) for i, place in enumerate(places)] == payloads
    journal.close()


def test_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "journal"
    journal = Journal(folder, file_bytes=1000)
    append(journal, "e", b"x")
    journal.flush(sync=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"journal": 0o700, "lock": 0o600, "payload-00000000.bin": 0o600}
    journal.close()


# ---- sealing


def test_a_new_file_begins_when_one_is_full_and_the_full_one_is_cut_to_its_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    places = [append(journal, f"e{i}", bytes([i]) * 600) for i in range(5)]
    sealed = journal.flush(sync=True)
    assert [place.file for place in places] == [0, 0, 1, 1, 2]
    assert journal.current_file == 2
    ends = [record_end("e1", places[1]), record_end("e3", places[3])]
    assert [(file.number, file.num_bytes) for file in sealed] == [(0, ends[0]), (1, ends[1])]
    assert [path.stat().st_size for path in files(tmp_path)][:2] == ends
    journal.seal()
    sealed += journal.flush(sync=True)
    assert journal.current_file is None
    assert journal.num_bytes == sum(path.stat().st_size for path in files(tmp_path))
    for file, path in zip(sealed, files(tmp_path), strict=True):
        assert hash_file(path) == (file.num_bytes, file.crc32c)
    journal.close()


def test_a_sealed_files_hash_says_what_was_to_be_in_it_not_what_was_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=300_000)
    payloads = [os.urandom(random.Random(i).randrange(0, 200_000)) for i in range(12)]
    places = [append(journal, f"e{i}", p) for i, p in enumerate(payloads)]
    journal.seal()
    sealed = journal.flush(sync=True)
    rows = [row(f"e{i}", place) for i, place in enumerate(places)]
    for file in sealed:
        path = tmp_path / f"payload-{file.number:08d}.bin"
        path.write_bytes(b"rot")
        assert sealed_as(file.number, [r for r in rows if r.location.file == file.number]) == file
    journal.close()


def test_rows_with_a_gap_give_no_hash(journal: Journal) -> None:
    places = [append(journal, f"e{i}", b"x" * 10) for i in range(3)]
    assert isinstance(sealed_as(0, [row(f"e{i}", place) for i, place in enumerate(places)]), Sealed)
    assert sealed_as(0, [row("e0", places[0]), row("e2", places[2])]) is None
    assert sealed_as(0, [row("e1", places[1])]) is None


def test_hashes_of_two_pieces_join_to_the_hash_of_both() -> None:
    draw = random.Random(0)
    for length in [0, 1, 2, 255, 4096, 2**20, *(draw.randrange(100_000) for _ in range(50))]:
        first, second = draw.randbytes(draw.randrange(100)), draw.randbytes(length)
        assert join_crc32c(crc32c(first), crc32c(second), length) == google_crc32c.value(first + second)


def test_sealed_files_wait_for_the_sync_that_finishes_them(journal: Journal) -> None:
    for i in range(3):
        append(journal, f"e{i}", b"x" * 600)
    assert journal.flush(sync=False) == []
    assert [file.number for file in journal.flush(sync=True)] == [0]


def test_without_any_sync_files_are_sealed_by_the_flush(tmp_path: Path) -> None:
    disk = SmallDisk(2**40)
    journal = Journal(tmp_path, file_bytes=1000, disk=disk, ever_sync=False)
    disk.calls.clear()
    for i in range(3):
        append(journal, f"e{i}", b"x" * 600)
    assert [file.number for file in journal.flush(sync=False)] == [0]
    assert "sync" not in disk.calls
    journal.close()


# ---- a full disk


def test_space_is_reserved_in_chunks_and_exactly_when_a_chunk_does_not_fit(tmp_path: Path) -> None:
    disk = SmallDisk(CHUNK_BYTES + 500)
    journal = Journal(tmp_path, file_bytes=2**30, disk=disk)
    append(journal, "e0", b"x" * 100)
    assert disk.free == 500
    append(journal, "e1", b"x" * (CHUNK_BYTES - 100))
    assert 0 < disk.free < 500
    journal.close()


def test_a_full_disk_shows_before_a_byte_is_written_and_leaves_the_ledgers_share(tmp_path: Path) -> None:
    for lies in (False, True):  # free space shows in statvfs, or only in the reservation itself
        folder = tmp_path / str(lies)
        disk = SmallDisk(3000, lies=lies)
        journal = Journal(folder, file_bytes=2**20, disk=disk, keep_free_bytes=1000)
        kept = [append(journal, "e0", b"a" * 1500)]
        with pytest.raises(DiskFullError, match="Free space"):
            append(journal, "e1", b"b" * 1500)
        if not lies:
            assert disk.free >= 1000
        journal.flush(sync=True)
        disk.free += 10_000
        kept.append(append(journal, "e2", b"c" * 1500))
        journal.seal()
        (sealed,) = journal.flush(sync=True)
        assert journal.read("e0", kept[0]) + journal.read("e2", kept[1]) == b"a" * 1500 + b"c" * 1500
        assert sealed_as(0, [row("e0", kept[0]), row("e2", kept[1])]) == sealed  # no gap where e1 would have been
        journal.close()


def test_a_file_begun_on_a_full_disk_is_used_later_or_goes(tmp_path: Path) -> None:
    disk = SmallDisk(0)
    journal = Journal(tmp_path, file_bytes=1000, disk=disk)
    with pytest.raises(DiskFullError):
        append(journal, "e0", b"x")
    with pytest.raises(DiskFullError):
        append(journal, "e0", b"x")
    assert len(files(tmp_path)) == 1
    journal.seal()
    assert journal.flush(sync=True) == []
    assert files(tmp_path) == []
    journal.close()


def test_a_broken_disk_is_not_a_full_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000, disk=SmallDisk(0, lies=True, error=errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        append(journal, "e0", b"x")
    journal.close()


# ---- recovery


def test_nothing_is_appended_to_a_file_that_another_process_began(tmp_path: Path) -> None:
    places = []
    for _ in range(2):
        journal = Journal(tmp_path, file_bytes=1000)
        places.append(append(journal, "e", b"x"))
        journal.flush(sync=True)
        journal.close()
    assert [place.file for place in places] == [0, 1]


def test_recovery_keeps_what_the_ledger_knows_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    kept = append(journal, "e0", b"kept")
    append(journal, "e1", b"orphan")
    append(journal, "e2", b"x" * 1000)
    append(journal, "e3", b"in an orphan file")
    journal.flush(sync=True)
    journal.close()
    assert len(files(tmp_path)) == 2
    again = Journal(tmp_path, file_bytes=1000)
    end = record_end("e0", kept)
    found = again.recover({0: end})
    assert found.cut_bytes > 0
    assert found.damaged == {}
    assert [path.stat().st_size for path in files(tmp_path)] == [end]
    assert again.num_bytes == end
    assert again.read("e0", kept) == b"kept"
    again.close()


def test_recovery_in_a_running_process_forgets_the_queue_and_begins_a_new_file(
    journal: Journal, tmp_path: Path
) -> None:
    kept = append(journal, "e0", b"kept")
    journal.flush(sync=True)
    lost = append(journal, "e1", b"lost")
    journal.recover({0: record_end("e0", kept)})
    with pytest.raises(JournalError, match="the file ends inside it"):
        journal.read("e1", lost)
    later = append(journal, "e2", b"later")
    assert later.file == 1
    journal.flush(sync=True)
    assert (journal.read("e0", kept), journal.read("e2", later)) == (b"kept", b"later")
    assert files(tmp_path)[0].stat().st_size == record_end("e0", kept)


def test_recovery_names_damaged_files_and_never_uses_their_numbers_again(tmp_path: Path) -> None:
    for number, content in ((0, FILE_MAGIC + b"x" * 92), (1, FILE_MAGIC + b"x" * 50), (2, b"MATPOJ0\n" + b"x" * 92)):
        (tmp_path / f"payload-{number:08d}.bin").write_bytes(content)
    journal = Journal(tmp_path, file_bytes=1000)
    found = journal.recover({0: 100, 1: 100, 2: 100, 7: 100})
    assert found.damaged == {1: "torn", 2: "magic", 7: "missing"}
    assert [path.stat().st_size for path in files(tmp_path)] == [100, 58, 100]
    assert append(journal, "e", b"x").file == 8
    journal.close()


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("payload-notes!!.bin", "payload-00000001.bin.bak", "notes.txt"):
        (tmp_path / name).write_bytes(b"mine")
    journal = Journal(tmp_path, file_bytes=1000)
    journal.recover({})
    journal.close()
    assert len(list(tmp_path.iterdir())) == 4  # and the lock


def test_a_file_in_progress_is_not_removed(journal: Journal, tmp_path: Path) -> None:
    append(journal, "e0", b"x" * 1000)
    append(journal, "e1", b"y")
    journal.flush(sync=True)
    journal.remove([0, 1, 5])
    assert [path.name for path in files(tmp_path)] == ["payload-00000001.bin"]


# ---- damage


def test_every_flipped_byte_of_a_record_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=100)
    location = append(journal, "g-0.0.0", b"payload")
    journal.seal()
    journal.flush(sync=True)
    path = files(tmp_path)[0]
    good = path.read_bytes()
    for position in range(location.offset, len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(JournalError, match=r"byte 8: the bytes are not those"):
            journal.read("g-0.0.0", location)
    journal.close()


def test_every_cut_of_a_record_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=100)
    location = append(journal, "g-0.0.0", b"payload")
    journal.seal()
    journal.flush(sync=True)
    path = files(tmp_path)[0]
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(JournalError, match="the file ends inside it"):
            journal.read("g-0.0.0", location)
    journal.close()


def test_a_record_in_another_place_is_found(journal: Journal) -> None:
    places = [append(journal, f"e{i}", b"same payload") for i in range(2)]
    journal.flush(sync=True)
    with pytest.raises(JournalError, match="the bytes are not those"):
        journal.read("e0", places[1])


def test_a_missing_file_is_named(journal: Journal) -> None:
    with pytest.raises(JournalError, match=r"payload-00000007\.bin"):
        journal.read("e", Location(file=7, offset=8, num_bytes=1, crc32c=0))


def test_one_process_at_a_time_uses_a_folder(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="in use by another broker"):
        Journal(tmp_path, file_bytes=1000)


def test_a_folder_without_a_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there"):
        list(read_episodes(tmp_path))
