"""What people may know about a ledger: counts and listings. Changes nothing; works on read-only connections."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from matpo import wire
from matpo.errors import RefusedError

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


def counts(db: sqlite3.Connection) -> dict[str, int]:
    """What is where, by count. Orders that `compact` pruned are counted too."""
    rows = db.execute("SELECT state, consumed, delivered IS NULL, count(*) FROM orders GROUP BY 1, 2, 3").fetchall()
    past = dict(db.execute("SELECT state, sum(groups) FROM history GROUP BY 1"))
    state = {s: past.get(s, 0) + sum(n for found, _, _, n in rows if found == s) for s in _ORDER_STATES}
    return {
        "orders": sum(state.values()),
        "orders_open": sum(n for s, consumed, _, n in rows if s == "open" and not consumed),
        "groups_whole": state["whole"],
        "groups_dropped": state["dropped"],
        "groups_quarantined": state["quarantined"],
        "groups_ready": sum(n for s, done, waits, n in rows if s != "open" and not done and waits),
        "groups_delivered": sum(n for _, consumed, waits, n in rows if not consumed and not waits),
        "groups_consumed": sum(past.values()) + sum(n for _, consumed, _, n in rows if consumed),
        "members_open": num_free(db),
        "members_leased": _one(db, "SELECT count(*) FROM members WHERE lease IS NOT NULL"),
        "episodes_stored": _one(db, "SELECT count(*) FROM episodes")
        + _one(db, "SELECT coalesce(sum(episodes), 0) FROM history"),
        "backlog_bytes": backlog_bytes(db),
        "epoch": _meta(db, "epoch", 0),
        "snapshot_version": _meta(db, "snapshot_version", -1),
    }


_ORDER_STATES = ("open", "whole", "dropped", "quarantined")


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
    """Groups as a table (columns, rows), oldest first; with `message.group` the members of that group."""
    if message.group:
        return _MEMBER_COLUMNS, _members(db, message.group)
    rows = db.execute(
        f"SELECT {', '.join(_GROUP_COLUMNS.values())} FROM orders WHERE {_STATES[message.state]} ORDER BY idx LIMIT ?",
        (message.limit,),
    )
    return list(_GROUP_COLUMNS), [list(row) for row in rows]


def _members(db: sqlite3.Connection, group: str) -> list[list[Cell]]:
    index = db.execute("SELECT idx FROM orders WHERE grp = ?", (group,)).fetchone()
    if index is None:
        raise RefusedError(f"there is no group {group}. `peek` without --group lists them.", reason="no_group")
    stored = db.execute(
        "SELECT ?, member, 'stored', attempt, episode, actor, environment, num_tokens, num_bytes, crc32c, file, offset,"
        " 0, 0 FROM episodes WHERE idx = ?",
        (group, *index),
    )
    missing = db.execute(
        "SELECT ?, member, CASE WHEN lease IS NULL THEN 'free' ELSE 'leased' END, attempt, NULL, actor, NULL, NULL,"
        " NULL, NULL, NULL, NULL, failures, timeouts FROM members WHERE idx = ?",
        (group, *index),
    )
    return sorted(([*row] for row in [*stored, *missing]), key=lambda row: row[1])


def _one(db: sqlite3.Connection, query: str) -> int:
    return int(db.execute(query).fetchone()[0])


def _meta(db: sqlite3.Connection, key: str, default: int) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return default if row is None else int(row[0])
