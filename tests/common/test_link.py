"""The peers' end of the pipe against a scripted ROUTER: restarts, silence, late replies, keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator

from matpo import link as link_module
from matpo import wire
from matpo.errors import ProtocolError, RefusedError, TryAgainError
from matpo.link import Link
from matpo.security import ClientKeys

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


class Keys:
    """A broker's pair and one peer's; the peer is let in while `valid`."""

    def __init__(self) -> None:
        self.broker, self.peer = zmq.curve_keypair(), zmq.curve_keypair()
        self.valid = True
        self.num_asked = 0

    def guard(self, context: zmq.Context[Any], socket: zmq.Socket[Any]) -> None:
        self.authenticator = ThreadAuthenticator(zmq.Context(context))
        self.authenticator.start()
        self.authenticator.configure_curve_callback(domain="d", credentials_provider=self)
        socket.curve_secretkey, socket.curve_server, socket.zap_domain = self.broker[1], True, b"d"

    def callback(self, domain: str, key: bytes) -> bool:
        self.num_asked += 1
        return self.valid and key == self.peer[0]

    def of_peer(self, **changes: str) -> ClientKeys:
        public, secret = (key.decode() for key in self.peer)
        fields = {"name": "spot-7", "role": "actor", "created": "", "broker": self.broker[0].decode()}
        return ClientKeys.model_validate({**fields, "public": public, "secret": secret, **changes})


class Router:
    """Plays the broker by hand: `heard` are the kinds that arrived, `next` waits for one of a kind."""

    def __init__(self, keys: Keys | None = None) -> None:
        self.port: int | None = None
        self.heard: list[str] = []
        self.keys = keys
        self.open()

    def open(self) -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        if self.keys is not None:
            self.keys.guard(self.context, self.socket)
        if self.port is None:
            self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        else:
            self.socket.bind(f"tcp://127.0.0.1:{self.port}")

    def close(self) -> None:
        self.socket.close()
        if self.keys is not None:
            self.keys.authenticator.stop()
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


async def connected(router: Router, on_notice: Callable[[Any], None] | None = None, **options: Any) -> Link:
    link = Link(f"tcp://127.0.0.1:{router.port}", HELLO, on_notice=on_notice, **options)
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
    await router.reply(*await router.next("stat"), wire.Refused(reason="fenced", message="no"))
    with pytest.raises(RefusedError) as refused:
        await asking
    assert (refused.value.reason, refused.value.retry_after_s) == ("fenced", None)


async def test_a_refusal_for_now_is_asked_again_after_the_time_it_names(router: Router, link: Link) -> None:
    asking = asyncio.create_task(link.request(wire.Stat(), timeout_s=5))
    full = wire.Refused(reason="disk_full", message="no room", retry_after_s=0.2)
    for _ in range(3):
        await router.reply(*await router.next("stat"), full)
    started_s = time.monotonic()
    await router.reply(*await router.next("stat"), wire.StatReply(counts={"a": 1}))
    assert time.monotonic() - started_s > 0.15
    assert (await asking)[0].counts == {"a": 1}


async def test_a_refusal_for_now_to_the_last_is_try_again_with_its_reason(router: Router, link: Link) -> None:
    asking = asyncio.create_task(link.request(wire.Stat(), timeout_s=0.3))
    await router.reply(
        *await router.next("stat"), wire.Refused(reason="disk_full", message="no room", retry_after_s=9.0)
    )
    started_s = time.monotonic()
    with pytest.raises(TryAgainError, match=r"refused stat for 0\.3 s: no room") as gave_up:
        await asking
    assert gave_up.value.reason == "disk_full"
    assert 0.2 < time.monotonic() - started_s < 3.0


async def test_a_hello_that_is_refused_for_now_is_said_again(router: Router) -> None:
    link = Link(f"tcp://127.0.0.1:{router.port}", HELLO)
    connecting = asyncio.create_task(link.connect(5))
    full = wire.Refused(reason="disk_full", message="no room", retry_after_s=0.01)
    for _ in range(2):
        await router.reply(*await router.next("hello"), full)
    await router.reply(*await router.next("hello"), WELCOME)
    assert (await connecting).epoch == 1
    await link.close()


def store(member: int, num_bytes: int = 4) -> tuple[wire.StoreEpisode, bytes]:
    message = wire.StoreEpisode(
        lease=f"l-{member}", group="g", member=member, attempt=0, episode=f"g.{member}.0", num_bytes=num_bytes, crc32c=0
    )
    return message, bytes(num_bytes)


async def bundled(router: Router, bundle_episodes: int) -> Link:
    """A link whose broker takes so many episodes in one message."""
    link = Link(f"tcp://127.0.0.1:{router.port}", HELLO)
    connecting = asyncio.create_task(link.connect(5))
    welcome = WELCOME.model_copy(update={"bundle_episodes": bundle_episodes})
    await router.reply(*await router.next("hello"), welcome)
    await connecting
    return link


async def stores(router: Router) -> tuple[bytes, list[wire.StoreEpisode]]:
    """The episodes of the next message."""
    async with asyncio.timeout(5):
        identity, *frames = await router.socket.recv_multipart()
    messages = [wire.decode(each)[0] for each in wire.unbundle(frames)]
    return identity, [each for each in messages if isinstance(each, wire.StoreEpisode)]


async def test_episodes_of_one_moment_share_a_message_and_each_gets_its_own_answer(router: Router) -> None:
    link = await bundled(router, 8)
    asking = [asyncio.create_task(link.request(*store(member))) for member in range(3)]
    identity, asked = await stores(router)
    assert [each.member for each in asked] == [0, 1, 2]
    kept = [wire.Stored(seq=each.seq, episode=each.episode, durability="x") for each in asked]
    lost = wire.Refused(seq=asked[1].seq, reason="lease_lost", message="lost")
    replies = [wire.encode(each) for each in (kept[2], lost, kept[0])]
    await router.socket.send_multipart([identity, *wire.bundle(replies)])
    assert (await asking[0])[0].episode == "g.0.0"
    assert (await asking[2])[0].episode == "g.2.0"
    with pytest.raises(RefusedError, match="lost"):
        await asking[1]
    await link.close()


@pytest.mark.parametrize(("limit", "num_bytes", "found"), [(1, 4, [1] * 5), (2, 4, [2, 2, 1]), (9, 40, [2, 2, 1])])
async def test_a_message_holds_no_more_episodes_and_bytes_than_the_broker_takes(
    router: Router, limit: int, num_bytes: int, found: list[int]
) -> None:
    link = await bundled(router, limit)  # whose max_payload_bytes is 100
    asking = [asyncio.create_task(link.request(*store(member, num_bytes))) for member in range(5)]
    members = [[each.member for each in (await stores(router))[1]] for _ in found]
    assert [len(each) for each in members] == found
    assert [member for message in members for member in message] == [0, 1, 2, 3, 4]
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await link.close()


async def test_episodes_without_an_answer_go_out_again_after_a_restart(router: Router) -> None:
    link = await bundled(router, 8)
    asking = [asyncio.create_task(link.request(*store(member))) for member in range(3)]
    assert len((await stores(router))[1]) == 3
    router.close()
    router.open()
    await router.reply(*await router.next("hello"), WELCOME.model_copy(update={"bundle_episodes": 2}))
    again = [each for _ in range(2) for each in (await stores(router))[1]]
    assert [each.member for each in again] == [0, 1, 2]
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await link.close()


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


# ---- keys: what libzmq tells a client about a refused handshake, and what we make of it


@pytest.fixture
async def guarded() -> AsyncIterator[Router]:
    router = Router(Keys())
    yield router
    router.close()


async def refusal(port: int | None, keys: ClientKeys | None) -> str:
    link = Link(f"tcp://127.0.0.1:{port}", HELLO, keys=keys)
    with pytest.raises(TryAgainError, match="no answer to hello") as failed:
        await link.connect(0.5)
    await link.close()
    return str(failed.value)


async def test_a_peer_with_a_good_key_is_served(guarded: Router) -> None:
    assert guarded.keys is not None
    link = await connected(guarded, keys=guarded.keys.of_peer())
    asking = asyncio.create_task(link.request(wire.Stat()))
    await guarded.reply(*await guarded.next("stat"), wire.StatReply(counts={"a": 1}))
    assert (await asking)[0].counts == {"a": 1}
    await link.close()


async def test_a_key_that_the_broker_does_not_know_is_named(guarded: Router) -> None:
    assert guarded.keys is not None
    guarded.keys.valid = False
    assert "refuses our key (spot-7, fingerprint " in await refusal(guarded.port, guarded.keys.of_peer())


async def test_a_key_file_of_another_broker_is_named_as_likely(guarded: Router) -> None:
    assert guarded.keys is not None
    other = zmq.curve_keypair()[0].decode()
    why = await refusal(guarded.port, guarded.keys.of_peer(broker=other))
    assert "the key file of spot-7 is for another broker" in why
    assert guarded.keys.num_asked == 0


async def test_no_key_where_one_is_wanted_is_named(guarded: Router) -> None:
    why = await refusal(guarded.port, None)  # libzmq's client does not always learn of it
    assert "It wants a key, and we have none" in why or "does it want a key?" in why


async def test_a_key_where_none_is_used_is_named(router: Router) -> None:
    # libzmq's client learns of it only sometimes; otherwise it sees a connection that ends.
    why = await refusal(router.port, Keys().of_peer())
    assert "It uses no keys, and we do" in why or "Or that is no broker" in why


async def test_a_key_that_becomes_valid_is_tried_again(guarded: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    # libzmq itself gives such a connection up for ever.
    monkeypatch.setattr(link_module, "REOPEN_S", 0.05)
    assert guarded.keys is not None
    guarded.keys.valid = False
    link = Link(f"tcp://127.0.0.1:{guarded.port}", HELLO, keys=guarded.keys.of_peer())
    connecting = asyncio.create_task(link.connect(10))
    while guarded.keys.num_asked < 3:
        await asyncio.sleep(0.01)
    guarded.keys.valid = True
    await guarded.reply(*await guarded.next("hello"), WELCOME)
    assert (await connecting).epoch == 1
    await link.close()


async def test_after_a_restart_that_refuses_our_key_for_a_while_requests_go_on(
    guarded: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "REOPEN_S", 0.05)
    assert guarded.keys is not None
    link = await connected(guarded, keys=guarded.keys.of_peer())
    asking = asyncio.create_task(link.request(wire.Stat()))
    await guarded.next("stat")
    guarded.close()
    guarded.keys.valid, guarded.keys.num_asked = False, 0
    guarded.open()
    while guarded.keys.num_asked < 2:
        await asyncio.sleep(0.01)
    guarded.keys.valid = True
    await guarded.reply(*await guarded.next("stat"), wire.StatReply(counts={"a": 1}))
    assert (await asking)[0].counts == {"a": 1}
    await link.close()


async def test_close_while_the_connection_is_refused(guarded: Router) -> None:
    assert guarded.keys is not None
    guarded.keys.valid = False
    link = Link(f"tcp://127.0.0.1:{guarded.port}", HELLO, keys=guarded.keys.of_peer())
    connecting = asyncio.create_task(link.connect(10))
    while guarded.keys.num_asked < 1:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # the refusal travels; the link now pauses without a socket
    await link.close()
    with pytest.raises(TryAgainError, match="closed"):
        await connecting
