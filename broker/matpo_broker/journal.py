"""Payload files: append-only, framed, hashed. Which bytes count is the ledger's business.

A file is FILE_MAGIC and then records, one after the other:

    "EPIS" | u16 id length | u64 payload length | u32 CRC32C of payload | id | u32 CRC32C of all before | payload

While it grows, zeros follow that were reserved for what comes. A sealed file is cut to its records, and its length and
CRC32C stand in the ledger.

Rules kept here; each has a test in tests/broker/test_journal.py:
1. What was appended is on disk after `flush(sync=True)`, the file's name in its folder included.
2. A full disk shows in `append`, before a byte is written: space is reserved first, and some is left for the ledger.
3. Nothing is appended to a file that another process began, or that an error cut short: a torn tail is never in the
   middle of a file.
4. A record that was altered, cut or moved is an error for that record only, never wrong bytes.
5. A sealed file's hash says what was to be in it, never what was found in it.
6. Recovery keeps what the ledger knows, and nothing else.
7. One process at a time uses a folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import google_crc32c

from matpo.errors import JournalError
from matpo.wire import crc32c
from matpo_broker.disk import FILE_MODE, Disk, says_full
from matpo_broker.tables import LEDGER_NAME, Location, StoredRow, stored_rows

FILE_MAGIC = b"MATPOJ1\n"
RECORD_MAGIC = b"EPIS"
CHUNK_BYTES = 8 * 2**20  # reserved at once: a reservation costs a file system transaction
_HEAD = struct.Struct("<4sHQI")
_CRC = struct.Struct("<I")
_NAME = re.compile(r"payload-(\d{8})\.bin")


class DiskFullError(JournalError):
    """There is no room for this record; nothing was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEpisode:
    """One episode as it lies in a journal. `group` is for example "g-00000007"; `payload` is what the actor sent."""

    episode: str
    group: str
    index: int
    member: int
    attempt: int
    payload: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """A payload file that is finished: its length and the CRC32C of all of it."""

    number: int
    num_bytes: int
    crc32c: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """What recovery did and found. `damaged`: file -> missing | torn | magic; its episodes are checked when read."""

    cut_bytes: int
    damaged: Mapping[int, str]


@dataclass(kw_only=True, slots=True)
class _Open:
    """A file that is being appended to, or was in this turn. `size` counts what is queued."""

    number: int
    descriptor: int
    size: int = 0
    written: int = 0
    allocated: int = 0
    crc: int = 0
    sealed: bool = False
    unsynced: bool = False
    queue: list[bytes | memoryview] = field(default_factory=list)


