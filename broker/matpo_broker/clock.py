"""Time as the broker counts it: only while it runs. Knows nothing else.

A broker that was stopped (SIGSTOP, a frozen machine, a disk that hung) could hear no heartbeat. If that time counted,
every lease would end at once when it comes back, and every actor would lose its work to the others.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_STEP_S = 2.0  # twice the longest that the broker's loop waits


class PatientClock:
    """Seconds that rise with `source`, but by at most MAX_STEP_S from one call to the next, and never fall."""

    def __init__(self, source: Callable[[], float]) -> None:
        self._source = source
        self._last_s = source()
        self._now_s = 0.0

    def __call__(self) -> float:
        """Seconds since the clock was made, without what the broker slept through."""
        now_s = self._source()
        self._now_s += min(max(now_s - self._last_s, 0.0), MAX_STEP_S)
        self._last_s = now_s
        return self._now_s
