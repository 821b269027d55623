"""Rank 0's side of the learner: what it asks of the broker, which groups it trains, what it writes down.

Rules kept here, each with a test in tests/flow/test_learner_process.py:
1. A group is consumed when it is trained, or dropped for a counted reason: zero_signal, stale, dropped (by the broker),
   invalid. Its line in trained.jsonl and its place in the book are written together.
2. Lag is judged when a group is about to be trained, in updates.
3. What a checkpoint covers is on disk before the broker hears of it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from matpo import logs, wire
from matpo.episode import UNSAMPLED_VERSION, Episode, Group
from matpo.errors import ConfigError, EpisodeError
from matpo.metrics import Metrics
from matpo.plugins import load_environment
from matpo.run_folder import Identity
from matpo.schema import SCHEMA_VERSION
from matpo.security import client_keys
from matpo.settings import RunFile
from matpo_learner import checkpoint, credit, records
from matpo_learner.deepspeed_engine import StepReport
from matpo_learner.hint import VERDICTS, WINDOW_UPDATES, hint
from matpo_learner.inbox import Delivery, Inbox
from matpo_learner.orders import Book, OrderStream
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
    """Talks to the broker and the disk. Made on rank 0 once the engine holds the weights to start from."""

    def __init__(self, run_file: RunFile, identity: Identity, resumed: checkpoint.Meta | None) -> None:
        """Connect to the broker and cut the logs back. Waits for the broker as long as it takes."""
        self._run_file, self._identity = run_file, identity
        self._settings = run_file.learner
        self.book = resumed.book() if resumed else Book()
        self.update = resumed.update if resumed else 0
        self._resumed = resumed.name if resumed else ""
        self.version = -1
        self.stopping = False
        self.metrics = Metrics("learner")
        if run_file.metrics.learner_port:
            self.metrics.serve(run_file.metrics.host, run_file.metrics.learner_port)
        environment = load_environment(
            run_file.environment.name, run_file.environment.plugin, run_file.environment.options
        )
        tasks = environment.tasks("train")
        stream = OrderStream(tasks, seed=run_file.run.seed, group_size=self._settings.group_size)
        self._inbox = Inbox(
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
            group_size=self._settings.group_size,
            vocab_size=vocab_size(run_file.model_folder),
            prefetch=self._settings.groups_per_update,
            keys=client_keys(run_file, "learner"),
        )
        self.waits = Waits(self._reasons(), self.metrics, warn_after_s=self._settings.group_timeout_s)
        with self.waits.on("start"):
            welcome = self._inbox.start()
        known = max(welcome.snapshot_version, resumed.version if resumed else -1)
        self._publisher = Publisher(run_file, epoch=self._inbox.epoch, update=self.update, known_version=known)
        covered = resumed.log_bytes if resumed else {}
        folder = run_file.run.folder / "metrics"
        self._logs = {
            name: records.JsonLines(folder / f"{name}.jsonl", num_bytes=covered.get(name, 0))
            for name in ("learner", "trained")
        }
        self._chosen: list[Chosen] = []
        self._zero_signal: list[Group] = []
        self._dropped = 0
        self._num_chosen, self._came_s = 0, time.monotonic()  # of the batch that is being collected; its newest group
        self._batch_ready = False
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW_UPDATES)
        self._hinted = ""

    def _reasons(self) -> Mapping[str, Ask]:
        """Who is waited for in each phase of an update (matpo_learner.records.Stopwatch)."""
        folder = self._run_file.run.folder
        reasons: dict[str, Ask] = {
            "start": self._inbox.waits_for,
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
        wanted, without = self._settings.groups_per_update, len(self._zero_signal)
        found = self._inbox.waits_for()
        if without + self._dropped >= wanted and time.monotonic() - self._came_s < COMES_S:
            why = f"they come, but {without} had equal rewards and {self._dropped} were dropped since the last update"
            found = Reason(who="signal", why=f"groups with a signal: {why}")
        return replace(found, why=f"{self._num_chosen} of {wanted} groups are here. {found.why}")

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], *, update: int) -> None:
        """Write the weights of `update` as the next version and tell of it."""
        self.update = update
        # Before it is written: an actor may load it, and finish an episode with it, before publish returns.
        self._inbox.published = self._publisher.version
        self.version = self._publisher.publish(tensors, update=self.update)
        oldest = self._publisher.lineage.oldest_within(self.update, self._settings.drop_lag_versions)
        self._inbox.min_version = oldest
        self._inbox.notice(self.version)
        self.metrics.set("policy_version", self.version)
        self.metrics.set("published_version", self.version)

    def open(self) -> None:
        """After the first publish: let groups come."""
        self._inbox.resume(self._resumed, self.book)

    def collect(self, idle: Callable[[], None]) -> list[Delivery] | None:
        """The groups of the next update, with others ordered for those that cannot be trained. None: told to stop.

        `idle` is called at least about once in TAKE_S.
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
                if found := self._judge(delivery):
                    chosen.append(found)
            self._num_chosen = len(chosen)
        self._chosen = chosen
        return [one.delivery for one in chosen]

    def finish(self, report: StepReport, seconds: dict[str, float]) -> None:
        """Write down the update of the groups that were collected last. Its weights are published."""
        chosen, self._chosen = self._chosen, []
        self._inbox.trained([one.delivery.index for one in chosen])
        for one in chosen:
            self._consume(one.delivery, "trained", one.group)
        lags = [one.lag for one in chosen for _ in one.group.episodes]
        row: dict[str, Any] = {
            "update": self.update,
            "version": self.version,
            "time_s": round(time.time(), 3),
            **records.summarise([one.group for one in chosen], self._zero_signal, lags, report),
            "groups_dropped": self._dropped,
            "batch_ready": self._batch_ready,
            "seconds": seconds,
        }
        row |= self._hint(row)
        self._zero_signal, self._dropped = [], 0
        self._logs["learner"].write(**row)
        records.export(self.metrics, row, lags, self._run_file.environment.name, report)
        shown = ("reward", "lag_mean", "loss", "kl", "ess", "grad_norm", "groups_zero_signal", "tokens_trained")
        log.info(
            "update.done",
            update=self.update,
            version=self.version,
            **{name: round(row[name], 4) for name in shown},
            seconds=seconds,
        )

    def _hint(self, row: dict[str, Any]) -> dict[str, Any]:
        """What would make the run faster, for this line of learner.jsonl; logged now and then, and when it changes."""
        self._recent.append(row)
        found = hint(list(self._recent))
        self.metrics.set("wait_ratio", found.wait_fraction)
        for verdict in VERDICTS:
            self.metrics.set("hint", verdict == found.verdict, verdict=verdict)
        if found.verdict != self._hinted or self.update % WINDOW_UPDATES == 0:
            log.info("learner.hint", verdict=found.verdict, why=found.sentence, num_updates=found.num_updates)
        self._hinted = found.verdict
        return {"wait_fraction": round(found.wait_fraction, 4), "hint": found.verdict}

    def staging(self) -> Path:
        """An empty folder for the engine's part of a checkpoint."""
        return checkpoint.prepare(self._run_file.checkpoint_folder, self.update)

    def save(self) -> None:
        """Make the staged engine state a checkpoint of everything so far, and tell the broker."""
        folder = self._run_file.checkpoint_folder
        meta = checkpoint.Meta(
            run=self._identity.id,
            fingerprint=self._identity.fingerprint,
            epoch=self._inbox.epoch,
            version=self.version,
            update=self.update,
            cursor=self.book.cursor,
            consumed_below=self.book.consumed_below,
            consumed=sorted(self.book.consumed),
            log_bytes={name: file.sync() for name, file in self._logs.items()},
        )
        checkpoint.commit(folder, meta, keep=self._settings.keep_checkpoints)
        self._inbox.commit(meta.name, self.book, oldest_kept_below=checkpoint.oldest_kept(folder))
        self.metrics.set("checkpoint_timestamp_seconds", time.time())
        log.info("checkpoint.saved", checkpoint=meta.name, update=self.update, version=self.version)

    def say_goodbye(self) -> None:
        """The end was in order: no group that is still here did any harm."""
        self._inbox.say_goodbye()

    def close(self) -> None:
        """Send what is still to be sent, and let go."""
        self._inbox.stop()
        self.waits.close()
        for file in self._logs.values():
            file.close()

    def _judge(self, delivery: Delivery) -> Chosen | None:
        """The group if it is worth training now; otherwise it is consumed here, and counted."""
        group = delivery.group
        if group is None:
            self._drop(delivery, delivery.fate, delivery.reason)
            return None
        trained = credit.as_trained(group, self._settings)
        lag = self._publisher.lineage.lag(self.update, _oldest(trained.episodes))
        if lag > self._settings.drop_lag_versions:
            self._inbox.trained([delivery.index])  # looked at without harm
            self._drop(delivery, "stale", "stale", lag=lag)
            return None
        try:
            check_roles(group, self._run_file)
            worth = credit.advantages(group, self._settings)
        except EpisodeError as error:
            log.warning("group.invalid", group=group.id, reason=error.reason, error=str(error))
            self._inbox.quarantine(group.id, error.reason)
            self._drop(delivery, "invalid", error.reason)
            return None
        if not worth.has_signal:
            self.metrics.count("zero_signal_groups_total")
            # Only for the means: a policy without any signal would otherwise fill the memory with tokens.
            self._zero_signal.append(replace(group, episodes=[replace(e, segments=()) for e in group.episodes]))
            self._inbox.trained([delivery.index])
            self._consume(delivery, "zero_signal", group)
            return None
        return Chosen(delivery=delivery, group=group, lag=lag)

    def _drop(self, delivery: Delivery, fate: str, reason: str, **fields: int) -> None:
        # The label is the fate, which is one of four: a peer's words must not become label values.
        self.metrics.count("groups_dropped_total", reason=fate)
        self._dropped += 1
        log.warning("group.dropped", group=delivery.id, fate=fate, reason=reason, **fields)
        self._consume(delivery, fate, delivery.group, reason=reason)

    def _consume(self, delivery: Delivery, fate: str, group: Group | None, reason: str = "") -> None:
        self.book.consume(delivery.index)
        # A group that fell out before an update counts to that update.
        self._logs["trained"].write(
            update=self.update if fate == "trained" else self.update + 1,
            group=delivery.id,
            index=delivery.index,
            fate=fate,
            reason=reason,
            episodes=[episode.id for episode in group.episodes] if group else [],
        )


def check_roles(group: Group, run_file: RunFile) -> None:
    """Refuse roles that the run file does not name: they would be trained, and become labels of metrics.

    Raises EpisodeError(role).
    """
    for episode in group.episodes:
        roles = [segment.role for segment in episode.segments]
        unknown = sorted(set(roles) - set(run_file.roles))
        if unknown or roles[0] != run_file.rollout.root:
            raise EpisodeError(
                f"episode {episode.id}: root {roles[0][:64]}, unknown roles {str(unknown)[:200]}; want root "
                f"{run_file.rollout.root} and roles {', '.join(run_file.roles)}. Does its actor have this run file?",
                reason="role",
            )


def _oldest(episodes: Iterable[Episode]) -> int:
    """The oldest version in a group; an episode without sampled tokens has none."""
    found = [e.min_version for e in episodes if e.min_version != UNSAMPLED_VERSION]
    return min(found, default=UNSAMPLED_VERSION)


def vocab_size(model_folder: Path) -> int:
    """How many token ids the model has. Raises ConfigError when its config does not say."""
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{model_folder / 'config.json'} has no vocab_size. Use a causal LM such as Qwen3.")
    return size
