"""Decide what the broker does next. No sockets, no clock, no threads; `now_s` is monotonic time, passed in.

Rules kept here; each has a test of the same name in tests/broker/test_ledger.py:
1. One stored episode per member; the same one again is a duplicate, another one is refused.
2. A lease never outlives its deadline, whatever the actor says; a lost lease stores nothing.
3. A group is delivered whole or as a tombstone that says why, oldest index first.
4. A delivered group comes again until the learner says that it arrived, and again after Resume until it is consumed.
5. An episode is forgotten only when the oldest kept checkpoint covers it, or when its group is dropped and counted.
6. Only the newest learner epoch changes anything.
7. Actors get no new members while a ready group waits and the learner's backlog is above credit.
8. A group that is in the hands of `max_deliveries` learners that die is quarantined; the others are not.
9. A member that failed goes to another actor first, if there is one.

What changes is in one open SQLite transaction until `commit`; the caller makes payloads durable before it. Lease
deadlines are in memory only: they mean nothing to another process, which starts them afresh.
Payloads are opaque here; matpo.schema knows what is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from matpo import logs, wire
from matpo.errors import RefusedError
from matpo.metrics import Metrics
from matpo_broker import quarantine, views
from matpo_broker.deadlines import Deadlines
from matpo_broker.tables import Location, StoredRow, connect, rows_of

MAX_TASK_BYTES = wire.MAX_HEADER_BYTES - 8192  # a lease repeats the task in its own header
LEASE_REPLY_BYTES = wire.MAX_HEADER_BYTES - 65536
KEPT_COMMITS = 1000
LENGTHS = ((1024, "<1k"), (4096, "<4k"), (16384, "<16k"), (65536, "<64k"))  # mean tokens of a dropped group's episodes

log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One group for the learner: whole, or a tombstone (`dropped` says why, no episodes)."""

    group: str
    index: int
    episodes: Sequence[StoredRow]
    dropped: str = ""


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


