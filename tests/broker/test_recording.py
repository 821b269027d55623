"""Reading what a journal recorded, beside a running broker or after its death, without changing it."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.broker.journals import forget, group_of, journal

from matpo.errors import JournalError
from matpo_broker.recording import RecordedGroup, Recording
from matpo_broker.tables import LEDGER_NAME

GROUPS = {i: [f"payload {i}.{m}".encode() * 50 for m in range(2)] for i in range(6)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def read(folder: Path) -> dict[int, list[bytes]]:
    with Recording(folder) as recording:
        return {group.index: list(recording.read(group).payloads) for group in recording.groups}


def test_whole_groups_are_read_as_they_were_stored_and_an_open_one_is_left_out(folder: Path) -> None:
    with journal(folder, {**GROUPS, 6: [b"alone"]}):
        pass
    assert read(folder) == GROUPS


def test_a_recording_beside_a_running_broker_is_what_it_had_committed(folder: Path) -> None:
    with journal(folder, GROUPS):
        assert read(folder) == GROUPS


def test_a_journal_of_a_broker_that_was_killed_is_read(folder: Path, tmp_path: Path) -> None:
    with journal(folder, GROUPS):
        shutil.copytree(folder, tmp_path / "as-it-died")  # nothing was closed
    assert read(tmp_path / "as-it-died") == GROUPS


def test_reading_changes_no_byte_of_the_journal(folder: Path) -> None:
    with journal(folder, GROUPS):
        pass
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    read(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before


def test_a_damaged_record_is_named_and_costs_its_own_group_only(folder: Path) -> None:
    with journal(folder, GROUPS):
        pass
    path = folder / "payload-00000000.bin"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"payload 2.1", b"payload 2.!", 1))
    with Recording(folder) as recording:
        found = {group.index: recording.read(group) for group in recording.groups}
    (damage,) = found.pop(2).damage
    assert (damage.episode, damage.file, damage.reason) == (f"{group_of(2)}.1.0", path.name, "hash")
    assert {index: list(members.payloads) for index, members in found.items()} == {
        i: payloads for i, payloads in GROUPS.items() if i != 2
    }


def test_a_file_that_was_cut_short_costs_the_groups_behind_the_cut(folder: Path) -> None:
    with journal(folder, GROUPS):
        pass
    path = folder / "payload-00000000.bin"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"payload 4.0")])
    with Recording(folder) as recording:
        found = {group.index: recording.read(group) for group in recording.groups}
    assert [index for index, members in found.items() if members.payloads] == [0, 1, 2, 3]
    assert {damage.reason for index in (4, 5) for damage in found[index].damage} == {"torn"}


def test_a_group_whose_payloads_were_given_back_is_gone_and_no_damage(folder: Path) -> None:
    with journal(folder, GROUPS, file_bytes=1000) as (store, epoch), Recording(folder) as recording:
        forget(store, epoch, below=2)  # while it is read
        early = [recording.read(group) for group in recording.groups]
    assert [bool(members.payloads) for members in early] == [False, False, True, True, True, True]
    assert not any(members.damage for members in early)
    with Recording(folder) as late:
        assert [group.index for group in late.groups if group.is_gone] == [0, 1]


def test_keep_consumed_keeps_what_every_checkpoint_covers(folder: Path) -> None:
    with journal(folder, GROUPS, file_bytes=1000, keep_consumed=True) as (store, epoch):
        forget(store, epoch, below=5)
    assert read(folder) == GROUPS


def test_a_run_that_stored_nothing_has_no_groups(folder: Path) -> None:
    with journal(folder, {0: []}):
        pass
    with Recording(folder) as recording:
        assert recording.groups == []


def test_a_folder_without_a_journal_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there") as found:
        Recording(tmp_path)
    assert found.value.reason == "missing"


def test_a_ledger_that_is_no_database_is_an_error_that_names_it(folder: Path) -> None:
    folder.mkdir()
    (folder / LEDGER_NAME).write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(JournalError, match=LEDGER_NAME) as found:
        Recording(folder)
    assert found.value.reason == "ledger"


def test_a_ledger_of_another_format_is_refused(folder: Path) -> None:
    with journal(folder, GROUPS):
        pass
    with sqlite3.connect(folder / LEDGER_NAME) as db:
        db.execute("UPDATE meta SET value = 1 WHERE key = 'format'")
    db.close()
    with pytest.raises(JournalError, match="has format 1"):
        Recording(folder)


def test_a_ledger_that_breaks_while_it_is_read_is_an_error_and_no_crash(folder: Path) -> None:
    with journal(folder, GROUPS):
        pass
    with Recording(folder) as recording:
        with sqlite3.connect(folder / LEDGER_NAME) as db:
            db.execute("DROP TABLE episodes")
        db.close()
        with pytest.raises(JournalError, match="cannot be read"):
            recording.read(RecordedGroup(index=0, group=group_of(0), is_gone=False))
