"""Rank 0's side of the learner: what it asks of the broker and the disk. Which groups are trained is decided in
matpo_learner.judge, what is written down is in matpo_learner.diary.

Rules kept here, each with a test in tests/flow/test_learner_process.py:
1. A group is consumed when it is trained, or dropped for a counted reason: zero_signal, stale, dropped (by the broker),
   invalid, not_finite. Its line in trained.jsonl and its place in the book are written together.
2. What a checkpoint covers is on disk before the broker hears of it.
3. A checkpoint is due by updates, or by time when groups were consumed since the last one.
4. A batch that is not finite is saved; max_bad_updates of them in a row end the run.
5. Once a newer learner has taken over, nothing more is written (matpo_learner.fence).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from matpo import logs, wire
from matpo.episode import Group
from matpo.errors import MatpoError
from matpo.metrics import Metrics
from matpo.plugins import load_environment
from matpo.run_folder import Identity
from matpo.schema import SCHEMA_VERSION
from matpo.security import client_keys
from matpo.settings import LearnerSettings, RunFile
from matpo_learner import checkpoint
from matpo_learner.deepspeed_engine import StepReport
from matpo_learner.diary import Diary
from matpo_learner.fence import Fence
from matpo_learner.inbox import Delivery, Inbox
from matpo_learner.judge import Judge, vocab_size
from matpo_learner.lineage import Lineage
from matpo_learner.orders import Book, OrderStream
from matpo_learner.packing import minibatch_bounds
from matpo_learner.publisher import Publisher
from matpo_learner.waits import Ask, Reason, Waits

TAKE_S = 0.5
COMES_S = 10.0  # groups that come at least so often are not what is waited for
log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chosen:
    """One group that will be trained in the next update."""

    delivery: Delivery
    group: Group
    lag: int


class Leader:
    """Talks to the broker and the disk. Made on rank 0; `resumed` is the checkpoint that the engine has to load."""

    def __init__(
        self,
        run_file: RunFile,
        identity: Identity,
        stopping: threading.Event,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect to the broker, take over the run folder, find the newest checkpoint, cut the logs back to it.

        Waits for the broker as long as it takes; `idle` is called meanwhile, and what it raises ends the wait.
        """
        self._run_file, self._identity = run_file, identity
        self._settings = run_file.learner
        self._stopping = stopping
        self.version = -1
        self.metrics = Metrics("learner")
        if run_file.metrics.learner_port:
            self.metrics.serve(run_file.metrics.host, run_file.metrics.learner_port)
        self._judge = Judge(run_file)
        self._inbox = _make_inbox(run_file, identity)
        self.waits = Waits(self._reasons(), self.metrics, warn_after_s=self._settings.group_timeout_s)
        try:
            with self.waits.on("start"):
                welcome = self._inbox.start(idle)
            with self.waits.on("fence"):
                self._fence = Fence(run_file.run.folder, self._inbox.epoch, idle)
            self._begin(welcome)
        except BaseException:  # also when told to stop
            self._inbox.stop()
            self.waits.close()
            raise

    def _begin(self, welcome: wire.Welcome) -> None:
        """From the newest checkpoint, which no older learner can replace any more."""
        run_file = self._run_file
        self.resumed = checkpoint.load_newest(run_file.checkpoint_folder, self._identity)
        meta = self.resumed[1] if self.resumed else None
        self.book = meta.book() if meta else Book()
        self.update = meta.update if meta else 0
        self._saved = (self.update, self.book.num_consumed, time.monotonic())
        known = max(welcome.snapshot_version, meta.version if meta else -1)
        covered = meta.log_bytes if meta else {}
        pending = meta.pending if meta else checkpoint.Pending()
        with self._fence.held():
            self._publisher = Publisher(run_file, epoch=self._inbox.epoch, update=self.update, known_version=known)
            self._diary = Diary(run_file, self.metrics, covered=covered, pending=pending)
        self._chosen: list[Chosen] = []
        self._bad_in_a_row = 0
        self._num_chosen, self._came_s = 0, time.monotonic()  # of the batch that is being collected; its newest group
        self._batch_ready = False

    @property
    def lineage(self) -> Lineage:
        """Which update each version is of."""
        return self._publisher.lineage

    @property
    def stopping(self) -> bool:
        """Told to stop."""
        return self._stopping.is_set()

    def _reasons(self) -> Mapping[str, Ask]:
        """Who is waited for in each phase of an update (matpo_learner.records.Stopwatch)."""
        folder = self._run_file.run.folder
        older = "an older learner is writing a snapshot or checkpoint, or is stopped. End it."
        reasons: dict[str, Ask] = {
            "start": self._inbox.waits_for,
            "fence": lambda: Reason(who="older_learner", why=older),
            "wait": self._waits_for,
            "publish": lambda: Reason(who="disk", why=f"weights are being written to {folder}"),
            "checkpoint": lambda: Reason(who="disk", why=f"a checkpoint is being written to {folder}"),
        }
        if self._settings.num_ranks > 1:
            why = f"the {self._settings.num_ranks} ranks train together: the slowest, or one that died. See their logs."
            reasons["forward_backward"] = lambda: Reason(who="ranks", why=why)
        return reasons

    def _waits_for(self) -> Reason:
        """Why the next batch is not there."""
        wanted, without, dropped = (
            self._settings.groups_per_update,
            self._diary.num_zero_signal,
            self._diary.num_dropped,
        )
        found = self._inbox.waits_for()
        if without + dropped >= wanted and time.monotonic() - self._came_s < COMES_S:
            why = f"they come, but {without} had equal rewards and {dropped} were dropped since the last update"
            found = Reason(who="signal", why=f"groups with a signal: {why}")
        return replace(found, why=f"{self._num_chosen} of {wanted} groups are here. {found.why}")

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], *, update: int) -> None:
        """Write the weights of `update` as the next version and tell of it."""
        self.update = update
        # Before it is written: an actor may load it, and finish an episode with it, before publish returns.
        self._inbox.published = self._publisher.version
        with self._fence.held():
            self.version = self._publisher.publish(tensors, update=self.update)
        oldest = self.lineage.oldest_within(self.update, self._settings.drop_lag_versions)
        self._inbox.min_version = oldest
        self._inbox.notice(self.version)
        self.metrics.set("policy_version", self.version)
        self.metrics.set("published_version", self.version)

    def open(self, idle: Callable[[], None]) -> None:
        """After the first publish: let groups come."""
        self._inbox.resume(self.resumed[1].name if self.resumed else "", self.book, idle)

    def collect(self, idle: Callable[[], None]) -> list[Delivery] | None:
        """The groups of the next update, with others ordered for those that cannot be trained. None: told to stop.

        `idle` is called at least about once in TAKE_S, with every group consumed or open: it may save a checkpoint.
        """
        chosen: list[Chosen] = []
        self._batch_ready = self._inbox.num_waiting >= self._settings.groups_per_update
        while len(chosen) < self._settings.groups_per_update:
            left = self._settings.num_updates - self.update
            self._inbox.place(self.book.place(self._settings, updates_left=left))
            delivery = self._inbox.take(TAKE_S)
            if self.stopping:
                return None
            idle()
            if delivery is not None:
                self._came_s = time.monotonic()
                if found := self._sort(delivery):
                    chosen.append(found)
            self._num_chosen = len(chosen)
        self._chosen = chosen
        return [one.delivery for one in chosen]

    def finish(self, report: StepReport, seconds: dict[str, float]) -> None:
        """Write down the update of the groups that were collected last. Its weights, if they moved, are published.

        Raises MatpoError(not_finite) when this was one bad update too many.
        """
        chosen, self._chosen = self._chosen, []
        self._inbox.trained([one.delivery.index for one in chosen])
        update = self.update if report.num_steps else self.update + 1
        bad = _groups_of(report.skipped, len(chosen), self._settings)
        with self._fence.held():
            if bad:
                spoilt = [chosen[index].group for index in bad]
                self._diary.not_finite(spoilt, report, update=update, version=self.version)
            for index, why in bad.items():
                self._drop(chosen[index].delivery, "not_finite", why, update=update)
            trained = [one for index, one in enumerate(chosen) if index not in bad]
            for one in trained:
                self._consume(one.delivery, "trained", update=update)
            if report.num_steps:
                self._diary.updated(
                    [one.group for one in trained],
                    [one.lag for one in trained for _ in one.group.episodes],
                    report,
                    update=self.update,
                    version=self.version,
                    batch_ready=self._batch_ready,
                    seconds=seconds,
                )
        self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
        if self._bad_in_a_row >= self._settings.max_bad_updates:
            raise MatpoError(
                f"{self._bad_in_a_row} updates in a row were not finite: {report.skipped}. The batches are in "
                f"{self._diary.bad_batches}. Look at them; then start again with a lower "
                "learner.learning_rate from the last checkpoint, or set learner.max_bad_updates higher.",
                reason="not_finite",
            )

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint covers everything so far."""
        nothing_new = self._saved[:2] == (self.update, self.book.num_consumed)
        return nothing_new and bool(checkpoint.found(self._run_file.checkpoint_folder))

    def is_checkpoint_due(self) -> bool:
        """By updates since the last one, or by time if there is anything new to cover."""
        update, consumed, at_s = self._saved
        if self.update - update >= self._settings.checkpoint_every:
            return True
        late = time.monotonic() - at_s >= self._settings.checkpoint_interval_s
        return late and self.book.num_consumed > consumed

    def staging(self) -> Path:
        """An empty folder for the engine's part of a checkpoint."""
        with self._fence.held():
            return checkpoint.prepare(self._run_file.checkpoint_folder, self._inbox.epoch)

    def check_fence(self) -> None:
        """Raises RefusedError(fenced) when a newer learner has taken over."""
        with self._fence.held():
            pass

    def save(self) -> None:
        """Make the staged engine state a checkpoint of everything so far, and tell the broker."""
        folder = self._run_file.checkpoint_folder
        with self._fence.held():
            meta = checkpoint.Meta(
                run=self._identity.id,
                fingerprint=self._identity.fingerprint,
                epoch=self._inbox.epoch,
                version=self.version,
                update=self.update,
                cursor=self.book.cursor,
                consumed_below=self.book.consumed_below,
                consumed=sorted(self.book.consumed),
                log_bytes=self._diary.sync(),
                pending=self._diary.pending(),
            )
            checkpoint.commit(folder, meta, keep=self._settings.keep_checkpoints)
            oldest = checkpoint.oldest_kept(folder)
        self._saved = (self.update, self.book.num_consumed, time.monotonic())
        self._inbox.commit(meta.name, self.book, oldest_kept_below=oldest)
        self.metrics.set("checkpoint_timestamp_seconds", time.time())
        log.info("checkpoint.saved", checkpoint=meta.name, update=self.update, version=self.version)

    def say_goodbye(self) -> None:
        """The end was in order: no group that is still here did any harm."""
        self._inbox.say_goodbye()

    def close(self) -> None:
        """Send what is still to be sent, and let go."""
        self._inbox.stop()
        self.waits.close()
        self._diary.close()
        self._fence.close()

    def _sort(self, delivery: Delivery) -> Chosen | None:
        """The group if it is worth training now; otherwise it is consumed here, and counted."""
        group = delivery.group
        if group is None:
            self._drop(delivery, delivery.fate, delivery.reason)
            return None
        found = self._judge(group, update=self.update, lineage=self.lineage)
        match found.fate:
            case "trained":
                return Chosen(delivery=delivery, group=group, lag=found.lag)
            case "zero_signal":
                self._diary.no_signal(group)
                self._inbox.trained([delivery.index])  # looked at without harm
                self._consume(delivery, "zero_signal")
            case "stale":
                self._inbox.trained([delivery.index])
                self._drop(delivery, "stale", "stale", lag=found.lag)
            case "invalid":
                log.warning("group.invalid", group=group.id, reason=found.reason, error=found.why)
                self._inbox.quarantine(group.id, found.reason)
                self._drop(delivery, "invalid", found.reason)
        return None

    def _drop(self, delivery: Delivery, fate: str, reason: str, *, update: int | None = None, **fields: int) -> None:
        self._diary.dropped(delivery.id, fate, reason, **fields)
        self._consume(delivery, fate, reason=reason, update=update)

    def _consume(self, delivery: Delivery, fate: str, *, reason: str = "", update: int | None = None) -> None:
        """`update` is the one that the group was for. Default: one that is still to come."""
        episodes = [episode.id for episode in delivery.group.episodes] if delivery.group else []
        at = self.update + 1 if update is None else update
        with self._fence.held():
            self.book.consume(delivery.index)
            self._diary.consumed(delivery.id, delivery.index, fate, episodes, reason=reason, update=at)


def _make_inbox(run_file: RunFile, identity: Identity) -> Inbox:
    environment = load_environment(run_file.environment.name, run_file.environment.plugin, run_file.environment.options)
    settings = run_file.learner
    stream = OrderStream(environment.tasks("train"), seed=run_file.run.seed, group_size=settings.group_size)
    return Inbox(
        f"tcp://{run_file.broker.host}:{run_file.broker.learner_port}",
        wire.Hello(
            peer="learner",
            name="learner",
            incarnation=uuid.uuid4().hex,
            run=identity.name,
            schema_version=SCHEMA_VERSION,
            model=identity.fingerprint,
        ),
        stream=stream,
        group_size=settings.group_size,
        vocab_size=vocab_size(run_file.model_folder),
        prefetch=settings.groups_per_update,
        keys=client_keys(run_file, "learner"),
    )


def _groups_of(skipped: Mapping[int, str], num_groups: int, settings: LearnerSettings) -> dict[int, str]:
    """Which groups of a batch were in minibatches that were left out, and why."""
    bounds = minibatch_bounds(num_groups, settings)
    return {group: why for index, why in skipped.items() for group in range(*bounds[index])}
