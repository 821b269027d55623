"""Payload files and ledger as one durable unit. Knows no sockets and no messages but the episode that it stores.

`put` ... `commit`: nothing that `put` took may be acknowledged before `commit` has returned.

Rules kept here; each has a test in tests/broker/test_store.py:
1. Payloads are on disk before the ledger knows them, and the ledger before `commit` returns (group, always).
2. A restart keeps what was committed, cuts what was not, and invents nothing.
3. A full disk is a pause: episodes are refused (disk_full) until there is room again; whatever else the ledger has to
   note goes on at 0 bytes free, in the space that its WAL has already.
4. If even the ledger finds the disk full, the turn is lost as a whole (TurnLostError), the store is as it was after its
   last commit, and the ballast is given up, so that the next turn finds room.
5. Any other error of the disk is the caller's end: after a failed sync nothing in memory can be believed.
6. A payload file is deleted only after the ledger's word that nothing needs it is as durable as its policy makes it.

Durability: group and always sync payloads and ledger in each commit. interval syncs both every sync_interval_s, never
leaves it to the kernel.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterator
from math import inf
from pathlib import Path
from time import perf_counter

from matpo import logs, wire
from matpo.errors import JournalError, RefusedError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.disk import FILE_MODE, Disk, says_full
from matpo_broker.journal import DiskFullError, Journal, record_end, sealed_as
from matpo_broker.ledger import Ledger
from matpo_broker.members import Rules
from matpo_broker.tables import LEDGER_NAME, Location, open_read_only, rows_of

BALLAST_NAME = "ballast"
LOW_WATER_BYTES = 4 * 2**20  # no payload takes the last bytes: the ledger's own file grows too
WAL_BYTES = 8 * 2**20  # SQLite begins its WAL anew at about half of it
RETRY_S = 1.0  # a refused episode comes again after this; space is looked for then, and in each tick

_SYNCHRONOUS = {"group": "FULL", "always": "FULL", "interval": "NORMAL", "never": "OFF"}

log = logs.get()


class TurnLostError(RefusedError):
    """The ledger found the disk full: nothing of this turn happened. Refuse every request of it; it may be repeated."""


class Store:
    """Everything that the broker keeps, in one folder that is locked until `close`.

    One call at a time, from any thread. Raises JournalError: locked, damaged, of another run; OSError, sqlite3.Error.
    """

    ledger: Ledger  # another one after a lost turn: never keep a reference

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        settings: BrokerSettings,
        metrics: Metrics,
        *,
        now_s: float,
        disk: Disk | None = None,
    ) -> None:
        self._disk = disk or Disk()
        self._folder = folder
        self._rules = rules
        self._settings = settings
        self._metrics = metrics
        self._low_water_bytes = min(LOW_WATER_BYTES, settings.ballast_bytes)
        self._syncs_each = settings.durability in ("group", "always")
        self._next_sync_s = now_s + settings.sync_interval_s
        self._owes_sync = False
        self._deleted_after_sync: list[int] = []
        self._is_full = False
        self._journal = Journal(
            folder,
            file_bytes=settings.journal_file_bytes,
            disk=self._disk,
            keep_free_bytes=self._low_water_bytes,
            ever_sync=settings.durability != "never",
        )
        try:
            self._start(now_s)
        except BaseException:
            if hasattr(self, "ledger"):
                self.ledger.close()
            self._journal.close()
            raise

    # ---- what is kept

    @property
    def is_full(self) -> bool:
        """Whether episodes are refused because the disk is full."""
        return self._is_full

    @property
    def num_bytes(self) -> int:
        """Bytes in payload files."""
        return self._journal.num_bytes

    @property
    def next_tick_s(self) -> float:
        """In so many seconds at the latest `tick` has to sync (interval policy); infinity when there is nothing to."""
        return self._settings.sync_interval_s if self._owes_sync else inf

    def read(self, episode: str, location: Location) -> bytes:
        """The payload of one episode. Raises JournalError (missing | torn | hash)."""
        try:
            return self._journal.read(episode, location)
        except JournalError as error:
            self._metrics.count("journal_errors_total", reason=error.reason)
            raise

    @property
    def current_file(self) -> int | None:
        """The payload file that is appended to: it may not be forgotten and released."""
        return self._journal.current_file

    # ---- a turn

    def put(self, message: wire.StoreEpisode, actor: str, payload: bytes | memoryview) -> bool:
        """Take an episode whose payload was checked; it is kept once `commit` returns. False: it is there already.

        Raises RefusedError: what the ledger says, or disk_full. OSError, sqlite3.Error: end the process.
        """
        if not self.ledger.members.admit(message, actor):
            return False
        if self._is_full:
            self._look_at_space()
        try:
            if self._is_full:
                raise DiskFullError(f"the disk of {self._folder} is full. Free space on it.", reason="disk_full")
            location = self._journal.append(message.episode, payload, message.crc32c)
        except DiskFullError as error:
            self._look_at_space()
            raise RefusedError(
                f"{error} The episode is refused until then; its actor keeps it.",
                reason="disk_full",
                retry_after_s=RETRY_S,
            ) from None
        self.ledger.members.record(message, actor, location)
        return True

    def commit(self, now_s: float) -> None:
        """Make everything since the last commit as durable as the policy says.

        Raises TurnLostError: the disk is full, nothing since the last commit happened. OSError or sqlite3.Error: the
        disk fails; acknowledge nothing and end the process.
        """
        with self._turn(now_s):
            self._flush(sync=self._syncs_each)
            self.ledger.commit()
            self._owes_sync = self._settings.durability == "interval"
            self._sync_when_due(now_s)

    @contextlib.contextmanager
    def _turn(self, now_s: float) -> Iterator[None]:
        """Inside it a full disk is a TurnLostError, and the store is back at its last commit when it is raised."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            if not self._means_full(error):
                raise
            log.error("turn.lost", error=str(error))
            self._give_up_ballast()
            self.reload(now_s)
            raise TurnLostError(
                f"the disk of {self._folder} is full ({error}): nothing of this turn was kept. Free space on it.",
                reason="disk_full",
                retry_after_s=RETRY_S,
            ) from error

    def release(self, files: Collection[int]) -> None:
        """Delete payload files that the ledger has forgotten, in a commit before this."""
        if self._settings.durability == "interval":
            self._deleted_after_sync += files
        else:
            self._remove(files)

    def tick(self, now_s: float) -> None:
        """What time brings: a look at the free space, the sync of the interval policy. To be called between turns.

        Raises OSError or sqlite3.Error as `commit` does.
        """
        self._look_at_space()
        with contextlib.suppress(TurnLostError), self._turn(now_s):  # between turns there is nothing to lose
            self._sync_when_due(now_s)

    def reload(self, now_s: float) -> None:
        """Go back to the last commit. Needs no space: the disk may be full to the last byte."""
        with contextlib.closing(sqlite3.connect(self._folder / LEDGER_NAME, isolation_level=None)) as keeper:
            # While another connection is open SQLite keeps the WAL and its index; made anew, they would need space.
            keeper.execute("SELECT count(*) FROM meta").fetchone()
            self.ledger.close()
            with contextlib.suppress(
                sqlite3.Error
            ):  # so that the next commits fit into the WAL's own space, if they can
                keeper.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._open_ledger(now_s)
            self._recover()

    def close(self) -> None:
        """Seal the file in progress, commit, and release the folder."""
        try:
            self._journal.seal()
            self._flush(sync=self._settings.durability != "never")
            self.ledger.commit()
        except (OSError, sqlite3.Error) as error:
            if not self._means_full(error):
                raise
            log.warning("journal.not_closed", error=str(error))  # the next start seals it
        finally:
            self.ledger.close()
            self._journal.close()

    # ---- start

    def _start(self, now_s: float) -> None:
        self._metrics.set("durability", 1, policy=self._settings.durability)
        self._metrics.set("disk_full", 0)
        if self._disk.free_bytes(self._folder) < self._low_water_bytes:
            self._give_up_ballast()  # to open a ledger takes some space
        descriptor = os.open(self._folder / LEDGER_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        os.close(descriptor)  # SQLite's other files get the mode of this one
        self._open_ledger(now_s)
        if self.ledger.counts()["orders"] == 0 and self._journal.num_bytes > 0:
            raise JournalError(
                f"{self._folder} has payload files, but its ledger is empty. "
                f"Restore {LEDGER_NAME}, or use another run.folder.",
                reason="ledger",
            )
        self._recover()
        with contextlib.suppress(TurnLostError):
            self.commit(now_s)
        self._set_aside()

    def _open_ledger(self, now_s: float) -> None:
        self.ledger = Ledger(self._folder / LEDGER_NAME, self._rules, self._metrics, now_s=now_s)
        self.ledger.set_synchronous(_SYNCHRONOUS[self._settings.durability])

    def _recover(self) -> None:
        """Make the payload files what the ledger says; seal those that were not."""
        ends = {row.location.file: record_end(row.episode, row.location) for row in self.ledger.last_records()}
        sealed = self.ledger.sealed_files()
        # A sealed file keeps its length, also when its last row is gone (Ledger.reopen).
        ends |= {number: max(ends[number], num_bytes) for number, (num_bytes, _) in sealed.items() if number in ends}
        ends = {n: max(end, sealed[n][0]) if n in sealed else end for n, end in ends.items()}
        found = self._journal.recover(ends, sealed)
        if found.cut_bytes:
            log.info("journal.recovered", cut_bytes=found.cut_bytes)
        for number, reason in found.damaged.items():
            self._metrics.count("journal_errors_total", reason=reason)
            log.error("journal.damaged", reason=reason, file=number)
        self.ledger.forget_files(sorted(sealed.keys() - ends.keys()))
        with contextlib.closing(open_read_only(self._folder / LEDGER_NAME)) as db:
            for number in sorted(ends.keys() - sealed.keys()):
                whole = sealed_as(number, rows_of(db, "AND file = ?", number))
                if whole is None:  # a damaged record was given up there: the others answer for themselves
                    log.warning("journal.unsealed", file=number)
                else:
                    self.ledger.seal_file(whole.number, whole.num_bytes, whole.crc32c)

    # ---- sync

    def _flush(self, *, sync: bool) -> None:
        if not self._journal.has_unsynced:
            return
        started_s = perf_counter()
        for file in self._journal.flush(sync=sync):
            self.ledger.seal_file(file.number, file.num_bytes, file.crc32c)
        if sync:
            self._metrics.observe("fsync_seconds", perf_counter() - started_s)

    def _sync_when_due(self, now_s: float) -> None:
        if not self._owes_sync or now_s < self._next_sync_s:
            return
        self._next_sync_s, self._owes_sync = now_s + self._settings.sync_interval_s, False
        self._flush(sync=True)
        self.ledger.commit()
        wal = self._folder / f"{LEDGER_NAME}-wal"
        if wal.exists():
            descriptor = self._disk.open(wal)
            try:
                self._disk.sync(descriptor)
            finally:
                self._disk.close(descriptor)
        self._remove(self._deleted_after_sync)
        self._deleted_after_sync = []

    def _remove(self, files: Collection[int]) -> None:
        self._journal.remove(files)
        if files:
            self.ledger.forget_files(list(files))  # again: one may have been sealed after the ledger forgot it

    # ---- space

    def _look_at_space(self) -> None:
        free = self._disk.free_bytes(self._folder)
        self._metrics.set("disk_free_bytes", free)
        if self._is_full:
            self._regain(free)
        elif free < self._low_water_bytes:
            self._pause()

    def _pause(self) -> None:
        if not self._is_full:
            log.warning("disk.full", folder=str(self._folder), free_bytes=self._disk.free_bytes(self._folder))
        self._is_full = True
        self._metrics.set("disk_full", 1)

    def _give_up_ballast(self) -> None:
        self._disk.unlink(self._folder / BALLAST_NAME)
        self._pause()

    def _regain(self, free: int) -> None:
        """End the pause if there is room for the ballast, should it be gone, and for some payloads beside it."""
        ballast_bytes = 0 if (self._folder / BALLAST_NAME).exists() else self._settings.ballast_bytes
        if free < ballast_bytes + 2 * self._low_water_bytes:
            return
        self._is_full = False
        self._set_aside()
        if not self._is_full:
            self._metrics.set("disk_full", 0)
            log.info("disk.has_room", folder=str(self._folder), free_bytes=free)

    def _set_aside(self) -> None:
        """Space for the ledger: in its WAL, where nobody can take it, and the ballast for when that is not enough."""
        ballast, num_bytes = self._folder / BALLAST_NAME, self._settings.ballast_bytes
        try:
            # SQLite takes what is behind the last good frame for the rest of an earlier round, whatever it is.
            self._allocate(self._folder / f"{LEDGER_NAME}-wal", min(WAL_BYTES, num_bytes))
            if self._is_full:
                return
            if ballast.exists() and ballast.stat().st_size > num_bytes:
                self._disk.unlink(ballast)
            self._allocate(ballast, num_bytes)
        except OSError as error:
            if not says_full(error):
                raise
            self._give_up_ballast()  # half of one helps nobody

    def _allocate(self, path: Path, num_bytes: int) -> None:
        descriptor = self._disk.open(path) if path.exists() else self._disk.create(path)
        try:
            self._disk.allocate(descriptor, 0, num_bytes)
        finally:
            self._disk.close(descriptor)

    def _means_full(self, error: OSError | sqlite3.Error) -> bool:
        if isinstance(error, OSError):
            return says_full(error)
        code = getattr(error, "sqlite_errorname", "")
        if code in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):  # a quota, or the WAL's index could not grow
            return self._disk.free_bytes(self._folder) < self._low_water_bytes
        return bool(code == "SQLITE_FULL")
