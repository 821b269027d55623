"""The ledger's tables, and what others may read from them without the broker. Decides nothing.

Everything below `open_read_only` works on a journal folder whose broker runs, has stopped, or was killed.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matpo.errors import JournalError, SetupError

FORMAT = 2
LEDGER_NAME = "ledger.sqlite"
MIN_SQLITE = (3, 35)  # RETURNING

# Without spilling, only a commit can find the disk full, never a statement before it.
_PRAGMAS = (
    "journal_mode = WAL", "synchronous = FULL", "busy_timeout = 5000", "cache_size = -16384", "cache_spill = OFF",
    "temp_store = MEMORY",
)  # fmt: skip
_TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
-- clean: it said goodbye. Otherwise it died, and what was in its hands is under suspicion.
CREATE TABLE learners(epoch INTEGER PRIMARY KEY, incarnation TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
  clean INTEGER NOT NULL DEFAULT 0);
-- state: open (members missing), whole, dropped (given up: `reason`), quarantined (set aside: `reason`, payloads kept).
-- delivered: epoch that has it. trained: it went through an update. strikes: learners that died with it. task: msgpack.
-- min_version: oldest policy version of a sampled token of its stored episodes.
CREATE TABLE orders(idx INTEGER PRIMARY KEY, grp TEXT NOT NULL UNIQUE, group_size INTEGER NOT NULL, task BLOB NOT NULL,
  state TEXT NOT NULL DEFAULT 'open', reason TEXT NOT NULL DEFAULT '', owner TEXT,
  num_stored INTEGER NOT NULL DEFAULT 0, num_bytes INTEGER NOT NULL DEFAULT 0, num_tokens INTEGER NOT NULL DEFAULT 0,
  min_version INTEGER, delivered INTEGER, trained INTEGER NOT NULL DEFAULT 0, strikes INTEGER NOT NULL DEFAULT 0,
  consumed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX waiting ON orders(idx) WHERE consumed = 0 AND delivered IS NULL;
CREATE INDEX owned ON orders(owner, idx) WHERE state = 'open' AND consumed = 0;
-- members without an episode. `attempt` counts hand-outs, `failures` those that ended badly, `timeouts` those that the
-- actor let run out.
CREATE TABLE members(idx INTEGER NOT NULL, member INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0, timeouts INTEGER NOT NULL DEFAULT 0, lease TEXT UNIQUE, actor TEXT,
  PRIMARY KEY(idx, member)) WITHOUT ROWID;
-- file is NULL once the payload was deleted.
CREATE TABLE episodes(idx INTEGER NOT NULL, member INTEGER NOT NULL, attempt INTEGER NOT NULL, episode TEXT NOT NULL,
  lease TEXT NOT NULL, actor TEXT NOT NULL, environment TEXT NOT NULL, num_tokens INTEGER NOT NULL, file INTEGER,
  offset INTEGER NOT NULL, num_bytes INTEGER NOT NULL, crc32c INTEGER NOT NULL, PRIMARY KEY(idx, member)) WITHOUT ROWID;
CREATE INDEX by_lease ON episodes(lease);
CREATE INDEX by_file ON episodes(file, offset) WHERE file IS NOT NULL;
-- sealed payload files: nothing is appended to them any more. crc32c is of the whole file.
CREATE TABLE files(number INTEGER PRIMARY KEY, num_bytes INTEGER NOT NULL, crc32c INTEGER NOT NULL);
CREATE TABLE commits(checkpoint TEXT NOT NULL, epoch INTEGER NOT NULL, consumed_below INTEGER NOT NULL,
  oldest_kept_below INTEGER NOT NULL, PRIMARY KEY(checkpoint, epoch));
-- what `compact` pruned: orders with an index below meta's compacted_below.
CREATE TABLE history(state TEXT NOT NULL, reason TEXT NOT NULL, groups INTEGER NOT NULL, episodes INTEGER NOT NULL,
  tokens INTEGER NOT NULL, PRIMARY KEY(state, reason)) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a payload lies: file number, byte at which its record begins, payload length and hash."""

    file: int
    offset: int
    num_bytes: int
    crc32c: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRow:
    """One stored episode as the ledger knows it, for example "g-00000007.2.0"."""

    episode: str
    group: str
    index: int
    member: int
    attempt: int
    location: Location


@dataclass(frozen=True, kw_only=True, slots=True)
class Accounting:
    """What became of every order, by id: groups "g-00000007", members (group, member), episodes "g-00000007.2.0"."""

    orders: Sequence[str]
    members: Sequence[tuple[str, int]]  # every place of every order
    stored: Mapping[tuple[str, int], str]  # (group, member) -> episode; a member has at most one
    whole: Sequence[str]  # every member stored
    delivered: Sequence[str]  # the learner has it, no checkpoint covers it yet
    committed: Sequence[str]  # a checkpoint of the learner covers it
    dropped: Mapping[str, str]  # group -> why it was given up
    quarantined: Mapping[str, str] = field(default_factory=dict)  # group -> why it was set aside
    compacted_below: int = 0  # orders with a smaller index are not in here: `compact` has forgotten them
    groups_compacted: int = 0  # how many those are
    episodes_compacted: int = 0  # and how many episodes they had


