"""Who may connect, and who is behind a message: CURVE keys, checked by a ZAP authenticator on a thread of its own.

Rules kept here; each has a test of that name in tests/broker/test_gate.py:
1. Without a live authenticator nobody new gets in. CURVE alone would let any key in.
2. A key counts only while the list says so: a new connection is judged by the list of that moment, an open one's next
   message by that of the last `refresh`.
3. Who a peer is, its key says, never the peer.
4. A handshake that is refused for its key is counted (refusals_total, reason "key") and named in the log, not more than
   once in LOG_S however often it comes.

What a role may say is decided in matpo_broker.dispatch; the files are matpo.security's.
"""

from __future__ import annotations

import resource
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import zmq
from zmq.auth.thread import ThreadAuthenticator

from matpo import logs, security
from matpo.errors import MatpoError, RefusedError, SetupError
from matpo.metrics import Metrics

ZAP_DOMAIN = "matpo"
LOG_S = 10.0

log = logs.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Whose key a message came under. Role "": no keys are in use, anyone may be anything."""

    name: str
    role: Literal["actor", "learner", "operator", ""]
    key: str = field(default="", compare=False)  # the public key itself: a rotated name has another


ANYONE = Identity(name="", role="")


class Gate:
    """Lets in the live keys of a folder. `Gate(None, metrics)` has no keys: everyone is anonymous.

    Raises ConfigError when the folder has no keys yet, SetupError when they are unsafe or damaged.
    """

    def __init__(self, keys: Path | None, metrics: Metrics) -> None:
        self._folder = keys
        self._metrics = metrics
        self._authenticator: ThreadAuthenticator | None = None
        self._live: dict[str, Identity] = {}  # by public key; replaced, never changed: two threads read it
        self._stamp: tuple[int, ...] = ()
        self._reading = threading.Lock()
        self._log_at_s = 0.0
        self._valid_keys: frozenset[str] | None = None
        if keys is not None:
            self._broker = security.load_broker(keys)
            self._stamp = _stamp(keys)
            self._read(keys)

    def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Start the authenticator of this context. Before any bind."""
        if self._folder is None:
            return
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=ZAP_DOMAIN, credentials_provider=_Provider(self))

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket take only connections that the authenticator allows. Before its bind; no-op without keys."""
        if self._folder is None:
            return
        socket.curve_secretkey = self._broker.secret.encode()
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it a missing authenticator means: all may enter

    def identify(self, frame: zmq.Frame) -> Identity:
        """Who sent this frame (any but the routing id). Raises RefusedError when its key is not valid any more."""
        if self._folder is None:
            return ANYONE
        try:
            found = self._live.get(str(frame.get("User-Id")))
        except zmq.ZMQError:  # the connection has none
            found = None
        if found is None:
            raise RefusedError(
                "your key is not valid any more: it was revoked or rotated. Get the new key file.", reason="key"
            )
        return found

    @property
    def valid_keys(self) -> frozenset[str] | None:
        """Public keys that are valid now; None when there are none in use."""
        return self._valid_keys

    def refresh(self) -> None:
        """Read the list again if it has changed (one stat if not). Raises SetupError when the authenticator died."""
        if self._folder is None:
            return
        if self._authenticator is not None and not self._authenticator.is_alive():
            raise SetupError("the authenticator's thread has died: nobody could connect any more.", reason="gate")
        self._follow(self._folder)

    def close(self) -> None:
        """Stop the authenticator. Before the context is terminated."""
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is None:
            return
        if not authenticator.is_alive() and authenticator.pipe is not None:
            authenticator.pipe.close(linger=0)  # `stop` would wait for ever for a dead thread to read from it
            authenticator.pipe = None  # type: ignore[assignment]
        authenticator.stop()

    def allows(self, public: str) -> bool:
        """Whether a key may connect; on the authenticator's thread."""
        if self._folder is not None:
            self._follow(self._folder)  # a key that was just made, or just revoked
        if public in self._live:
            return True
        self._metrics.count("refusals_total", reason="key")
        now_s = time.monotonic()
        if now_s >= self._log_at_s:
            self._log_at_s = now_s + LOG_S
            log.warning("connection.refused", reason="key", fingerprint=security.fingerprint(public))
        return False

    def _follow(self, folder: Path) -> None:
        """Read the list if it is not the one that we know. A damaged one changes nothing, and is said once."""
        with self._reading:  # else the slower of two threads could bring an older list back
            stamp = _stamp(folder)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._read(folder)
            except MatpoError as error:
                log.error("keys.unreadable", error=str(error), do="mend the list; until then the keys of before count")

    def _read(self, folder: Path) -> None:
        entries = security.live(security.load_entries(folder)).items()
        self._live = {public: Identity(name=entry.name, role=entry.role, key=public) for public, entry in entries}
        self._valid_keys = frozenset(self._live)
        log.info("keys.read", valid=len(self._live))


class _Provider:
    """What pyzmq calls to ask about a key."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def callback(self, domain: str, key: bytes) -> bool:
        return self._gate.allows(key.decode())


def raise_file_limit() -> int:
    """Let this process have as many connections as the system allows it; returns how many files that are.

    Each connection is a file, a stranger's half handshake too, and the usual soft limit is 1,024.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes whenever the list is replaced, or gone."""
    try:
        found = (folder / security.AUTHORISED).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
