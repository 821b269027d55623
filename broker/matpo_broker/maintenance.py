"""Check a journal folder, and make it smaller. Knows no sockets and no messages.

Rules kept here; each has a test in tests/broker/test_maintenance.py:
1. `verify` writes nothing and works beside a running broker: what that adds or deletes meanwhile is no damage.
2. Damage is named by file, byte and episode, and never ends the check.
3. `compact` works only when no broker has the folder. Killed at any instant, it leaves a journal with every payload
   that is still needed.
4. What `compact` forgets was covered by every kept checkpoint, and stays in the counts.
5. A payload file keeps all of its ledger rows or loses all of them: recovery finds its end by the last one.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matpo.errors import JournalError
from matpo_broker.disk import Disk
from matpo_broker.journal import Journal, Sealed, file_numbers, hash_file, path_of, read_payload, record_end
from matpo_broker.tables import FORMAT, LEDGER_NAME, Location, StoredRow, connect, open_read_only, rows_of

MIN_LIVE_FRACTION = 0.5  # a payload file with less that is needed is written anew

Progress = Callable[[int, int], None]  # bytes done, bytes in all

# A payload is needed until the oldest kept checkpoint covers its group, or its group is dropped. People need
# quarantined ones until they purge them.
_NEEDED = "(state = 'quarantined' OR (state != 'dropped' AND idx >= ?))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One thing that is wrong. `file` is a name, for example "payload-00000003.bin"; offset -1: the whole file."""

    file: str
    offset: int = -1
    episode: str = ""
    reason: str
    message: str


@dataclass(kw_only=True, slots=True)
class Verified:
    """What `verify` found. `unknown` files are no damage: the broker's next start deletes them."""

    files: int = 0
    sealed_files: int = 0
    bytes: int = 0
    episodes: int = 0
    orders: int = 0
    unknown: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Compacted:
    """What `compact` did; bytes of payload files and ledger together. `damage` was left as it is."""

    bytes_before: int = 0
    bytes_after: int = 0
    orders_forgotten: int = 0
    episodes_forgotten: int = 0
    files_deleted: int = 0
    files_rewritten: int = 0
    damage: list[Damage] = field(default_factory=list)


# ---- verify


def verify(folder: Path, progress: Progress = lambda done, total: None) -> Verified:
    """Read and hash every record, every sealed file and the ledger. Raises JournalError when there is no journal."""
    found = Verified()
    with contextlib.closing(open_read_only(folder / LEDGER_NAME)) as db:
        try:
            _check_ledger(db, found)
            with _one_view(db):
                rows = list(rows_of(db))
                sealed = {number: (size, crc) for number, size, crc in db.execute("SELECT * FROM files")}
                on_disk = {number: path_of(folder, number).stat().st_size for number in file_numbers(folder)}
            check = _Check(folder, db, found, progress, total=_total(rows, sealed, on_disk))
            for row in sorted(rows, key=lambda row: (row.location.file, row.location.offset)):
                check.record(row)
            for number, (size, crc) in sorted(sealed.items()):
                check.sealed(number, size, crc)
            known = {row.location.file for row in rows} | sealed.keys()
            check.unknown(on_disk.keys() - known)
        except sqlite3.DatabaseError as error:
            found.damage.append(Damage(file=LEDGER_NAME, reason="ledger", message=f"{LEDGER_NAME}: {error}"))
    return found


def _check_ledger(db: sqlite3.Connection, found: Verified) -> None:
    version = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if version is None or version[0] != FORMAT:
        raise JournalError(f"the ledger has format {version}, want {FORMAT}. Use the release that wrote it.")
    problems = [text for (text,) in db.execute("PRAGMA quick_check") if text != "ok"]
    with _one_view(db):
        found.orders = db.execute("SELECT count(*) FROM orders").fetchone()[0]
        problems += [
            f"{group} is {state}, but {stored} of its {size} episodes are there"
            for group, state, size, stored in db.execute(
                "SELECT grp, state, group_size, (SELECT count(*) FROM episodes e WHERE e.idx = o.idx)"
                " AS stored"
                " FROM orders o WHERE state IN ('whole', 'quarantined') AND stored != group_size"
            )
        ]
        problems += [
            f"{episode} is needed, but its payload was deleted"
            for (episode,) in db.execute(
                f"SELECT episode FROM episodes JOIN orders USING (idx) WHERE file IS NULL AND {_NEEDED}",
                (_forgotten_below(db),),
            )
        ]
    found.damage += [Damage(file=LEDGER_NAME, reason="ledger", message=f"{LEDGER_NAME}: {text}") for text in problems]


