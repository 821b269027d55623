"""What people may know about a ledger: counts and listings. Changes nothing; works on read-only connections."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence

import msgpack

from matpo import wire
from matpo.errors import RefusedError

MAX_ROWS_BYTES = wire.MAX_HEADER_BYTES - 4096  # what is left for the rest of the message is more than it needs

Cell = int | float | str | None

_STATES = {
    "": "1",
    "open": "state = 'open' AND consumed = 0",
    "ready": "state != 'open' AND consumed = 0 AND delivered IS NULL",
    "delivered": "consumed = 0 AND delivered IS NOT NULL",
    "consumed": "consumed = 1",
    "dropped": "state = 'dropped'",
    "quarantined": "state = 'quarantined'",
}
_GROUP_COLUMNS = {
    "group": "grp", "index": "idx", "state": "state", "reason": "reason", "stored": "num_stored",
    "members": "group_size", "bytes": "num_bytes", "tokens": "num_tokens", "min_version": "min_version",
    "strikes": "strikes", "delivered_to_epoch": "delivered", "trained": "trained", "consumed": "consumed",
    "actor": "owner",
}  # fmt: skip
_MEMBER_COLUMNS = (
    "group", "member", "state", "attempt", "episode", "actor", "environment", "tokens", "bytes", "crc32c", "file",
    "offset", "failures", "timeouts",
)  # fmt: skip


class Past:
    """Counts of the orders below an index, kept so that they need not be counted again.

    Only for orders that every kept checkpoint covers: those change no more, but by a purge (then begin with a new one).
    """

    def __init__(self) -> None:
        self.below = 0
        self.groups: Counter[tuple[str, int, int]] = Counter()  # by (state, consumed, delivered IS NULL)
        self.episodes = 0

    def extend(self, db: sqlite3.Connection, below: int) -> None:
        """Take in the orders up to `below`."""
        if below > self.below:
            self.groups.update(_groups(db, self.below, below))
            self.episodes += _episodes(db, self.below, below)
            self.below = below


def _groups(db: sqlite3.Connection, low: int, high: int) -> dict[tuple[str, int, int], int]:
    rows = db.execute(
        "SELECT state, consumed, delivered IS NULL, count(*) FROM orders WHERE idx >= ? AND idx < ? GROUP BY 1, 2, 3",
        (low, high),
    )
    return {(state, consumed, waits): n for state, consumed, waits, n in rows}


def _episodes(db: sqlite3.Connection, low: int, high: int) -> int:
    return int(db.execute("SELECT count(*) FROM episodes WHERE idx >= ? AND idx < ?", (low, high)).fetchone()[0])


def counts(db: sqlite3.Connection, past: Past | None = None) -> dict[str, int]:
    """What is where, by count. Orders that `compact` pruned are counted too, and so are those of `past`."""
    past = past or Past()
    found = past.groups + Counter(_groups(db, past.below, _ALL))
    rows = [(*key, n) for key, n in found.items()]
    pruned = dict(db.execute("SELECT state, sum(groups) FROM history GROUP BY 1"))
    state = {s: pruned.get(s, 0) + sum(n for found, _, _, n in rows if found == s) for s in _ORDER_STATES}
    return {
        "orders": sum(state.values()),
        "orders_open": sum(n for s, consumed, _, n in rows if s == "open" and not consumed),
        "groups_whole": state["whole"],
        "groups_dropped": state["dropped"],
        "groups_quarantined": state["quarantined"],
        "groups_ready": sum(n for s, done, waits, n in rows if s != "open" and not done and waits),
        "groups_delivered": sum(n for _, consumed, waits, n in rows if not consumed and not waits),
        "groups_consumed": sum(pruned.values()) + sum(n for _, consumed, _, n in rows if consumed),
        "members_open": num_free(db),
        "members_leased": _one(db, "SELECT count(*) FROM members WHERE lease IS NOT NULL"),
        "episodes_stored": past.episodes
        + _episodes(db, past.below, _ALL)
        + _one(db, "SELECT coalesce(sum(episodes), 0) FROM history"),
        "backlog_bytes": backlog_bytes(db),
        "epoch": _meta(db, "epoch", 0),
        "snapshot_version": _meta(db, "snapshot_version", -1),
    }


_ORDER_STATES = ("open", "whole", "dropped", "quarantined")
_ALL = 2**63 - 1


def backlog_bytes(db: sqlite3.Connection) -> int:
    """Payload bytes of groups that wait for the learner, whole or not."""
    return _one(db, "SELECT coalesce(sum(num_bytes), 0) FROM orders WHERE consumed = 0 AND delivered IS NULL")


def flow(db: sqlite3.Connection) -> tuple[int, int]:
    """(groups ready, orders open) of what waits."""
    ready, open_orders = db.execute(
        "SELECT count(*) FILTER (WHERE state != 'open'), count(*) FILTER (WHERE state = 'open') FROM orders"
        " WHERE consumed = 0 AND delivered IS NULL"
    ).fetchone()
    return ready, open_orders


def num_free(db: sqlite3.Connection) -> int:
    """Members that no actor holds and that are still wanted."""
    return _one(
        db,
        "SELECT count(*) FROM orders JOIN members USING (idx)"
        " WHERE consumed = 0 AND delivered IS NULL AND lease IS NULL",
    )


def peek(db: sqlite3.Connection, message: wire.Peek) -> tuple[Sequence[str], list[list[Cell]]]:
    """Groups as a table (columns, rows), oldest first; with `message.group` the members of that group.

    At least one row if there is any, and no more than fit into a message.
    """
    if message.group:
        return _MEMBER_COLUMNS, _fitting(_members(db, message))
    rows = db.execute(
        f"SELECT {', '.join(_GROUP_COLUMNS.values())} FROM orders WHERE {_STATES[message.state]} AND idx > ?"
        " ORDER BY idx LIMIT ?",
        (message.after, message.limit),
    )
    return list(_GROUP_COLUMNS), _fitting(rows)


def key_column(columns: Sequence[str]) -> int:
    """The column of a table of `peek` whose last value is the next one's `after`."""
    return columns.index("member" if "member" in columns else "index")


