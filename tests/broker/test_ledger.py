"""Every decision of the broker, in memory and with time passed in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from matpo import wire
from matpo.errors import JournalError, RefusedError
from matpo.metrics import Metrics
from matpo_broker.ledger import Ledger, Rules
from matpo_broker.tables import Location, accounting

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
    assert ledger.admit(message)
    ledger.record(message, "a", Location(file=file, offset=8, num_bytes=num_bytes, crc32c=7))
    return message


def store_all(ledger: Ledger, *, num_bytes: int = 100, file: int = 0) -> None:
    for lease in ledger.lease("a", 4096, 0.0)[0]:
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
    message = store(ledger, ledger.lease("a", 1, 0.0)[0][0])
    assert ledger.admit(message) is False


def test_another_episode_for_a_stored_member_is_refused(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.lease("a", 1, 0.0)[0][0]
    store(ledger, lease)
    with pytest.raises(RefusedError) as refused:
        ledger.admit(episode(lease, crc=8))
    assert refused.value.reason == "lease_lost"


def test_a_lease_never_outlives_its_deadline(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.lease("a", 1, 0.0)[0][0]
    ledger.expire(10.0)
    with pytest.raises(RefusedError, match="was lost"):
        ledger.admit(episode(lease))
    assert ledger.heartbeat("a", [lease.lease], 10.0) == [lease.lease]


def test_a_heartbeat_renews_a_lease(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.lease("a", 1, 0.0)[0][0]
    assert ledger.heartbeat("a", [lease.lease], 9.0) == []
    ledger.expire(18.9)
    assert ledger.admit(episode(lease))


def test_another_actor_cannot_renew_or_release_a_lease(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.lease("a", 1, 0.0)[0][0]
    ledger.release("b", [lease.lease], infra=True)
    assert ledger.heartbeat("b", [lease.lease], 1.0) == [lease.lease]
    assert ledger.admit(episode(lease))


def test_a_stored_lease_is_not_called_lost(ledger: Ledger) -> None:
    start(ledger, order(0))
    lease = ledger.lease("a", 1, 0.0)[0][0]
    store(ledger, lease)
    assert ledger.heartbeat("a", [lease.lease], 1.0) == []


def test_a_lost_member_is_handed_out_again_as_the_next_attempt(ledger: Ledger) -> None:
    start(ledger, order(0, size=1))
    ledger.lease("a", 1, 0.0)
    ledger.expire(10.0)
    (again,) = ledger.lease("b", 1, 10.0)[0]
    assert (again.member, again.attempt) == (0, 1)


def test_a_lease_stores_only_its_own_member(ledger: Ledger) -> None:
    start(ledger, order(0))
    first, second = ledger.lease("a", 2, 0.0)[0]
    with pytest.raises(RefusedError) as refused:
        ledger.admit(episode(first.model_copy(update={"lease": second.lease})))
    assert refused.value.reason == "lease_mismatch"


def test_goodbye_frees_leases_without_counting_a_failure(ledger: Ledger) -> None:
    start(ledger, order(0, size=1))
    for _ in range(5):
        assert len(ledger.lease("a", 1, 0.0)[0]) == 1
        ledger.depart("a")
    assert ledger.counts()["groups_dropped"] == 0


def test_a_member_that_used_up_its_attempts_takes_its_group_down_as_a_tombstone(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    store(ledger, ledger.lease("a", 1, 0.0)[0][0])
    for _ in range(RULES.max_attempts):
        ledger.release("a", [lease.lease for lease in ledger.lease("a", 1, 0.0)[0]], infra=True)
    delivery = ledger.fetch(wire.Fetch(epoch=epoch))
    assert delivery is not None
    assert (delivery.group, delivery.dropped, delivery.episodes) == ("g-0", "attempts", [])
    assert ledger.lease("a", 1, 0.0)[0] == []


def test_a_group_is_delivered_only_when_it_is_whole(ledger: Ledger) -> None:
    epoch = start(ledger, order(0))
    first, second = ledger.lease("a", 2, 0.0)[0]
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
    lease = ledger.lease("a", 1, 0.0)[0][0]
    ledger.cover(commit(epoch, below=1))
    assert ledger.lease("a", 1, 0.0) == ([], "")
    assert ledger.heartbeat("a", [lease.lease], 0.0) == [lease.lease]


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
    ledger.lease("a", 1, 0.0)
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
    groups = [ledger.lease(actor, 1, 0.0)[0][0].group for actor in ("a", "b", "a", "b", "a", "b")]
    assert groups == ["g-0", "g-1", "g-0", "g-1", "g-2", "g-2"]


def test_no_new_members_while_a_ready_group_waits_and_the_backlog_is_above_credit(ledger: Ledger) -> None:
    epoch = start(ledger, order(0), order(1, size=1))
    for lease in ledger.lease("a", 2, 0.0)[0]:
        store(ledger, lease, num_bytes=600)
    leases, paused = ledger.lease("a", 1, 0.0)
    assert leases == []
    assert "credit_bytes=1000" in paused
    fetch(ledger, epoch)
    assert len(ledger.lease("a", 1, 0.0)[0]) == 1


def test_parts_of_groups_alone_never_pause_the_actors(ledger: Ledger) -> None:
    start(ledger, order(0))
    store(ledger, ledger.lease("a", 1, 0.0)[0][0], num_bytes=5000)
    assert len(ledger.lease("a", 1, 0.0)[0]) == 1


def test_leases_of_a_dead_broker_get_a_fresh_deadline(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=5000.0)
    start(first, order(0))
    lease = first.lease("a", 1, 5000.0)[0][0]
    first.commit()
    first.close()
    second = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=3.0)
    second.expire(12.9)
    assert second.admit(episode(lease))
    second.expire(13.0)
    with pytest.raises(RefusedError, match="was lost"):
        second.admit(episode(lease))
    second.close()


def test_a_lease_id_is_never_used_twice(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        ledger = Ledger(tmp_path / "l", RULES, Metrics("broker"), now_s=0.0)
        start(ledger, order(0))
        seen.add(ledger.lease("a", 1, 0.0)[0][0].lease)
        ledger.depart("a")
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
    first = ledger.lease("a", 2, 0.0)[0]
    for lease in first:
        store(ledger, lease)
    fetch(ledger, epoch)
    ledger.cover(commit(epoch, below=1))
    store(ledger, ledger.lease("a", 1, 0.0)[0][0])
    ledger.drop(2, "attempts")
    ledger.commit()
    books = accounting(tmp_path)
    assert (books.orders, books.whole, books.committed) == (["g-0", "g-1", "g-2"], ["g-0"], ["g-0"])
    assert books.stored == {("g-0", 0): "g-0.0.0", ("g-0", 1): "g-0.1.0", ("g-1", 0): "g-1.0.0"}
    assert (books.dropped, len(books.members)) == ({"g-2": "attempts"}, 6)
    ledger.close()
