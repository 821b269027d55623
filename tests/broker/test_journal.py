"""Payload files: what is read back is what was written, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from matpo import wire
from matpo.errors import JournalError
from matpo.metrics import Metrics
from matpo.wire import crc32c
from matpo_broker.journal import Journal, read_episodes, record_end
from matpo_broker.ledger import Ledger, Rules
from matpo_broker.tables import LEDGER_NAME, Location


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, file_bytes=1000)
    yield journal
    journal.close()


def append(journal: Journal, episode: str, payload: bytes) -> Location:
    return journal.append(episode, payload, crc32c(payload))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("payload-*.bin"))


def test_a_payload_is_read_back_before_and_after_sync(journal: Journal) -> None:
    location = append(journal, "g-0.0.0", b"abc")
    assert journal.read("g-0.0.0", location) == b"abc"
    journal.sync()
    assert journal.read("g-0.0.0", location) == b"abc"


def test_a_new_file_begins_when_one_is_full(journal: Journal, tmp_path: Path) -> None:
    places = [append(journal, f"e{i}", bytes([i]) * 600) for i in range(5)]
    journal.sync()
    assert [place.file for place in places] == [0, 0, 1, 1, 2]
    assert [journal.read(f"e{i}", place) for i, place in enumerate(places)] == [bytes([i]) * 600 for i in range(5)]
    assert journal.num_bytes == sum(path.stat().st_size for path in files(tmp_path))


def test_a_process_never_appends_to_a_file_that_another_began(tmp_path: Path) -> None:
    numbers = []
    for _ in range(2):
        journal = Journal(tmp_path, file_bytes=1000)
        numbers.append(append(journal, "e", b"x").file)
        journal.close()
    assert numbers == [0, 1]


def test_bytes_after_the_last_ledger_row_are_cut(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    kept = append(journal, "e0", b"kept")
    append(journal, "e1", b"orphan")
    journal.close()
    with files(tmp_path)[0].open("ab") as file:
        file.write(b"EPIS torn")
    again = Journal(tmp_path, file_bytes=1000)
    end = record_end("e0", kept)
    assert again.recover({0: end}) > 0
    assert files(tmp_path)[0].stat().st_size == end
    assert again.read("e0", kept) == b"kept"
    again.close()


def test_a_file_without_ledger_rows_is_deleted(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    append(journal, "e0", b"orphan")
    journal.close()
    again = Journal(tmp_path, file_bytes=1000)
    again.recover({})
    assert files(tmp_path) == []
    again.close()


def test_every_flipped_byte_of_a_record_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    location = append(journal, "g-0.0.0", b"payload")
    journal.sync()
    path = files(tmp_path)[0]
    good = path.read_bytes()
    for position in range(location.offset, len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(JournalError, match=r"byte 8: the bytes are not those"):
            journal.read("g-0.0.0", location)
    journal.close()


def test_every_cut_of_a_record_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    location = append(journal, "g-0.0.0", b"payload")
    journal.sync()
    path = files(tmp_path)[0]
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(JournalError, match="the file ends inside it"):
            journal.read("g-0.0.0", location)
    journal.close()


def test_a_missing_file_is_named(journal: Journal) -> None:
    with pytest.raises(JournalError, match=r"payload-00000007\.bin"):
        journal.read("e", Location(file=7, offset=8, num_bytes=1, crc32c=0))


def test_one_process_at_a_time_uses_a_folder(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="in use by another broker"):
        Journal(tmp_path, file_bytes=1000)


def test_episodes_are_read_without_the_broker(tmp_path: Path) -> None:
    journal = Journal(tmp_path, file_bytes=1000)
    rules = Rules(run="r", lease_s=10.0, max_attempts=2, credit_bytes=1000)
    ledger = Ledger(tmp_path / LEDGER_NAME, rules, Metrics("broker"), now_s=0.0)
    hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1)
    task = wire.OrderedTask(id="t", environment="e", question="q")
    order = wire.Order(group="g-0", index=0, group_size=2, task=task)
    ledger.place(wire.PlaceOrders(epoch=ledger.greet_learner(hello), orders=[order]))
    for lease in ledger.lease("a", 2, 0.0)[0]:
        payload = b"payload of %d" % lease.member
        message = wire.StoreEpisode(
            lease=lease.lease,
            group=lease.group,
            member=lease.member,
            attempt=lease.attempt,
            episode=f"g-0.{lease.member}.0",
            num_bytes=len(payload),
            crc32c=crc32c(payload),
        )
        ledger.record(message, "a", append(journal, message.episode, payload))
    journal.sync()
    ledger.commit()
    found = [(e.episode, e.group, e.member, e.payload) for e in read_episodes(tmp_path)]
    assert found == [("g-0.0.0", "g-0", 0, b"payload of 0"), ("g-0.1.0", "g-0", 1, b"payload of 1")]
    ledger.close()
    journal.close()


def test_a_folder_without_a_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there"):
        list(read_episodes(tmp_path))
