"""Groups that are set aside: their content is invalid, or learners die with them in hand.

Which group kills a learner cannot be seen from outside, so each group in the hands of a learner that ends without a
goodbye gets a strike, unless it went through an update before (`Trained`). One strike below the limit a group is a
suspect: suspects are handed out one at a time, so that the next death has one suspect only. A suspect that goes through
an update is cleared. At the very end of a run, when nothing else can fill a learner's batch, suspects go out together.

All functions work inside the ledger's open transaction; they return (group, reason) pairs for its counters and log.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from matpo.errors import RefusedError

REQUEUED = "requeued"
_BACK = (
    "UPDATE orders SET state = 'whole', reason = '', strikes = 0"
    " WHERE state = 'quarantined' AND consumed = 0 AND reason = ?"
)


def strike(db: sqlite3.Connection, epoch: int, *, limit: int) -> list[str]:
    """Learners before `epoch` died: count it against what they held. Returns groups that are now quarantined."""
    if limit == 0:
        return []
    db.execute(
        "UPDATE orders SET strikes = strikes + 1"
        " WHERE delivered IN (SELECT epoch FROM learners WHERE clean = 0 AND epoch < ?)"
        " AND consumed = 0 AND trained = 0 AND state = 'whole'",
        (epoch,),
    )
    rows = db.execute(
        "UPDATE orders SET state = 'quarantined', reason = 'deliveries'"
        " WHERE strikes >= ? AND consumed = 0 AND trained = 0 AND state = 'whole' RETURNING grp",
        (limit,),
    ).fetchall()
    return [group for (group,) in rows]


def clear(db: sqlite3.Connection, indices: Sequence[int], epoch: int) -> None:
    """These groups went through an update: no suspects any more."""
    db.executemany(
        "UPDATE orders SET trained = 1, strikes = 0 WHERE idx = ? AND delivered = ?", [(i, epoch) for i in indices]
    )


def set_aside(db: sqlite3.Connection, group: str, reason: str, epoch: int) -> bool:
    """The learner finds a delivered group invalid. False: it is quarantined already, or not this learner's."""
    changed = db.execute(
        "UPDATE orders SET state = 'quarantined', reason = ?"
        " WHERE grp = ? AND delivered = ? AND state = 'whole' RETURNING idx",
        (reason, group, epoch),
    ).fetchall()
    return bool(changed)


def next_ready(db: sqlite3.Connection, epoch: int, *, limit: int) -> tuple[int, str, str, str] | None:
    """(index, group, state, reason) of the group to hand out next: the oldest, but no second suspect."""
    if limit <= 1 or not _suspect_out(db, epoch, limit - 1):
        return _oldest_ready(db, strikes_below=2**31)
    row = _oldest_ready(db, strikes_below=limit - 1)
    if row is None and not _others_may_come(db):  # nothing else can fill the learner's batch
        row = _oldest_ready(db, strikes_below=2**31)
    return row


def _oldest_ready(db: sqlite3.Connection, *, strikes_below: int) -> tuple[int, str, str, str] | None:
    row: tuple[int, str, str, str] | None = db.execute(
        "SELECT idx, grp, state, reason FROM orders WHERE consumed = 0 AND delivered IS NULL AND state != 'open'"
        " AND (strikes < ? OR trained = 1 OR state != 'whole') ORDER BY idx LIMIT 1",
        (strikes_below,),
    ).fetchone()
    return row


def requeue(db: sqlite3.Connection, groups: Sequence[str]) -> None:
    """Quarantined groups back into the stream. Raises RefusedError when one is not quarantined, or is consumed."""
    groups = list(dict.fromkeys(groups))
    for group in groups:  # all of them before the first is changed: a refusal changes nothing
        _check_quarantined(db, group)
        consumed = db.execute("SELECT consumed FROM orders WHERE grp = ?", (group,)).fetchone()[0]
        if consumed:
            raise RefusedError(
                f"a checkpoint of the learner covers {group} as quarantined, so it would never be asked for. Resume "
                "the learner from an older checkpoint, or save it: matpo-broker quarantine show GROUP --out FOLDER.",
                reason="consumed",
            )
    for group in groups:
        # The learner that has seen it, or its tombstone, would not look at it again: it comes to the next one.
        db.execute("UPDATE orders SET reason = ? WHERE grp = ?", (REQUEUED, group))
        db.execute(f"{_BACK} AND grp = ? AND delivered IS NULL", (REQUEUED, group))


def bring_back(db: sqlite3.Connection) -> None:
    """A learner resumes: requeued groups that its checkpoint does not cover are whole again."""
    db.execute(_BACK, (REQUEUED,))


def purge(db: sqlite3.Connection, groups: Sequence[str]) -> None:
    """Quarantined groups become dropped ones, whose payloads may go. Raises RefusedError: one is not quarantined."""
    groups = list(dict.fromkeys(groups))
    for group in groups:
        _check_quarantined(db, group)
    for group in groups:
        db.execute("UPDATE orders SET state = 'dropped', reason = 'purged', num_bytes = 0 WHERE grp = ?", (group,))


def _check_quarantined(db: sqlite3.Connection, group: str) -> None:
    row = db.execute("SELECT state FROM orders WHERE grp = ?", (group,)).fetchone()
    if row is None or row[0] != "quarantined":
        state = "unknown" if row is None else row[0]
        raise RefusedError(
            f"{group} is not quarantined: {state}. `matpo-broker quarantine ls` lists those that are.",
            reason="not_quarantined",
        )


def _suspect_out(db: sqlite3.Connection, epoch: int, suspect_from: int) -> bool:
    return (
        db.execute(
            "SELECT 1 FROM orders WHERE delivered = ? AND consumed = 0 AND trained = 0 AND state = 'whole'"
            " AND strikes >= ? LIMIT 1",
            (epoch, suspect_from),
        ).fetchone()
        is not None
    )


def _others_may_come(db: sqlite3.Connection) -> bool:
    """Whether actors still play: if not, the learner may need the suspect to fill its batch."""
    return (
        db.execute(
            "SELECT 1 FROM orders WHERE state = 'open' AND consumed = 0 AND delivered IS NULL LIMIT 1"
        ).fetchone()
        is not None
    )
