"""Real brokers that really die, peers that speak to them, and a checker that reads what is left without any broker.

place = Place(tmp_path, credit_bytes=2**25)            # a run folder, its run file, two quiet ports
life = place.start()                                   # the command itself; start(forks=...) forks it in milliseconds
ask = place.peer("actor", "a0")                        # a raw DEALER socket that said hello
life.kill()                                            # kill -9, and it is gone when this returns

Payloads follow from the episode's id (`payload_of`), so that anybody can say whether bytes are right.
As a program this file is a fork server (`forks`) or an actor that only holds leases (`holder PORT NAME NUM`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import zmq

from matpo import wire
from matpo.errors import RefusedError
from matpo.link import Link
from matpo.testing import write_run_file
from matpo_broker.journal import read_episodes

SOAK = os.environ.get("MATPO_SOAK", "") not in ("", "0")
RUN = "fault"
PR_SET_PDEATHSIG = 1  # Linux: this signal when the parent ends


# ---- payloads


def payload_of(episode: str, num_bytes: int | None = None) -> bytes:
    """The payload of an episode: its hash again and again. Without `num_bytes` the length follows from the id as well,
    between 100 bytes and 8 kB."""
    digest = hashlib.sha256(episode.encode()).digest()
    if num_bytes is None:
        num_bytes = 100 + int.from_bytes(digest[:4], "little") % 8000
    return (digest * (num_bytes // 32 + 1))[:num_bytes]


def episode_of(lease: wire.Lease, num_bytes: int | None = None) -> tuple[wire.StoreEpisode, bytes]:
    """The episode that is played for a lease."""
    name = f"{lease.group}.{lease.member}.{lease.attempt}"
    payload = payload_of(name, num_bytes)
    message = wire.StoreEpisode(
        lease=lease.lease,
        group=lease.group,
        member=lease.member,
        attempt=lease.attempt,
        episode=name,
        num_bytes=len(payload),
        crc32c=wire.crc32c(payload),
    )
    return message, payload


def orders_of(indices: Iterable[int], group_size: int) -> list[wire.Order]:
    """Work orders g-00000000, g-00000001, ..."""
    task = wire.OrderedTask(id="t", environment="e", question="q")
    return [wire.Order(group=f"g-{i:08d}", index=i, group_size=group_size, task=task) for i in indices]


def delivered(reply: wire.GroupReady, body: bytes) -> Iterator[tuple[str, bytes]]:
    """(episode, payload) of a group that the broker handed out."""
    at = 0
    for one in reply.episodes:
        yield one.episode, body[at : at + one.num_bytes]
        at += one.num_bytes


# ---- peers


class GoneError(Exception):
    """No answer: the broker died, or this took too long."""


class Peer:
    """A DEALER socket that said hello. `is_over` ends every wait early (GoneError)."""

    def __init__(self, context: zmq.Context[Any], port: int, is_over: Callable[[], bool], send_hwm: int = 0) -> None:
        self.socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.RECONNECT_IVL, 10), (zmq.SNDHWM, send_hwm), (zmq.RCVHWM, 0)):
            self.socket.setsockopt(option, value)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.welcome: Any = None
        self._is_over = is_over
        self._seq = 0
        self._arrived: deque[Sequence[bytes | memoryview]] = deque()  # the rest of a bundle

    def send(self, message: wire.AnyMessage, payload: bytes = b"") -> int:
        return self.send_together([(message, payload)])[0]

    def send_together(self, messages: Iterable[tuple[wire.AnyMessage, bytes]]) -> list[int]:
        """Send messages as one bundle; returns the seq of each."""
        frames = []
        for message, payload in messages:
            self._seq += 1
            frames.append(wire.encode(message.model_copy(update={"seq": self._seq}), payload))
        # A copy: what ZeroMQ sends without one is freed by its I/O thread, through Python.
        self.socket.send_multipart(wire.bundle(frames), copy=True)
        return list(range(self._seq - len(frames) + 1, self._seq + 1))

    def receive(self, timeout_s: float = 30.0) -> tuple[Any, bytes]:
        until_s = time.monotonic() + timeout_s
        while not self._arrived and not self.socket.poll(20):
            if self._is_over() or time.monotonic() > until_s:
                raise GoneError
        if not self._arrived:
            self._arrived += wire.unbundle(self.socket.recv_multipart())
        message, payload = wire.decode(self._arrived.popleft())
        return message, bytes(payload)

    def ask(self, message: wire.AnyMessage, payload: bytes = b"", timeout_s: float = 30.0) -> Any:
        """The reply to this message; those to earlier ones are skipped."""
        seq = self.send(message, payload)
        while True:
            reply, self.payload = self.receive(timeout_s)
            if reply.seq == seq:
                return reply

    def close(self) -> None:
        self.socket.close(0)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- brokers


class Life:
    """One broker process, from its start to its end. `log` is what it wrote to stderr."""

    def __init__(self, pid: int, log: Path, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.log = log
        self._child = child
        self._pidfd = os.pidfd_open(pid)

    @property
    def is_over(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def kill(self) -> None:
        """kill -9; the process is gone when this returns."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait()

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout_s: float = 20.0) -> int | None:
        """The exit code; None for a forked one, whose parent is the fork server."""
        assert select.select([self._pidfd], [], [], timeout_s)[0], f"broker {self.pid} does not end: {self.log}"
        return self._child.wait() if self._child is not None else None

    def status(self, field: str) -> int:
        """A field of /proc/PID/status in bytes, for example VmRSS or VmHWM (the highest RSS so far)."""
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found, f"/proc/{self.pid}/status has no {field}: did the broker end? See {self.log}"
        return int(found[1]) * 1024

    def close(self) -> None:
        if self._pidfd >= 0:
            self.kill()
            os.close(self._pidfd)
            self._pidfd = -1


