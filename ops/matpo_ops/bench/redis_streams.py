"""Redis Streams as a peer: the server, a producer, a consumer. Speaks RESP over plain sockets.

The client library `redis` was no faster (64 KiB: 311 against 306-350 MiB/s, with hiredis), sends a pipeline and waits
for all of it, where an actor has a sliding window, and would be one more dependency: RESP is four lines.

Server settings, each to Redis's advantage or required:
* appendonly yes, appendfsync always: an answer means fsync, as our ack does. Redis also syncs once for all that
  arrived in one turn of its loop.
* save "", auto-aof-rewrite-percentage 0: no other writes beside the log. Its data are thrown away with the folder.
* XADD ... MAXLEN ~ N, or with a consumer XTRIM of what it has read: a stream that only grows would also measure how
  fast the kernel finds fresh memory.
* io-threads 1 (default): with 2, on two cores, it lost 10-30 %.
TCP on loopback, as our side; a Unix socket was no faster. With `tls` the same over TLS, as our side is encrypted too: a
self-signed certificate made on the spot, the cipher that the two agree on by themselves.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import deque
from io import IOBase
from pathlib import Path
from types import TracebackType
from typing import Any

from matpo.errors import SetupError
from matpo.testing import free_port
from matpo_ops.bench.producer import NUM_PAYLOADS, Spec, payloads_of
from matpo_ops.processes import Child

STREAM = b"episodes"
KEPT_BYTES = 128 * 2**20
READ_BYTES = 4 * 2**20  # what the consumer asks for at one time
SERVER_SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "always",
    "save": "",
    "auto-aof-rewrite-percentage": "0",
    "bind": "127.0.0.1",
}


class RedisServer:
    """redis-server with its data in `folder`, for a `with` block. Raises SetupError when it is missing."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        program = self.require()
        folder.mkdir(parents=True)
        self.port = free_port()
        self.certificate = ""  # for Spec.certificate
        settings = {**SERVER_SETTINGS, "port": str(self.port), "dir": str(folder)}
        if tls:
            self.certificate = str(make_certificate(folder))
            files = {"tls-cert-file": self.certificate, "tls-key-file": str(folder / "key.pem")}
            settings |= {"port": "0", "tls-port": str(self.port), "tls-auth-clients": "no", **files}
            settings["tls-ca-cert-file"] = self.certificate
        command = [program, *(part for key, value in settings.items() for part in (f"--{key}", value))]
        self.child = Child(name="redis-server", command=command, log_path=folder / "redis.log", restarts=False)

    @staticmethod
    def require() -> str:
        """The server's program. Raises SetupError when it is missing."""
        program = shutil.which("redis-server")
        if program is None:
            raise SetupError(
                "redis-server is not installed; it is what the broker is compared with. Run `make tools` "
                "(Debian's package), or install Redis 7 and put redis-server on the PATH.",
                reason="redis",
            )
        return program

    @property
    def address(self) -> str:
        """For Spec.address."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self.child.process is not None
        return self.child.process.pid

    def __enter__(self) -> RedisServer:
        """Start it and wait until it answers."""
        self.child.start()
        deadline = time.monotonic() + 10
        while True:
            try:
                connect(self.address, self.certificate).close()
                return self
            except OSError:
                if self.child.exit_code is not None or time.monotonic() > deadline:
                    raise SetupError(f"redis-server did not start:\n{self.child.tail()}", reason="redis") from None
                time.sleep(0.02)

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        """Kill it: what it holds is thrown away."""
        assert self.child.process is not None
        self.child.process.kill()
        self.child.process.wait()


class RedisConnection:
    """One producer: XADD with a sliding window."""

    def __init__(self, spec: Spec) -> None:
        self.acked: list[tuple[float, float]] = []
        self.source = connect(spec.address, spec.certificate)
        self._window = spec.window
        self._payloads = payloads_of(spec.payload_bytes)
        self._sent: deque[float] = deque()
        self._count = 0
        kept = max(64, KEPT_BYTES // spec.payload_bytes)
        trim = (b"MAXLEN", b"~", b"%d" % kept) if spec.trim else ()
        head = (b"XADD", STREAM, *trim, b"*", b"group", b"g-00000001", b"payload")
        self._head = b"*%d\r\n" % (len(head) + 1) + b"".join(map(_bulk, head)) + b"$%d\r\n" % spec.payload_bytes

    def fill(self) -> None:
        """Send until the window is full."""
        while len(self._sent) < self._window:
            self._count += 1
            self._sent.append(time.monotonic())
            send_all(self.source, [self._head, self._payloads[self._count % NUM_PAYLOADS][0], b"\r\n"])

    def receive(self) -> None:
        """Count answers: each is one bulk string, the entry's id, in the order of the requests."""
        found = self.source.recv(1 << 16)
        while isinstance(self.source, ssl.SSLSocket) and self.source.pending():  # the poller does not see these
            found += self.source.recv(1 << 16)
        if not found or found.translate(None, b"$-0123456789\r\n"):  # only an error has letters
            raise SystemExit(f"redis answered {found[:200]!r}")
        now_s = time.monotonic()
        self.acked += [(self._sent.popleft(), now_s) for _ in range(found.count(b"$"))]

    def close(self) -> None:
        """Drop the connection."""
        self.source.close()