class _Check:
    """Goes through payload files. What is wrong is looked up in the ledger again: the broker may have deleted it."""

    def __init__(
        self, folder: Path, db: sqlite3.Connection, found: Verified, progress: Progress, *, total: int
    ) -> None:
        self._folder, self._db, self._found = folder, db, found
        self._progress, self._done, self._total = progress, 0, total

    def record(self, row: StoredRow) -> None:
        place = row.location
        try:
            read_payload(self._folder, row.episode, place)
            self._found.episodes += 1
            self._found.bytes += place.num_bytes
        except JournalError as error:
            if list(rows_of(self._db, "AND idx = ? AND member = ? AND file = ?", row.index, row.member, place.file)):
                self._damage(place.file, error.reason, str(error), offset=place.offset, episode=row.episode)
        self._advance(place.num_bytes)

    def sealed(self, number: int, size: int, crc: int) -> None:
        path = path_of(self._folder, number)
        now: tuple[int, int] | OSError
        try:
            now = hash_file(path)
        except OSError as error:
            now = error
        if now != (size, crc) and self._db.execute("SELECT 1 FROM files WHERE number = ?", (number,)).fetchone():
            what = now.strerror if isinstance(now, OSError) else f"{now[0]} bytes with CRC32C {now[1]:08x}"
            self._damage(number, "sealed", f"{path}: {what}, it was sealed with {size} bytes and CRC32C {crc:08x}")
        self._found.sealed_files += 1
        self._advance(size)

    def unknown(self, numbers: set[int]) -> None:
        # Those that the broker began or let go since we looked at the ledger are known now, or gone.
        known = {number for (number,) in self._db.execute("SELECT file FROM episodes UNION SELECT number FROM files")}
        left = sorted(number for number in numbers - known if path_of(self._folder, number).exists())
        self._found.unknown = [path_of(self._folder, number).name for number in left]
        self._found.files = len(file_numbers(self._folder))

    def _damage(self, number: int, reason: str, message: str, *, offset: int = -1, episode: str = "") -> None:
        name = path_of(self._folder, number).name
        self._found.damage.append(Damage(file=name, offset=offset, episode=episode, reason=reason, message=message))

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(self._done, self._total)


def _total(rows: Sequence[StoredRow], sealed: Mapping[int, tuple[int, int]], on_disk: Mapping[int, int]) -> int:
    return sum(row.location.num_bytes for row in rows) + sum(size for size, _ in sealed.values())


# ---- compact


def compact(
    folder: Path, run: str, *, file_bytes: int, disk: Disk | None = None, progress: Progress = lambda done, total: None
) -> Compacted:
    """Give back the space of what no kept checkpoint needs.

    Raises JournalError: no journal, of another run, locked by a broker, no space to write (disk_full). OSError.
    """
    if not (folder / LEDGER_NAME).is_file():
        raise JournalError(f"{folder} has no {LEDGER_NAME}: no journal there. Name a run file.", reason="missing")
    journal = Journal(folder, file_bytes=file_bytes, disk=disk)
    try:
        with contextlib.closing(connect(folder / LEDGER_NAME, run)) as db:
            return _compact(folder, db, journal, disk or Disk(), progress)
    finally:
        journal.close()


def _compact(folder: Path, db: sqlite3.Connection, journal: Journal, disk: Disk, progress: Progress) -> Compacted:
    done = Compacted(bytes_before=_num_bytes(folder))
    sealed: dict[int, int] = dict(db.execute("SELECT number, num_bytes FROM files"))
    ends = _ends(db)
    ends |= {number: max(ends[number], size) for number, size in sealed.items() if number in ends}
    journal.recover(ends, sealed)  # what was never acknowledged goes first, as at each start
    dead = _mostly_dead(folder, db)
    total = sum(num_bytes for num_bytes in dead.values())
    copied = 0
    for number, num_bytes in dead.items():
        try:
            moved = _copy_needed(folder, db, journal, number)
        except JournalError as error:
            if error.reason == "disk_full":
                raise
            done.damage.append(Damage(file=path_of(folder, number).name, reason=error.reason, message=str(error)))
            continue
        with _transaction(db):
            _switch(db, number, moved)
        journal.remove([number])
        done.files_deleted += 1
        done.files_rewritten += bool(moved)
        copied += num_bytes
        progress(copied, total)
    journal.seal()
    with _transaction(db):
        _enter_sealed(db, journal.flush(sync=True))
    disk.sync_folder(folder)
    done.orders_forgotten, done.episodes_forgotten = _prune(db)
    db.execute("VACUUM")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    done.bytes_after = _num_bytes(folder)
    return done


