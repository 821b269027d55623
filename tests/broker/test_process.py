"""The broker as a process: how it starts, how it ends, what kill -9 leaves."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from matpo import wire
from matpo.errors import ConfigError, SetupError
from matpo.settings import BrokerSettings
from matpo_broker.journal import read_episodes
from matpo_broker.process import address_of
from matpo_broker.tables import accounting

MACHINE_LEARNING = ("torch", "transformers", "numpy", "pyarrow", "deepspeed", "vllm", "safetensors")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Place:
    """A run folder, its run file, and brokers started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self.children: list[subprocess.Popen[str]] = []
        self.sockets: list[zmq.Socket[bytes]] = []
        self.ports = (free_port(), free_port())
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.run_file = folder / "run.toml"
        self.run_file.write_text(
            f'[run]\nname = "r"\nfolder = "{folder}/run"\n[model]\npath = "{folder}/model"\n'
            f"[broker]\nactor_port = {self.ports[0]}\nlearner_port = {self.ports[1]}\n"
        )

    @property
    def journal(self) -> Path:
        return self.folder / "run" / "journal"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "matpo_broker", str(self.run_file), *arguments]
        # COLUMNS: Typer's help folds to the terminal.
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
        self.children.append(child)
        return child

    def peer(self, kind: str, port: int, incarnation: str = "i1") -> Callable[..., Any]:
        sock = self.context.socket(zmq.DEALER)
        self.sockets.append(sock)
        sock.linger = 0
        sock.rcvtimeo = 20_000  # also covers the broker's start: connect and hello wait for it
        sock.connect(f"tcp://127.0.0.1:{port}")

        def ask(message: wire.AnyMessage, payload: bytes = b"") -> Any:
            sock.send_multipart(wire.encode(message, payload))
            return wire.decode(sock.recv_multipart())[0]

        fields = {"peer": kind, "name": kind, "incarnation": incarnation, "run": "r", "schema_version": 1}
        assert ask(wire.Hello.model_validate(fields)).kind == "welcome"
        return ask

    def actor(self) -> Callable[..., Any]:
        return self.peer("actor", self.ports[0])

    def learner(self, num_orders: int) -> Callable[..., Any]:
        ask = self.peer("learner", self.ports[1])
        ask(wire.Resume(epoch=1, checkpoint="", consumed_below=0, consumed=[]))
        task = wire.OrderedTask(id="t", environment="e", question="q")
        orders = [wire.Order(group=f"g-{i}", index=i, group_size=1, task=task) for i in range(num_orders)]
        assert ask(wire.PlaceOrders(epoch=1, orders=orders)).kind == "done"
        return ask


def episode(lease: wire.Lease) -> tuple[wire.StoreEpisode, bytes]:
    payload = lease.group.encode() * 1000
    message = wire.StoreEpisode(
        lease=lease.lease,
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        episode=f"{lease.group}.{lease.member}.{lease.attempt}",
        num_bytes=len(payload),
        crc32c=wire.crc32c(payload),
    )
    return message, payload


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for sock in place.sockets:
        sock.close()
    place.context.term()
    for child in place.children:
        child.kill()
        child.communicate()


def test_the_broker_loads_no_machine_learning_library() -> None:
    script = f"import sys, matpo_broker.__main__; print([m for m in {MACHINE_LEARNING} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_the_public_names_of_matpo_load_on_first_use() -> None:
    script = "import matpo; [getattr(matpo, name) for name in matpo.__all__]; from matpo import Task, tool"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.9.1"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert address_of(BrokerSettings(host=host), may_leave_loopback=False).startswith("127.")


def test_beyond_loopback_needs_keys_or_insecure_to_be_said() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        address_of(BrokerSettings(host="0.0.0.0"), may_leave_loopback=False)
    assert address_of(BrokerSettings(host="0.0.0.0"), may_leave_loopback=True) == "0.0.0.0"


def test_a_host_that_does_not_resolve_is_named() -> None:
    with pytest.raises(SetupError, match=r"no-such-host\.invalid"):
        address_of(BrokerSettings(host="no-such-host.invalid"), may_leave_loopback=False)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0(place: Place, number: int) -> None:
    child = place.start()
    place.learner(1)
    child.send_signal(number)
    assert child.wait(10) == 0


