"""The watchdog: no wait of the learner without a line that says who is waited for, since when, and why.

    waits = Waits({"checkpoint": lambda: Reason(who="disk", why="a checkpoint is being written")}, metrics)
    with waits.on("checkpoint"):
        ...                              # log: learner.waiting waited_s=10 who=disk why="a checkpoint is ..."

Rules kept here, each with a test in tests/learner/test_waits.py:
1. A wait is told of after 10 s, 20 s, 40 s, ... and at least every 10 minutes; as a warning from `warn_after_s` on.
2. Why is asked anew for each line: actors that come while we wait change the answer.
3. The innermost wait is the one that is told of; its end brings back the outer one.
4. `waiting_seconds` is how long the wait in progress has lasted, by who; 0 without one. `waited_seconds_total` adds up.

`InProgress` decides and is given the time; `Waits` is the thread that looks at it, because what waits may be a
collective or a disk, in a call that does not come back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from matpo import logs
from matpo.metrics import Metrics

FIRST_LINE_S = 10.0
MAX_PAUSE_S = 600.0
LOOK_S = 1.0
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Who has to move: a word for metrics (broker, actors, leases, members, orders, signal, disk, ...), and why."""

    who: str
    why: str


Ask = Callable[[], Reason]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line to log."""

    reason: Reason
    waited_s: float
    is_warning: bool


@dataclass(kw_only=True, slots=True)
class _Wait:
    ask: Ask
    began_s: float
    next_line_s: float = FIRST_LINE_S  # after it began


class InProgress:
    """The waits in progress, innermost last. Pure: the time is given."""

    def __init__(self, *, warn_after_s: float) -> None:
        self._warn_after_s = warn_after_s
        self._waits: list[_Wait] = []

    def begin(self, ask: Ask, now_s: float) -> None:
        """A wait begins inside the one in progress."""
        self._waits.append(_Wait(ask=ask, began_s=now_s))

    def end(self) -> None:
        """The innermost wait is over."""
        self._waits.pop()

    def now(self, now_s: float) -> tuple[Reason, float] | None:
        """(reason, seconds so far) of the innermost wait."""
        if not self._waits:
            return None
        wait = self._waits[-1]
        return wait.ask(), now_s - wait.began_s

    def line(self, now_s: float) -> Line | None:
        """What to log now, if anything."""
        if not self._waits:
            return None
        wait = self._waits[-1]
        waited_s = now_s - wait.began_s
        if waited_s < wait.next_line_s:
            return None
        wait.next_line_s = min(2 * waited_s, waited_s + MAX_PAUSE_S)
        return Line(reason=wait.ask(), waited_s=waited_s, is_warning=waited_s >= self._warn_after_s)


class Waits:
    """Looks at the waits of the main thread, logs and measures them. `close` ends its thread."""

    def __init__(self, reasons: Mapping[str, Ask], metrics: Metrics | None, *, warn_after_s: float) -> None:
        """`reasons`: who is waited for, by the name of the wait. A wait of another name is not looked at."""
        self._reasons, self._metrics = reasons, metrics
        self._waits = InProgress(warn_after_s=warn_after_s)
        self._lock = threading.Lock()  # guards _waits
        self._shown: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waits", daemon=True)
        self._thread.start()

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """The `with` block is a wait."""
        ask = self._reasons.get(name)
        if ask is None:
            yield
            return
        with self._lock:
            self._waits.begin(ask, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                found = self._waits.now(time.monotonic())
                self._waits.end()
            if found is not None and self._metrics is not None:
                self._metrics.count("waited_seconds_total", found[1], who=found[0].who)

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """Log what is due and set the gauges."""
        with self._lock:
            found, line = self._waits.now(now_s), self._waits.line(now_s)
        if self._metrics is not None:
            current = {found[0].who: found[1]} if found else {}
            self._shown |= current.keys()
            for who in self._shown:
                self._metrics.set("waiting_seconds", current.get(who, 0.0), who=who)
        if line is not None:
            say = log.warning if line.is_warning else log.info
            say("learner.waiting", waited_s=round(line.waited_s), who=line.reason.who, why=line.reason.why)
