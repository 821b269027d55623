"""From a journal to the batches of a replay: which recorded groups make which update. Knows no torch and no clock.

Rules kept here, each with a test in tests/ops/test_recorded.py:
1. By default update n of a replay has the groups that the live learner had in its update n, in its order; an update
   that the live learner did not finish is left out.
2. Without that record, groups come by index, groups_per_update with a signal at a time; what does not fill a batch is
   left over.
3. Each group is judged again by the settings of the replay: no signal is counted, what cannot be trained is counted by
   reason, and neither ends the replay.
4. Lag is counted from the replayed update that stands where the live one stood: update n trains what the live learner
   had at n, so the lag is that of the record, whatever the replayed weights are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matpo import logs, schema
from matpo.episode import Episode, Group
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings
from matpo_broker.maintenance import Damage
from matpo_broker.recording import Recording
from matpo_learner import credit

log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One update as it was recorded. `version` is that of the weights that trained it, for the lags of its tokens."""

    update: int
    version: int
    groups: Sequence[str]  # trained and without signal, in the learner's order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one update of the replay trains."""

    update: int
    version: int
    groups: Sequence[Group]  # each with a signal
    zero_signal: Sequence[Group]


@dataclass(kw_only=True)
class Tally:
    """What became of the recorded groups."""

    zero_signal: int = 0
    gone: int = 0  # the journal has given their payloads back
    left_over: int = 0  # did not fill a batch
    invalid: Counter[str] = field(default_factory=Counter)  # reason -> groups that cannot be trained
    damage: list[Damage] = field(default_factory=list)  # records that are not what was stored


def steps_of(trained: Iterable[Mapping[str, Any]], updates: Iterable[Mapping[str, Any]]) -> list[Step]:
    """The updates of a run, from the lines of trained.jsonl and learner.jsonl."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for line in trained:
        if line["fate"] in ("trained", "zero_signal"):
            groups[line["update"]].append(line["group"])
    # Versions rise by one with each update of one process, so the weights before it were one version older.
    versions = {row["update"]: row["version"] - 1 for row in updates}
    return [Step(update=n, version=version, groups=groups[n]) for n, version in sorted(versions.items())]


class Reader:
    """Reads and judges groups of a recording, one at a time.

    `check` raises EpisodeError for a group that the run file does not allow.
    """

    def __init__(
        self,
        recording: Recording,
        settings: LearnerSettings,
        *,
        vocab_size: int,
        check: Callable[[Group], None] = lambda group: None,
    ) -> None:
        self.tally = Tally()
        self._check = check
        self._recording, self._settings, self._vocab_size = recording, settings, vocab_size
        self._known = {group.group: group for group in recording.groups}

    def batches(self, steps: Sequence[Step] | None) -> Iterator[Batch]:
        """The batches of `steps`, or by index. A step of which nothing with a signal is left has none."""
        return self._by_index() if steps is None else self._recorded(steps)

    def _recorded(self, steps: Sequence[Step]) -> Iterator[Batch]:
        for step in steps:
            found: list[Group] = []
            zero_signal: list[Group] = []
            for name in step.groups:
                self._sort(name, found, zero_signal)
            if found:
                yield Batch(update=step.update, version=step.version, groups=found, zero_signal=zero_signal)

    def _by_index(self) -> Iterator[Batch]:
        update = 0
        found: list[Group] = []
        zero_signal: list[Group] = []
        for recorded in self._recording.groups:
            self._sort(recorded.group, found, zero_signal)
            if len(found) == self._settings.groups_per_update:
                update += 1
                yield Batch(update=update, version=update - 1, groups=found, zero_signal=zero_signal)
                found, zero_signal = [], []
        self.tally.left_over += len(found)

    def _sort(self, name: str, found: list[Group], zero_signal: list[Group]) -> None:
        group = self._read(name)
        if group is None:
            return
        try:
            self._check(group)
            worth = credit.advantages(group, self._settings)
        except EpisodeError as error:
            self._refuse(name, error)
            return
        self.tally.zero_signal += not worth.has_signal
        (found if worth.has_signal else zero_signal).append(group)

    def _read(self, name: str) -> Group | None:
        recorded = self._known.get(name)
        members = None if recorded is None or recorded.is_gone else self._recording.read(recorded)
        if members is not None and members.damage:
            self.tally.damage += members.damage
            for one in members.damage:
                log.warning("record.damaged", group=name, episode=one.episode, reason=one.reason, error=one.message)
            return None
        if members is None or not members.payloads:
            self.tally.gone += 1
            return None
        try:
            return Group(id=name, episodes=tuple(self._decode(name, payload) for payload in members.payloads))
        except EpisodeError as error:
            self._refuse(name, error)
            return None

    def _decode(self, name: str, payload: bytes) -> Episode:
        episode = schema.decode(payload, vocab_size=self._vocab_size, published_version=None)
        if episode.group != name:
            raise EpisodeError(f"a record of {name} holds episode {episode.id}", reason="ids")
        return episode

    def _refuse(self, name: str, error: EpisodeError) -> None:
        self.tally.invalid[error.reason] += 1
        log.warning("group.invalid", group=name, reason=error.reason, error=str(error))
