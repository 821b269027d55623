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
from matpo_broker.members import Members, Rules
from matpo_broker.tables import Meta, StoredRow, connect, rows_of

MAX_TASK_BYTES = wire.MAX_HEADER_BYTES - 8192  # a lease repeats the task in its own header
MAX_MEMBERS = 2**18  # of the orders in one message: they are entered in one turn
KEPT_COMMITS = 1000

log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One group for the learner: whole, or a tombstone (`dropped` says why, no episodes)."""

    group: str
    index: int
    episodes: Sequence[StoredRow]
    dropped: str = ""


class Ledger:
    """Orders, groups and learner epochs of one run; `members` has the actors' side.

    `path` is a file, or ":memory:" for tests. Raises JournalError when the file is damaged or of another run.
    """

    def __init__(self, path: Path | str, rules: Rules, metrics: Metrics, *, now_s: float) -> None:
        self._rules = rules
        self._metrics = metrics
        self._db = connect(path, rules.run)
        self._meta = Meta(self._db)
        self._past = views.Past()
        self.members = Members(self._db, self._meta, rules, metrics, now_s=now_s)
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
            epoch = self.epoch + 1
            self._db.execute(
                "INSERT INTO learners(epoch, incarnation, name) VALUES (?, ?, ?)",
                (epoch, hello.incarnation, hello.name),
            )
            self._meta.set(
                epoch=epoch, schema_version=hello.schema_version, model=hello.model or self._meta.get("model", "")
            )
            log.info("learner.epoch", epoch=epoch, learner=hello.name)
        self._check_epoch(known if known is not None else self.epoch)
        return self.epoch

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
        self._db.execute("UPDATE orders SET consumed = 0 WHERE idx >= ?", (self._forgotten_below,))
        self._consume(message.consumed_below, message.consumed)
        for group in quarantine.strike(self._db, message.epoch, limit=self._rules.max_deliveries):
            self._count_quarantined(group, "deliveries")
        quarantine.bring_back(self._db)
        self._db.execute("UPDATE orders SET delivered = NULL WHERE idx >= ?", (self._forgotten_below,))
        self._meta.set(resumed=message.epoch, delivery="")

    def place(self, message: wire.PlaceOrders, now_s: float = 0.0) -> None:
        """Take work orders; those that are there already change nothing, unless they differ (refused)."""
        self._check_epoch(message.epoch)
        new = []
        seen: set[int | str] = set()
        if sum(order.group_size for order in message.orders) > MAX_MEMBERS:
            raise RefusedError(f"orders of more than {MAX_MEMBERS} members in one message", reason="order_size")
        for order in message.orders:
            if order.group_size * (2 * len(order.group) + 64) > wire.MAX_HEADER_BYTES:
                raise RefusedError(
                    f"a group of {order.group_size} members with a name of {len(order.group)} characters would not fit "
                    "into one message. Use smaller groups or shorter names.",
                    reason="order_size",
                )
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
        self.members.add(((index, size) for index, _, size, _ in new), now_s)

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
            self.members.drop(index, "stale")
            state, reason = "dropped", "stale"
        self._db.execute("UPDATE orders SET delivered = ? WHERE idx = ?", (message.epoch, index))
        self.members.backlog_changed()
        self._meta.set(delivery=group)
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
            self._meta.set(forgotten_below=below)
        self._meta.set(checkpoint=message.checkpoint)
        self._db.execute(
            "INSERT OR REPLACE INTO commits VALUES (?, ?, ?, ?)",
            (message.checkpoint, message.epoch, message.consumed_below, message.oldest_kept_below),
        )
        self._db.execute("DELETE FROM commits WHERE rowid <= (SELECT max(rowid) FROM commits) - ?", (KEPT_COMMITS,))
        return self._release_files()

    def announce(self, message: wire.SnapshotNotice) -> None:
        """Remember the newest snapshot."""
        self._check_epoch(message.epoch)
        self._meta.set(snapshot_version=message.version)

    # ---- operators

    def peek(self, message: wire.Peek) -> tuple[Sequence[str], list[list[views.Cell]]]:
        """Groups, or the members of one, as (columns, rows)."""
        return views.peek(self._db, message)

    def show(self, group: str) -> Delivery:
        """A group as it would be delivered, also a quarantined one. Raises RefusedError: no such group."""
        row = self._db.execute("SELECT idx, state, reason FROM orders WHERE grp = ?", (group,)).fetchone()
        if row is None:
            raise RefusedError(f"there is no group {group}. `matpo-broker peek` lists them.", reason="no_group")
        index, state, reason = row
        episodes = list(rows_of(self._db, "AND idx = ?", index))
        return Delivery(group=group, index=index, episodes=episodes, dropped=reason if state == "dropped" else "")

    def requeue(self, groups: Sequence[str]) -> None:
        """Put quarantined groups back into the stream."""
        quarantine.requeue(self._db, groups)
        self.members.backlog_changed()
        log.info("groups.requeued", groups=list(groups))

    def purge(self, groups: Sequence[str]) -> list[int]:
        """Let the payloads of quarantined groups go. Returns payload files that nothing needs any more."""
        quarantine.purge(self._db, groups)
        self._past = views.Past()
        self.members.backlog_changed()
        log.info("groups.purged", groups=list(groups))
        return self._release_files()

    # ---- what others may know

    def counts(self) -> dict[str, int]:
        """What is where, by count. In the broker's loop: what every kept checkpoint covers is counted only once."""
        self._past.extend(self._db, self._forgotten_below)
        return views.counts(self._db, self._past)

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
        self.members.backlog_changed()
        self.members.end_consumed()

    def _is_stale(self, index: int, min_version: int) -> bool:
        oldest = self._one("SELECT min_version FROM orders WHERE idx = ?", index)
        return oldest is not None and oldest < min_version

    def _count_quarantined(self, group: str, reason: str) -> None:
        self.members.backlog_changed()
        self._metrics.count("groups_quarantined_total", reason=reason)
        log.warning("group.quarantined", reason=reason, group=group)

    def _release_files(self) -> list[int]:
        needed = (
            "SELECT e.file FROM episodes e JOIN orders o USING (idx)"
            " WHERE e.file IS NOT NULL AND o.state != 'dropped' AND (o.idx >= ? OR o.state = 'quarantined')"
        )
        query = f"SELECT DISTINCT file FROM episodes WHERE file IS NOT NULL EXCEPT {needed}"
        below = 0 if self._rules.keep_consumed else self._forgotten_below
        return [file for (file,) in self._db.execute(query, (below,))]

    def forget_files(self, files: Sequence[int]) -> None:
        """Note that payload files are about to be deleted (after the next commit)."""
        self._db.executemany("UPDATE episodes SET file = NULL WHERE file = ?", [(file,) for file in files])
        self._db.executemany("DELETE FROM files WHERE number = ?", [(file,) for file in files])


def _pack(task: wire.OrderedTask) -> bytes:
    packed: bytes = msgpack.packb(task.model_dump(), use_bin_type=True)
    return packed