class Forks:
    """A parent that has imported the broker and forks a fresh process for each life: a real process for a real
    kill -9, without paying Python's start each time."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__)), "forks"]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, arguments: Sequence[str], log: Path) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        """End the parent and whatever it forked."""
        self._parent.communicate(timeout=20)


class Place:
    """A run folder, its run file, fixed ports, and brokers on it, one after the other."""

    def __init__(self, folder: Path, **broker: object) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self.lives: list[Life] = []
        self.peers: list[Peer] = []
        self.ports = quiet_ports()
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        ports = {"actor_port": self.ports[0], "learner_port": self.ports[1]}
        self.run_file = write_run_file(
            folder / "run.toml", model=folder / "model", name=RUN, broker={**ports, **broker}
        )

    @property
    def journal(self) -> Path:
        return self.folder / RUN / "journal"

    def start(self, *, forks: Forks | None = None, under: Sequence[str] = ()) -> Life:
        """Start the broker: the command itself, one forked by `forks`, or the command under another (strace)."""
        log = self.folder / f"broker-{len(self.lives)}.log"
        if forks is not None:
            life = Life(forks.start([str(self.run_file)], log), log)
        else:
            command = [*under, sys.executable, "-m", "matpo_broker", str(self.run_file)]
            with log.open("wb") as file:
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            life = Life(child.pid, log, child)
        self.lives.append(life)
        return life

    def peer(
        self,
        kind: str,
        name: str,
        *,
        incarnation: str = "1",
        is_over: Callable[[], bool] | None = None,
        send_hwm: int = 0,
    ) -> Peer:
        """Connect and say hello; the broker may be still on its way. Raises GoneError."""
        ends = (lambda: self.lives[-1].is_over) if is_over is None else is_over
        peer = Peer(self.context, self.ports[0 if kind == "actor" else 1], ends, send_hwm)
        self.peers = [*(peer for peer in self.peers if not peer.socket.closed), peer]
        fields = {"peer": kind, "name": name, "incarnation": incarnation, "run": RUN, "schema_version": 1}
        try:
            peer.welcome = peer.ask(wire.Hello.model_validate(fields))
        except GoneError:
            peer.close()
            raise
        assert peer.welcome.kind == "welcome", peer.welcome
        return peer

    def wait_ready(self) -> None:
        """Until the broker answers."""
        try:
            self.peer("operator", "ready?").close()
        except GoneError:
            raise AssertionError(f"the broker does not answer:\n{self.lives[-1].log.read_text()}") from None

    def counts(self) -> Mapping[str, Any]:
        """What `matpo-broker stat` shows."""
        with self.peer("operator", "stat") as peer:
            reply: wire.StatReply = peer.ask(wire.Stat())
        return reply.counts

    def learner(self, num_groups: int, group_size: int, *, incarnation: str = "1") -> Peer:
        """A learner that has placed its orders."""
        peer = self.peer("learner", "learner", incarnation=incarnation)
        epoch = peer.welcome.epoch
        assert peer.ask(wire.Resume(epoch=epoch, checkpoint="", consumed_below=0, consumed=[])).kind == "done"
        for first in range(0, num_groups, 1000):
            orders = orders_of(range(first, min(first + 1000, num_groups)), group_size)
            assert peer.ask(wire.PlaceOrders(epoch=epoch, orders=orders)).kind == "done"
        return peer

    def close(self) -> None:
        for life in self.lives:
            life.close()
        for peer in self.peers:
            peer.close()
        self.context.term()


def stored_bytes(journal: Path) -> dict[str, bytes]:
    """Payload of every episode that a journal folder still holds, read without the broker. A damaged one raises."""
    return {stored.episode: stored.payload for stored in read_episodes(journal)}


def quiet_ports() -> tuple[int, int]:
    """Two free ports below the kernel's ephemeral range: a peer that connects again and again to a port of that range
    may be given the port itself, connect to itself, and so keep the broker from it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    start = 10_000 + os.getpid() * 7 % 10_000
    for port in range(start, first):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == 2:
            break
    return found[0], found[1]