def _ends(db: sqlite3.Connection) -> dict[int, int]:
    last = "AND (file, offset) IN (SELECT file, max(offset) FROM episodes WHERE file IS NOT NULL GROUP BY file)"
    return {row.location.file: record_end(row.episode, row.location) for row in rows_of(db, last)}


def _mostly_dead(folder: Path, db: sqlite3.Connection) -> dict[int, int]:
    """Payload files to be written anew or deleted: number -> bytes that have to be copied."""
    below = _forgotten_below(db)
    rows = db.execute(
        f"SELECT file, coalesce(sum(e.num_bytes) FILTER (WHERE {_NEEDED}), 0), count(*) FILTER (WHERE NOT {_NEEDED})"
        " FROM episodes e JOIN orders USING (idx) WHERE file IS NOT NULL GROUP BY file",
        (below, below),
    ).fetchall()
    found = {}
    for number, needed_bytes, num_dead in rows:
        path = path_of(folder, number)
        if num_dead and path.exists() and needed_bytes < MIN_LIVE_FRACTION * path.stat().st_size:
            found[number] = needed_bytes
    return found


def _copy_needed(
    folder: Path, db: sqlite3.Connection, journal: Journal, number: int
) -> list[tuple[StoredRow, Location]]:
    """Append the records of a file that are still needed, on disk when this returns. The ledger knows nothing yet.

    Raises JournalError: one of them is damaged (nothing is copied), or disk_full.
    """
    rows = list(rows_of(db, f"AND file = ? AND {_NEEDED}", number, _forgotten_below(db)))
    payloads = [read_payload(folder, row.episode, row.location) for row in rows]
    moved = [
        (row, journal.append(row.episode, payload, row.location.crc32c))
        for row, payload in zip(rows, payloads, strict=True)
    ]
    _enter_sealed(db, journal.flush(sync=True))
    return moved


def _switch(db: sqlite3.Connection, number: int, moved: Sequence[tuple[StoredRow, Location]]) -> None:
    """Let the ledger name the copies; the old file has no rows afterwards."""
    places = [(new.file, new.offset, row.index, row.member) for row, new in moved]
    db.executemany("UPDATE episodes SET file = ?, offset = ? WHERE idx = ? AND member = ?", places)
    db.execute("UPDATE episodes SET file = NULL WHERE file = ?", (number,))
    db.execute("DELETE FROM files WHERE number = ?", (number,))


def _enter_sealed(db: sqlite3.Connection, sealed: Sequence[Sealed]) -> None:
    values = [(file.number, file.num_bytes, file.crc32c) for file in sealed]
    db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", values)


def _prune(db: sqlite3.Connection) -> tuple[int, int]:
    """Let the rows of orders go that every kept checkpoint covers; their numbers go to `history`.

    Quarantined ones stay for people, and those with a payload in a file that is kept stay with it.
    """
    below = _forgotten_below(db)
    with _transaction(db):
        db.execute(
            "CREATE TEMP TABLE past AS SELECT idx FROM orders o WHERE idx < ? AND consumed = 1 AND state !="
            " 'quarantined' AND NOT EXISTS (SELECT 1 FROM episodes e WHERE e.idx = o.idx AND e.file IS NOT NULL)",
            (below,),
        )
        db.execute(
            "INSERT INTO history SELECT state, reason, count(*), sum(stored), cast(total(num_tokens) AS INTEGER)"
            " FROM (SELECT state, reason, num_tokens, (SELECT count(*) FROM episodes e WHERE e.idx = o.idx)"
            " AS stored"
            " FROM orders o WHERE idx IN past) GROUP BY 1, 2"
            " ON CONFLICT DO UPDATE SET groups = groups + excluded.groups,"
            " episodes = episodes + excluded.episodes, tokens = tokens + excluded.tokens"
        )
        episodes = db.execute("DELETE FROM episodes WHERE idx IN past").rowcount
        db.execute("DELETE FROM members WHERE idx IN past")
        orders = db.execute("DELETE FROM orders WHERE idx IN past").rowcount
        db.execute("DROP TABLE past")
        if orders:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('compacted_below', ?)", (below,))
    return orders, episodes


# ---- small things


def _forgotten_below(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = 'forgotten_below'").fetchone()
    return 0 if row is None else int(row[0])


def _num_bytes(folder: Path) -> int:
    """Bytes of payload files and ledger. The ballast is none of them."""
    paths = [*(path_of(folder, number) for number in file_numbers(folder)), *folder.glob(f"{LEDGER_NAME}*")]
    return sum(path.stat().st_size for path in paths)


@contextlib.contextmanager
def _one_view(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
