"""The broker process: opens the store, binds the ports, serves until a signal. No ML library is loaded here.

A failing disk ends the process at once, without a further acknowledgement: after a failed fsync the kernel may have
thrown the bytes away, so nothing in memory can be believed. Restarted, it serves what the disk has.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sqlite3
import time
from types import FrameType

from matpo import __version__, heap, logs
from matpo.errors import ConfigError, JournalError, SetupError
from matpo.metrics import Metrics
from matpo.settings import BrokerSettings, RunFile
from matpo_broker.clock import PatientClock
from matpo_broker.gate import Gate, raise_file_limit
from matpo_broker.members import Rules
from matpo_broker.server import Server
from matpo_broker.store import Store

log = logs.get()


def run(run_file: RunFile, *, insecure: bool = False) -> None:
    """Serve a run until SIGTERM or SIGINT. Raises ConfigError, SetupError or JournalError when it cannot.

    `insecure`: other machines may connect without keys.
    """
    logs.configure(run_file.log, process="broker")
    heap.keep_buffers()
    settings, security = run_file.broker, run_file.security
    raise_file_limit()
    address = address_of(settings, may_leave_loopback=insecure or security.keys is not None)
    metrics = Metrics("broker")
    clock = PatientClock(time.monotonic)
    gate = Gate(security.keys, metrics)
    try:
        store = Store(run_file.journal_folder, rules_of(run_file), settings, metrics, now_s=clock())
    except (OSError, sqlite3.Error) as error:
        raise SetupError(f"cannot open the journal in {run_file.journal_folder}: {error}") from error
    server = Server(settings, store, gate, metrics, clock=clock)
    try:
        actors, learner = server.bind(address, actor_port=settings.actor_port, learner_port=settings.learner_port)
        if run_file.metrics.broker_port:
            metrics.serve(run_file.metrics.host, run_file.metrics.broker_port)
        _stop_on_signals(server)
        counts = store.ledger.counts()
        log.info(
            "broker ready", actors=actors, learner=learner, run=run_file.run.name, release=__version__,
            pid=os.getpid(), durability=settings.durability, keys=str(security.keys or "none"),
            orders=counts["orders"], episodes=counts["episodes_stored"], epoch=counts["epoch"],
        )  # fmt: skip
        server.serve()
    except (OSError, sqlite3.Error) as error:
        server.close(linger_s=0)  # the store is not closed: what the kernel still holds of it cannot be believed
        raise JournalError(
            f"the journal in {run_file.journal_folder} cannot be written: {error}. Nothing more was acknowledged. "
            "Mend the disk and start the broker again: all it acknowledged is kept.",
            reason="disk",
        ) from error
    except SetupError:
        server.close(linger_s=0)
        raise
    server.close()
    store.close()
    log.info("broker stopped", run=run_file.run.name)


def rules_of(run_file: RunFile) -> Rules:
    """What the run file says about the broker's decisions."""
    settings = run_file.broker
    return Rules(
        run=run_file.run.name,
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
        max_lease_losses=settings.max_lease_losses,
        max_deliveries=settings.max_deliveries,
        max_order_age_s=settings.max_order_age_s,
        keep_consumed=settings.keep_consumed,
        credit_bytes=settings.credit_bytes,
    )


def address_of(settings: BrokerSettings, *, may_leave_loopback: bool) -> str:
    """The address to bind. Raises ConfigError beyond loopback unless it may, SetupError for an unknown host."""
    try:
        found = socket.getaddrinfo(settings.host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(f'broker.host="{settings.host}" is no address of ours: {error.strerror}.') from error
    address = str(found[0][4][0])
    if not ipaddress.ip_address(address).is_loopback and not may_leave_loopback:
        raise ConfigError(
            f'broker.host="{settings.host}" is reachable from other machines, and peers have no keys. '
            "Use 127.0.0.1, make keys (matpo-broker keys new RUN.TOML) and set security.keys, "
            "or start the broker with --insecure on a network that nobody else can reach.",
            reason="insecure",
        )
    return address


def _stop_on_signals(server: Server) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
