"""Members of open orders: who may play them, until when, and the episodes that end them.

Part of the ledger (see there): the same open transaction, no clock, no sockets. Keeps rules 1, 2, 5, 7 and 9 of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgpack

from matpo import logs, wire
from matpo.errors import RefusedError
from matpo.metrics import Metrics
from matpo_broker import views
from matpo_broker.deadlines import Deadlines
from matpo_broker.tables import Location, Meta

LEASE_REPLY_BYTES = wire.MAX_HEADER_BYTES - 65536
LENGTHS = ((1024, "<1k"), (4096, "<4k"), (16384, "<16k"), (65536, "<64k"))  # mean tokens of a dropped group's episodes

log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What the run file says about the broker's decisions."""

    run: str
    lease_s: float
    max_attempts: int
    credit_bytes: int
    max_lease_losses: int = 20
    max_deliveries: int = 3  # 0: never quarantine for it
    max_order_age_s: float = 0.0  # 0: orders do not expire
    keep_consumed: bool = False  # payloads of consumed groups stay


class Members:
    """See the module. `db` has an open transaction, which the ledger commits."""

    def __init__(self, db: sqlite3.Connection, meta: Meta, rules: Rules, metrics: Metrics, *, now_s: float) -> None:
        self._db = db
        self._meta = meta
        self._rules = rules
        self._metrics = metrics
        # A lease of the dead process gets a fresh deadline: its actor could not renew it while we were away.
        leased = db.execute("SELECT lease FROM members WHERE lease IS NOT NULL")
        self._deadlines = Deadlines(rules.lease_s, (lease for (lease,) in leased), now_s)
        opened = db.execute("SELECT idx FROM orders WHERE state = 'open' AND consumed = 0 ORDER BY idx")
        self._ordered_s = dict.fromkeys((index for (index,) in opened), now_s)  # oldest first
        self._elsewhere: dict[
            tuple[int, int], tuple[str, float]
        ] = {}  # member -> who failed it, until when to avoid it
        self._backlog_bytes: int | None = None  # None: to be counted again
        self._is_together = False
        self._recorded: list[tuple[wire.StoreEpisode, str, Location]] = []  # not entered yet ...
        self._recorded_keys: set[str | tuple[str, int]] = set()  # ... of these leases and members

    # ---- for the learner's side of the ledger

    def add(self, orders: Iterable[tuple[int, int]], now_s: float) -> None:
        """New orders (index, group size): each has so many members to play."""
        orders = list(orders)
        rows = [(index, member) for index, size in orders for member in range(size)]
        self._db.executemany("INSERT INTO members(idx, member) VALUES (?, ?)", rows)
        self._ordered_s.update(dict.fromkeys((index for index, _ in orders), now_s))

    def end_consumed(self) -> None:
        """Take back the leases of orders that are consumed without being whole."""
        if self._deadlines:
            self._free("idx IN (SELECT idx FROM orders WHERE consumed = 1 AND state = 'open')", reason="consumed")

    def backlog_changed(self) -> None:
        """What waits for the learner is not what it was."""
        self._backlog_bytes = None

    def drop(self, index: int, reason: str) -> None:
        """Give a group up: a tombstone takes its place in the stream, its payloads may go."""
        row = self._db.execute(
            "SELECT grp, num_tokens, num_stored FROM orders"
            " WHERE idx = ? AND state IN ('open', 'whole') AND consumed = 0",
            (index,),
        ).fetchone()
        if row is None:
            return
        group, num_tokens, num_stored = row
        self._free("idx = ?", index, reason="dropped")
        self._db.execute("DELETE FROM members WHERE idx = ?", (index,))
        self._db.execute(
            "UPDATE orders SET state = 'dropped', reason = ?, num_bytes = 0 WHERE idx = ?", (reason, index)
        )
        self._backlog_bytes = None
        self._ordered_s.pop(index, None)
        length = length_bucket(num_tokens, num_stored)
        self._metrics.count("groups_dropped_total", reason=reason, tokens=length)
        log.warning("group.dropped", reason=reason, group=group, index=index, tokens=length)

    def reopen(self, index: int, member: int) -> None:
        """A stored episode is damaged: its member is to be played again, the others of the group stay."""
        row = self._db.execute(
            "DELETE FROM episodes WHERE idx = ? AND member = ? RETURNING attempt, num_bytes, num_tokens",
            (index, member),
        ).fetchone()
        if row is None:
            return
        attempt, num_bytes, num_tokens = row
        self._db.execute("INSERT INTO members(idx, member, attempt) VALUES (?, ?, ?)", (index, member, attempt + 1))
        self._db.execute(
            "UPDATE orders SET state = 'open', delivered = NULL, num_stored = num_stored - 1,"
            " num_bytes = num_bytes - ?, num_tokens = num_tokens - ? WHERE idx = ?",
            (num_bytes, num_tokens, index),
        )
        self._backlog_bytes = None
        self._meta.set(delivery="")

    # ---- for actors

    def lease(self, actor: str, num_members: int, now_s: float, *, num_actors: int = 1) -> tuple[list[wire.Lease], str]:
        """Up to `num_members` leases, and why there are none if actors are held back.

        Order: groups that this actor began (their prefix is in its cache), groups that nobody began, any group.
        """
        if paused := self._paused():
            return [], paused
        leases: list[wire.Lease] = []
        taken: list[tuple[str, str, int, int]] = []  # as the update of members wants it
        tasks: dict[int, wire.OrderedTask] = {}  # by order: its members have one
        serial, budget = int(self._meta.get("serial", 0)), LEASE_REPLY_BYTES
        for index, member, attempt, group, task in self._free_members(actor, num_members, now_s, num_actors):
            if leases and budget < len(task) + 1024:
                break
            serial += 1
            budget -= len(task) + 1024
            lease = f"{self._meta['journal']}-{serial}"
            taken.append((lease, actor, index, member))
            self._deadlines.renew(lease, now_s)
            if index not in tasks:
                tasks[index] = wire.OrderedTask.model_validate(msgpack.unpackb(task))
            leases.append(wire.Lease(lease=lease, group=group, member=member, attempt=attempt, task=tasks[index]))
        if leases:
            self._db.executemany("UPDATE members SET lease = ?, actor = ? WHERE idx = ? AND member = ?", taken)
            owned = [(actor, index) for index in tasks]
            self._db.executemany("UPDATE orders SET owner = ? WHERE idx = ? AND owner IS NULL", owned)
            self._meta.set(serial=serial)
        return leases, ""

    def _free_members(self, actor: str, limit: int, now_s: float, num_actors: int) -> list[tuple[Any, ...]]:
        """(index, member, attempt, group, task) of members to hand out, best first, at most `limit`."""
        found: dict[tuple[int, int], tuple[Any, ...]] = {}
        for mine, values in (("o.owner = ?", (actor,)), ("o.owner IS NULL", ()), ("o.owner != ?", (actor,))):
            if len(found) >= limit:
                break
            rows = self._db.execute(
                "SELECT m.idx, m.member, m.attempt, o.grp, o.task FROM orders o CROSS JOIN members m USING (idx)"
                f" WHERE o.state = 'open' AND o.consumed = 0 AND {mine} AND m.lease IS NULL"
                " ORDER BY o.idx, m.member LIMIT ?",
                (*values, limit + len(self._elsewhere)),
            )
            for row in rows:
                if len(found) < limit and not self._is_for_others(row[:2], actor, now_s, num_actors):
                    found[row[:2]] = row
        return list(found.values())

    def _is_for_others(self, member: tuple[int, int], actor: str, now_s: float, num_actors: int) -> bool:
        failed_by, until_s = self._elsewhere.get(member, ("", 0.0))
        return num_actors > 1 and failed_by == actor and now_s < until_s

    def admit(self, message: wire.StoreEpisode, actor: str | None = None) -> bool:
        """True: store this episode (append its payload, then `record` it). False: it is there already.

        Raises RefusedError: episode_id, lease_lost, lease_mismatch (for another member, or another actor's).
        """
        if message.episode != f"{message.group}.{message.member}.{message.attempt}":
            raise RefusedError(
                f"{message.episode} is not the id of {message.group}, member {message.member}, attempt "
                f"{message.attempt}: want GROUP.MEMBER.ATTEMPT",
                reason="episode_id",
            )
        if message.lease in self._recorded_keys or (message.group, message.member) in self._recorded_keys:
            self._enter()  # it is judged by what came before it
        row = self._db.execute(
            "SELECT e.episode, e.num_bytes, e.crc32c, m.lease, m.attempt, m.actor FROM orders o"
            " LEFT JOIN episodes e ON e.idx = o.idx AND e.member = ?"
            " LEFT JOIN members m ON m.idx = o.idx AND m.member = ? WHERE o.grp = ?",
            (message.member, message.member, message.group),
        ).fetchone()
        if row is not None and row[:3] == (message.episode, message.num_bytes, message.crc32c):
            return False
        if row is not None and row[3] == message.lease:
            if row[4] == message.attempt and actor in (None, row[5]):
                return True
        elif self._one("SELECT 1 FROM members WHERE lease = ?", message.lease) is None:
            raise RefusedError(
                f"lease {message.lease} on member {message.member} of {message.group} was lost. Drop the episode: "
                "the member is another's, or is no longer wanted.",
                reason="lease_lost",
            )
        raise RefusedError(
            f"lease {message.lease} is not this actor's for {message.group}, member {message.member}, "
            f"attempt {message.attempt}",
            reason="lease_mismatch",
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Episodes recorded inside are entered in few statements, at its end; only `admit` and `record` fit in it."""
        self._is_together = True
        try:
            yield
        finally:
            self._is_together = False
            self._enter()

    def record(self, message: wire.StoreEpisode, actor: str, location: Location) -> None:
        """Enter an admitted episode; its member is done."""
        self._recorded.append((message, actor, location))
        self._recorded_keys.update((message.lease, (message.group, message.member)))
        if not self._is_together:
            self._enter()

    def _enter(self) -> None:
        """Enter what was recorded: one statement for each group, and two for all the episodes."""
        recorded, self._recorded = self._recorded, []
        self._recorded_keys.clear()
        groups: dict[str, list[tuple[wire.StoreEpisode, Location]]] = {}
        for message, _, location in recorded:
            groups.setdefault(message.group, []).append((message, location))
        indices = {group: self._add_up(group, episodes) for group, episodes in groups.items()}
        done, rows = [], []
        for message, actor, at in recorded:
            index, member = place = (indices[message.group], message.member)
            done.append(place)
            rows.append(
                (index, member, message.attempt, message.episode, message.lease, actor, message.environment,
                 message.num_tokens, at.file, at.offset, at.num_bytes, at.crc32c)
            )  # fmt: skip
            self._deadlines.end(message.lease)
            self._elsewhere.pop(place, None)
        self._db.executemany("DELETE FROM members WHERE idx = ? AND member = ?", done)
        self._db.executemany("INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _add_up(self, group: str, episodes: Sequence[tuple[wire.StoreEpisode, Location]]) -> int:
        """Add episodes to what an order says of its group; returns its index."""
        num_bytes = sum(location.num_bytes for _, location in episodes)
        oldest = min((message.min_version for message, _ in episodes if message.min_version >= 0), default=None)
        index, state = self._db.execute(
            "UPDATE orders SET num_stored = num_stored + ?1, num_bytes = num_bytes + ?2, num_tokens = num_tokens + ?3,"
            " min_version = coalesce(min(min_version, ?4), min_version, ?4),"
            " state = CASE WHEN num_stored + ?1 = group_size THEN 'whole' ELSE state END WHERE grp = ?5"
            " RETURNING idx, state",
            (len(episodes), num_bytes, sum(message.num_tokens for message, _ in episodes), oldest, group),
        ).fetchone()
        if state != "open":
            self._ordered_s.pop(index, None)
        if self._backlog_bytes is not None:
            self._backlog_bytes += num_bytes
        return int(index)

    def heartbeat(self, actor: str, leases: Sequence[str], now_s: float) -> list[str]:
        """Renew leases; returns those that this actor does not hold. Stored ones are not lost."""
        lost = []
        for lease in leases:
            holder = self._one("SELECT actor FROM members WHERE lease = ?", lease)
            if holder == actor:
                self._deadlines.renew(lease, now_s)
            elif holder is not None or self._one("SELECT 1 FROM episodes WHERE lease = ?", lease) is None:
                lost.append(lease)
        return lost

    def release(self, actor: str, leases: Sequence[str], *, infra: bool, now_s: float = 0.0) -> None:
        """Take leases back. `infra`: a failure that counts against the member."""
        for lease in leases:
            row = self._db.execute("SELECT idx, member, actor FROM members WHERE lease = ?", (lease,)).fetchone()
            if row is not None and row[2] == actor:
                if infra:
                    self._elsewhere[row[:2]] = (actor, now_s + self._rules.lease_s)
                self._free("lease = ?", lease, reason="infra" if infra else "released")

    def depart(self, actor: str) -> None:
        """An actor said goodbye: whatever it holds is free."""
        self._free("actor = ?", actor, reason="goodbye")
        self._db.execute("UPDATE orders SET owner = NULL WHERE owner = ? AND state = 'open'", (actor,))

    def expire(self, now_s: float) -> None:
        """Free the leases whose actors were silent for too long, and give up orders that are too old."""
        for lease in self._deadlines.over(now_s):
            self._free("lease = ?", lease, reason="timeout")
        if self._elsewhere:
            self._elsewhere = {member: entry for member, entry in self._elsewhere.items() if now_s < entry[1]}
        max_age_s = self._rules.max_order_age_s
        while max_age_s and (index := next(iter(self._ordered_s), None)) is not None:
            if now_s - self._ordered_s[index] < max_age_s:
                break
            self.drop(index, "expired")
            self._ordered_s.pop(index, None)

    # ---- what others may know

    @property
    def next_deadline_s(self) -> float:
        """No lease ends before this; infinity without leases."""
        return self._deadlines.next_s

    @property
    def has_reserved(self) -> bool:
        """Whether some members wait for another actor than the one that failed them."""
        return bool(self._elsewhere)

    @property
    def num_leases(self) -> int:
        """Members that actors hold."""
        return len(self._deadlines)

    # ---- inside

    def _free(self, where: str, *values: object, reason: str) -> None:
        """Take the leases of some members away. `where` is one of our own constants, never a peer's text."""
        rows = self._db.execute(
            f"SELECT idx, member, lease, actor, failures, timeouts FROM members WHERE lease IS NOT NULL AND {where}",
            values,
        ).fetchall()
        for index, member, lease, actor, failures, timeouts in rows:
            failures, timeouts = failures + (reason == "infra"), timeouts + (reason == "timeout")
            self._db.execute(
                "UPDATE members SET lease = NULL, actor = NULL, attempt = attempt + 1, failures = ?, timeouts = ?"
                " WHERE idx = ? AND member = ?",
                (failures, timeouts, index, member),
            )
            self._db.execute("UPDATE orders SET owner = NULL WHERE idx = ? AND owner = ?", (index, actor))
            self._deadlines.end(lease)
            self._metrics.count("lease_losses_total", reason=reason)
            if failures >= self._rules.max_attempts:
                self.drop(index, "attempts")
            elif timeouts >= self._rules.max_lease_losses:
                self.drop(index, "lease_losses")

    def _paused(self) -> str:
        # Without a ready group the learner itself waits for members: holding actors back would be a deadlock.
        # Nor does it get a suspect (see quarantine) while another is out.
        if self._backlog_bytes is None:
            self._backlog_bytes = views.backlog_bytes(self._db)
        if self._backlog_bytes <= self._rules.credit_bytes:
            return ""
        ready = "consumed = 0 AND delivered IS NULL AND state = 'whole' AND (strikes = 0 OR trained = 1)"
        if self._one(f"SELECT 1 FROM orders WHERE {ready} LIMIT 1") is None:
            return ""
        return f"{self._backlog_bytes} bytes wait for the learner, more than credit_bytes={self._rules.credit_bytes}"

    def _one(self, query: str, *values: object) -> Any:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]


def length_bucket(num_tokens: int, num_episodes: int) -> str:
    """Mean tokens per stored episode, as a label: dropping long episodes more often than short ones biases training."""
    if num_episodes == 0:
        return "none"
    mean = num_tokens / num_episodes
    return next((label for limit, label in LENGTHS if mean < limit), ">=64k")