class Ledger:
    """Orders, members, leases, episodes and learner epochs of one run.

    `path` is a file, or ":memory:" for tests. Raises JournalError when the file is damaged or of another run.
    """

    def __init__(self, path: Path | str, rules: Rules, metrics: Metrics, *, now_s: float) -> None:
        self._rules = rules
        self._metrics = metrics
        self._db = connect(path, rules.run)
        self._meta: dict[str, Any] = dict(self._db.execute("SELECT key, value FROM meta"))
        # A lease of the dead process gets a fresh deadline: its actor could not renew it while we were away.
        leased = self._db.execute("SELECT lease FROM members WHERE lease IS NOT NULL")
        self._deadlines = Deadlines(rules.lease_s, (lease for (lease,) in leased), now_s)
        opened = self._db.execute("SELECT idx FROM orders WHERE state = 'open' AND consumed = 0 ORDER BY idx")
        self._ordered_s = dict.fromkeys((index for (index,) in opened), now_s)  # oldest first
        self._elsewhere: dict[
            tuple[int, int], tuple[str, float]
        ] = {}  # member -> who failed it, until when to avoid it
        self._backlog_bytes: int | None = None  # None: to be counted again
        self._db.execute("BEGIN")

    # ---- transactions

    def commit(self) -> None:
        """Make every decision since the last commit durable, at once. Raises sqlite3.Error."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def set_synchronous(self, level: str) -> None:
        """SQLite's `synchronous`: FULL (a commit is on disk), NORMAL or OFF (it is with the kernel). Commits."""
        assert level in ("FULL", "NORMAL", "OFF")
        self._db.execute("COMMIT")
        self._db.execute(f"PRAGMA synchronous = {level}")
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Forget what was not committed and release the file."""
        if self._db.in_transaction:  # a commit that failed may have ended it
            self._db.execute("ROLLBACK")
        self._db.close()

    # ---- hello

    def check_peer(self, hello: wire.Hello) -> None:
        """Refuse a peer of another run, schema or model. What the first learner says holds for the run."""
        if hello.run != self._rules.run:
            raise RefusedError(
                f'this broker serves run "{self._rules.run}", {hello.name} is of run "{hello.run}". '
                "Start it with this broker's run file, or correct broker.host and ports.",
                reason="other_run",
            )
        for field, value in (("schema_version", hello.schema_version), ("model", hello.model)):
            known = self._meta.get(field)
            if known and value and known != value and hello.peer != "operator":
                raise RefusedError(
                    f"{field} of {hello.name} is {value}, the learner has {known}. Use one release and one model.",
                    reason=field,
                )

    def greet_learner(self, hello: wire.Hello) -> int:
        """The epoch of a learner process: a new one raises it, the current one keeps it, an earlier one is refused."""
        self.check_peer(hello)
        known = self._one("SELECT epoch FROM learners WHERE incarnation = ?", hello.incarnation)
        if known is None:
            self._bury(self.epoch)
            epoch = self.epoch + 1
            self._db.execute(
                "INSERT INTO learners(epoch, incarnation, name) VALUES (?, ?, ?)",
                (epoch, hello.incarnation, hello.name),
            )
            self._set(
                epoch=epoch, schema_version=hello.schema_version, model=hello.model or self._meta.get("model", "")
            )
            log.info("learner.epoch", epoch=epoch, learner=hello.name)
        self._check_epoch(known if known is not None else self.epoch)
        return self.epoch

    def _bury(self, epoch: int) -> None:
        """A learner follows the one of `epoch`: if that one died, what it held is under suspicion."""
        if self._one("SELECT clean FROM learners WHERE epoch = ?", epoch) == 0:
            for group in quarantine.strike(self._db, epoch, limit=self._rules.max_deliveries):
                self._count_quarantined(group, "deliveries")

    def farewell(self, incarnation: str) -> None:
        """A learner process said goodbye: nothing that it held did it harm."""
        self._db.execute("UPDATE learners SET clean = 1 WHERE incarnation = ?", (incarnation,))

    @property
    def epoch(self) -> int:
        """The newest learner epoch; 0 before the first learner."""
        return int(self._meta.get("epoch", 0))

    @property
    def snapshot_version(self) -> int:
        """The newest snapshot that the learner told of; -1 before the first."""
        return int(self._meta.get("snapshot_version", -1))

    # ---- learner

    def resume(self, message: wire.Resume) -> None:
        """Set what is consumed; every other complete group is ready again."""
        self._check_epoch(message.epoch)
        self._check_forgotten(message)
        self._db.execute("UPDATE orders SET consumed = 0, delivered = NULL WHERE idx >= ?", (self._forgotten_below,))
        self._consume(message.consumed_below, message.consumed)
        self._set(resumed=message.epoch, delivery="")

    def place(self, message: wire.PlaceOrders, now_s: float = 0.0) -> None:
        """Take work orders; those that are there already change nothing, unless they differ (refused)."""
        self._check_epoch(message.epoch)
        new = []
        seen: set[int | str] = set()
        for order in message.orders:
            task = _pack(order.task)
            if len(task) > MAX_TASK_BYTES:
                raise RefusedError(
                    f"task {order.task.id} of {order.group} has {len(task)} bytes, at most {MAX_TASK_BYTES}. "
                    "Keep large material in the environment, not in Task.data.",
                    reason="task_size",
                )
            seen.update((order.index, order.group))
            if order.index < self._compacted_below:  # known once; nothing is left of it but the counts
                continue
            wanted = (order.index, order.group, order.group_size)
            known = self._db.execute(
                "SELECT idx, grp, group_size, task FROM orders WHERE idx = ? OR grp = ?", (order.index, order.group)
            ).fetchone()
            if known is None:
                new.append((*wanted, task))
            elif known[:3] != wanted or (known[3] and msgpack.unpackb(known[3]) != msgpack.unpackb(task)):
                raise RefusedError(
                    f"order {order.index} ({order.group}) is there already with another task or size. "
                    "Is this another run, seed or data set? Give it its own run.folder.",
                    reason="order_conflict",
                )
        if len(seen) != 2 * len(message.orders):
            raise RefusedError("an order index or group stands twice in one message", reason="order_conflict")
        self._db.executemany("INSERT INTO orders(idx, grp, group_size, task) VALUES (?, ?, ?, ?)", new)
        members = [(index, member) for index, _, size, _ in new for member in range(size)]
        self._db.executemany("INSERT INTO members(idx, member) VALUES (?, ?)", members)
        self._ordered_s.update(dict.fromkeys((index for index, *_ in new), now_s))

    def fetch(self, message: wire.Fetch) -> Delivery | None:
        """The group to hand out next, or the last one again if the learner does not have it. None: nothing is ready."""
        self._check_epoch(message.epoch)
        if self._meta.get("resumed") != message.epoch:
            raise RefusedError("fetch before resume: say first what the checkpoint covers", reason="resume_first")
        last = self._meta.get("delivery", "")
        row = None
        if last and message.received != last:
            row = self._db.execute(
                "SELECT idx, grp, state, reason FROM orders WHERE consumed = 0 AND state != 'open' AND grp = ?", (last,)
            ).fetchone()
        if row is None:
            row = quarantine.next_ready(self._db, message.epoch, limit=self._rules.max_deliveries)
        if row is None:
            return None
        index, group, state, reason = row
        if state == "whole" and self._is_stale(index, message.min_version):
            self.drop(index, "stale")
            state, reason = "dropped", "stale"
        self._db.execute("UPDATE orders SET delivered = ? WHERE idx = ?", (message.epoch, index))
        self._backlog_bytes = None
        self._set(delivery=group)
        if state == "whole":
            return Delivery(group=group, index=index, episodes=list(rows_of(self._db, "AND idx = ?", index)))
        return Delivery(group=group, index=index, episodes=[], dropped="quarantined" if state != "dropped" else reason)

    def trained(self, message: wire.Trained) -> None:
        """These groups went through an update without harm."""
        self._check_epoch(message.epoch)
        quarantine.clear(self._db, message.indices, message.epoch)

    def set_aside(self, message: wire.Quarantine) -> None:
        """The learner finds a group's content invalid."""
        self._check_epoch(message.epoch)
        if quarantine.set_aside(self._db, message.group, message.reason, message.epoch):
            self._count_quarantined(message.group, "invalid")

    def cover(self, message: wire.Commit) -> list[int]:
        """A durable checkpoint covers these groups. Returns payload files that nothing needs any more."""
        self._check_epoch(message.epoch)
        self._consume(message.consumed_below, message.consumed)
        below = min(message.oldest_kept_below, message.consumed_below)
        if below > self._forgotten_below:
            self._db.execute("DELETE FROM members WHERE idx < ?", (below,))
            self._db.execute("UPDATE orders SET task = x'' WHERE idx < ? AND task != x''", (below,))
            self._set(forgotten_below=below)
        self._set(checkpoint=message.checkpoint)
        self._db.execute(
            "INSERT OR REPLACE INTO commits VALUES (?, ?, ?, ?)",
            (message.checkpoint, message.epoch, message.consumed_below, message.oldest_kept_below),
        )
        self._db.execute("DELETE FROM commits WHERE rowid <= (SELECT max(rowid) FROM commits) - ?", (KEPT_COMMITS,))
        return self._release_files()

    def announce(self, message: wire.SnapshotNotice) -> None:
        """Remember the newest snapshot."""
        self._check_epoch(message.epoch)
        self._set(snapshot_version=message.version)

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
        self._set(delivery="")

    # ---- operators

    def peek(self, message: wire.Peek) -> tuple[Sequence[str], list[list[views.Cell]]]:
        """Groups, or the members of one, as (columns, rows)."""
        return views.peek(self._db, message)

    def show(self, group: str) -> Delivery:
        """A group as it would be delivered, also a quarantined one. Raises RefusedError when it has no payloads."""
        row = self._db.execute("SELECT idx, state, reason FROM orders WHERE grp = ?", (group,)).fetchone()
        if row is None:
            raise RefusedError(f"there is no group {group}. `matpo-broker peek` lists them.", reason="no_group")
        index, state, reason = row
        episodes = list(rows_of(self._db, "AND idx = ?", index))
        return Delivery(group=group, index=index, episodes=episodes, dropped=reason if state == "dropped" else "")

    def requeue(self, groups: Sequence[str]) -> None:
        """Put quarantined groups back into the stream."""
        quarantine.requeue(self._db, groups)
        self._backlog_bytes = None
        log.info("groups.requeued", groups=list(groups))

    def purge(self, groups: Sequence[str]) -> list[int]:
        """Let the payloads of quarantined groups go. Returns payload files that nothing needs any more."""
        quarantine.purge(self._db, groups)
        self._backlog_bytes = None
        log.info("groups.purged", groups=list(groups))
        return self._release_files()

    # ---- actors

    def lease(self, actor: str, num_members: int, now_s: float, *, num_actors: int = 1) -> tuple[list[wire.Lease], str]:
        """Up to `num_members` leases, and why there are none if actors are held back.

        Order: groups that this actor began (their prefix is in its cache), groups that nobody began, any group.
        """
        if paused := self._paused():
            return [], paused
        leases: list[wire.Lease] = []
        serial, budget = int(self._meta.get("serial", 0)), LEASE_REPLY_BYTES
        for index, member, attempt, group, task in self._free_members(actor, num_members, now_s, num_actors):
            if leases and budget < len(task) + 1024:
                break
            serial += 1
            budget -= len(task) + 1024
            lease = f"{self._meta['journal']}-{serial}"
            self._db.execute(
                "UPDATE members SET lease = ?, actor = ? WHERE idx = ? AND member = ?", (lease, actor, index, member)
            )
            self._db.execute("UPDATE orders SET owner = ? WHERE idx = ? AND owner IS NULL", (actor, index))
            self._deadlines.renew(lease, now_s)
            ordered = wire.OrderedTask.model_validate(msgpack.unpackb(task))
            leases.append(wire.Lease(lease=lease, group=group, member=member, attempt=attempt, task=ordered))
        if leases:
            self._set(serial=serial)
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
                (*values, limit),
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

        Raises RefusedError: episode_id, lease_lost, lease_mismatch (the lease is for another member, or another actor's).
        """
        if message.episode != f"{message.group}.{message.member}.{message.attempt}":
            raise RefusedError(
                f"{message.episode} is not the id of {message.group}, member {message.member}, attempt "
                f"{message.attempt}: want GROUP.MEMBER.ATTEMPT",
                reason="episode_id",
            )
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

    def record(self, message: wire.StoreEpisode, actor: str, location: Location) -> None:
        """Enter an admitted episode; its member is done."""
        index = self._one("DELETE FROM members WHERE lease = ? RETURNING idx", message.lease)
        values = (index, message.member, message.attempt, message.episode, message.lease, actor, message.environment)
        place = (message.num_tokens, location.file, location.offset, location.num_bytes, location.crc32c)
        self._db.execute("INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values + place)
        self._deadlines.end(message.lease)
        self._elsewhere.pop((index, message.member), None)
        version = None if message.min_version < 0 else message.min_version
        state = self._one(
            "UPDATE orders SET num_stored = num_stored + 1, num_bytes = num_bytes + ?, num_tokens = num_tokens + ?,"
            " min_version = coalesce(min(min_version, ?), min_version, ?),"
            " state = CASE WHEN num_stored + 1 = group_size THEN 'whole' ELSE state END WHERE idx = ? RETURNING state",
            location.num_bytes,
            message.num_tokens,
            version,
            version,
            index,
        )
        if state != "open":
            self._ordered_s.pop(index, None)
        if self._backlog_bytes is not None:
            self._backlog_bytes += location.num_bytes

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

    def counts(self) -> dict[str, int]:
        """What is where, by count."""
        return views.counts(self._db)

    def flow(self) -> tuple[int, int]:
        """(groups ready, orders open)."""
        return views.flow(self._db)

    def num_free(self) -> int:
        """Members that no actor holds."""
        return views.num_free(self._db)

    def seal_file(self, number: int, num_bytes: int, crc32c: int) -> None:
        """Note the length and hash of a payload file that is finished."""
        self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (number, num_bytes, crc32c))

    def sealed_files(self) -> dict[int, tuple[int, int]]:
        """Finished payload files: number -> (length, CRC32C of the whole file)."""
        return {number: (size, crc) for number, size, crc in self._db.execute("SELECT * FROM files")}

    def last_records(self) -> list[StoredRow]:
        """The last record of each payload file."""
        last = "AND (file, offset) IN (SELECT file, max(offset) FROM episodes WHERE file IS NOT NULL GROUP BY file)"
        return list(rows_of(self._db, last))

    # ---- inside

    @property
    def _forgotten_below(self) -> int:
        return int(self._meta.get("forgotten_below", 0))

    @property
    def _compacted_below(self) -> int:
        return int(self._meta.get("compacted_below", 0))

    def _one(self, query: str, *values: object) -> Any:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _set(self, **values: str | int) -> None:
        changed = [(key, value) for key, value in values.items() if self._meta.get(key) != value]
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", changed)
        self._meta.update(changed)

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise RefusedError(
                f"learner epoch {epoch} is over, epoch {self.epoch} has the run. Stop this learner.", reason="fenced"
            )

    def _check_forgotten(self, message: wire.Resume) -> None:
        below = self._forgotten_below
        if message.consumed_below >= below:
            return
        gone = self._one(
            "SELECT count(*) FROM orders WHERE state = 'whole' AND idx BETWEEN ? AND ?",
            message.consumed_below,
            below - 1,
        )
        if message.consumed_below < self._compacted_below or gone > sum(
            1 for index in set(message.consumed) if message.consumed_below <= index < below
        ):
            raise RefusedError(
                f"groups below {below} are forgotten, this learner has consumed those below {message.consumed_below}. "
                "Resume from a newer checkpoint, or start a new run.folder.",
                reason="forgotten",
            )

    def _consume(self, below: int, more: Sequence[int]) -> None:
        self._db.execute("UPDATE orders SET consumed = 1 WHERE consumed = 0 AND idx < ?", (below,))
        self._db.executemany("UPDATE orders SET consumed = 1 WHERE consumed = 0 AND idx = ?", [(i,) for i in more])
        self._backlog_bytes = None
        if self._deadlines:
            done = "idx IN (SELECT idx FROM orders WHERE consumed = 1 AND state = 'open')"
            self._free(done, reason="consumed")

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

    def _is_stale(self, index: int, min_version: int) -> bool:
        oldest = self._one("SELECT min_version FROM orders WHERE idx = ?", index)
        return oldest is not None and oldest < min_version

    def _count_quarantined(self, group: str, reason: str) -> None:
        self._backlog_bytes = None
        self._metrics.count("groups_quarantined_total", reason=reason)
        log.warning("group.quarantined", reason=reason, group=group)

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

    def _release_files(self) -> list[int]:
        needed = (
            "SELECT e.file FROM episodes e JOIN orders o USING (idx)"
            " WHERE e.file IS NOT NULL AND o.state != 'dropped' AND (o.idx >= ? OR o.state = 'quarantined')"
        )
        query = f"SELECT DISTINCT file FROM episodes WHERE file IS NOT NULL EXCEPT {needed}"
        return [file for (file,) in self._db.execute(query, (self._forgotten_below,))]

    def forget_files(self, files: Sequence[int]) -> None:
        """Note that payload files are about to be deleted (after the next commit)."""
        self._db.executemany("UPDATE episodes SET file = NULL WHERE file = ?", [(file,) for file in files])
        self._db.executemany("DELETE FROM files WHERE number = ?", [(file,) for file in files])


def length_bucket(num_tokens: int, num_episodes: int) -> str:
    """Mean tokens per stored episode, as a label: dropping long episodes more often than short ones biases training."""
    if num_episodes == 0:
        return "none"
    mean = num_tokens / num_episodes
    return next((label for limit, label in LENGTHS if mean < limit), ">=64k")


def _pack(task: wire.OrderedTask) -> bytes:
    packed: bytes = msgpack.packb(task.model_dump(), use_bin_type=True)
    return packed
