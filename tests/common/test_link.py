"""The peers' end of the pipe against a scripted ROUTER: restarts, silence, late replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import zmq
import zmq.asyncio

from matpo import wire
from matpo.errors import ProtocolError, RefusedError, TryAgainError
from matpo.link import Link

HELLO = wire.Hello(peer="actor", name="a", incarnation="i", run="r", schema_version=1)
WELCOME = wire.Welcome(
    epoch=1,
    heartbeat_s=1.0,
    lease_s=9.0,
    snapshot_version=-1,
    durability="x",
    max_payload_bytes=100,
    window_bytes=100,
    window_episodes=9,
)
STORED = wire.Stored(episode="g-0.0.0", durability="x")
TASK = wire.OrderedTask(id="t", environment="e", question="q")
LEASES = wire.Leases(leases=[wire.Lease(lease="l-1", group="g-0", member=0, attempt=0, task=TASK)])


class Router:
    """Plays the broker by hand: `heard` are the kinds that arrived, `next` waits for one of a kind."""

    def __init__(self) -> None:
        self.port: int | None = None
        self.heard: list[str] = []
        self.open()

    def open(self) -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        if self.port is None:
            self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        else:
            self.socket.bind(f"tcp://127.0.0.1:{self.port}")

    def close(self) -> None:
        self.socket.close()
        self.context.term()  # only then is the port free

    async def next(self, kind: str) -> tuple[bytes, Any]:
        async with asyncio.timeout(5):
            while True:
                identity, *frames = await self.socket.recv_multipart()
                message, _ = wire.decode(frames)
                self.heard.append(message.kind)
                if message.kind == kind:
                    return identity, message
                if message.kind == "hello":
                    await self.reply(identity, message, WELCOME)

    async def reply(self, identity: bytes, to: Any, message: wire.AnyMessage) -> None:
        frames = wire.encode(message.model_copy(update={"seq": to.seq if to else 0}))
        await self.socket.send_multipart([identity, *frames])


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    router = Router()
    yield router
    router.close()


@pytest.fixture
async def link(router: Router) -> AsyncIterator[Link]:
    link = await connected(router)
    yield link
    await link.close()


async def connected(router: Router, on_notice: Callable[[Any], None] | None = None) -> Link:
    link = Link(f"tcp://127.0.0.1:{router.port}", HELLO, on_notice=on_notice)
    connecting = asyncio.create_task(link.connect(5))
    identity, hello = await router.next("hello")
    await router.reply(identity, hello, WELCOME)
    assert (await connecting).epoch == 1
    return link


async def test_a_reply_finds_its_request_in_any_order(router: Router, link: Link) -> None:
    first = asyncio.create_task(link.request(wire.Heartbeat(leases=["l-1"], policy_version=0)))
    one = await router.next("heartbeat")
    second = asyncio.create_task(link.request(wire.Stat()))
    two = await router.next("stat")
    await router.reply(*two, wire.StatReply(counts={}))
    await router.reply(*one, wire.Alive(lost=[], snapshot_version=3, window_bytes=1, window_episodes=1))
    assert ((await first)[0].kind, (await second)[0].kind) == ("alive", "stats")


async def test_a_refusal_is_an_error_with_its_reason(router: Router, link: Link) -> None:
    asking = asyncio.create_task(link.request(wire.Stat()))
    await router.reply(*await router.next("stat"), wire.Refused(reason="fenced", message="no", retry_after_s=2.0))
    with pytest.raises(RefusedError) as refused:
        await asking
    assert (refused.value.reason, refused.value.retry_after_s) == ("fenced", 2.0)


async def test_silence_ends_with_try_again_that_names_endpoint_and_request(router: Router, link: Link) -> None:
    with pytest.raises(TryAgainError, match=rf"no answer to stat .*127\.0\.0\.1:{router.port}"):
        await link.request(wire.Stat(), timeout_s=0.05)


async def test_a_broker_that_is_not_there_is_try_again() -> None:
    link = Link("tcp://127.0.0.1:1", HELLO)
    with pytest.raises(TryAgainError, match="no answer to hello"):
        await link.connect(0.1)
    await link.close()


async def test_a_refused_hello_ends_connect(router: Router) -> None:
    link = Link(f"tcp://127.0.0.1:{router.port}", HELLO)
    connecting = asyncio.create_task(link.connect(5))
    await router.reply(*await router.next("hello"), wire.Refused(reason="other_run", message="no"))
    with pytest.raises(RefusedError):
        await connecting
    await link.close()


async def test_after_a_restart_the_hello_goes_first_and_the_request_again(router: Router, link: Link) -> None:
    asking = asyncio.create_task(link.request(wire.Stat()))
    await router.next("stat")
    router.close()
    router.heard.clear()
    router.open()
    await router.reply(*await router.next("stat"), wire.StatReply(counts={"a": 1}))
    assert (await asking)[0].counts == {"a": 1}
    assert router.heard == ["hello", "stat"]


async def test_a_broker_that_does_not_know_us_is_greeted_and_asked_again(router: Router, link: Link) -> None:
    asking = asyncio.create_task(link.request(wire.Stat()))
    refusal = wire.Refused(reason="hello_first", message="who?", retry_after_s=0.0)
    await router.reply(*await router.next("stat"), refusal)
    await router.reply(*await router.next("stat"), wire.StatReply(counts={}))
    assert (await asking)[0].kind == "stats"


async def test_leases_that_come_too_late_are_given_back(router: Router, link: Link) -> None:
    with pytest.raises(TryAgainError):
        await link.request(wire.LeaseRequest(num_members=1), timeout_s=0.05)
    await router.reply(*await router.next("lease"), LEASES)
    _, release = await router.next("release")
    assert (release.leases, release.infra) == (["l-1"], False)


async def test_a_fetch_names_the_last_group_that_arrived(router: Router, link: Link) -> None:
    received = []
    for group in ("g-0", "g-1"):
        asking = asyncio.create_task(link.request(wire.Fetch(epoch=1)))
        identity, fetch = await router.next("fetch")
        received.append(fetch.received)
        await router.reply(identity, fetch, wire.GroupReady(group=group, index=0, episodes=[]))
        await asking
    assert received == ["", "g-0"]


async def test_a_group_that_comes_too_late_is_not_called_received(router: Router, link: Link) -> None:
    with pytest.raises(TryAgainError):
        await link.request(wire.Fetch(epoch=1), timeout_s=0.05)
    await router.reply(*await router.next("fetch"), wire.GroupReady(group="g-0", index=0, episodes=[]))
    asking = asyncio.create_task(link.request(wire.Fetch(epoch=1)))
    identity, fetch = await router.next("fetch")
    assert fetch.received == ""
    await router.reply(identity, fetch, wire.GroupReady(group="g-0", index=0, episodes=[]))
    await asking


async def test_orders_that_do_not_fit_one_header_go_in_several(router: Router, link: Link) -> None:
    tasks = [TASK.model_copy(update={"question": "q" * 400_000}) for _ in range(4)]
    orders = [wire.Order(group=f"g-{i}", index=i, group_size=1, task=task) for i, task in enumerate(tasks)]
    asking = asyncio.create_task(link.request(wire.PlaceOrders(epoch=1, orders=orders)))
    arrived: list[int] = []
    while len(arrived) < 4:
        identity, message = await router.next("orders")
        arrived += [order.index for order in message.orders]
        await router.reply(identity, message, wire.Done())
    assert (await asking)[0].kind == "done"
    assert arrived == [0, 1, 2, 3]


async def test_a_task_that_fits_no_header_is_an_error_before_it_is_sent(link: Link) -> None:
    order = wire.Order(group="g", index=0, group_size=1, task=TASK.model_copy(update={"question": "q" * 2**20}))
    with pytest.raises(ProtocolError, match="at most 1048576"):
        await link.request(wire.PlaceOrders(epoch=1, orders=[order]))


async def test_a_payload_that_the_broker_would_not_take_is_refused_here(link: Link) -> None:
    with pytest.raises(RefusedError, match=r"broker\.max_payload_bytes"):
        await link.request(wire.Stat(), bytes(101))


async def test_a_notice_reaches_its_callback(router: Router) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    link = await connected(router, heard.put_nowait)
    asking = asyncio.create_task(link.request(wire.Stat()))
    identity, stat = await router.next("stat")
    await router.reply(identity, None, wire.SnapshotNotice(epoch=1, version=7))
    await router.reply(identity, stat, wire.StatReply(counts={}))
    await asking
    assert heard.get_nowait().version == 7
    await link.close()


async def test_a_dead_background_task_is_told_to_everyone_who_waits(router: Router) -> None:
    def broken(message: Any) -> None:
        raise LookupError("our own bug")

    link = await connected(router, broken)
    asking = asyncio.create_task(link.request(wire.Stat()))
    identity, _ = await router.next("stat")
    await router.reply(identity, None, wire.SnapshotNotice(epoch=1, version=7))
    for waiting in (asking, link.request(wire.Stat())):
        with pytest.raises(LookupError):
            await waiting
    await link.close()


async def test_close_ends_requests_in_flight(router: Router) -> None:
    link = await connected(router)
    asking = asyncio.create_task(link.request(wire.Stat()))
    await router.next("stat")
    await link.close()
    with pytest.raises(TryAgainError, match="closed"):
        await asking