# ---- as a program


def serve_forks() -> None:
    """Fork a broker for each line on stdin and print its process id; end with stdin."""
    from matpo_broker.__main__ import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; who started it watches a pidfd
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _become(task["arguments"], task["log"], main)
        print(pid, flush=True)


def _become(arguments: Sequence[str], log: str, main: Callable[[], None]) -> None:
    code = 70
    try:
        null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        sys.argv = ["matpo-broker", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:  # noqa: BLE001 - outermost: nothing of it may reach the fork server's own loop
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


async def hold(port: int, name: str, num_members: int) -> None:
    """An actor that leases members and renews them. A line on stdin: store them all. It prints what happens as JSON."""
    hello = wire.Hello(peer="actor", name=name, incarnation=str(os.getpid()), run=RUN, schema_version=1)
    link = Link(f"tcp://127.0.0.1:{port}", hello)
    welcome = await link.connect(30)
    leases: list[wire.Lease] = []
    while len(leases) < num_members:
        reply, _ = await link.request(wire.LeaseRequest(num_members=num_members - len(leases), wait_s=5))
        assert isinstance(reply, wire.Leases)
        leases += reply.leases
    _say(leased=[lease.model_dump() for lease in leases])
    order = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    while not order.done():
        names = [lease.lease for lease in leases]
        reply, _ = await link.request(wire.Heartbeat(leases=names, policy_version=0))
        assert isinstance(reply, wire.Alive)
        _say(lost=reply.lost)
        await asyncio.wait([order], timeout=welcome.heartbeat_s)
    for lease in leases if order.result() else []:
        try:
            reply, _ = await link.request(*episode_of(lease))
            _say(answer=reply.kind, lease=lease.lease)
        except RefusedError as error:
            _say(answer=error.reason, lease=lease.lease)
    await link.close()


def _say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "forks":
        serve_forks()
    else:
        asyncio.run(hold(int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
