"""Payload files: append-only, framed, hashed. Which bytes count is the ledger's business.

A file is FILE_MAGIC and then records, one after the other:

    "EPIS" | u16 id length | u64 payload length | u32 CRC32C of payload | id | u32 CRC32C of all before | payload

Rules kept here; each has a test in tests/broker/test_journal.py:
1. What was appended is on disk after `sync`, the file's name in its folder included.
2. A process never appends to a file that another process began: a torn tail is never in the middle of a file.
3. A record that was altered, cut or moved is an error, never wrong bytes.
4. One process at a time uses a folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

from matpo.errors import JournalError
from matpo.wire import crc32c
from matpo_broker.tables import LEDGER_NAME, Location, StoredRow, stored_rows

FILE_MAGIC = b"MATPOJ1\n"
RECORD_MAGIC = b"EPIS"
_HEAD = struct.Struct("<4sHQI")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEpisode:
    """One episode as it lies in a journal. `group` is for example "g-00000007"; `payload` is what the actor sent."""

    episode: str
    group: str
    index: int
    member: int
    attempt: int
    payload: bytes


class Journal:
    """The payload files of one folder, held by this process until `close`."""

    def __init__(self, folder: Path, *, file_bytes: int) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._lock = _take_lock(folder)
        self._sizes = {number: _path(folder, number).stat().st_size for number in _numbers(folder)}
        self._writer: BufferedWriter | None = None
        self._number = max(self._sizes, default=-1)
        self._new_file = False

    @property
    def num_bytes(self) -> int:
        """Bytes in payload files."""
        return sum(self._sizes.values())

    def recover(self, ends: Mapping[int, int]) -> int:
        """Cut what no ledger row covers: `ends` has, per file, where its last row ends. Returns the bytes cut.

        Files that are not in `ends` go altogether. To be called before the first append.
        """
        cut = 0
        for number, size in list(self._sizes.items()):
            if number not in ends:
                cut += size
                self.remove([number])
            elif size > ends[number]:
                os.truncate(_path(self._folder, number), ends[number])
                cut += size - ends[number]
                self._sizes[number] = ends[number]
        return cut

    def missing(self, ends: Mapping[int, int]) -> list[int]:
        """Files that lack bytes which the ledger knows; their groups will be given up when they are read."""
        return [number for number, end in ends.items() if self._sizes.get(number, 0) < end]

    def append(self, episode: str, payload: bytes, crc: int) -> Location:
        """Write one record; it is durable after `sync`. `crc` is the payload's CRC32C, already checked.

        Raises OSError when the disk does; the caller must then acknowledge nothing any more.
        """
        name = episode.encode()
        head = _HEAD.pack(RECORD_MAGIC, len(name), len(payload), crc) + name
        record = head + _CRC.pack(crc32c(head))
        if self._writer is None or self._sizes[self._number] >= self._file_bytes:
            self._begin_file()
        assert self._writer is not None
        offset = self._sizes[self._number]
        self._writer.write(record)
        self._writer.write(payload)
        self._sizes[self._number] = offset + len(record) + len(payload)
        return Location(file=self._number, offset=offset, num_bytes=len(payload), crc32c=crc)

    def sync(self) -> None:
        """Make every append durable. Raises OSError."""
        if self._writer is not None:
            self._writer.flush()
            os.fdatasync(self._writer.fileno())
        if self._new_file:
            _sync_folder(self._folder)
            self._new_file = False

    def read(self, episode: str, location: Location) -> bytes:
        """The payload of one record. Raises JournalError (missing | torn | hash) with file and offset."""
        if self._writer is not None and location.file == self._number:
            self._writer.flush()
        return read_payload(self._folder, episode, location)

    def remove(self, files: Collection[int]) -> None:
        """Delete payload files that nothing needs any more."""
        for number in files:
            if self._writer is not None and number == self._number:
                continue
            _path(self._folder, number).unlink(missing_ok=True)
            self._sizes.pop(number, None)

    @property
    def current_file(self) -> int | None:
        """Number of the file that is being appended to."""
        return self._number if self._writer is not None else None

    def close(self) -> None:
        """Release files and lock. Syncs nothing: what was not synced was not promised."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        os.close(self._lock)

    def _begin_file(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            os.fdatasync(self._writer.fileno())
            self._writer.close()
        self._number += 1
        self._writer = _path(self._folder, self._number).open("xb")
        self._writer.write(FILE_MAGIC)
        self._sizes[self._number] = len(FILE_MAGIC)
        self._new_file = True


def record_end(episode: str, location: Location) -> int:
    """Where a record ends in its file."""
    return location.offset + _HEAD.size + len(episode.encode()) + _CRC.size + location.num_bytes


def read_payload(folder: Path, episode: str, location: Location) -> bytes:
    """Read and check one record. Raises JournalError (missing | torn | hash) with file and offset."""
    path = _path(folder, location.file)
    where = f"{path}: record of {episode} at byte {location.offset}"
    name = episode.encode()
    head_bytes = _HEAD.size + len(name)
    try:
        with path.open("rb") as file:
            file.seek(location.offset)
            head = file.read(head_bytes + _CRC.size)
            payload = file.read(location.num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):  # of this process, not of these bytes: too many files, ...
            raise
        raise JournalError(f"{where}: {error.strerror}", reason="missing") from error
    if len(head) + len(payload) != head_bytes + _CRC.size + location.num_bytes:
        raise JournalError(f"{where}: the file ends inside it", reason="torn")
    expected = _HEAD.pack(RECORD_MAGIC, len(name), location.num_bytes, location.crc32c) + name
    if head != expected + _CRC.pack(crc32c(expected)) or crc32c(payload) != location.crc32c:
        raise JournalError(f"{where}: the bytes are not those that were stored", reason="hash")
    return payload


def read_episodes(folder: Path) -> Iterator[StoredEpisode]:
    """Every episode that a journal folder still holds, by group and member. Works beside a running broker.

    Episodes whose payload file was deleted (every kept checkpoint covers them) are left out.
    Raises JournalError when there is no journal, or a record is damaged.
    """
    for row in stored_rows(folder / LEDGER_NAME):
        yield _read_row(folder, row)


def _read_row(folder: Path, row: StoredRow) -> StoredEpisode:
    return StoredEpisode(
        episode=row.episode,
        group=row.group,
        index=row.index,
        member=row.member,
        attempt=row.attempt,
        payload=read_payload(folder, row.episode, row.location),
    )


def _path(folder: Path, number: int) -> Path:
    return folder / f"payload-{number:08d}.bin"


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("payload-")) for path in folder.glob("payload-????????.bin"))


def _take_lock(folder: Path) -> int:
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _sync_folder(folder.parent)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise JournalError(
            f"the journal {folder} is in use by another broker. Stop that one, or set run.folder to another.",
            reason="locked",
        ) from error
    return descriptor


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