def connect(path: Path | str, run: str) -> sqlite3.Connection:
    """Open the ledger for writing, made first if it is not there. Raises JournalError: damaged, or of another run.

    Any thread may use the connection, never two at once: the broker commits in a thread of its own.
    """
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise SetupError(
            f"this Python has SQLite {sqlite3.sqlite_version}, want {'.'.join(map(str, MIN_SQLITE))}. Use a newer one."
        )
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            first = {"format": FORMAT, "journal": secrets.token_hex(4), "run": run}
            db.execute("BEGIN")
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.executemany("INSERT INTO meta VALUES (?, ?)", first.items())
            db.execute("COMMIT")
        found = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('format', 'run')"))
    except sqlite3.Error as error:
        db.close()
        raise JournalError(
            f"{path} cannot be used as a ledger: {error}. Restore it, or set run.folder to another.", reason="ledger"
        ) from error
    if found.get("format") != FORMAT:
        db.close()
        raise JournalError(f"{path} has format {found.get('format')}, want {FORMAT}. Use the release that wrote it.")
    if found.get("run") != run:
        db.close()
        raise JournalError(
            f'{path} belongs to run "{found.get("run")}", this is run "{run}". Set run.folder to another folder.',
            reason="other_run",
        )
    return db


def open_read_only(path: Path) -> sqlite3.Connection:
    """The ledger of a journal, for reading. Raises JournalError when it is not there."""
    if not path.is_file():
        raise JournalError(f"{path} does not exist: no journal there. Name a run's journal folder.", reason="missing")
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


class Meta:
    """The ledger's single values, kept in memory and written through into the open transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._values: dict[str, Any] = dict(db.execute("SELECT key, value FROM meta"))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return self._values.get(key, default)

    def set(self, **values: str | int) -> None:
        """Change values."""
        changed = [(key, value) for key, value in values.items() if self._values.get(key) != value]
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", changed)
        self._values.update(changed)


def stored_rows(path: Path) -> Iterator[StoredRow]:
    """Stored episodes whose payload is still there, by group and member."""
    db = open_read_only(path)
    try:
        yield from rows_of(db)
    finally:
        db.close()


def accounting(folder: Path) -> Accounting:
    """Account for every order of a journal folder. Raises JournalError when there is none."""
    db = open_read_only(folder / LEDGER_NAME)
    try:
        db.execute("BEGIN")  # one view of all tables
        below = dict(db.execute("SELECT key, value FROM meta WHERE key = 'compacted_below'")).get("compacted_below", 0)
        orders = db.execute(
            "SELECT grp, group_size, state, reason, delivered, consumed FROM orders WHERE idx >= ? ORDER BY idx",
            (below,),
        ).fetchall()
        episodes = db.execute(
            "SELECT grp, member, episode FROM episodes JOIN orders USING (idx) WHERE idx >= ? ORDER BY idx, member",
            (below,),
        )
        stored = {(group, member): episode for group, member, episode in episodes}
        past = [
            db.execute("SELECT coalesce(sum(groups), 0), coalesce(sum(episodes), 0) FROM history").fetchone(),
            # `compact` leaves some of their rows: quarantined ones, and those with a payload in a file that is kept.
            db.execute(
                "SELECT count(*), (SELECT count(*) FROM episodes WHERE idx < ?) FROM orders WHERE idx < ?",
                (below, below),
            ).fetchone(),
        ]
    finally:
        db.close()
    return Accounting(
        compacted_below=below,
        groups_compacted=sum(groups for groups, _ in past),
        episodes_compacted=sum(episodes for _, episodes in past),
        orders=[group for group, *_ in orders],
        members=[(group, member) for group, size, *_ in orders for member in range(size)],
        stored=stored,
        whole=[group for group, _, state, *_ in orders if state == "whole"],
        delivered=[group for group, *_, delivered, consumed in orders if delivered is not None and not consumed],
        committed=[group for group, *_, consumed in orders if consumed],
        dropped={group: reason for group, _, state, reason, *_ in orders if state == "dropped"},
        quarantined={group: reason for group, _, state, reason, *_ in orders if state == "quarantined"},
    )


def rows_of(db: sqlite3.Connection, condition: str = "", *values: object) -> Iterator[StoredRow]:
    """Stored episodes that still have a payload and fulfil a condition (our own SQL, never a peer's text)."""
    query = (
        "SELECT episode, grp, idx, member, attempt, file, offset, e.num_bytes, crc32c FROM episodes e"
        f" JOIN orders USING (idx) WHERE file IS NOT NULL {condition} ORDER BY idx, member"
    )
    for episode, group, index, member, attempt, file, offset, num_bytes, crc in db.execute(query, values):
        location = Location(file=file, offset=offset, num_bytes=num_bytes, crc32c=crc)
        yield StoredRow(episode=episode, group=group, index=index, member=member, attempt=attempt, location=location)
