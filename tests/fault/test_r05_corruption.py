"""R5: no silent corruption of payload files.

A payload file holds the episodes of many groups. Each of its bytes is altered, and it is cut at each length; every
time a store opens it and reads every episode. Damage must be noticed, by the reading or by the start, and whatever was
not hit must come back byte for byte. And the whole-file hash must notice all of it too: that is what `matpo-broker
verify` goes by.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from tests.fault.harness import SOAK, episode_of, orders_of, payload_of

from matpo import wire
from matpo.errors import JournalError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.journal import Journal, hash_file, path_of, record_end
from matpo_broker.members import Rules
from matpo_broker.store import Store
from matpo_broker.tables import LEDGER_NAME, StoredRow, stored_rows

NUM_EPISODES = 12
BYTES_EACH = 1800
RESTARTS = 2000 if SOAK else 150  # of the damages, so many are also found by a whole store that starts
MASKS = (0x01, 0x80, 0xFF) if SOAK else (0x01,)

RULES = Rules(run="fault", lease_s=100.0, max_attempts=3, credit_bytes=2**40)
SETTINGS = BrokerSettings.model_validate({"durability": "never", "ballast_bytes": 2**20})

# As long as a test with processes: not part of the fast gate.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600 if SOAK else 120)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal with one sealed payload file of NUM_EPISODES groups."""
    store = Store(tmp_path / "journal", RULES, SETTINGS, Metrics("broker"), now_s=0.0)
    hello = wire.Hello(peer="learner", name="l", incarnation="i", run="fault", schema_version=1)
    epoch = store.ledger.greet_learner(hello)
    store.ledger.place(wire.PlaceOrders(epoch=epoch, orders=orders_of(range(NUM_EPISODES), 1)))
    leases, _ = store.ledger.members.lease("a", NUM_EPISODES, 0.0)
    for lease in leases:
        message, payload = episode_of(lease, BYTES_EACH)
        store.put(message, "a", payload)
    store.commit(0.0)
    store.close()
    return tmp_path / "journal"


def test_every_altered_byte_and_every_cut_is_noticed_and_costs_no_other_episode(
    folder: Path, report: Callable[..., None]
) -> None:
    path = path_of(folder, 0)
    good = path.read_bytes()
    assert len(good) >= 20_000
    rows = list(stored_rows(folder / LEDGER_NAME))
    assert len(rows) == NUM_EPISODES
    payloads = {row.episode: payload_of(row.episode, BYTES_EACH) for row in rows}
    ends = {0: max(record_end(row.episode, row.location) for row in rows)}
    seal = hash_file(path)
    damages = [Flip(position, mask) for position in range(len(good)) for mask in MASKS]
    damages += [Cut(length) for length in range(len(good))]
    unnoticed, lost = [], []
    journal = Journal(folder, file_bytes=2**20, ever_sync=False)
    for damage in damages:
        with path.open("r+b", buffering=0) as file:  # in place: a file system may flush a file that is made anew
            file.truncate(file.write(damage.of(good)))
        hit = set()
        for row in rows:
            try:
                assert journal.read(row.episode, row.location) == payloads[row.episode], f"{damage}: wrong bytes"
            except JournalError:
                hit.add(row.episode)
        if not (hit or journal.recover(ends, ends).damaged) or hash_file(path) == seal:
            unnoticed.append(damage)
        if hit != {row.episode for row in rows if damage.hits(row)}:
            lost.append((damage, hit))
    journal.close()
    report(
        "R5",
        file_bytes=len(good),
        flips=len(good) * len(MASKS),
        cuts=len(good),
        unnoticed=len(unnoticed),
        others_lost=len(lost),
    )
    assert not unnoticed, unnoticed[:5]
    assert not lost, lost[:5]


def test_a_store_that_starts_with_a_damaged_file_delivers_every_other_group(folder: Path, tmp_path: Path) -> None:
    good = path_of(folder, 0).read_bytes()
    draw = random.Random(5)
    damages = [Flip(draw.randrange(len(good)), 1 << draw.randrange(8)) for _ in range(RESTARTS // 2)]
    damages += [Cut(draw.randrange(len(good))) for _ in range(RESTARTS // 2)]
    damages += [Flip(0, 1), Flip(len(good) - 1, 1), Cut(0), Cut(7), Cut(8), Cut(len(good) - 1)]
    with structlog.testing.capture_logs():
        for i, damage in enumerate(damages):
            copy = shutil.copytree(folder, tmp_path / f"copy-{i}")
            path_of(copy, 0).write_bytes(damage.of(good))
            check_start(copy, damage)
            shutil.rmtree(copy)


def check_start(folder: Path, damage: Flip | Cut) -> None:
    metrics = Metrics("broker")
    store = Store(folder, RULES, SETTINGS, metrics, now_s=0.0)
    hello = wire.Hello(peer="learner", name="l", incarnation="again", run="fault", schema_version=1)
    epoch = store.ledger.greet_learner(hello)
    store.ledger.resume(wire.Resume(epoch=epoch, checkpoint="", consumed_below=0, consumed=[]))
    received, damaged = "", set()
    while (delivery := store.ledger.fetch(wire.Fetch(epoch=epoch, received=received))) is not None:
        (row,) = delivery.episodes
        received = delivery.group
        try:
            assert store.read(row.episode, row.location) == payload_of(row.episode, BYTES_EACH)
        except JournalError:
            damaged.add(row.episode)
    store.close()
    rows = list(stored_rows(folder / LEDGER_NAME))
    assert damaged == {row.episode for row in rows if damage.hits(row)}, damage
    found = [
        sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "matpo_broker_journal_errors_total"
    ]
    assert sum(found) >= 1, damage


# ---- damage


class Flip:
    """One byte is another."""

    def __init__(self, position: int, mask: int) -> None:
        self.position = position
        self.mask = mask

    def __repr__(self) -> str:
        return f"byte {self.position} ^ {self.mask:#x}"

    def of(self, good: bytes) -> bytes:
        at = self.position
        return good[:at] + bytes([good[at] ^ self.mask]) + good[at + 1 :]

    def hits(self, row: StoredRow) -> bool:
        return row.location.offset <= self.position < record_end(row.episode, row.location)


class Cut:
    """The file ends early."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __repr__(self) -> str:
        return f"cut at {self.length}"

    def of(self, good: bytes) -> bytes:
        return good[: self.length]

    def hits(self, row: StoredRow) -> bool:
        return self.length < record_end(row.episode, row.location)
