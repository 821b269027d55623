"""R3: no acknowledgement before the sync, as the kernel sees it.

strace follows a live broker. For every "stored" reply that leaves through a socket it must be true that, in this
order: the payload was written to a payload file, that file's fdatasync had returned, the ledger's row was written to
its write-ahead log, that log's sync had returned, and only then the send began.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.fault.harness import Place, episode_of
from tests.fault.strace import SENDS, SYNCS, WRITES, Call, pid_of, read_trace, skip_without_strace, under_strace

from matpo import wire

pytestmark = pytest.mark.processes

NUM_ACTORS = 4
_EPISODE = re.compile(rb"g-\d{8}\.\d\.\d")
_ACK = re.compile(rb"\xa4kind\xa6stored\xa7episode.(g-\d{8}\.\d\.\d)", re.DOTALL)


@dataclass
class Steps:
    """What happened for one episode, as line numbers of the trace; -1: not seen."""

    payload: str = ""  # path of its payload file
    written: int = -1
    synced: int = -1
    row_written: int = -1
    row_synced_from: int = -1
    row_synced: int = -1

    def are_in_order_before(self, ack: int) -> bool:
        """Whether an acknowledgement whose send began at this line was allowed."""
        payload_is_safe = 0 <= self.written < self.synced
        row_is_safe = 0 <= self.row_written < self.row_synced_from <= self.row_synced
        return payload_is_safe and row_is_safe and self.synced < self.row_synced_from and self.row_synced < ack


@dataclass
class Judge:
    """Follows the trace; `acks` has, for each acknowledged episode, whether it was allowed."""

    steps: dict[bytes, Steps] = field(default_factory=dict)
    acks: dict[bytes, bool] = field(default_factory=dict)
    _unsynced: set[bytes] = field(default_factory=set)
    _rows_unsynced: set[bytes] = field(default_factory=set)
    _streams: dict[str, bytes] = field(default_factory=dict)

    def see(self, call: Call) -> None:
        name = Path(call.target).name
        if call.name in WRITES and name.startswith("payload-"):
            for episode in _EPISODE.findall(call.data):
                self.steps[episode] = Steps(payload=call.target, written=call.ends)
                self._unsynced.add(episode)
        elif call.name in SYNCS and name.startswith("payload-") and call.result == 0:
            for episode in [e for e in self._unsynced if self._is_covered(e, call)]:
                self.steps[episode].synced = call.ends
                self._unsynced.remove(episode)
        elif call.name in WRITES and name.endswith("-wal"):
            for episode in _EPISODE.findall(call.data):
                steps = self.steps.setdefault(episode, Steps())
                if steps.row_written < 0:
                    steps.row_written = call.ends
                    self._rows_unsynced.add(episode)
        elif call.name in SYNCS and name.endswith("-wal") and call.result == 0:
            for episode in [e for e in self._rows_unsynced if self.steps[e].row_written < call.begins]:
                self.steps[episode].row_synced_from, self.steps[episode].row_synced = call.begins, call.ends
                self._rows_unsynced.remove(episode)
        elif call.name in SENDS and call.target.startswith(("socket:", "TCP")):
            self._sent(call)

    def _is_covered(self, episode: bytes, sync: Call) -> bool:
        steps = self.steps[episode]
        return steps.payload == sync.target and steps.written < sync.begins

    def _sent(self, call: Call) -> None:
        """One connection's bytes are one stream: a reply may stand in two sends."""
        stream = self._streams.get(call.target, b"") + call.data
        end = 0
        for found in _ACK.finditer(stream):
            self.acks[found[1]] = self.steps.get(found[1], Steps()).are_in_order_before(call.begins)
            end = found.end()
        self._streams[call.target] = stream[end:][-200:]


def trace_some_acks(place: Place, num_acks: int) -> tuple[Judge, set[str]]:
    """Store episodes from several actors at once. Returns the judge, and the episodes whose acknowledgement arrived."""
    log = place.folder / "strace.txt"
    life = place.start(under=under_strace(log, calls=(*SYNCS, *SENDS)))
    learner = place.learner(num_acks // 4, 4)
    actors = [place.peer("actor", f"a{number}") for number in range(NUM_ACTORS)]
    acked: set[str] = set()
    while len(acked) < num_acks:
        counts = []
        for number, actor in enumerate(actors):
            leases = actor.ask(wire.LeaseRequest(num_members=2 + 3 * number)).leases
            counts.append(len(leases))
            for lease in leases:
                actor.send(*episode_of(lease, 200))
        for actor, count in zip(actors, counts, strict=True):
            replies = [actor.receive()[0] for _ in range(count)]
            acked |= {reply.episode for reply in replies if reply.kind == "stored"}
        assert sum(counts) > 0, "no more members, and too few acknowledgements"
    for peer in (learner, *actors):
        peer.close()
    os.kill(pid_of(log), signal.SIGTERM)  # strace keeps the signals that it gets itself
    assert life.wait() == 0
    judge = Judge()
    for call in read_trace(log):
        judge.see(call)
    return judge, acked


@pytest.mark.parametrize(("durability", "num_acks"), [("group", 1000), ("always", 200)])
def test_no_acknowledgement_leaves_before_payload_and_ledger_are_synced_in_this_order(
    make_place: Callable[..., Place], report: Callable[..., None], durability: str, num_acks: int
) -> None:
    skip_without_strace()
    judge, acked = trace_some_acks(make_place(durability=durability, journal_file_bytes=64 * 1024), num_acks)
    violations = sorted(episode for episode, allowed in judge.acks.items() if not allowed)
    report("R3", durability=durability, acks=len(judge.acks), violations=len(violations))
    assert {episode.decode() for episode in judge.acks} == acked  # every one was seen in the trace
    assert len(acked) >= num_acks
    assert violations == [], judge.steps[violations[0]]


def test_the_same_check_finds_every_acknowledgement_that_durability_never_gives_too_early(
    make_place: Callable[..., Place], report: Callable[..., None]
) -> None:
    skip_without_strace()
    judge, acked = trace_some_acks(make_place(durability="never"), 100)
    violations = [episode for episode, allowed in judge.acks.items() if not allowed]
    report("R3", durability="never", acks=len(judge.acks), violations=len(violations), note="as_it_must")
    assert len(violations) == len(acked)
