"""Journals for tests, written by a real store, without sockets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from matpo import wire
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.members import Rules
from matpo_broker.store import Store


def group_of(index: int) -> str:
    """The name of a group as the learner gives it."""
    return f"g-{index:08d}"


@contextmanager
def journal(
    folder: Path, groups: Mapping[int, list[bytes]], *, group_size: int = 2, file_bytes: int = 2**20, **rules: bool
) -> Iterator[tuple[Store, int]]:
    """(store, learner's epoch): a run that has stored the payloads given, one group after the other.

    A group with fewer payloads than `group_size` stays open.
    """
    settings = BrokerSettings(journal_file_bytes=file_bytes, ballast_bytes=2**20)
    store = Store(
        folder,
        Rules(run="r", lease_s=100.0, max_attempts=3, credit_bytes=2**40, **rules),
        settings,
        Metrics("broker"),
        now_s=0.0,
    )
    hello = wire.Hello(peer="learner", name="l", incarnation="i", run="r", schema_version=1, model="m")
    epoch = store.ledger.greet_learner(hello)
    store.ledger.resume(wire.Resume(epoch=epoch, checkpoint="c", consumed_below=0, consumed=[]))
    task = wire.OrderedTask(id="t", environment="e", question="q")
    for index, payloads in groups.items():
        order = wire.Order(group=group_of(index), index=index, group_size=group_size, task=task)
        store.ledger.place(wire.PlaceOrders(epoch=epoch, orders=[order]))
        store.commit(0.0)
        leases, _ = store.ledger.members.lease("a", group_size, 0.0)
        for lease, payload in zip(leases, payloads, strict=False):
            message = wire.StoreEpisode(
                lease=lease.lease,
                group=lease.group,
                member=lease.member,
                attempt=lease.attempt,
                episode=f"{lease.group}.{lease.member}.{lease.attempt}",
                num_bytes=len(payload),
                crc32c=wire.crc32c(payload),
            )
            store.put(message, "a", payload)
            store.commit(0.0)
    try:
        yield store, epoch
    finally:
        store.close()


def forget(store: Store, epoch: int, below: int) -> None:
    """A checkpoint covers all groups below an index, and so does the oldest that is kept: their files go."""
    commit = wire.Commit(epoch=epoch, checkpoint="c", consumed_below=below, consumed=[], oldest_kept_below=below)
    store.release(store.ledger.cover(commit))
    store.commit(0.0)
