"""Finished episodes are kept until the broker has them. The broker is played by a function with its answers."""

import asyncio

import pytest

from matpo.errors import ProtocolError, RefusedError, TryAgainError
from matpo.metrics import Metrics
from matpo.wire import Done, Stored, StoreEpisode
from matpo_actor.outbox import Outbox


def message(n, num_bytes=4):
    return StoreEpisode(
        lease=f"lease-{n}", group="g", member=n, attempt=0, episode=f"g.{n}.0", num_bytes=num_bytes, crc32c=0
    )


class Broker:
    """Gives these answers in turn, then stores everything."""

    def __init__(self, *answers):
        self.answers, self.seen = list(answers), []

    async def request(self, asked, payload):
        self.seen.append(asked.episode)
        answer = self.answers.pop(0) if self.answers else Stored(episode=asked.episode, durability="x")
        if isinstance(answer, Exception):
            raise answer
        return answer, b""


def outbox(broker, **options):
    return Outbox(broker.request, retry_s=0.001, **{"metrics": Metrics("actor"), "max_bytes": 100, **options})


async def flushed(box):
    async with asyncio.timeout(5):
        await box.flush()
    return box


@pytest.mark.parametrize(
    "answer", [TryAgainError("no answer"), RefusedError("full", reason="full", retry_after_s=0.001)]
)
async def test_an_episode_is_sent_again_until_it_is_stored(answer):
    broker = Broker(answer, answer)
    box = outbox(broker)
    box.put(message(1), b"data")
    await flushed(box)
    assert (broker.seen, box.leases) == (["g.1.0"] * 3, [])


async def test_an_episode_that_will_never_be_taken_is_dropped_and_counted():
    refused = []
    metrics = Metrics("actor")
    broker = Broker(RefusedError("gone", reason="lease"))
    box = outbox(broker, metrics=metrics, on_refused=lambda lease, reason: refused.append((lease, reason)))
    box.put(message(1), b"data")
    await flushed(box)
    assert refused == [("lease-1", "lease")]
    assert metrics.registry.get_sample_value("matpo_actor_episodes_total", {"outcome": "refused"}) == 1


async def test_the_outbox_is_full_at_its_budget_until_episodes_leave():
    changes = []
    box = outbox(Broker(), max_bytes=8, on_change=lambda: changes.append(1))
    box.put(message(1), b"data")
    assert not box.is_full
    box.put(message(2), b"data")
    assert box.is_full
    await flushed(box)
    assert (box.is_full, len(changes)) == (False, 2)


async def test_what_was_under_way_when_sending_stopped_is_sent_again():
    arrived = asyncio.Event()

    async def silent(asked, payload):
        arrived.set()
        await asyncio.Event().wait()

    broker = Broker()
    box = outbox(broker)
    box._request = silent
    box.put(message(1), b"data")
    sending = asyncio.create_task(box.run())
    await arrived.wait()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert box.leases == ["lease-1"]
    box._request = broker.request
    await flushed(box)
    assert broker.seen == ["g.1.0"]


async def test_an_answer_that_is_none_ends_the_sender():
    box = outbox(Broker(Done()))
    box.put(message(1), b"data")
    with pytest.raises(ExceptionGroup) as caught:
        await flushed(box)
    assert caught.group_contains(ProtocolError)


async def test_flushing_an_empty_outbox_ends_at_once():
    await flushed(outbox(Broker()))


class SlowBroker:
    """Answers when it is told to, and remembers the most that was on its way at one time."""

    def __init__(self):
        self.on_the_way, self.most, self.go = 0, 0, asyncio.Event()
        self.seen = []

    async def request(self, asked, payload):
        self.seen.append(asked.episode)
        self.on_the_way += len(payload)
        self.most = max(self.most, self.on_the_way)
        await self.go.wait()
        self.on_the_way -= len(payload)
        return Stored(episode=asked.episode, durability="x"), b""


@pytest.mark.parametrize(
    ("window", "most"), [((10, 99), 8), ((4, 99), 4), ((1, 99), 4), ((99, 3), 12), ((999, 999), 256)]
)
async def test_no_more_is_on_its_way_than_the_window_says_but_one_episode_always(window, most):
    broker = SlowBroker()
    box = Outbox(broker.request, metrics=Metrics("actor"), max_bytes=1000)
    box.set_window(*window)
    for n in range(70):
        box.put(message(n), b"data")
    sending = asyncio.create_task(box.flush())
    for _ in range(20):
        await asyncio.sleep(0)
    broker.go.set()
    async with asyncio.timeout(5):
        await sending
    assert (broker.most, box.leases) == (most, [])


async def test_a_large_episode_is_not_overtaken_for_ever_by_small_ones():
    broker = SlowBroker()
    broker.go.set()
    box = Outbox(broker.request, metrics=Metrics("actor"), max_bytes=1000)
    box.set_window(10, 99)
    for n in range(3):
        box.put(message(n), b"data")
    box.put(message(3), b"d" * 50)
    sending = asyncio.create_task(box.run())
    async with asyncio.timeout(5):
        while "lease-3" in box.leases:
            box.put(message(len(broker.seen) + 100), b"data")
            await asyncio.sleep(0)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