def _members(db: sqlite3.Connection, message: wire.Peek) -> Iterable[Sequence[Cell]]:
    index = db.execute("SELECT idx FROM orders WHERE grp = ?", (message.group,)).fetchone()
    if index is None:
        raise RefusedError(f"there is no group {message.group}. `peek` without --group lists them.", reason="no_group")
    values = (message.group, *index, message.after, message.limit)
    stored = db.execute(
        "SELECT ?, member, 'stored', attempt, episode, actor, environment, num_tokens, num_bytes, crc32c, file, offset,"
        " 0, 0 FROM episodes WHERE idx = ? AND member > ? ORDER BY member LIMIT ?",
        values,
    )
    missing = db.execute(
        "SELECT ?, member, CASE WHEN lease IS NULL THEN 'free' ELSE 'leased' END, attempt, NULL, actor, NULL, NULL,"
        " NULL, NULL, NULL, NULL, failures, timeouts FROM members WHERE idx = ? AND member > ? ORDER BY member LIMIT ?",
        values,
    )
    return sorted((*stored, *missing), key=lambda row: int(row[1]))[: message.limit]


def _fitting(rows: Iterable[Sequence[Cell]]) -> list[list[Cell]]:
    """As many of the first rows as fit into a message: the names in them are as long as peers like."""
    fitting: list[list[Cell]] = []
    num_bytes = 0
    for row in rows:
        num_bytes += len(msgpack.packb(row))
        if fitting and num_bytes > MAX_ROWS_BYTES:
            break
        fitting.append(list(row))
    return fitting


def _one(db: sqlite3.Connection, query: str) -> int:
    return int(db.execute(query).fetchone()[0])


def _meta(db: sqlite3.Connection, key: str, default: int) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return default if row is None else int(row[0])