def make_certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 and its key (key.pem) in `folder`. Raises SetupError."""
    found, openssl = folder / "certificate.pem", shutil.which("openssl")
    if openssl is None:
        raise SetupError("openssl is not installed; it makes Redis's certificate. Install it.", reason="openssl")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"openssl made no certificate: {done.stderr[-500:]}", reason="openssl")
    return found


def connect(address: str, certificate: str = "") -> socket.socket:
    """A blocking TCP connection to "host:port", with TLS if there is a certificate to trust."""
    host, _, port = address.rpartition(":")
    found = socket.create_connection((host, int(port)))
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if certificate:
        return ssl.create_default_context(cafile=certificate).wrap_socket(found, server_hostname=host)
    return found


def send_all(to: socket.socket, parts: list[bytes]) -> None:
    """All parts, without joining them; TLS has no call for several."""
    if isinstance(to, ssl.SSLSocket):
        for part in parts:
            to.sendall(part)
        return
    views = [memoryview(part) for part in parts]
    while views:
        sent = to.sendmsg(views)
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if views:
            views[0] = views[0][sent:]


def consume(address: str, payload_bytes: int, begin_s: float, end_s: float) -> int:
    """Read every entry in order, and trim what was read. Returns payload bytes read between the two instants."""
    with connect(address) as link, link.makefile("rb", buffering=1 << 20) as answers:

        def ask(*parts: bytes) -> Any:
            link.sendall(b"*%d\r\n" % len(parts) + b"".join(map(_bulk, parts)))
            return _read_reply(answers)

        last, num_bytes = b"0", 0
        count = b"%d" % max(1, READ_BYTES // payload_bytes)
        while (now_s := time.monotonic()) < end_s:
            found = ask(b"XREAD", b"COUNT", count, b"BLOCK", b"200", b"STREAMS", STREAM, last)
            if found:
                entries = found[0][1]
                last = entries[-1][0]
                num_bytes += len(entries) * payload_bytes if now_s >= begin_s else 0
                ask(b"XTRIM", STREAM, b"MINID", b"~", last)
        return num_bytes


def _read_reply(answers: IOBase) -> Any:
    line = answers.readline()
    kind, rest = line[:1], line[1:-2]
    if kind == b"$":
        return answers.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
    if kind == b"*":
        return [_read_reply(answers) for _ in range(int(rest))] if int(rest) >= 0 else None
    if kind == b":":
        return int(rest)
    raise SystemExit(f"redis answered {line[:200]!r}")


def _bulk(part: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(part), part)


def main() -> None:
    """Entry point of the consumer's process."""
    spec = json.loads(sys.argv[1])
    print("ready", flush=True)
    when = json.loads(sys.stdin.readline() or "{}")
    if when:
        num_bytes = consume(spec["address"], spec["payload_bytes"], when["begin_s"], when["end_s"])
        print(json.dumps({"consumed_bytes": num_bytes}), flush=True)


if __name__ == "__main__":
    main()
