"""The gate before a real ROUTER: who gets in, who is named, what happens without a live authenticator."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from prometheus_client import generate_latest
from structlog.testing import capture_logs
from zmq.utils.monitor import recv_monitor_message

from matpo import security
from matpo.errors import ConfigError, RefusedError, SetupError
from matpo.metrics import Metrics
from matpo_broker.gate import ANYONE, Gate, Identity, raise_file_limit

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


class Door:
    """A ROUTER behind a gate, and clients that knock."""

    def __init__(self, keys: Path | None, handshake_ms: int = 500) -> None:
        self.metrics = Metrics("broker")
        self.gate = Gate(keys, self.metrics)
        self.context: zmq.Context[Any] = zmq.Context()
        self.gate.start(self.context)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.setsockopt(zmq.HANDSHAKE_IVL, handshake_ms)
        self.gate.protect(self.router)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.clients: list[zmq.Socket[bytes]] = []

    def client(self, keys: security.ClientKeys | None, **options: Any) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        self.clients.append(socket)
        socket.linger = 0
        socket.handshake_ivl = 500
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
            socket.curve_serverkey = keys.broker.encode()
        for name, value in options.items():
            setattr(socket, name, value)
        socket.connect(f"tcp://127.0.0.1:{self.port}")
        socket.send(b"knock")
        return socket

    def heard(self, timeout_s: float = 5.0) -> zmq.Frame:
        assert self.router.poll(int(timeout_s * 1000)), "nothing arrived"
        return self.router.recv_multipart(copy=False)[-1]

    def silent(self, timeout_s: float) -> bool:
        return not self.router.poll(int(timeout_s * 1000))

    def refused(self) -> float:
        text = generate_latest(self.metrics.registry).decode()
        lines = [line for line in text.splitlines() if line.startswith('matpo_broker_refusals_total{reason="key"}')]
        return float(lines[0].split()[-1]) if lines else 0.0

    def close(self) -> None:
        for socket in [*self.clients, self.router]:
            socket.close()
        self.gate.close()
        self.context.term()


Open = Callable[..., Door]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    security.new_keys(tmp_path / "keys", now=NOW)
    return tmp_path / "keys"


@pytest.fixture
def door(keys: Path) -> Iterator[Door]:
    door = Door(keys)
    yield door
    door.close()


def key(folder: Path, name: str = "actor") -> security.ClientKeys:
    return security._read(folder / f"{name}.key", security.ClientKeys, missing="")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def stranger(door: Door) -> security.ClientKeys:
    public, secret = (part.decode() for part in zmq.curve_keypair())
    return key_like(door, public=public, secret=secret)


def key_like(door: Door, **changes: str) -> security.ClientKeys:
    assert door.gate._folder is not None
    return key(door.gate._folder).model_copy(update=changes)


# ---- rule 1


def test_without_a_live_authenticator_nobody_new_gets_in_though_the_key_is_good(door: Door, keys: Path) -> None:
    door.client(key(keys))
    door.heard()
    authenticator = door.gate._authenticator
    assert authenticator is not None
    authenticator.stop()  # thread and ZAP socket are gone: libzmq itself must refuse
    newcomer = door.client(key(keys))
    monitor = newcomer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    assert monitor.poll(5000)
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    assert door.silent(1.0)
    newcomer.disable_monitor()
    monitor.close()


def test_without_a_live_authenticator_that_still_holds_its_socket_nobody_new_gets_in_either(
    door: Door, keys: Path
) -> None:
    authenticator = door.gate._authenticator
    assert authenticator is not None
    thread = authenticator.thread
    authenticator.pipe.send(b"TERMINATE")
    thread.join(10)
    assert not thread.is_alive()
    door.client(key(keys))
    assert door.silent(1.5)


def test_an_authenticator_that_died_is_an_error_at_the_next_refresh_and_close_does_not_hang(
    door: Door, keys: Path
) -> None:
    door.gate.refresh()
    authenticator = door.gate._authenticator
    assert authenticator is not None
    authenticator.pipe.send(b"TERMINATE")
    authenticator.thread.join(10)
    with pytest.raises(SetupError, match="authenticator"):
        door.gate.refresh()


# ---- rule 2


def test_a_revoked_key_s_open_connection_is_refused_at_its_next_message(door: Door, keys: Path) -> None:
    client = door.client(key(keys))
    assert door.gate.identify(door.heard()).name == "actor"
    security.revoke(keys, "actor", now=LATER)
    door.gate.refresh()
    client.send(b"again")
    with pytest.raises(RefusedError) as refused:
        door.gate.identify(door.heard())
    assert refused.value.reason == "key"
    assert refused.value.retry_after_s is None


def test_a_rotated_key_s_open_connection_is_refused_and_the_new_key_gets_in(door: Door, keys: Path) -> None:
    client = door.client(key(keys))
    door.heard()
    security.rotate(keys, "actor", now=LATER)
    door.gate.refresh()
    client.send(b"again")
    with pytest.raises(RefusedError):
        door.gate.identify(door.heard())
    door.client(key(keys))
    assert door.gate.identify(door.heard()) == Identity(name="actor", role="actor")


def test_a_new_key_gets_in_without_a_restart(door: Door, keys: Path) -> None:
    security.add(keys, role="actor", name="spot-7", now=LATER)
    door.client(key(keys, "spot-7"))
    assert door.gate.identify(door.heard()) == Identity(name="spot-7", role="actor")


@pytest.mark.parametrize("damage", ["", "keys = 1", None])
def test_a_list_that_cannot_be_read_leaves_the_keys_of_before_and_is_said_once(
    door: Door, keys: Path, damage: str | None
) -> None:
    path = keys / security.AUTHORISED
    good = path.read_text()
    path.unlink()
    if damage is not None:
        path.write_text(damage)
    with capture_logs() as logs:
        door.gate.refresh()
        door.gate.refresh()
    assert [line["event"] for line in logs] == ["keys.unreadable"]
    door.client(key(keys))
    assert door.gate.identify(door.heard()).name == "actor"
    path.write_text(good)
    path.chmod(0o600)
    security.revoke(keys, "actor", now=LATER)
    door.gate.refresh()
    assert set(door.gate._live.values()) == {Identity(name=n, role=n) for n in ("learner", "operator")}


# ---- rule 3


@pytest.mark.parametrize("name", ["actor", "learner", "operator"])
def test_who_a_peer_is_its_key_says_never_the_peer(door: Door, keys: Path, name: str) -> None:
    door.client(key(keys, name), routing_id=b"operator")
    assert door.gate.identify(door.heard()) == Identity(name=name, role=name)


def test_without_keys_everyone_is_anyone() -> None:
    door = Door(None)
    door.client(None)
    assert door.gate.identify(door.heard()) == ANYONE
    door.gate.refresh()
    door.close()


# ---- rule 4 and who is kept out


def test_a_handshake_refused_for_its_key_is_counted_and_named_once(door: Door, keys: Path) -> None:
    unknown = stranger(door)
    with capture_logs() as logs:
        for number in range(3):
            door.client(unknown)
            wait_until(lambda number=number: door.refused() == number + 1)
    assert [(line["event"], line["fingerprint"]) for line in logs] == [
        ("connection.refused", security.fingerprint(unknown.public))
    ]
    assert door.silent(0.2)


def test_a_revoked_key_does_not_get_in_again_not_even_before_a_refresh(door: Door, keys: Path) -> None:
    old = key(keys)
    security.revoke(keys, "actor", now=LATER)
    door.client(old)
    wait_until(lambda: door.refused() == 1)
    assert door.silent(0.2)


def test_no_key_a_password_or_the_wrong_broker_s_key_do_not_get_in(door: Door, keys: Path) -> None:
    door.client(None)
    door.client(None, plain_username=b"actor", plain_password=b"actor")
    door.client(key_like(door, broker=stranger(door).public))
    assert door.silent(1.0)
    door.client(key(keys))
    assert door.gate.identify(door.heard()).name == "actor"


# ---- start


def test_without_keys_in_the_folder_the_error_says_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys new RUN\.TOML"):
        Gate(tmp_path / "keys", Metrics("broker"))


def test_a_broker_key_that_others_can_read_is_refused(keys: Path) -> None:
    (keys / "broker.key").chmod(0o644)
    with pytest.raises(SetupError, match="chmod 600"):
        Gate(keys, Metrics("broker"))


def test_the_file_limit_is_raised_to_what_the_system_allows() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource as r; _, hard = r.getrlimit(r.RLIMIT_NOFILE); r.setrlimit(r.RLIMIT_NOFILE, (64, hard));"
        "from matpo_broker.gate import raise_file_limit as up; print(up(), r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.split() == [str(hard), str(hard)]
    assert raise_file_limit() == hard