class Journal:
    """The payload files of one folder, held by this process until `close`. No threads: one call at a time.

    `keep_free_bytes` are left to the ledger. `ever_sync` False: sealed files are not synced either.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file_bytes: int,
        disk: Disk | None = None,
        keep_free_bytes: int = 0,
        ever_sync: bool = True,
    ) -> None:
        self._disk = disk or Disk()
        self._folder = folder
        self._file_bytes = file_bytes
        self._keep_free_bytes = keep_free_bytes
        self._ever_sync = ever_sync
        self._disk.make_folder(folder)
        self._lock = _take_lock(folder)
        self._sizes = {number: path_of(folder, number).stat().st_size for number in file_numbers(folder)}
        self._next = max(self._sizes, default=-1) + 1
        self._open: list[_Open] = []  # only the last one is appended to
        self._queued: dict[tuple[int, int], bytes | memoryview] = {}  # payloads by file and offset
        self._new_names = False

    @property
    def num_bytes(self) -> int:
        """Bytes in payload files, without what is only reserved."""
        return sum(self._sizes.values())

    @property
    def current_file(self) -> int | None:
        """Number of the file that is appended to."""
        return self._open[-1].number if self._open and not self._open[-1].sealed else None

    @property
    def has_unsynced(self) -> bool:
        """Whether `flush(sync=True)` has something to do."""
        return self._new_names or any(file.queue or file.unsynced or file.sealed for file in self._open)

    # ---- at a start

    def recover(self, ends: Mapping[int, int], sealed: Collection[int] = ()) -> Recovered:
        """Go back to what the ledger knows: `ends` has, per file, where its last row ends; `sealed` are done already.

        What was queued is forgotten, every file is cut to its end or deleted, and the next append begins a new file.
        """
        for file in self._open:
            self._disk.close(file.descriptor)
        self._open.clear()
        self._queued.clear()
        on_disk = {number: path_of(self._folder, number).stat().st_size for number in file_numbers(self._folder)}
        cut = sum(size for number, size in on_disk.items() if number not in ends)
        for number in on_disk.keys() - ends.keys():
            self._disk.unlink(path_of(self._folder, number))
        for number in on_disk.keys() & ends.keys():
            surplus = max(0, on_disk[number] - ends[number])
            if surplus or number not in sealed:
                self._cut(number, ends[number] if surplus else None)
            cut += surplus
        if self._ever_sync:
            self._disk.sync_folder(self._folder)
        self._new_names = False
        self._sizes = {number: min(on_disk[number], ends[number]) for number in on_disk.keys() & ends.keys()}
        self._next = max([self._next - 1, *on_disk, *ends]) + 1
        return Recovered(cut_bytes=cut, damaged=self._damaged(ends))

    def _cut(self, number: int, num_bytes: int | None) -> None:
        descriptor = self._disk.open(path_of(self._folder, number))
        try:
            if num_bytes is not None:
                self._disk.truncate(descriptor, num_bytes)
            if self._ever_sync:
                self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)

    def _damaged(self, ends: Mapping[int, int]) -> dict[int, str]:
        found = {}
        for number, end in ends.items():
            if number not in self._sizes:
                found[number] = "missing"
            elif self._sizes[number] < end:
                found[number] = "torn"
            elif _read(path_of(self._folder, number), 0, len(FILE_MAGIC)) != [FILE_MAGIC]:
                found[number] = "magic"
        return found

    # ---- while it runs

    def append(self, episode: str, payload: bytes | memoryview, crc: int) -> Location:
        """Give a record its place and queue it; it is durable after `flush`. `crc` is the payload's CRC32C, checked.

        Keeps a reference to `payload`, no copy. Raises DiskFullError: nothing happened. Raises OSError: the disk fails.
        """
        head = record_head(episode, len(payload), crc)
        num_bytes = len(head) + len(payload)
        file = self._reserve(num_bytes)
        if file.size == 0:
            file.queue.append(FILE_MAGIC)
            file.size = len(FILE_MAGIC)
            file.crc = crc32c(FILE_MAGIC)
        location = Location(file=file.number, offset=file.size, num_bytes=len(payload), crc32c=crc)
        file.queue += (head, payload)
        file.size += num_bytes
        file.crc = _crc_after(int(google_crc32c.extend(file.crc, head)), payload, crc)
        self._queued[file.number, location.offset] = payload
        self._sizes[file.number] = file.size
        return location

    def flush(self, *, sync: bool) -> list[Sealed]:
        """Hand what is queued to the kernel, and to the disk if `sync`. Returns files that are finished by it.

        Raises OSError: any part may be written. Then `recover`, or end the process.
        """
        done = []
        for file in self._open:
            if file.queue:
                self._disk.write(file.descriptor, file.queue, file.written)
                file.queue.clear()
                file.written, file.unsynced = file.size, True
            if file.sealed and file.allocated > file.size:
                self._disk.truncate(file.descriptor, file.size)
                file.allocated, file.unsynced = file.size, True
            if sync and file.unsynced:
                self._disk.sync(file.descriptor)
                file.unsynced = False
            if file.sealed and (sync or not self._ever_sync):
                done.append(file)
        self._queued.clear()
        if sync and self._new_names:
            self._disk.sync_folder(self._folder)
            self._new_names = False
        for file in done:
            self._open.remove(file)
            # New files then take the memory of old ones, which is far cheaper than memory that was never touched.
            self._disk.forget_cache(file.descriptor)
            self._disk.close(file.descriptor)
            if file.size == 0:  # begun, but the disk was full
                self._disk.unlink(path_of(self._folder, file.number))
        return [Sealed(number=file.number, num_bytes=file.size, crc32c=file.crc) for file in done if file.size]

    def seal(self) -> None:
        """Let the next append begin a new file, and the next flush finish this one."""
        if self._open:
            self._open[-1].sealed = True

    def read(self, episode: str, location: Location) -> bytes:
        """The payload of one record. Raises JournalError (missing | torn | hash) with file and offset."""
        queued = self._queued.get((location.file, location.offset))
        return read_payload(self._folder, episode, location) if queued is None else bytes(queued)

    def remove(self, files: Collection[int]) -> None:
        """Delete payload files that nothing needs any more; one that is not finished stays until the next start."""
        for number in set(files).difference(file.number for file in self._open):
            self._disk.unlink(path_of(self._folder, number))
            self._sizes.pop(number, None)

    def close(self) -> None:
        """Release files and lock. Writes nothing: what was not flushed was not promised."""
        for file in self._open:
            self._disk.close(file.descriptor)
        self._open.clear()
        self._queued.clear()
        os.close(self._lock)

    # ---- space

    def _reserve(self, num_bytes: int) -> _Open:
        """The file to append to, with room for so many bytes more."""
        if not self._open or self._open[-1].sealed or self._open[-1].size >= self._file_bytes:
            self.seal()
            self._begin_file()
        file = self._open[-1]
        end = (file.size or len(FILE_MAGIC)) + num_bytes
        if end > file.allocated:
            self._allocate(file, end)
        return file

    def _allocate(self, file: _Open, end: int) -> None:
        free = self._disk.free_bytes(self._folder) - self._keep_free_bytes
        ample = max(end, min(file.allocated + CHUNK_BYTES, self._file_bytes))
        for target in (ample, end):
            if target - file.allocated > free:
                continue
            try:
                self._disk.allocate(file.descriptor, file.allocated, target - file.allocated)
            except OSError as error:
                if not says_full(error):
                    raise
            else:
                file.allocated = target
                return
        raise DiskFullError(
            f"{self._folder} has {max(0, free)} bytes to spare, want {end - file.allocated}. Free space on that disk.",
            reason="disk_full",
        )

    def _begin_file(self) -> None:
        try:
            descriptor = self._disk.create(path_of(self._folder, self._next))
        except OSError as error:
            if not says_full(error):
                raise
            raise DiskFullError(f"no room for a new file in {self._folder}. Free space.", reason="disk_full") from error
        self._open.append(_Open(number=self._next, descriptor=descriptor))
        self._next += 1
        self._new_names = True


# ---- records


def record_head(episode: str, num_bytes: int, crc: int) -> bytes:
    """What stands before a payload."""
    name = episode.encode()
    head = _HEAD.pack(RECORD_MAGIC, len(name), num_bytes, crc) + name
    return head + _CRC.pack(crc32c(head))


def record_end(episode: str, location: Location) -> int:
    """Where a record ends in its file."""
    return location.offset + _HEAD.size + len(episode.encode()) + _CRC.size + location.num_bytes


def sealed_as(number: int, rows: Iterable[StoredRow]) -> Sealed | None:
    """Length and hash that a file must have by its ledger rows, whatever is on disk. None: the rows leave gaps."""
    crc, size = crc32c(FILE_MAGIC), len(FILE_MAGIC)
    for row in sorted(rows, key=lambda row: row.location.offset):
        place = row.location
        if place.offset != size:
            return None
        crc = int(google_crc32c.extend(crc, record_head(row.episode, place.num_bytes, place.crc32c)))
        crc = join_crc32c(crc, place.crc32c, place.num_bytes)
        size = record_end(row.episode, place)
    return Sealed(number=number, num_bytes=size, crc32c=crc)


def hash_file(path: Path) -> tuple[int, int]:
    """(length, CRC32C) of a file as it is on disk. Raises OSError."""
    crc = size = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(2**20):
            crc = int(google_crc32c.extend(crc, chunk))
            size += len(chunk)
    return size, crc


def read_payload(folder: Path, episode: str, location: Location) -> bytes:
    """Read and check one record. Raises JournalError (missing | torn | hash) with file and offset."""
    path = path_of(folder, location.file)
    where = f"{path}: record of {episode} at byte {location.offset}"
    expected = record_head(episode, location.num_bytes, location.crc32c)
    try:
        head, payload = _read(path, location.offset, len(expected), location.num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):  # of this process, not of these bytes: too many files, ...
            raise
        raise JournalError(f"{where}: {error.strerror}", reason="missing") from error
    if len(head) + len(payload) != len(expected) + location.num_bytes:
        raise JournalError(f"{where}: the file ends inside it", reason="torn")
    if head != expected or crc32c(payload) != location.crc32c:
        raise JournalError(f"{where}: the bytes are not those that were stored", reason="hash")
    return payload


def read_episodes(folder: Path) -> Iterator[StoredEpisode]:
    """Every episode that a journal folder still holds, by group and member. Works beside a running broker.

    Episodes whose payload file was deleted (every kept checkpoint covers them) are left out.
    Raises JournalError when there is no journal, or a record is damaged.
    """
    for row in stored_rows(folder / LEDGER_NAME):
        yield StoredEpisode(
            episode=row.episode,
            group=row.group,
            index=row.index,
            member=row.member,
            attempt=row.attempt,
            payload=read_payload(folder, row.episode, row.location),
        )


# ---- hashes


def join_crc32c(first: int, second: int, second_bytes: int) -> int:
    """CRC32C of two pieces, one after the other, from the CRC32C of each and the length of the second.

    Source: crc32_combine of zlib, with Castagnoli's polynomial.
    """
    power = 0
    while second_bytes:
        if second_bytes & 1:
            one, two, three, four = _shifts(power)
            first = one[first & 255] ^ two[first >> 8 & 255] ^ three[first >> 16 & 255] ^ four[first >> 24]
        second_bytes >>= 1
        power += 1
    return first ^ second


@cache
def _shifts(power: int) -> Sequence[Sequence[int]]:
    """Behind a CRC come 2^power bytes: what each of its four bytes then is, lowest first, to be xored."""
    shift = 1 << 30  # x^1; bit 31 is x^0
    for _ in range(power + 3):  # a byte is 2^3 bits
        shift = _times(shift, shift)
    return [[_times(byte << place, shift) for byte in range(256)] for place in (0, 8, 16, 24)]


def _times(a: int, b: int) -> int:
    """a(x) * b(x) modulo the polynomial; bit 31 is x^0."""
    product = 0
    while a:
        if a & (1 << 31):
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ 0x82F63B78 if b & 1 else b >> 1
    return product


def _crc_after(crc: int, payload: bytes | memoryview, payload_crc: int) -> int:
    """`crc` after `payload` came behind it: by its bytes if they are few. Many are not in the CPU's cache any more."""
    if len(payload) <= 4 * 2**10:
        return int(google_crc32c.extend(crc, bytes(payload)))
    return join_crc32c(crc, payload_crc, len(payload))


# ---- files


def path_of(folder: Path, number: int) -> Path:
    """A payload file's path."""
    return folder / f"payload-{number:08d}.bin"


def file_numbers(folder: Path) -> list[int]:
    """The payload files in a folder."""
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def _read(path: Path, offset: int, *lengths: int) -> list[bytes]:
    """Pieces of a file, one after the other; shorter when the file ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        for length in lengths:
            pieces.append(os.pread(descriptor, length, offset))
            offset += length
        return pieces
    finally:
        os.close(descriptor)


def _take_lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise JournalError(
            f"the journal {folder} is in use by another broker. Stop that one, or set run.folder to another.",
            reason="locked",
        ) from error
    return descriptor
