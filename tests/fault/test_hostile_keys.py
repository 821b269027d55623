"""Strangers, liars and noise before a real broker that uses keys: each is kept out by name, and nobody else notices.

One broker serves the whole module, with a good actor that must be answered throughout. At the end its memory is
measured against what it had when it was new.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.fault.harness import RUN, GoneError, Life, Peer, Place, episode_of, orders_of, quiet_ports

from matpo import security, wire
from matpo.errors import TryAgainError
from matpo.link import Link

pytestmark = pytest.mark.processes

NUM_HALF_HANDSHAKES = 1000
REFRESH_S = 2.0  # so long at most an open connection outlives its key
HANDSHAKE_S = 5.0  # the broker's ZMQ_HANDSHAKE_IVL
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
MAX_GROWTH_BYTES = 64 * 2**20
_numbers = itertools.count()


class Guest(Peer):
    """A DEALER with a key, a password, or nothing, that says what it likes."""

    def __init__(self, guarded: Guarded, port: int, keys: security.ClientKeys | None, **options: Any) -> None:
        self.socket = guarded.place.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.immediate = 1  # nothing is queued for a connection that does not come about
        if keys is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
            self.socket.curve_serverkey = keys.broker.encode()
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.sndtimeo = 5000
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self._is_over = lambda: guarded.life.is_over
        self._seq = 0
        self._arrived = deque()

    def hello(self, peer: str, name: str, incarnation: str = "1") -> Any:
        fields = {"peer": peer, "name": name, "incarnation": incarnation, "run": RUN, "schema_version": 1}
        return self.ask(wire.Hello.model_validate(fields), timeout_s=5.0)

    def gets_in(self, timeout_s: float = 1.0) -> bool:
        """Whether a connection comes about: with `immediate` a socket can only then be written to."""
        return bool(self.socket.poll(int(timeout_s * 1000), zmq.POLLOUT))


class Guarded:
    """A broker with keys, and its counters."""

    def __init__(self, folder: Path) -> None:
        self.place = Place(folder / "place", lease_s=60)
        self.keys = folder / "keys"
        self.metrics_port = quiet_ports()[0] + 2
        with self.place.run_file.open("a") as file:
            file.write(f'\n[security]\nkeys = "{self.keys}"\n[metrics]\nbroker_port = {self.metrics_port}\n')
        self.command("keys", "new")
        self.life: Life = self.place.start()
        self.actor_port, self.learner_port = self.place.ports
        self.first_rss = 0

    def command(self, *words: str) -> str:
        """Run `matpo-broker WORDS RUN.TOML ...`; the run file goes after the first two words."""
        command = [sys.executable, "-m", "matpo_broker", *words[:2], str(self.place.run_file), *words[2:]]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def key(self, name: str) -> security.ClientKeys:
        return security._read(self.keys / f"{name}.key", security.ClientKeys, missing="")

    def new_actor(self) -> str:
        """A key of its own for a test that spoils it."""
        name = f"spot-{next(_numbers)}"
        self.command("keys", "new", "--role", "actor", "--name", name)
        return name

    def guest(self, keys: security.ClientKeys | str | None, *, port: int | None = None, **options: Any) -> Guest:
        keys = self.key(keys) if isinstance(keys, str) else keys
        return Guest(self, port or self.actor_port, keys, **options)

    def counted(self, metric: str, label: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"matpo_broker_{metric}") and label in line]
        return sum(float(line.split()[-1]) for line in found)

    def wait_counted(self, metric: str, label: str, at_least: float) -> None:
        wait_until(lambda: self.counted(metric, label) >= at_least)

    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.life.pid}/fd").iterdir()))


def wait_until(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("hostile"))
    yield guarded
    guarded.place.close()


@pytest.fixture(scope="module")
def good(broker: Guarded) -> Iterator[Guest]:
    """An actor with a good key, connected before the hostile ones come."""
    with broker.guest("actor") as guest:
        assert guest.hello("actor", "good").kind == "welcome"
        broker.first_rss = broker.life.status("VmRSS")
        yield guest


@pytest.fixture(autouse=True)
def others_unaffected(broker: Guarded, good: Guest) -> Iterator[None]:
    """Around each test: who was connected is answered, and a newcomer with a good key gets in."""
    yield
    assert good.ask(wire.Stat(), timeout_s=5.0).kind == "stats"
    with broker.guest("actor") as newcomer:
        assert newcomer.hello("actor", "newcomer").kind == "welcome"


# ---- keys


@pytest.mark.parametrize("role", security.ROLES)
def test_a_good_key_of_each_role_is_served(broker: Guarded, role: str) -> None:
    with broker.guest(role, port=broker.actor_port if role == "actor" else broker.learner_port) as guest:
        assert guest.hello(role, "x").kind == "welcome"


def test_an_unknown_key_is_refused_counted_and_its_link_says_why(broker: Guarded) -> None:
    before = broker.counted("refusals_total", 'reason="key"')
    public, secret = (part.decode() for part in zmq.curve_keypair())
    unknown = broker.key("actor").model_copy(update={"public": public, "secret": secret})
    with broker.guest(unknown) as guest:
        broker.wait_counted("refusals_total", 'reason="key"', before + 1)
        assert not guest.gets_in(0.2)
    assert security.fingerprint(public) in broker.life.log.read_text()


async def test_a_link_with_an_unknown_key_says_why(broker: Guarded) -> None:
    public, secret = (part.decode() for part in zmq.curve_keypair())
    unknown = broker.key("actor").model_copy(update={"public": public, "secret": secret})
    hello = wire.Hello(peer="actor", name="x", incarnation="1", run=RUN, schema_version=1)
    link = Link(f"tcp://127.0.0.1:{broker.actor_port}", hello, keys=unknown)
    with pytest.raises(TryAgainError, match="refuses our key"):
        await link.connect(1.0)
    await link.close()


def test_unknown_keys_again_and_again_do_not_fill_the_log(broker: Guarded) -> None:
    before, num_bytes = broker.counted("refusals_total", 'reason="key"'), broker.life.log.stat().st_size
    for number in range(100):
        public, secret = (part.decode() for part in zmq.curve_keypair())
        with broker.guest(broker.key("actor").model_copy(update={"public": public, "secret": secret})):
            broker.wait_counted("refusals_total", 'reason="key"', before + number + 1)
    assert broker.life.log.stat().st_size - num_bytes < 2000


def test_a_revoked_key_is_refused_on_its_open_connection_and_on_a_new_one(broker: Guarded) -> None:
    name = broker.new_actor()
    before = broker.counted("refusals_total", 'reason="key"')
    keys = broker.key(name)
    with broker.guest(keys) as guest:
        assert guest.hello("actor", name).kind == "welcome"
        broker.command("keys", "revoke", name)
        wait_until(lambda: guest.ask(wire.Stat(), timeout_s=5.0).kind == "refused", REFRESH_S)
        for message in (wire.Stat(), wire.Heartbeat(leases=[], policy_version=0), wire.LeaseRequest(num_members=1)):
            reply = guest.ask(message, timeout_s=5.0)
            assert (reply.kind, reply.reason, reply.retry_after_s) == ("refused", "key", None)
        assert guest.hello("actor", name).reason == "key"
    with broker.guest(keys) as guest:
        broker.wait_counted("refusals_total", 'reason="key"', before + 6)
        assert not guest.gets_in(0.2)


def test_a_rotated_key_s_old_pair_is_refused_and_its_new_one_served(broker: Guarded) -> None:
    name = broker.new_actor()
    with broker.guest(name) as guest:
        assert guest.hello("actor", name).kind == "welcome"
        broker.command("keys", "rotate", name)
        wait_until(lambda: guest.ask(wire.Stat(), timeout_s=5.0).kind == "refused", REFRESH_S)
    with broker.guest(name) as guest:
        assert guest.hello("actor", name).kind == "welcome"


def test_no_key_a_password_and_a_key_for_another_broker_get_no_connection(broker: Guarded) -> None:
    other = broker.key("actor").model_copy(update={"broker": zmq.curve_keypair()[0].decode()})
    password = {"plain_username": b"actor", "plain_password": b"actor"}
    for keys, options in ((None, {}), (None, password), (other, {})):
        before = broker.counted("connections_total", 'event="handshake_failed"')
        with broker.guest(keys, **options) as guest:
            broker.wait_counted("connections_total", 'event="handshake_failed"', before + 1)
            assert not guest.gets_in(0.2)


# ---- identities


def test_an_actor_s_key_with_another_role_s_hello_is_refused(broker: Guarded) -> None:
    before = broker.counted("refusals_total", 'reason="role"')
    for role in ("learner", "operator"):
        with broker.guest("actor", port=broker.learner_port) as guest:
            assert guest.hello(role, "learner").reason == "role"
            assert guest.ask(wire.Resume(epoch=1, checkpoint="", consumed_below=0, consumed=[])).kind == "refused"
            assert guest.ask(wire.Drain(on=True)).kind == "refused"
    assert broker.counted("refusals_total", 'reason="role"') == before + 2


def test_another_actor_s_name_gives_no_power_over_its_leases(broker: Guarded) -> None:
    thief_key = broker.new_actor()
    with (
        broker.guest("learner", port=broker.learner_port) as learner,
        broker.guest("actor") as owner,
        broker.guest(thief_key) as thief,
    ):
        epoch = learner.hello("learner", "learner", "identities").epoch
        assert learner.ask(wire.Resume(epoch=epoch, checkpoint="", consumed_below=0, consumed=[])).kind == "done"
        assert learner.ask(wire.PlaceOrders(epoch=epoch, orders=orders_of(range(2), 1))).kind == "done"
        assert owner.hello("actor", "host-1", "secret-incarnation").kind == "welcome"
        (lease,) = owner.ask(wire.LeaseRequest(num_members=1)).leases
        assert thief.hello("actor", "host-1", "secret-incarnation").kind == "welcome"
        assert thief.ask(wire.Heartbeat(leases=[lease.lease], policy_version=0)).lost == [lease.lease]
        thief.ask(wire.Release(leases=[lease.lease], infra=True, reason="mine"))
        thief.ask(wire.Goodbye())
        assert owner.ask(wire.Heartbeat(leases=[lease.lease], policy_version=0)).lost == []
        assert owner.ask(*episode_of(lease)).kind == "stored"
        (stolen,) = owner.ask(wire.LeaseRequest(num_members=1)).leases
        assert thief.hello("actor", "host-1", "secret-incarnation").kind == "welcome"
        reply = thief.ask(*episode_of(stolen))
        assert (reply.kind, reply.reason) == ("refused", "lease_mismatch")
        assert owner.ask(*episode_of(stolen)).kind == "stored"


def test_a_self_chosen_routing_id_is_refused_whoever_else_has_it(broker: Guarded) -> None:
    before = broker.counted("refusals_total", 'reason="identity"')
    with broker.guest("actor", routing_id=b"good") as first, broker.guest("actor", routing_id=b"good") as second:
        assert first.hello("actor", "x").reason == "identity"
        with pytest.raises(GoneError):  # libzmq ignores a second connection with the same id
            second.ask(wire.Stat(), timeout_s=0.5)
    assert broker.counted("refusals_total", 'reason="identity"') == before + 1


# ---- noise


def test_half_handshakes_hold_nobody_up_and_are_closed(
    broker: Guarded, good: Guest, report: Callable[..., None]
) -> None:
    files, rss = broker.num_files(), broker.life.status("VmRSS")
    held: list[socket.socket] = []
    latencies_s: list[float] = []
    started_s = time.monotonic()
    for number in range(NUM_HALF_HANDSHAKES):
        one = socket.create_connection(("127.0.0.1", broker.actor_port), timeout=5)
        one.sendall((b"", GREETING[:5], GREETING, GREETING + b"\x04\xc8\x05HELLO")[number % 4])
        held.append(one)
        if number % 20 == 0:
            asked_s = time.monotonic()
            assert good.ask(wire.Stat(), timeout_s=5.0).kind == "stats"
            latencies_s.append(time.monotonic() - asked_s)
    most_files, took_s = broker.num_files(), time.monotonic() - started_s
    grown = broker.life.status("VmRSS") - rss
    if took_s < HANDSHAKE_S:
        assert most_files > files + NUM_HALF_HANDSHAKES // 2  # they really are there
    wait_until(lambda: broker.num_files() <= files + 5, HANDSHAKE_S + 10)
    for one in held:
        one.close()
    assert sorted(latencies_s)[-2] < 1.0
    assert grown < MAX_GROWTH_BYTES
    report(
        "half handshakes", num=NUM_HALF_HANDSHAKES, rss_growth_mib=grown / 2**20,
        slowest_answer_ms=1000 * max(latencies_s), closed_s=time.monotonic() - started_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    "noise",
    [
        b"GET /metrics HTTP/1.1\r\nHost: broker\r\n\r\n",
        bytes.fromhex("16030100c8010000c40303") + bytes(194),  # TLS: client hello
        b"\x01\x00\x03hey",  # ZMTP 1.0, which knows no keys
        b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00",  # ZMTP 2.0, the same
        b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32) + b"\x04\x06\x05READY",
        b"\xff" * 65536,
        bytes(65536),
        GREETING + b"\x02" + b"\x7f" + b"\xff" * 7,  # a frame of 2^63 bytes
    ],
    ids=["http", "tls", "zmtp1", "zmtp2", "null", "ones", "zeros", "huge"],
)
def test_bytes_that_are_no_handshake_are_closed_and_cost_nothing(broker: Guarded, noise: bytes) -> None:
    rss, accepted = broker.life.status("VmRSS"), broker.counted("connections_total", 'event="accepted"')
    gone = broker.counted("connections_total", 'event="disconnected"')
    for port in broker.place.ports:
        stranger = socket.create_connection(("127.0.0.1", port), timeout=HANDSHAKE_S + 5)
        with closing(stranger), contextlib.suppress(ConnectionError):  # reset, perhaps before all was sent
            stranger.sendall(noise)
            with contextlib.suppress(OSError):  # not connected any more
                stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    broker.wait_counted("connections_total", 'event="accepted"', accepted + 2)
    broker.wait_counted("connections_total", 'event="disconnected"', gone + 2)
    assert broker.life.status("VmRSS") - rss < MAX_GROWTH_BYTES


def test_after_all_this_the_broker_has_grown_little(broker: Guarded, report: Callable[..., None]) -> None:
    growth = broker.life.status("VmRSS") - broker.first_rss
    report("hostile keys", rss_growth_mib=growth / 2**20)
    assert growth < MAX_GROWTH_BYTES
    assert not broker.life.is_over
