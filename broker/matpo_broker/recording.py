"""What a journal recorded, group by group, for who reads it afterwards. Changes nothing and needs no broker.

Rules kept here; each has a test in tests/broker/test_recording.py:
1. The broker may run, have stopped, or have been killed: a recording is what the ledger said when it was opened.
2. Each record is checked against its hash. A damaged one is named and costs its own group, never the reading.
3. A group whose payloads were given back, also while it is read, is gone; that is no damage.
4. One group is in memory at a time.

Payloads are opaque here; matpo.schema knows what is inside.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from matpo.errors import JournalError
from matpo_broker.journal import path_of, read_payload
from matpo_broker.maintenance import Damage
from matpo_broker.tables import FORMAT, LEDGER_NAME, open_read_only, rows_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedGroup:
    """A whole group, for example "g-00000007": every member was stored."""

    index: int
    group: str
    is_gone: bool  # the payloads were given back: every kept checkpoint covered them


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The payloads of one group by member, or why they cannot be had. Gone: neither payloads nor damage."""

    payloads: Sequence[bytes] = ()
    damage: Sequence[Damage] = ()


class Recording:
    """A journal opened for reading; use it in a `with` block.

    Raises JournalError: no journal (missing), of another format, or its ledger is damaged (ledger).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._db = open_read_only(folder / LEDGER_NAME)
        try:
            self._check_format()
            self.groups: Sequence[RecordedGroup] = [
                RecordedGroup(index=index, group=group, is_gone=bool(gone))
                for index, group, gone in self._db.execute(
                    "SELECT idx, grp, EXISTS (SELECT 1 FROM episodes e WHERE e.idx = o.idx AND file IS NULL)"
                    " FROM orders o WHERE state = 'whole' ORDER BY idx"
                )
            ]
        except sqlite3.Error as error:
            self._db.close()
            raise self._damaged(error) from error
        except JournalError:
            self._db.close()
            raise

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def read(self, group: RecordedGroup) -> Members:
        """The payloads of a group, checked."""
        payloads: list[bytes] = []
        damage: list[Damage] = []
        try:
            rows = list(rows_of(self._db, "AND idx = ?", group.index))
            for row in rows:
                try:
                    payloads.append(read_payload(self._folder, row.episode, row.location))
                except JournalError as error:
                    place = row.location
                    if not list(rows_of(self._db, "AND idx = ? AND file = ?", row.index, place.file)):
                        return Members()  # given back since we looked
                    name = path_of(self._folder, place.file).name
                    damage.append(
                        Damage(
                            file=name,
                            offset=place.offset,
                            episode=row.episode,
                            reason=error.reason,
                            message=str(error),
                        )
                    )
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        return Members(damage=damage) if damage else Members(payloads=payloads)

    def _check_format(self) -> None:
        found = self._db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        if found is None or found[0] != FORMAT:
            raise JournalError(
                f"{self._folder / LEDGER_NAME} has format {found and found[0]}, want {FORMAT}. "
                "Use the release that wrote it.",
                reason="format",
            )

    def _damaged(self, error: sqlite3.Error) -> JournalError:
        return JournalError(
            f"{self._folder / LEDGER_NAME} cannot be read: {error}. `matpo-broker verify` says what is left.",
            reason="ledger",
        )