@pytest.mark.processes
def test_a_second_broker_on_the_same_journal_is_one_clear_line(place: Place) -> None:
    place.start()
    place.learner(1)
    second = place.start("--set", f"broker.actor_port={free_port()}")
    _, errors = second.communicate(timeout=20)
    assert second.returncode == 4
    assert len(errors.splitlines()) == 1
    assert "in use by another broker" in errors


@pytest.mark.processes
def test_a_port_in_use_is_one_clear_line_and_code_3(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", place.ports[0]))
        taken.listen()
        child = place.start()
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 3
    assert len(errors.splitlines()) == 1
    assert f"cannot listen on 127.0.0.1:{place.ports[0]}" in errors


@pytest.mark.processes
def test_after_kill_9_acked_episodes_are_there_and_unacked_ones_can_be_sent_again(place: Place) -> None:
    child = place.start()
    place.learner(3)
    actor = place.actor()
    acked, sent, unsent = actor(wire.LeaseRequest(num_members=3)).leases
    assert actor(*episode(acked)).kind == "stored"
    os.kill(child.pid, signal.SIGSTOP)  # what is sent now is never read
    place.sockets[-1].send_multipart(wire.encode(*episode(sent)))
    child.kill()
    child.wait(10)
    with (sorted(place.journal.glob("payload-*.bin"))[-1]).open("ab") as file:
        file.write(b"EPIS and half a record")
    place.start()
    actor, learner = place.actor(), place.peer("learner", place.ports[1])
    replies = [actor(*episode(lease)) for lease in (acked, sent, unsent)]
    assert [(reply.kind, reply.duplicate) for reply in replies] == [
        ("stored", True),
        ("stored", False),
        ("stored", False),
    ]
    groups = [learner(wire.Fetch(epoch=1, received=received)).group for received in ("", "g-0", "g-1")]
    assert groups == ["g-0", "g-1", "g-2"]
    assert [stored.payload for stored in read_episodes(place.journal)] == [g.encode() * 1000 for g in groups]


@pytest.mark.processes
def test_no_acked_episode_is_lost_and_none_is_stored_twice_when_it_is_killed_again_and_again(place: Place) -> None:
    num_orders, acked = 120, set()
    child = place.start()
    place.learner(num_orders)
    actor = place.actor()
    for turn in range(6):
        leases = actor(wire.LeaseRequest(num_members=20)).leases
        for lease in leases[: 5 + turn]:
            place.sockets[-1].send_multipart(wire.encode(*episode(lease)))
        for _ in range(turn + 1):
            acked.add(wire.decode(place.sockets[-1].recv_multipart())[0].episode)
        child.kill()
        child.wait(10)
        child = place.start()
        actor = place.actor()
    stored = list(accounting(place.journal).stored.values())
    assert acked <= set(stored)
    assert len(stored) == len(set(stored))
    assert {e.episode: e.payload for e in read_episodes(place.journal)} == {
        name: name.split(".")[0].encode() * 1000 for name in stored
    }


@pytest.mark.processes
def test_a_disk_that_fails_ends_it_with_code_4_and_no_ack(place: Place) -> None:
    ignoring = f"trap '' XFSZ; exec {sys.executable} -m matpo_broker {place.run_file}"
    child = subprocess.Popen(["bash", "-c", ignoring], stderr=subprocess.PIPE, text=True)
    place.children.append(child)
    place.learner(40)
    actor = place.actor()
    leases = actor(wire.LeaseRequest(num_members=40)).leases
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1024, 1024))  # from now on a growing file is an error
    place.sockets[-1].rcvtimeo = 1000
    acked = []
    for lease in leases:
        try:
            acked.append(actor(*episode(lease)).episode)
        except zmq.Again:
            break
    started_s = time.monotonic()
    _, errors = child.communicate(timeout=10)
    assert (child.returncode, time.monotonic() - started_s < 5) == (4, True)
    assert "Nothing more was acknowledged" in errors.splitlines()[-1]
    place.start()
    place.actor()
    assert set(acked) <= set(accounting(place.journal).stored.values())
    assert len(acked) < len(leases)


@pytest.mark.processes
def test_help_says_what_the_broker_does(place: Place) -> None:
    command = [sys.executable, "-m", "matpo_broker", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "kill the broker at any time" in shown.stdout
