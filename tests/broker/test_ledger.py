"""Every decision of the broker, in memory and with time passed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from matpo import wire
from matpo.errors import JournalError, RefusedError
from matpo.metrics import Metrics
from matpo_broker import views
from matpo_broker.ledger import Ledger
from matpo_broker.members import Rules, length_bucket
from matpo_broker.tables import Location, accounting

EPISODES = "SELECT idx, member, attempt, episode, actor, num_tokens, file, offset, num_bytes, crc32c FROM episodes"
RULES = Rules(run="r", lease_s=10.0, max_attempts=2, credit_bytes=1000)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(":memory:", RULES, Metrics("broker"), now_s=0.0)
    yield ledger
    ledger.close()


def hello(peer: str = "learner", incarnation: str = "i1", **fields: object) -> wire.Hello:
    return wire.Hello.model_validate(
        {
            "peer": peer,
            "name": peer,
            "incarnation": incarnation,
            "run": "r",
            "schema_version": 1,
            "model": "m",
            **fields,
        }
    )


def order(index: int, size: int = 2, question: str = "q?") -> wire.Order:
    task = wire.OrderedTask(id=f"t{index}", environment="e", question=question)
    return wire.Order(group=f"g-{index}", index=index, group_size=size, task=task)


def start(ledger: Ledger, *orders: wire.Order, incarnation: str = "i1", consumed_below: int = 0) -> int:
    epoch = ledger.greet_learner(hello(incarnation=incarnation))
    ledger.resume(wire.Resume(epoch=epoch, checkpoint="", consumed_below=consumed_below, consumed=[]))
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=list(orders)))
    return epoch


def episode(lease: wire.Lease, num_bytes: int = 100, crc: int = 7) -> wire.StoreEpisode:
    return wire.StoreEpisode(
        lease=lease.lease,
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        episode=f"{lease.group}.{lease.member}.{lease.attempt}",
        num_bytes=num_bytes,
        crc32c=crc,
    )


def store(ledger: Ledger, lease: wire.Lease, *, num_bytes: int = 100, file: int = 0) -> wire.StoreEpisode:
    message = episode(lease, num_bytes)
    assert ledger.members.admit(message)
    ledger.members.record(message, "a", Location(file=file, offset=8, num_bytes=num_bytes, crc32c=7))
    return message


def store_all(ledger: Ledger, *, num_bytes: int = 100, file: int = 0) -> None:
    for lease in ledger.members.lease("a", 4096, 0.0)[0]:
        store(ledger, lease, num_bytes=num_bytes, file=file)


def fetch(ledger: Ledger, epoch: int, received: str = "") -> str | None:
    delivery = ledger.fetch(wire.Fetch(epoch=epoch, received=received))
    return None if delivery is None else delivery.group


def commit(epoch: int, below: int, kept: int = 0, consumed: tuple[int, ...] = ()) -> wire.Commit:
    return wire.Commit(
        epoch=epoch, checkpoint="c", consumed_below=below, consumed=list(consumed), oldest_kept_below=kept
    )


def test_the_same_episode_again_is_a_duplicate(ledger: Ledger) -> None:
    start(ledger, order(0))
    message = store(ledger, ledger.members.lease("a", 1, 0.0)[0][0])
    assert ledger.members.admit(message) is False


def test_episodes_entered_together_are_judged_and_entered_as_one_after_the_other() -> None:
    def play(*, together: bool) -> tuple[list[object], list[tuple[object, ...]]]:
        ledger = Ledger(":memory:", RULES, Metrics("broker"), now_s=0.0)
        start(ledger, order(0, 3), order(1, 2))
        leases = ledger.members.lease("a", 5, 0.0)[0]
        sent = [
            episode(lease).model_copy(update={"min_version": v}) for lease, v in zip(leases, (4, -1, 2), strict=False)
        ]
        sent += [
            sent[0],  # again
            sent[1].model_copy(update={"crc32c": 8}),  # another one for a member that has one
            episode(leases[3]).model_copy(update={"lease": leases[2].lease}),  # with a lease that ended
            sent[2].model_copy(update={"lease": leases[4].lease}),  # again, under another's lease
            episode(leases[3]),
        ]
        found: list[object] = []
        with ledger.members.together() if together else nullcontext():
            for message in sent:
                try:
                    found.append(ledger.members.admit(message, "a"))
                except RefusedError as error:
                    found.append(error.reason)
                if found[-1] is True:
                    place = Location(file=0, offset=len(found), num_bytes=100, crc32c=7)
                    ledger.members.record(message, "a", place)
        tables = ("SELECT * FROM orders", "SELECT idx, member, attempt, actor FROM members", EPISODES)
        rows = [row for query in tables for row in ledger._db.execute(f"{query} ORDER BY 1, 2")]
        rows.append((ledger.members.num_leases, ledger.counts()["episodes_stored"]))
        ledger.close()
        return found, rows

    found, rows = play(together=True)
    assert found == [True, True, True, False, "lease_lost", "lease_lost", False, True]
    assert rows[-1] == (1, 4)
    assert (found, rows) == play(together=False)


def test_another_episode_for_a_stored_member_is_refused(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    store(ledger, lease)
    with pytest.raises(RefusedError) as refused:
        ledger.members.admit(episode(lease, crc=8))
    assert refused.value.reason == "lease_lost"


def test_a_lease_never_outlives_its_deadline(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    ledger.members.expire(10.0)
    with pytest.raises(RefusedError, match="was lost"):
        ledger.members.admit(episode(lease))
    assert ledger.members.heartbeat("a", [lease.lease], 10.0) == [lease.lease]


def test_a_heartbeat_renews_a_lease(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    assert ledger.members.heartbeat("a", [lease.lease], 9.0) == []
    ledger.members.expire(18.9)
    assert ledger.members.admit(episode(lease))


def test_another_actor_cannot_renew_or_release_a_lease(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    ledger.members.release("b", [lease.lease], infra=True)
    assert ledger.members.heartbeat("b", [lease.lease], 1.0) == [lease.lease]
    assert ledger.members.admit(episode(lease))


def test_a_stored_lease_is_not_called_lost(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    store(ledger, lease)
    assert ledger.members.heartbeat("a", [lease.lease], 1.0) == []


def test_a_lost_member_is_handed_out_again_as_the_next_attempt(ledger: Ledger) -> None:
    start(ledger, order(0, size=1))
    ledger.members.lease("a", 1, 0.0)
    ledger.members.expire(10.0)
    (again,) = ledger.members.lease("b", 1, 10.0)[0]
    assert (again.member, again.attempt) == (0, 1)


def test_a_lease_stores_only_its_own_member(ledger: Ledger) -> None:
    start(ledger, order(0))
    first, second = ledger.members.lease("a", 2, 0.0)[0]
    with pytest.raises(RefusedError) as refused:
        ledger.members.admit(episode(first.model_copy(update={"lease": second.lease})))
    assert refused.value.reason == "lease_mismatch"


def test_goodbye_frees_leases_without_counting_a_failure(ledger: Ledger) -> None:
    start(ledger, order(0, size=1))
    for _ in range(5):
        assert len(ledger.members.lease("a", 1, 0.0)[0]) == 1
        ledger.members.depart("a")
    assert ledger.counts()["groups_dropped"] == 0


def test_a_member_that_used_up_its_attempts_takes_its_group_down_as_a_tombstone(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    store(ledger, ledger.members.lease("a", 1, 0.0)[0][0])
    for _ in range(RULES.max_attempts):
        ledger.members.release("a", [lease.lease for lease in ledger.members.lease("a", 1, 0.0)[0]], infra=True)
    delivery = ledger.fetch(wire.Fetch(epoch=epoch))
    assert delivery is not None
    assert (delivery.group, delivery.dropped, delivery.episodes) == ("g-0", "attempts", [])
    assert ledger.members.lease("a", 1, 0.0)[0] == []


def test_a_group_is_delivered_only_when_it_is_whole(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    first, second = ledger.members.lease("a", 2, 0.0)[0]
    store(ledger, first)
    assert fetch(ledger, epoch) is None
    store(ledger, second)
    assert fetch(ledger, epoch) == "g-0"


def test_the_oldest_ready_group_comes_first(ledger: Ledger) -> None:
    epoch = start(ledger, order(2), order(0), order(1))
    store_all(ledger)
    assert fetch(ledger, epoch) == "g-0"
    assert fetch(ledger, epoch, "g-0") == "g-1"


def test_a_delivery_is_repeated_until_the_learner_says_that_it_arrived(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1))
    store_all(ledger)
    assert [fetch(ledger, epoch), fetch(ledger, epoch), fetch(ledger, epoch, "g-0")] == ["g-0", "g-0", "g-1"]


def test_after_resume_every_group_that_is_not_consumed_is_ready_again(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1), order(2))
    store_all(ledger)
    assert fetch(ledger, epoch) == "g-0"
    assert fetch(ledger, epoch, "g-0") == "g-1"
    epoch = ledger.greet_learner(hello(incarnation="i2"))
    ledger.resume(wire.Resume(epoch=epoch, checkpoint="c", consumed_below=0, consumed=[1]))
    assert fetch(ledger, epoch) == "g-0"
    assert fetch(ledger, epoch, "g-0") == "g-2"


def test_fetch_before_resume_is_refused(ledger: Ledger) -> None:
    epoch = ledger.greet_learner(hello())
    with pytest.raises(RefusedError) as refused:
        ledger.fetch(wire.Fetch(epoch=epoch))
    assert refused.value.reason == "resume_first"


def test_an_episode_is_forgotten_only_when_the_oldest_kept_checkpoint_covers_it(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    store_all(ledger, file=0)
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order(1)]))
    store_all(ledger, file=1)
    assert ledger.cover(commit(epoch, below=2, kept=0)) == []
    assert ledger.cover(commit(epoch, below=2, kept=1)) == [0]


def test_a_file_that_holds_one_needed_episode_is_kept(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1))
    store_all(ledger, file=0)
    assert ledger.cover(commit(epoch, below=1, kept=1)) == []


def test_an_older_kept_checkpoint_can_be_resumed(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1))
    store_all(ledger)
    ledger.cover(commit(epoch, below=2, kept=1))
    epoch = start(ledger, incarnation="i2", consumed_below=1)
    assert fetch(ledger, epoch) == "g-1"


def test_a_checkpoint_older_than_what_is_forgotten_is_refused(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1))
    store_all(ledger)
    ledger.cover(commit(epoch, below=2, kept=2))
    epoch = ledger.greet_learner(hello(incarnation="i2"))
    with pytest.raises(RefusedError) as refused:
        ledger.resume(wire.Resume(epoch=epoch, checkpoint="", consumed_below=0, consumed=[]))
    assert refused.value.reason == "forgotten"


def test_members_of_a_consumed_order_are_not_played_any_more(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    ledger.cover(commit(epoch, below=1))
    assert ledger.members.lease("a", 1, 0.0) == ([], "")
    assert ledger.members.heartbeat("a", [lease.lease], 0.0) == [lease.lease]


def test_a_new_learner_raises_the_epoch_and_the_same_one_keeps_it(ledger: Ledger) -> None:
    epochs = [ledger.greet_learner(hello(incarnation=i)) for i in ("i1", "i1", "i2", "i2")]
    assert epochs == [1, 1, 2, 2]


def test_an_older_epoch_changes_nothing(ledger: Ledger) -> None:
    old = start(ledger, order(0))
    store_all(ledger)
    ledger.greet_learner(hello(incarnation="i2"))
    for act in (
        lambda: ledger.fetch(wire.Fetch(epoch=old)),
        lambda: ledger.place(wire.PlaceOrders(epoch=old, orders=[order(5)])),
        lambda: ledger.cover(commit(old, below=1)),
        lambda: ledger.announce(wire.SnapshotNotice(epoch=old, version=3)),
        lambda: ledger.resume(wire.Resume(epoch=old, checkpoint="", consumed_below=1, consumed=[])),
    ):
        with pytest.raises(RefusedError, match="epoch 1 is over"):
            act()
    assert ledger.counts()["orders"] == 1


def test_a_replaced_learner_cannot_take_the_run_back(ledger: Ledger) -> None:
    ledger.greet_learner(hello(incarnation="i1"))
    ledger.greet_learner(hello(incarnation="i2"))
    with pytest.raises(RefusedError) as refused:
        ledger.greet_learner(hello(incarnation="i1"))
    assert refused.value.reason == "fenced"


@pytest.mark.parametrize(("field", "value"), [("run", "other"), ("schema_version", 2), ("model", "other")])
def test_a_peer_that_disagrees_with_the_run_is_refused(ledger: Ledger, field: str, value: object) -> None:
    ledger.greet_learner(hello())
    with pytest.raises(RefusedError) as refused:
        ledger.check_peer(hello("actor", **{field: value}))
    assert refused.value.reason == {"run": "other_run"}.get(field, field)


def test_orders_that_are_there_already_change_nothing(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    ledger.members.lease("a", 1, 0.0)
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order(0), order(1)]))
    assert (ledger.counts()["orders"], ledger.counts()["members_open"]) == (2, 3)


def test_an_order_with_another_task_under_a_known_index_is_refused_and_nothing_is_placed(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    with pytest.raises(RefusedError) as refused:
        ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order(1), order(0, question="other?")]))
    assert refused.value.reason == "order_conflict"
    assert ledger.counts()["orders"] == 1


def test_an_actor_gets_its_own_groups_first_then_untouched_ones(ledger: Ledger) -> None:
    start(ledger, order(0), order(1), order(2))
    groups = [ledger.members.lease(actor, 1, 0.0)[0][0].group for actor in ("a", "b", "a", "b", "a", "b")]
    assert groups == ["g-0", "g-1", "g-0", "g-1", "g-2", "g-2"]


def test_no_new_members_while_a_ready_group_waits_and_the_backlog_is_above_credit(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1, size=1))
    for lease in ledger.members.lease("a", 2, 0.0)[0]:
        store(ledger, lease, num_bytes=600)
    leases, paused = ledger.members.lease("a", 1, 0.0)
    assert leases == []
    assert "credit_bytes=1000" in paused
    fetch(ledger, epoch)
    assert len(ledger.members.lease("a", 1, 0.0)[0]) == 1


def test_parts_of_groups_alone_never_pause_the_actors(ledger: Ledger) -> None:
    start(ledger, order(0))
    store(ledger, ledger.members.lease("a", 1, 0.0)[0][0], num_bytes=5000)
    assert len(ledger.members.lease("a", 1, 0.0)[0]) == 1


def test_leases_of_a_dead_broker_get_a_fresh_deadline(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=5000.0)
    start(first, order(0))
    lease = first.members.lease("a", 1, 5000.0)[0][0]
    first.commit()
    first.close()
    second = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=3.0)
    second.members.expire(12.9)
    assert second.members.admit(episode(lease))
    second.members.expire(13.0)
    with pytest.raises(RefusedError, match="was lost"):
        second.members.admit(episode(lease))
    second.close()


def test_a_lease_id_is_never_used_twice(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        ledger = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=0.0)
        start(ledger, order(0))
        seen.add(ledger.members.lease("a", 1, 0.0)[0][0].lease)
        ledger.members.depart("a")
        ledger.commit()
        ledger.close()
    assert len(seen) == 3


def test_what_was_not_committed_is_gone_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=0.0)
    start(ledger, order(0))
    ledger.commit()
    start(ledger, order(1))
    ledger.close()
    again = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=0.0)
    assert again.counts()["orders"] == 1
    again.close()


def test_the_ledger_of_another_run_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=0.0).close()
    other = Rules(run="other", lease_s=1, max_attempts=1, credit_bytes=1)
    with pytest.raises(JournalError, match='belongs to run "r"'):
        Ledger(tmp_path / "l", other, Metrics("broker"), now_s=0.0)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"x" * 5000)
    with pytest.raises(JournalError, match="cannot be used as a ledger"):
        Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=0.0)


def test_accounting_names_every_order_and_episode_beside_a_running_broker(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", RULES, Metrics("broker"), now_s=0.0)
    epoch = start(ledger, order(0), order(1), order(2))
    first = ledger.members.lease("a", 2, 0.0)[0]
    for lease in first:
        store(ledger, lease)
    fetch(ledger, epoch)
    ledger.cover(commit(epoch, below=1))
    store(ledger, ledger.members.lease("a", 1, 0.0)[0][0])
    ledger.members.drop(2, "attempts")
    ledger.commit()
    books = accounting(tmp_path)
    assert (books.orders, books.whole, books.committed) == (["g-0", "g-1", "g-2"], ["g-0"], ["g-0"])
    assert books.stored == {("g-0", 0): "g-0.0.0", ("g-0", 1): "g-0.1.0", ("g-1", 0): "g-1.0.0"}
    assert (books.dropped, len(books.members)) == ({"g-2": "attempts"}, 6)
    ledger.close()


def test_counts_are_those_of_a_whole_count_after_checkpoints_purges_and_drops(ledger: Ledger) -> None:
    epoch = ready(ledger, 6)
    fetch_all(ledger, epoch)
    ledger.set_aside(wire.Quarantine(epoch=epoch, group="g-1", reason="nan"))
    for below in (1, 3, 5):
        ledger.cover(commit(epoch, below=below, kept=below))
        assert ledger.counts() == views.counts(ledger._db)
    assert (ledger.counts()["groups_consumed"], ledger.counts()["groups_quarantined"]) == (5, 1)
    ledger.purge(["g-1"])
    assert ledger.counts() == views.counts(ledger._db)
    assert ledger.counts()["groups_dropped"] == 1
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order(6)]))
    assert ledger.counts() == views.counts(ledger._db)
    assert (ledger.counts()["orders"], ledger.counts()["episodes_stored"]) == (7, 6)


def test_a_listing_fits_into_messages_however_long_the_names_are(ledger: Ledger) -> None:
    epoch = start(ledger)
    groups = [f"{index:05d}-".ljust(250, "x") for index in range(9000)]
    for low in range(0, len(groups), 3000):
        orders = [order(low + i).model_copy(update={"group": g}) for i, g in enumerate(groups[low : low + 3000])]
        ledger.place(wire.PlaceOrders(epoch=epoch, orders=orders))
    found: list[views.Cell] = []
    after = -1
    while rows := ledger.peek(wire.Peek(after=after, limit=4096))[1]:
        columns = ledger.peek(wire.Peek(limit=1))[0]
        reply = wire.encode(wire.Rows(columns=list(columns), rows=rows))
        assert len(reply[0]) <= wire.MAX_HEADER_BYTES
        found += [row[0] for row in rows]
        after = int(rows[-1][views.key_column(columns)] or 0)
    assert found == groups


def test_the_members_of_a_group_are_listed_in_parts(ledger: Ledger) -> None:
    start(ledger, order(0, size=5))
    store(ledger, ledger.members.lease("a", 1, 0.0)[0][0])
    parts = [ledger.peek(wire.Peek(group="g-0", after=after, limit=2))[1] for after in (-1, 1, 3, 4)]
    assert [[row[1] for row in part] for part in parts] == [[0, 1], [2, 3], [4], []]
    assert [row[2] for part in parts for row in part] == ["stored", "free", "free", "free", "free"]


# ---- quarantine


def ready(ledger: Ledger, num_groups: int, *, size: int = 1) -> int:
    epoch = start(ledger, *(order(index, size) for index in range(num_groups)))
    store_all(ledger)
    return epoch


def fetch_all(ledger: Ledger, epoch: int) -> dict[str, str]:
    """Group -> "" or why it is a tombstone, as long as there are any."""
    found: dict[str, str] = {}
    received = ""
    while (delivery := ledger.fetch(wire.Fetch(epoch=epoch, received=received))) is not None:
        found[delivery.group] = delivery.dropped
        received = delivery.group
    return found


def next_learner(ledger: Ledger, number: int, consumed_below: int = 0) -> int:
    return start(ledger, incarnation=f"life-{number}", consumed_below=consumed_below)


def test_a_group_in_the_hands_of_three_learners_that_died_is_quarantined(ledger: Ledger) -> None:
    epoch = ready(ledger, 1)
    for life in range(3):
        assert fetch_all(ledger, epoch) == {"g-0": ""}
        epoch = next_learner(ledger, life)
    assert fetch_all(ledger, epoch) == {"g-0": "quarantined"}
    assert ledger.counts()["groups_quarantined"] == 1


def test_a_learner_that_said_goodbye_strikes_nothing(ledger: Ledger) -> None:
    epoch = ready(ledger, 1)
    for life in range(9):
        assert fetch_all(ledger, epoch) == {"g-0": ""}
        ledger.farewell("i1" if life == 0 else f"life-{life - 1}")
        epoch = next_learner(ledger, life)


def test_a_group_that_went_through_an_update_is_no_suspect(ledger: Ledger) -> None:
    epoch = ready(ledger, 1)
    for life in range(9):
        assert fetch_all(ledger, epoch) == {"g-0": ""}
        ledger.trained(wire.Trained(epoch=epoch, indices=[0]))
        epoch = next_learner(ledger, life)


def test_only_the_poison_of_a_batch_is_quarantined(ledger: Ledger) -> None:
    """A learner trains batches of two, and dies whenever group 1 is in one. Actors go on playing new groups."""
    epoch = ready(ledger, 6)
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order(index, 1) for index in range(6, 12)]))
    fates: dict[str, str] = {}
    for life in range(6):
        received = ""
        batch: list[int] = []
        while 1 not in batch or len(batch) < 2:
            delivery = ledger.fetch(wire.Fetch(epoch=epoch, received=received))
            if delivery is None:
                leases = ledger.members.lease("a", 1, 0.0)[0]
                if not leases:
                    break
                store(ledger, leases[0])
                continue
            received = delivery.group
            if delivery.dropped:
                fates[delivery.group] = delivery.dropped
                continue
            batch.append(delivery.index)
            if len(batch) == 2 and 1 not in batch:
                ledger.trained(wire.Trained(epoch=epoch, indices=batch))
                fates.update({f"g-{index}": "trained" for index in batch})
                batch = []
        epoch = next_learner(ledger, life)
    assert fates.pop("g-1") == "quarantined"
    assert set(fates.values()) == {"trained"}
    assert fates.keys() >= {"g-0", "g-2", "g-3", "g-4", "g-5"}


def test_suspects_are_handed_out_one_at_a_time(ledger: Ledger) -> None:
    epoch = ready(ledger, 3)
    for life in range(2):
        fetch_all(ledger, epoch)
        epoch = next_learner(ledger, life)
    ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order(3, 1), order(4, 1)]))
    store(ledger, ledger.members.lease("a", 1, 0.0)[0][0])
    assert fetch(ledger, epoch) == "g-0"
    assert fetch(ledger, epoch, received="g-0") == "g-3"
    assert fetch(ledger, epoch, received="g-3") is None  # g-4 may still come
    ledger.trained(wire.Trained(epoch=epoch, indices=[0]))
    assert fetch(ledger, epoch, received="g-3") == "g-1"


def test_suspects_do_not_hold_up_a_learner_when_nothing_else_can_come(ledger: Ledger) -> None:
    epoch = ready(ledger, 3)
    for life in range(2):
        fetch_all(ledger, epoch)
        epoch = next_learner(ledger, life)
    assert list(fetch_all(ledger, epoch)) == ["g-0", "g-1", "g-2"]


def test_no_limit_never_quarantines_and_keeps_the_order() -> None:
    ledger = Ledger(":memory:", replace(RULES, max_deliveries=0), Metrics("broker"), now_s=0.0)
    epoch = ready(ledger, 3)
    for life in range(9):
        assert list(fetch_all(ledger, epoch)) == ["g-0", "g-1", "g-2"]
        epoch = next_learner(ledger, life)
    ledger.close()


def test_what_the_learner_finds_invalid_is_set_aside_and_its_payload_kept(ledger: Ledger) -> None:
    epoch = ready(ledger, 2)
    fetch_all(ledger, epoch)
    ledger.set_aside(wire.Quarantine(epoch=epoch, group="g-0", reason="nan"))
    assert ledger.cover(commit(epoch, below=2, kept=2)) == []
    assert [row.episode for row in ledger.show("g-0").episodes] == ["g-0.0.0"]
    assert ledger.purge(["g-0"]) == [0]
    with pytest.raises(RefusedError) as refused:
        ledger.purge(["g-0"])
    assert refused.value.reason == "not_quarantined"


def test_a_requeued_group_comes_again_to_the_next_learner_unless_a_checkpoint_covers_it(ledger: Ledger) -> None:
    epoch = ready(ledger, 2)
    fetch_all(ledger, epoch)
    for group in ("g-0", "g-1"):
        ledger.set_aside(wire.Quarantine(epoch=epoch, group=group, reason="nan"))
    ledger.requeue(["g-1"])
    assert fetch(ledger, epoch, received="g-1") is None  # this learner has seen it: it would not look at it again
    ledger.cover(commit(epoch, below=1))
    with pytest.raises(RefusedError) as refused:
        ledger.requeue(["g-0"])
    assert refused.value.reason == "consumed"
    assert fetch_all(ledger, next_learner(ledger, 1, consumed_below=1)) == {"g-1": ""}


def test_a_group_that_no_learner_has_seen_is_requeued_at_once(ledger: Ledger) -> None:
    epoch = ready(ledger, 1)
    for life in range(3):
        fetch_all(ledger, epoch)
        epoch = next_learner(ledger, life)
    ledger.requeue(["g-0"])
    assert fetch_all(ledger, epoch) == {"g-0": ""}


def test_one_group_that_is_not_quarantined_leaves_all_as_they_were(ledger: Ledger) -> None:
    epoch = ready(ledger, 2)
    fetch_all(ledger, epoch)
    ledger.set_aside(wire.Quarantine(epoch=epoch, group="g-0", reason="nan"))
    for change in (ledger.purge, ledger.requeue):
        with pytest.raises(RefusedError):
            change(["g-0", "g-1"])
        assert ledger.counts()["groups_quarantined"] == 1


def test_what_the_checkpoint_covers_gets_no_strike(ledger: Ledger) -> None:
    epoch = ready(ledger, 1)
    for life in range(5):
        fetch_all(ledger, epoch)
        epoch = next_learner(ledger, life, consumed_below=1)
    assert ledger.counts()["groups_quarantined"] == 0


# ---- expiry


def test_lease_losses_have_a_limit_of_their_own() -> None:
    rules = replace(RULES, max_lease_losses=5)
    ledger = Ledger(":memory:", rules, Metrics("broker"), now_s=0.0)
    epoch = start(ledger, order(0, 1))
    for life in range(5):
        assert fetch(ledger, epoch) is None
        assert ledger.members.lease("a", 1, life * 10.0)[0][0].attempt == life
        ledger.members.expire((life + 1) * 10.0)
    delivery = ledger.fetch(wire.Fetch(epoch=epoch))
    assert delivery is not None
    assert delivery.dropped == "lease_losses"
    ledger.close()


def test_an_order_that_is_too_old_is_dropped_with_its_length_bucket() -> None:
    metrics = Metrics("broker")
    ledger = Ledger(":memory:", replace(RULES, max_order_age_s=100.0), metrics, now_s=0.0)
    epoch = start(ledger, order(0), order(1, 1))
    lease, _, whole = ledger.members.lease("a", 3, 0.0)[0]
    for one in (lease, whole):
        message = episode(one).model_copy(update={"num_tokens": 5000})
        ledger.members.record(message, "a", Location(file=0, offset=8, num_bytes=100, crc32c=7))
    ledger.members.expire(99.0)
    assert fetch(ledger, epoch) == "g-1"
    ledger.members.expire(100.0)
    assert fetch_all(ledger, epoch) == {"g-0": "expired", "g-1": ""}
    labels = {"reason": "expired", "tokens": "<16k"}
    assert metrics.registry.get_sample_value("matpo_broker_groups_dropped_total", labels) == 1
    ledger.close()


def test_a_group_with_a_token_that_is_too_old_is_a_tombstone(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1))
    for lease, version in zip(ledger.members.lease("a", 4, 0.0)[0], (7, 5, 7, -1), strict=True):
        message = episode(lease).model_copy(update={"min_version": version})
        ledger.members.record(message, "a", Location(file=0, offset=8, num_bytes=100, crc32c=7))
    first = ledger.fetch(wire.Fetch(epoch=epoch, min_version=6))
    second = ledger.fetch(wire.Fetch(epoch=epoch, min_version=6, received="g-0"))
    assert first is not None
    assert second is not None
    assert (first.group, first.dropped, second.group, second.dropped) == ("g-0", "stale", "g-1", "")


def test_the_length_bucket_is_that_of_the_mean_episode() -> None:
    assert [length_bucket(tokens, 2) for tokens in (0, 2047, 2048, 8192, 32768, 131072)] == [
        "<1k", "<1k", "<4k", "<16k", "<64k", ">=64k"
    ]  # fmt: skip
    assert length_bucket(0, 0) == "none"


# ---- members


def test_a_failed_member_goes_to_another_actor_first(ledger: Ledger) -> None:
    start(ledger, order(0, 1))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    ledger.members.release("a", [lease.lease], infra=True, now_s=0.0)
    assert ledger.members.lease("a", 1, 1.0, num_actors=2)[0] == []
    assert ledger.members.has_reserved
    assert len(ledger.members.lease("b", 1, 1.0, num_actors=2)[0]) == 1


def test_members_kept_for_another_actor_do_not_hide_the_free_ones(ledger: Ledger) -> None:
    start(ledger, order(0, 4))
    for lease in ledger.members.lease("a", 2, 0.0)[0]:
        ledger.members.release("a", [lease.lease], infra=True, now_s=0.0)
    assert [lease.member for lease in ledger.members.lease("a", 1, 1.0, num_actors=2)[0]] == [2]


def test_a_failed_member_goes_to_the_same_actor_when_no_other_takes_it(ledger: Ledger) -> None:
    start(ledger, order(0, 1))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    ledger.members.release("a", [lease.lease], infra=True, now_s=0.0)
    assert len(ledger.members.lease("a", 1, 1.0, num_actors=1)[0]) == 1
    lease = ledger.members.lease("b", 1, 20.0)[0]
    assert lease == []


def test_a_damaged_member_is_played_again_and_the_others_stay(ledger: Ledger) -> None:
    epoch = ready(ledger, 1, size=3)
    assert fetch(ledger, epoch) == "g-0"
    ledger.members.reopen(0, 1)
    assert fetch(ledger, epoch) is None
    (lease,) = ledger.members.lease("a", 5, 0.0)[0]
    assert (lease.member, lease.attempt) == (1, 1)
    store(ledger, lease)
    delivery = ledger.fetch(wire.Fetch(epoch=epoch))
    assert delivery is not None
    assert [row.episode for row in delivery.episodes] == ["g-0.0.0", "g-0.1.1", "g-0.2.0"]


def test_a_lease_is_good_only_for_the_actor_that_has_it(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.members.lease("a", 1, 0.0)[0][0]
    with pytest.raises(RefusedError) as refused:
        ledger.members.admit(episode(lease), "thief")
    assert refused.value.reason == "lease_mismatch"
    assert ledger.members.admit(episode(lease), "a")


def test_commits_are_kept_with_their_checkpoints(ledger: Ledger) -> None:
    epoch = ready(ledger, 2)
    ledger.cover(commit(epoch, below=1))
    ledger.cover(commit(epoch, below=2, kept=1).model_copy(update={"checkpoint": "d"}))
    assert ledger._db.execute("SELECT * FROM commits").fetchall() == [("c", epoch, 1, 0), ("d", epoch, 2, 1)]
