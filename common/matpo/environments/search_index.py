"""Full-text search over passages: SQLite FTS5 with BM25, in memory.

Rules kept here; tests in tests/common/test_atlas.py and test_multihop.py:
1. A query is words, never FTS syntax: quotes, stars and operators in it mean nothing.
2. The same query gives the same passages in the same order, in every process (ties go to the earlier passage).
3. Safe from several threads: tools run in a thread pool.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from matpo.errors import SetupError

TITLE_WEIGHT = 2.0
_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "it",
        "of",
        "on",
        "or",
        "the",
        "to",
        "was",
        "what",
        "where",
        "which",
        "who",
        "whose",
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """One searchable text, for example Passage(title="Cusco", text="Cusco is a city in Peru.")."""

    title: str
    text: str


class SearchIndex:
    """Passages by relevance to a query, or by title."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._database.execute(
                "CREATE VIRTUAL TABLE passages USING fts5(title, body, tokenize='unicode61 remove_diacritics 2')"
            )
        except sqlite3.OperationalError as error:
            raise SetupError(f"this Python's SQLite has no FTS5 ({error}). Use a Python built with it.") from error
        rows = ((p.title, p.text) for p in passages)
        self._database.executemany("INSERT INTO passages (title, body) VALUES (?, ?)", rows)
        self._database.commit()

    def search(self, query: str, num_results: int) -> list[Passage]:
        """The `num_results` best passages by BM25 over the query's words, best first; [] if no word occurs."""
        words = list(dict.fromkeys(_WORD.findall(query.casefold())))[:64]
        words = [w for w in words if w not in _STOP_WORDS] or words
        if not words:
            return []
        match = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            rows = self._database.execute(
                f"SELECT title, body FROM passages WHERE passages MATCH ? "
                f"ORDER BY bm25(passages, {TITLE_WEIGHT}, 1.0), rowid LIMIT ?",
                (match, num_results),
            ).fetchall()
        return [Passage(title=title, text=body) for title, body in rows]

    def fetch(self, title: str) -> list[Passage]:
        """All passages with this title, whatever its case, in their order; [] if there is none."""
        words = _WORD.findall(title.casefold())
        if not words:
            return []
        with self._lock:
            rows = self._database.execute(
                "SELECT title, body FROM passages WHERE passages MATCH ? ORDER BY rowid",
                ('title : "' + " ".join(words) + '"',),
            ).fetchall()
        wanted = title.strip().casefold()
        return [Passage(title=t, text=b) for t, b in rows if t.casefold() == wanted]

    def close(self) -> None:
        """Free the index."""
        with self._lock:
            self._database.close()
