"""When each lease ends. In memory only: a deadline means nothing to another process, which starts them afresh."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf


class Deadlines:
    """Deadlines of leases, in seconds of one clock. Every lease gets the same time, so they end in order of renewal."""

    def __init__(self, lease_s: float, leases: Iterable[str], now_s: float) -> None:
        self._lease_s = lease_s
        self._ends = dict.fromkeys(leases, now_s + lease_s)  # oldest renewal first

    def __len__(self) -> int:
        return len(self._ends)

    def renew(self, lease: str, now_s: float) -> None:
        """Begin a lease, or begin its time again."""
        self._ends.pop(lease, None)
        self._ends[lease] = now_s + self._lease_s

    def end(self, lease: str) -> None:
        """The lease is over, for whatever reason."""
        self._ends.pop(lease, None)

    def over(self, now_s: float) -> list[str]:
        """Leases whose time is up. They stay until `end`."""
        found = []
        for lease, end_s in self._ends.items():
            if end_s > now_s:
                break
            found.append(lease)
        return found

    @property
    def next_s(self) -> float:
        """When the next lease ends; infinity without leases."""
        return next(iter(self._ends.values()), inf)
