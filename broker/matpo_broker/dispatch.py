"""What each message does: asks the ledger, and says what goes back. No sockets; time is passed in.

Rules kept here; each has a test in tests/broker/test_server.py:
1. Every message gets exactly one reply, now or later (parked), unless its peer says goodbye meanwhile.
2. Who is behind a message is its key and its connection, never what it says of itself.
3. A peer says only what its role may say, on its role's port.
4. A damaged payload costs its own member only: it is played again.
5. The episodes of a bundle are judged one by one, and answered together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from matpo import logs, wire
from matpo.errors import JournalError, MatpoError, ProtocolError, RefusedError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings
from matpo_broker.gate import Identity
from matpo_broker.ledger import Delivery
from matpo_broker.store import Store

MAX_WAIT_S = 30.0  # a request is parked no longer, whatever it asks for
DRAINING = "the broker drains: matpo-broker drain --undo lets it go on"

_ACTOR_KINDS = (wire.LeaseRequest, wire.StoreEpisode, wire.Heartbeat, wire.Release)
_LEARNER_KINDS = (
    wire.Resume, wire.PlaceOrders, wire.Fetch, wire.Trained, wire.Quarantine, wire.Commit, wire.SnapshotNotice
)  # fmt: skip
_OPERATOR_KINDS = (wire.Peek, wire.Show, wire.Requeue, wire.Purge, wire.Drain)
_KINDS = {"actor": _ACTOR_KINDS, "learner": _LEARNER_KINDS, "operator": _OPERATOR_KINDS}

log = logs.get()

Port = Literal["actor", "learner"]
Address = tuple[Port, bytes]  # the socket, and the routing id that ROUTER gave the connection
Reply = tuple[Address, Sequence[wire.AnyMessage], bytes]  # one message, or the answers to a bundle


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """One message as it came: decoded, or the reason why not."""

    address: Address
    identity: Identity
    seq: int
    message: wire.AnyMessage | None = None
    payload: bytes | memoryview = b""
    error: ProtocolError | RefusedError | None = None


@dataclass(kw_only=True, slots=True)
class Peer:
    """One connection that said hello. `key` names its process in the ledger; `heard_s` follows its messages."""

    hello: wire.Hello
    key: str
    user: str  # whose key it has
    public: str  # that key
    heard_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Parked:
    """A lease or fetch request that waits for something to hand out."""

    address: Address
    message: wire.LeaseRequest | wire.Fetch
    until_s: float


class Dispatch:
    """See the module. What it decides is in `replies` and `obsolete` until `clear`, durable after Store.commit."""

    def __init__(self, settings: BrokerSettings, store: Store, metrics: Metrics) -> None:
        self.replies: list[Reply] = []
        self.obsolete: list[int] = []  # payload files that nothing needs once this is committed
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._peers: dict[Address, Peer] = {}
        self._parked: dict[tuple[Address, str], Parked] = {}  # by peer and kind, oldest first
        self._counters: dict[str, int] = {}
        self._put_bytes = 0
        self._put_results: Counter[str] = Counter()  # of this turn's episodes: counted together, they are many
        self._draining = False

    # ---- for the loop

    @property
    def bundle_episodes(self) -> int:
        """How many episodes one message may carry: with durability "always" each is a turn of its own."""
        return 1 if self._settings.durability == "always" else wire.MAX_BUNDLE

    def take(self, together: Sequence[Received], now_s: float) -> None:
        """Decide about one message, or about those of a bundle, one by one."""
        if len(together) == 1:
            self._decide(together[0], now_s)
            return
        before = len(self.replies)
        with self._store.ledger.members.together():
            for received in together:
                if received.message is not None and not isinstance(received.message, wire.StoreEpisode):
                    error = ProtocolError(f"{received.message.kind} in a bundle: send it alone", reason="kind")
                    self._refuse(received.address, received.seq, error, kind=received.message.kind)
                else:
                    self._decide(received, now_s)
        self._join(before)

    def _decide(self, received: Received, now_s: float) -> None:
        message = received.message
        try:
            if received.error is not None or message is None:
                assert received.error is not None
                self._refuse(received.address, received.seq, received.error)  # not raised: see Server._read
                return
            self._take(received, message, now_s)
        except (ProtocolError, RefusedError) as error:
            self._refuse(received.address, received.seq, error, kind=message.kind if message is not None else "")

    def serve_parked(self, now_s: float) -> None:
        """Answer the requests that wait, if there is something for them or their time is up."""
        why_none: str | None = None  # there are no leases for anybody, and why if actors are held back
        for key, parked in list(self._parked.items()):
            address, message = parked.address, parked.message
            peer = self._peers.get(address)
            if peer is None:  # said goodbye meanwhile
                del self._parked[key]
                continue
            reply: wire.GroupReady | wire.NoGroup | wire.Leases
            payload = b""
            try:
                if isinstance(message, wire.Fetch):
                    reply, payload = self._deliver(message)
                    empty = isinstance(reply, wire.NoGroup)
                else:
                    leases: list[wire.Lease] = []
                    if why_none is None:
                        leases, why_none = self._lease(peer, message, now_s)
                    reply, empty = wire.Leases(leases=leases, paused=why_none or ""), not leases
            except RefusedError as error:
                del self._parked[key]
                self._refuse(address, message.seq, error, kind=message.kind)
                continue
            if not empty or now_s >= parked.until_s:
                del self._parked[key]
                self._reply(address, message, reply, payload)

    def lose_turn(self, error: RefusedError) -> None:
        """Nothing of this turn was kept: refuse all of it. Who said hello in it has to say so again."""
        lost = [(address, [answer.seq for answer in answers if answer.seq]) for address, answers, _ in self.replies]
        lost += [(parked.address, [parked.message.seq]) for parked in self._parked.values()]
        self._put_results.clear()
        self.clear()
        self._peers.clear()
        self._parked.clear()
        for address, seqs in lost:
            before = len(self.replies)
            for seq in seqs:
                self._refuse(address, seq, error)
            self._join(before)

    def clear(self) -> None:
        """Begin a new turn."""
        self.replies, self.obsolete = [], []
        for result, number in self._put_results.items():
            self._metrics.count("episodes_total", number, result=result)
        if self._put_bytes:
            self._metrics.count("bytes_total", self._put_bytes, direction="in")
        self._put_results.clear()
        self._put_bytes = 0

    def gone(self, address: Address, unsent: Sequence[wire.AnyMessage]) -> None:
        """The connection is not there any more; its leases last until their deadline, but for those that never left."""
        peer = self._peers.pop(address, None)
        if peer is not None:
            leases = [lease.lease for answer in unsent if isinstance(answer, wire.Leases) for lease in answer.leases]
            self._store.ledger.members.release(peer.key, leases, infra=False)

    def bump(self, counter: str) -> None:
        """Count something for `stat`."""
        self._counters[counter] = self._counters.get(counter, 0) + 1

    @property
    def due_s(self) -> Iterator[float]:
        """When parked requests have to be answered."""
        return (parked.until_s for parked in self._parked.values())

    @property
    def num_actors(self) -> int:
        """Actor processes that are connected."""
        return len({peer.key for peer in self._peers.values() if peer.hello.peer == "actor"})

    def keep_keys(self, valid: frozenset[str]) -> None:
        """Only these public keys are valid: the others' connections and parked requests end."""
        revoked = {address for address, peer in self._peers.items() if peer.public not in valid}
        error = RefusedError("your key is not valid any more: it was revoked. Get the new key file.", reason="key")
        for key, parked in list(self._parked.items()):
            if parked.address in revoked:
                del self._parked[key]
                self._refuse(parked.address, parked.message.seq, error, kind=parked.message.kind)
        for address in revoked:
            del self._peers[address]

    def forget_silent(self, now_s: float) -> None:
        """An end to peers that went without a goodbye; they say hello again when they come back."""
        waiting = {address for address, _ in self._parked}
        silent = [a for a, peer in self._peers.items() if now_s - peer.heard_s > self._settings.lease_s]
        for address in set(silent) - waiting:
            peer = self._peers.pop(address)
            if peer.hello.peer == "actor":
                log.warning("actor.silent", actor=peer.hello.name, silent_s=round(now_s - peer.heard_s, 1))

    # ---- one message

    def _take(self, received: Received, message: wire.AnyMessage, now_s: float) -> None:
        address = received.address
        if isinstance(message, wire.Hello):
            self._reply(address, message, self._welcome(received, message, now_s))
            return
        if isinstance(message, wire.Stat):
            self._reply(address, message, wire.StatReply(counts=self._stat()))
            return
        peer = self._peers.get(address)
        if peer is None:
            raise RefusedError("say hello first", reason="hello_first", retry_after_s=0.0)
        if peer.user != received.identity.name:
            raise RefusedError(f"this connection is {peer.user}'s, not {received.identity.name}'s", reason="identity")
        peer.heard_s = now_s
        if isinstance(message, wire.Goodbye):
            self._farewell(address, peer)
            self._reply(address, message, wire.Done())
        elif not isinstance(message, _KINDS[peer.hello.peer]):
            raise ProtocolError(f"{peer.hello.peer} {peer.hello.name} may not send {message.kind}", reason="kind")
        elif isinstance(message, wire.LeaseRequest | wire.Fetch):
            self._park(address, peer, message, now_s)
        elif isinstance(message, wire.Show):
            self._reply(address, message, *self._show(message))
        else:
            self._reply(address, message, self._do(peer, message, received.payload, now_s))

    def _do(self, peer: Peer, message: wire.AnyMessage, payload: bytes | memoryview, now_s: float) -> wire.AnyMessage:
        ledger = self._store.ledger
        match message:
            case wire.StoreEpisode():
                return self._put(peer, message, payload)
            case wire.Heartbeat():
                return self._alive(ledger.members.heartbeat(peer.key, message.leases, now_s))
            case wire.Release():
                ledger.members.release(peer.key, message.leases, infra=message.infra, now_s=now_s)
                log.info("leases.released", actor=peer.hello.name, num_leases=len(message.leases), why=message.reason)
            case wire.Resume():
                ledger.resume(message)
            case wire.PlaceOrders():
                ledger.place(message, now_s)
            case wire.Trained():
                ledger.trained(message)
            case wire.Quarantine():
                ledger.set_aside(message)
            case wire.Commit():
                self._obsolete(ledger.cover(message))
            case wire.SnapshotNotice():
                ledger.announce(message)
                self._notify(message)
            case wire.Peek():
                columns, rows = ledger.peek(message)
                return wire.Rows(columns=list(columns), rows=rows)
            case wire.Requeue():
                ledger.requeue(message.groups)
            case wire.Purge():
                self._obsolete(ledger.purge(message.groups))
            case wire.Drain():
                self._draining = message.on
                log.warning("broker.draining" if message.on else "broker.goes_on", operator=peer.hello.name)
        return wire.Done()

    def _welcome(self, received: Received, hello: wire.Hello, now_s: float) -> wire.Welcome:
        identity, ledger = received.identity, self._store.ledger
        if (received.address[0] == "actor") != (hello.peer == "actor"):
            raise RefusedError(
                f"this is not the port for a {hello.peer}. Actors use broker.actor_port, others broker.learner_port.",
                reason="port",
            )
        if identity.role not in ("", hello.peer):
            raise RefusedError(
                f"key {identity.name} is for the role {identity.role}, {hello.name} says that it is a {hello.peer}. "
                "Give it a key of its role: matpo-broker keys new --role ROLE --name NAME.",
                reason="role",
            )
        ledger.check_peer(hello)
        epoch = ledger.greet_learner(hello) if hello.peer == "learner" else ledger.epoch
        key = "/".join(part for part in (identity.name, hello.name, hello.incarnation) if part)
        self._peers[received.address] = Peer(
            hello=hello, key=key, user=identity.name, public=identity.key, heard_s=now_s
        )
        log.info("peer.hello", peer=hello.peer, name=hello.name, incarnation=hello.incarnation, user=identity.name)
        window_bytes, window_episodes = self._window()
        return wire.Welcome(
            epoch=epoch,
            heartbeat_s=self._settings.heartbeat_s,
            lease_s=self._settings.lease_s,
            snapshot_version=ledger.snapshot_version,
            durability=self._settings.durability,
            max_payload_bytes=self._settings.max_payload_bytes,
            window_bytes=window_bytes,
            window_episodes=window_episodes,
            bundle_episodes=self.bundle_episodes,
        )

    def _farewell(self, address: Address, peer: Peer) -> None:
        if peer.hello.peer == "actor":
            self._store.ledger.members.depart(peer.key)
        elif peer.hello.peer == "learner":
            self._store.ledger.farewell(peer.hello.incarnation)
        del self._peers[address]

    def _window(self) -> tuple[int, int]:
        """One actor's credit: its share of what may be on the way."""
        actors = max(1, self.num_actors)
        return self._settings.window_bytes // actors, max(1, self._settings.window_episodes // actors)

    def _alive(self, lost: list[str]) -> wire.Alive:
        window_bytes, window_episodes = self._window()
        return wire.Alive(
            lost=lost,
            snapshot_version=self._store.ledger.snapshot_version,
            window_bytes=window_bytes,
            window_episodes=window_episodes,
        )

    def _put(self, peer: Peer, message: wire.StoreEpisode, payload: bytes | memoryview) -> wire.Stored:
        self._put_bytes += len(payload)
        if len(payload) > self._settings.max_payload_bytes:
            raise RefusedError(
                f"{message.episode} has {len(payload)} bytes, at most {self._settings.max_payload_bytes}. "
                "Raise broker.max_payload_bytes, or make episodes shorter.",
                reason="payload_size",
            )
        new = self._store.put(message, peer.key, payload)
        self._put_results["stored" if new else "duplicate"] += 1
        durability = self._settings.durability
        return wire.Stored(seq=message.seq, episode=message.episode, durability=durability, duplicate=not new)

    def _notify(self, message: wire.SnapshotNotice) -> None:
        notice = message.model_copy(update={"seq": 0})
        self.replies += [(where, (notice,), b"") for where, peer in self._peers.items() if peer.hello.peer == "actor"]

    def _obsolete(self, files: Iterable[int]) -> None:
        files = [file for file in files if file != self._store.current_file]
        self._store.ledger.forget_files(files)
        self.obsolete += files

    # ---- requests that may wait

    def _park(self, address: Address, peer: Peer, message: wire.LeaseRequest | wire.Fetch, now_s: float) -> None:
        """Every lease and fetch goes through here and is served at the end of the turn. A peer's newer one replaces its
        older one of the same kind: the peer gave up waiting for that."""
        if isinstance(message, wire.LeaseRequest):
            self._store.ledger.check_peer(peer.hello)  # the learner may have come after this actor's hello
        until_s = now_s + min(message.wait_s, MAX_WAIT_S)
        self._parked.pop((address, message.kind), None)
        self._parked[address, message.kind] = Parked(address=address, message=message, until_s=until_s)

    def _lease(self, peer: Peer, message: wire.LeaseRequest, now_s: float) -> tuple[list[wire.Lease], str | None]:
        """Leases, and why there are none for anybody (None: there may be some for another)."""
        if self._draining:
            return [], DRAINING
        ledger = self._store.ledger
        leases, why = ledger.members.lease(peer.key, message.num_members, now_s, num_actors=self.num_actors)
        return leases, None if leases or (ledger.members.has_reserved and not why) else why

    def _deliver(self, message: wire.Fetch) -> tuple[wire.GroupReady | wire.NoGroup, bytes]:
        """The next group with its payloads. A member whose payload is damaged on disk is played again first."""
        while (delivery := self._store.ledger.fetch(message)) is not None:
            payloads = self._payloads(delivery)
            if payloads is not None:
                return group_ready(delivery), b"".join(payloads)
        _, orders_open = self._store.ledger.flow()
        return wire.NoGroup(
            orders_open=orders_open,
            members_open=self._store.ledger.num_free(),
            members_leased=self._store.ledger.members.num_leases,
            actors=self.num_actors,
        ), b""

    def _payloads(self, delivery: Delivery) -> list[bytes] | None:
        payloads, damaged = [], False
        for row in delivery.episodes:
            try:
                payloads.append(self._store.read(row.episode, row.location))
            except JournalError as error:
                damaged = True
                log.error("journal.damaged", reason=error.reason, error=str(error), does="its member is played again")
                self._store.ledger.members.reopen(row.index, row.member)
        return None if damaged else payloads

    def _show(self, message: wire.Show) -> tuple[wire.GroupReady, bytes]:
        delivery = self._store.ledger.show(message.group)
        try:
            payloads = [self._store.read(row.episode, row.location) for row in delivery.episodes]
        except JournalError as error:
            raise RefusedError(str(error), reason="damaged") from error
        return group_ready(delivery), b"".join(payloads)

    # ---- small things

    def _reply(self, address: Address, to: wire.AnyMessage, message: wire.AnyMessage, payload: bytes = b"") -> None:
        if message.seq != to.seq:
            message = message.model_copy(update={"seq": to.seq})
        self.replies.append((address, (message,), payload))

    def _join(self, before: int) -> None:
        """Make one reply of those since `before`: they answer the messages of one bundle."""
        if len(self.replies) - before > 1:
            joined = [answer for _, answers, _ in self.replies[before:] for answer in answers]
            self.replies[before:] = [(self.replies[before][0], joined, b"")]

    def _refuse(self, address: Address, seq: int, error: MatpoError, *, kind: str = "") -> None:
        self._metrics.count("refusals_total", reason=error.reason)
        self.bump(f"refused_{error.reason}")
        if kind == "episode":
            self._metrics.count("episodes_total", result="refused")
        if error.reason != "hello_first":
            peer = self._peers.get(address)
            name = peer.hello.name if peer else "?"
            log.warning("message.refused", reason=error.reason, kind=kind, peer=name, error=str(error))
        retry_after_s = error.retry_after_s if isinstance(error, RefusedError) else None
        refused = wire.Refused(seq=seq, reason=error.reason, message=str(error), retry_after_s=retry_after_s)
        self.replies.append((address, (refused,), b""))

    def _stat(self) -> dict[str, int | float | str]:
        return {
            **self._store.ledger.counts(),
            **self._counters,
            "actors": self.num_actors,
            "journal_bytes": self._store.num_bytes,
            "parked": len(self._parked),
            "durability": self._settings.durability,
            "disk_full": int(self._store.is_full),
            "draining": int(self._draining),
        }


def group_ready(delivery: Delivery) -> wire.GroupReady:
    """The message of a delivery; its episodes' payloads go behind it, in this order."""
    episodes = [
        wire.DeliveredEpisode(
            episode=row.episode,
            member=row.member,
            attempt=row.attempt,
            num_bytes=row.location.num_bytes,
            crc32c=row.location.crc32c,
        )
        for row in delivery.episodes
    ]
    return wire.GroupReady(group=delivery.group, index=delivery.index, episodes=episodes, dropped=delivery.dropped)
