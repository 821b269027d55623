"""Decide what the broker does next. No sockets, no clock, no threads; `now_s` is monotonic time, passed in.

Rules kept here; each has a test of the same name in tests/broker/test_ledger.py:
1. One stored episode per member; the same one again is a duplicate, another one is refused.
2. A lease never outlives its deadline, whatever the actor says; a lost lease stores nothing.
3. A group is delivered whole or as a tombstone that says why, oldest index first.
4. A delivered group comes again until the learner says that it arrived, and again after Resume until it is consumed.
5. An episode is forgotten only when the oldest kept checkpoint covers it, or when its group is dropped and counted.
6. Only the newest learner epoch changes anything.
7. Actors get no new members while a ready group waits and the learner's backlog is above credit.

What changes is in one open SQLite transaction until `commit`; the caller makes payloads durable before it. Lease
deadlines are in memory only: they mean nothing to another process, which starts them afresh.
Payloads are opaque here; matpo.schema knows what is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import msgpack

from matpo import logs, wire
from matpo.errors import RefusedError
from matpo.metrics import Metrics
from matpo_broker.tables import Location, StoredRow, connect, rows_of

MAX_TASK_BYTES = wire.MAX_HEADER_BYTES - 8192  # a lease repeats the task in its own header
LEASE_REPLY_BYTES = wire.MAX_HEADER_BYTES - 65536

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
        self._deadlines = {lease: now_s + rules.lease_s for (lease,) in leased}
        self._next_deadline_s = min(self._deadlines.values(), default=inf)  # never later than the first deadline
        self._db.execute("BEGIN")

    # ---- transactions

    def commit(self) -> None:
        """Make every decision since the last commit durable, at once. Raises sqlite3.Error."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Forget what was not committed and release the file."""
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
            epoch = self.epoch + 1
            self._db.execute("INSERT INTO learners VALUES (?, ?, ?)", (epoch, hello.incarnation, hello.name))
            self._set(
                epoch=epoch, schema_version=hello.schema_version, model=hello.model or self._meta.get("model", "")
            )
            log.info("learner.epoch", epoch=epoch, learner=hello.name)
        self._check_epoch(known if known is not None else self.epoch)
        return self.epoch

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

    def place(self, message: wire.PlaceOrders) -> None:
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
            seen.update((order.index, order.group))
        if len(seen) != 2 * len(message.orders):
            raise RefusedError("an order index or group stands twice in one message", reason="order_conflict")
        self._db.executemany("INSERT INTO orders(idx, grp, group_size, task) VALUES (?, ?, ?, ?)", new)
        members = [(index, member) for index, _, size, _ in new for member in range(size)]
        self._db.executemany("INSERT INTO members(idx, member) VALUES (?, ?)", members)

    def fetch(self, message: wire.Fetch) -> Delivery | None:
        """The oldest ready group, or the last one again if the learner does not have it. None: nothing is ready."""
        self._check_epoch(message.epoch)
        if self._meta.get("resumed") != message.epoch:
            raise RefusedError("fetch before resume: say first what the checkpoint covers", reason="resume_first")
        last = self._meta.get("delivery", "")
        columns = "SELECT idx, grp, reason FROM orders WHERE consumed = 0"
        row = None
        if last and message.received != last:
            row = self._db.execute(f"{columns} AND grp = ?", (last,)).fetchone()
        if row is None:
            row = self._db.execute(
                f"{columns} AND delivered IS NULL AND state != 'open' ORDER BY idx LIMIT 1"
            ).fetchone()
        if row is None:
            return None
        index, group, reason = row
        self._db.execute("UPDATE orders SET delivered = ? WHERE idx = ?", (message.epoch, index))
        self._set(delivery=group)
        episodes = [] if reason else list(rows_of(self._db, "AND idx = ?", index))
        return Delivery(group=group, index=index, episodes=episodes, dropped=reason)

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
        return self._release_files()

    def announce(self, message: wire.SnapshotNotice) -> None:
        """Remember the newest snapshot."""
        self._check_epoch(message.epoch)
        self._set(snapshot_version=message.version)

    def drop(self, index: int, reason: str) -> None:
        """Give a group up: a tombstone takes its place in the stream, its payloads may go."""
        group = self._one("SELECT grp FROM orders WHERE idx = ? AND state != 'dropped'", index)
        if group is None:
            return
        self._free("idx = ?", index, reason="dropped")
        self._db.execute("DELETE FROM members WHERE idx = ?", (index,))
        self._db.execute(
            "UPDATE orders SET state = 'dropped', reason = ?, num_bytes = 0 WHERE idx = ?", (reason, index)
        )
        self._metrics.count("groups_dropped_total", reason=reason)
        log.warning("group.dropped", reason=reason, group=group, index=index)

    # ---- actors

    def lease(self, actor: str, num_members: int, now_s: float) -> tuple[list[wire.Lease], str]:
        """Up to `num_members` leases, and why there are none if actors are held back.

        Order: groups that this actor began (their prefix is in its cache), groups that nobody began, any group.
        """
        if paused := self._paused():
            return [], paused
        rows = self._db.execute(
            "SELECT m.idx, m.member, m.attempt, o.grp, o.task FROM members m JOIN orders o USING (idx)"
            " WHERE m.lease IS NULL AND o.consumed = 0"
            " ORDER BY CASE WHEN o.owner = ? THEN 0 WHEN o.owner IS NULL THEN 1 ELSE 2 END, m.idx, m.member LIMIT ?",
            (actor, num_members),
        ).fetchall()
        leases: list[wire.Lease] = []
        serial, budget = int(self._meta.get("serial", 0)), LEASE_REPLY_BYTES
        for index, member, attempt, group, task in rows:
            if leases and budget < len(task) + 1024:
                break
            serial += 1
            budget -= len(task) + 1024
            lease = f"{self._meta['journal']}-{serial}"
            self._db.execute(
                "UPDATE members SET lease = ?, actor = ? WHERE idx = ? AND member = ?", (lease, actor, index, member)
            )
            self._db.execute("UPDATE orders SET owner = ? WHERE idx = ? AND owner IS NULL", (actor, index))
            self._deadlines[lease] = now_s + self._rules.lease_s
            self._next_deadline_s = min(self._next_deadline_s, self._deadlines[lease])
            ordered = wire.OrderedTask.model_validate(msgpack.unpackb(task))
            leases.append(wire.Lease(lease=lease, group=group, member=member, attempt=attempt, task=ordered))
        if leases:
            self._set(serial=serial)
        return leases, ""

    def admit(self, message: wire.StoreEpisode) -> bool:
        """True: store this episode (append its payload, then `record` it). False: it is there already.

        Raises RefusedError: lease_lost, lease_mismatch.
        """
        index = self._one("SELECT idx FROM orders WHERE grp = ?", message.group)
        stored = self._db.execute(
            "SELECT episode, num_bytes, crc32c FROM episodes WHERE idx = ? AND member = ?", (index, message.member)
        ).fetchone()
        if stored is not None and stored == (message.episode, message.num_bytes, message.crc32c):
            return False
        leased = self._db.execute(
            "SELECT idx, member, attempt FROM members WHERE lease = ?", (message.lease,)
        ).fetchone()
        if leased is None:
            raise RefusedError(
                f"lease {message.lease} on member {message.member} of {message.group} was lost. Drop the episode: "
                "the member is another's, or is no longer wanted.",
                reason="lease_lost",
            )
        if leased != (index, message.member, message.attempt):
            raise RefusedError(
                f"lease {message.lease} is not for {message.group}, member {message.member}, attempt {message.attempt}",
                reason="lease_mismatch",
            )
        return True

    def record(self, message: wire.StoreEpisode, actor: str, location: Location) -> None:
        """Enter an admitted episode; its member is done."""
        index = self._one("SELECT idx FROM members WHERE lease = ?", message.lease)
        values = (index, message.member, message.attempt, message.episode, message.lease, actor, message.num_tokens)
        place = (location.file, location.offset, location.num_bytes, location.crc32c)
        self._db.execute("INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values + place)
        self._db.execute("DELETE FROM members WHERE idx = ? AND member = ?", (index, message.member))
        del self._deadlines[message.lease]
        self._db.execute(
            "UPDATE orders SET num_stored = num_stored + 1, num_bytes = num_bytes + ?,"
            " state = CASE WHEN num_stored + 1 = group_size THEN 'whole' ELSE state END WHERE idx = ?",
            (location.num_bytes, index),
        )

    def heartbeat(self, actor: str, leases: Sequence[str], now_s: float) -> list[str]:
        """Renew leases; returns those that this actor does not hold. Stored ones are not lost."""
        lost = []
        for lease in leases:
            holder = self._one("SELECT actor FROM members WHERE lease = ?", lease)
            if holder == actor:
                self._deadlines[lease] = now_s + self._rules.lease_s
            elif holder is not None or self._one("SELECT 1 FROM episodes WHERE lease = ?", lease) is None:
                lost.append(lease)
        return lost

    def release(self, actor: str, leases: Sequence[str], *, infra: bool) -> None:
        """Take leases back. `infra`: a failure that counts against the member."""
        for lease in leases:
            if self._one("SELECT actor FROM members WHERE lease = ?", lease) == actor:
                self._free("lease = ?", lease, reason="infra" if infra else "released", failed=infra)

    def depart(self, actor: str) -> None:
        """An actor said goodbye: whatever it holds is free."""
        self._free("actor = ? AND lease IS NOT NULL", actor, reason="goodbye")
        self._db.execute("UPDATE orders SET owner = NULL WHERE owner = ? AND state = 'open'", (actor,))

    def expire(self, now_s: float) -> None:
        """Free the leases whose actors were silent for too long; that counts against their members."""
        if now_s < self._next_deadline_s:
            return
        for lease in [lease for lease, deadline in self._deadlines.items() if deadline <= now_s]:
            self._free("lease = ?", lease, reason="timeout", failed=True)
        self._next_deadline_s = min(self._deadlines.values(), default=inf)

    # ---- what others may know

    @property
    def next_deadline_s(self) -> float:
        """No lease ends before this; infinity without leases."""
        return self._next_deadline_s

    def counts(self) -> dict[str, int]:
        """What is where, by count."""
        rows = self._db.execute(
            "SELECT state, consumed, delivered IS NULL, count(*) FROM orders GROUP BY 1, 2, 3"
        ).fetchall()
        in_state = {s: sum(n for state, _, _, n in rows if state == s) for s in ("open", "whole", "dropped")}
        return {
            "orders": sum(in_state.values()),
            "orders_open": sum(n for state, consumed, _, n in rows if state == "open" and not consumed),
            "groups_whole": in_state["whole"],
            "groups_dropped": in_state["dropped"],
            "groups_ready": sum(n for state, done, waits, n in rows if state != "open" and not done and waits),
            "groups_delivered": sum(n for _, consumed, waits, n in rows if not consumed and not waits),
            "groups_consumed": sum(n for _, consumed, _, n in rows if consumed),
            "members_open": self._one(
                "SELECT count(*) FROM members JOIN orders USING (idx) WHERE lease IS NULL AND consumed = 0"
            ),
            "members_leased": len(self._deadlines),
            "episodes_stored": self._one("SELECT count(*) FROM episodes"),
            "backlog_bytes": self._backlog_bytes(),
            "epoch": self.epoch,
            "snapshot_version": self.snapshot_version,
        }

    def flow(self) -> tuple[int, int, int, int]:
        """(groups ready, orders open, members open, members leased), cheap enough for every loop turn."""
        ready, open_orders = self._db.execute(
            "SELECT count(*) FILTER (WHERE state != 'open'), count(*) FILTER (WHERE state = 'open') FROM orders"
            " WHERE consumed = 0 AND delivered IS NULL"
        ).fetchone()
        free = self._one("SELECT count(*) FROM members JOIN orders USING (idx) WHERE lease IS NULL AND consumed = 0")
        return ready, open_orders, free, len(self._deadlines)

    def last_records(self) -> list[StoredRow]:
        """The last record of each payload file."""
        last = "AND (file, offset) IN (SELECT file, max(offset) FROM episodes WHERE file IS NOT NULL GROUP BY file)"
        return list(rows_of(self._db, last))

    # ---- inside

    @property
    def _forgotten_below(self) -> int:
        return int(self._meta.get("forgotten_below", 0))

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
        if gone > sum(1 for index in set(message.consumed) if message.consumed_below <= index < below):
            raise RefusedError(
                f"groups below {below} are forgotten, this learner has consumed those below {message.consumed_below}. "
                "Resume from a newer checkpoint, or start a new run.folder.",
                reason="forgotten",
            )

    def _consume(self, below: int, more: Sequence[int]) -> None:
        self._db.execute("UPDATE orders SET consumed = 1 WHERE consumed = 0 AND idx < ?", (below,))
        self._db.executemany("UPDATE orders SET consumed = 1 WHERE consumed = 0 AND idx = ?", [(i,) for i in more])
        if self._deadlines:
            done = "lease IS NOT NULL AND idx IN (SELECT idx FROM orders WHERE consumed = 1 AND state = 'open')"
            self._free(done, reason="consumed")

    def _free(self, where: str, *values: object, reason: str, failed: bool = False) -> None:
        """Take the leases of some members away. `where` is one of our own constants, never a peer's text."""
        rows = self._db.execute(
            f"SELECT idx, member, lease, actor, failures FROM members WHERE {where}", values
        ).fetchall()
        for index, member, lease, actor, failures in rows:
            if lease is None:
                continue
            self._db.execute(
                "UPDATE members SET lease = NULL, actor = NULL, attempt = attempt + 1, failures = failures + ?"
                " WHERE idx = ? AND member = ?",
                (failed, index, member),
            )
            self._db.execute("UPDATE orders SET owner = NULL WHERE idx = ? AND owner = ?", (index, actor))
            del self._deadlines[lease]
            self._metrics.count("lease_losses_total", reason=reason)
            if failed and failures + 1 >= self._rules.max_attempts:
                self.drop(index, "attempts")

    def _backlog_bytes(self) -> int:
        return int(self._one("SELECT coalesce(sum(num_bytes), 0) FROM orders WHERE consumed = 0 AND delivered IS NULL"))

    def _paused(self) -> str:
        # Without a ready group the learner itself waits for members: holding actors back would be a deadlock.
        ready = self._one("SELECT 1 FROM orders WHERE consumed = 0 AND delivered IS NULL AND state = 'whole' LIMIT 1")
        backlog = self._backlog_bytes()
        if ready is None or backlog <= self._rules.credit_bytes:
            return ""
        return f"{backlog} bytes wait for the learner, more than credit_bytes={self._rules.credit_bytes}"

    def _release_files(self) -> list[int]:
        needed = (
            "SELECT e.file FROM episodes e JOIN orders o USING (idx)"
            " WHERE e.file IS NOT NULL AND o.state != 'dropped' AND o.idx >= ?"
        )
        query = f"SELECT DISTINCT file FROM episodes WHERE file IS NOT NULL EXCEPT {needed}"
        return [file for (file,) in self._db.execute(query, (self._forgotten_below,))]

    def forget_files(self, files: Sequence[int]) -> None:
        """Note that payload files are about to be deleted (after the next commit)."""
        self._db.executemany("UPDATE episodes SET file = NULL WHERE file = ?", [(file,) for file in files])


def _pack(task: wire.OrderedTask) -> bytes:
    packed: bytes = msgpack.packb(task.model_dump(), use_bin_type=True)
    return packed
