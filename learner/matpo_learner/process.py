"""The learner process: the loop, its ranks, how it starts and how it ends.

Rules kept here, each with a test in tests/flow/test_learner_process.py:
1. Every rank runs this same loop. Rank 0 alone (matpo_learner.leader) talks to the broker and writes files; the others
   get the encoded groups from it, and make the same plan from them.
2. Killed at any instruction, it resumes from the newest checkpoint, and no group moves the weights twice or never.
3. SIGTERM or SIGINT: finish the update in progress, write a checkpoint, exit 0. A second one exits at once.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import msgpack

from matpo import logs, schema
from matpo.episode import Group
from matpo.errors import ConfigError
from matpo.run_folder import Identity, claim
from matpo.settings import RunFile
from matpo_learner import checkpoint, credit
from matpo_learner.deepspeed_engine import LearnerEngine, StepReport
from matpo_learner.leader import Leader
from matpo_learner.packing import pack_update
from matpo_learner.records import Stopwatch
from matpo_learner.waits import Reason, Waits

Start = Literal["auto", "resume", "fresh"]
KEEP_ALIVE_S = 60.0
STOP_WITH_STDIN = "MATPO_LEARNER_STOP_WITH_STDIN"
"""Set by `launch` for its ranks: end of input on stdin means stop."""
log = logs.get()


def train(run_file: RunFile, start: Start = "auto") -> None:
    """Train until learner.num_updates, or until told to stop. One call per rank."""
    identity = claim(run_file)
    resumed = _choose_start(run_file, identity, start)
    engine = LearnerEngine(run_file.model_folder, run_file.learner, seed=run_file.run.seed)
    if resumed:
        engine.load(resumed[0])
        log.info("learner.resumed", checkpoint=resumed[0].name, update=engine.num_updates)
    saved = engine.num_updates if resumed else None
    with closing(engine):
        if engine.rank:
            _ignore_signals()
            with closing(_waits_of_others(run_file)) as waits:
                _loop(run_file, engine, None, saved, waits)
            return
        with closing(Leader(run_file, identity, resumed[1] if resumed else None)) as leader:
            _stop_on_signals(leader)
            _loop(run_file, engine, leader, saved, leader.waits)
            leader.say_goodbye()


def _waits_of_others(run_file: RunFile) -> Waits:
    """What a rank other than 0 waits for."""
    rank_0 = Reason(who="rank_0", why="rank 0 has no batch for us yet: its own log says who it waits for")
    ranks = Reason(who="ranks", why="the ranks train together: the slowest, or one that died. See their logs.")
    reasons = {"wait": lambda: rank_0, "forward_backward": lambda: ranks}
    return Waits(reasons, None, warn_after_s=run_file.learner.group_timeout_s)


def _loop(run_file: RunFile, engine: LearnerEngine, leader: Leader | None, saved: int | None, waits: Waits) -> None:
    """Groups -> update -> snapshot -> checkpoint. `saved` is the update of the checkpoint that we come from."""
    settings = run_file.learner
    watch = Stopwatch(leader.metrics if leader else None, waits)
    _publish(engine, leader)
    if leader:
        leader.open()
    while engine.num_updates < settings.num_updates:
        with watch.phase("wait"):
            batch = _next_batch(engine, leader, run_file)
        if batch is None:
            break
        report = update(engine, batch, run_file, watch)
        with watch.phase("publish"):
            _publish(engine, leader)
        if leader:
            leader.finish(report, watch.lap())
        if engine.num_updates % settings.checkpoint_every == 0:
            with watch.phase("checkpoint"):
                saved = _checkpoint(engine, leader)
    if saved != engine.num_updates:
        _checkpoint(engine, leader)
    log.info("learner.ends", update=engine.num_updates, num_updates=settings.num_updates)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """The groups of one update, and the version of the weights that will train on them."""

    version: int
    groups: Sequence[Group]


def _next_batch(engine: LearnerEngine, leader: Leader | None, run_file: RunFile) -> Batch | None:
    """The next batch, the same on every rank. None: told to stop."""
    if leader is None:
        return _receive_batch(engine, run_file)
    last_s = time.monotonic()

    def keep_alive() -> None:
        nonlocal last_s
        if time.monotonic() - last_s > KEEP_ALIVE_S:
            engine.broadcast_bytes(_pack({"do": "wait"}))
            last_s = time.monotonic()

    deliveries = leader.collect(keep_alive)
    if deliveries is None:
        engine.broadcast_bytes(_pack({"do": "stop"}))
        return None
    if engine.world_size > 1:
        groups = [(d.id, list(d.payloads)) for d in deliveries]
        engine.broadcast_bytes(_pack({"do": "train", "version": leader.version, "groups": groups}))
    return Batch(version=leader.version, groups=[d.group for d in deliveries if d.group])


def _receive_batch(engine: LearnerEngine, run_file: RunFile) -> Batch | None:
    while True:
        message = msgpack.unpackb(engine.broadcast_bytes(None), max_bin_len=2**32 - 1)
        if message["do"] == "stop":
            return None
        if message["do"] == "train":
            groups = [
                Group(
                    id=name,
                    # Rank 0 has checked them against the vocabulary and what is published.
                    episodes=tuple(schema.decode(p, vocab_size=None, published_version=None) for p in payloads),
                )
                for name, payloads in message["groups"]
            ]
            return Batch(version=message["version"], groups=groups)


def _pack(message: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed


def update(engine: LearnerEngine, batch: Batch, run_file: RunFile, watch: Stopwatch) -> StepReport:
    """One update of the weights."""
    with watch.phase("credit"):
        groups, advantages = credit.assign(batch.groups, run_file.learner)
        plan = pack_update(
            groups,
            advantages,
            run_file.learner,
            version=batch.version,
            rank=engine.rank,
            world_size=engine.world_size,
        )
    with watch.phase("forward_backward"):
        return engine.step(plan)


def _publish(engine: LearnerEngine, leader: Leader | None) -> None:
    if leader:
        leader.publish(engine.tensors(), update=engine.num_updates)
    else:
        for _ in engine.tensors():  # collective: rank 0 needs our shards
            pass


def _checkpoint(engine: LearnerEngine, leader: Leader | None) -> int:
    engine.save(leader.staging() if leader else Path())  # collective; only rank 0 writes
    if leader:
        leader.save()
    return engine.num_updates


# ---- start and end


def _choose_start(run_file: RunFile, identity: Identity, start: Start) -> tuple[Path, checkpoint.Meta] | None:
    found = checkpoint.load_newest(run_file.checkpoint_folder, identity)
    if start == "resume" and found is None:
        raise ConfigError(
            f"--resume: {run_file.checkpoint_folder} holds no checkpoint. Leave --resume out to start at the beginning."
        )
    if start == "fresh" and found is not None:
        raise ConfigError(
            f"--fresh: {run_file.checkpoint_folder} holds {found[0].name} of this run. Set run.folder to a new folder, "
            "or leave --fresh out to resume."
        )
    return found


def _stop_on_signals(leader: Leader) -> None:
    def stop(_number: int = 0, _frame: FrameType | None = None) -> None:
        leader.stopping = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # the second one ends us at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if os.environ.get(STOP_WITH_STDIN):
        threading.Thread(target=_stop_at_end_of_stdin, args=(leader,), name="stdin", daemon=True).start()


def _stop_at_end_of_stdin(leader: Leader) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    leader.stopping = True


def _ignore_signals() -> None:
    """Other ranks end when rank 0 says so."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Start `num_ranks` ranks of this command under DeepSpeed's launcher and wait for them. Returns the exit code.

    The ranks share our pipe as their stdin. SIGTERM or SIGINT closes it, and so does our own death: rank 0 then ends
    the run in order. (The launcher itself would kill the ranks and always exit 1.)
    """
    # The launcher overwrites CUDA_VISIBLE_DEVICES with these numbers.
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.isdigit()]
    devices = [int(d) for d in visible[:num_ranks]] if len(visible) >= num_ranks else list(range(num_ranks))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    where = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        *where,
        "--no_local_rank",
        "--module",
        "matpo_learner",
        *arguments,
    ]
    launcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, STOP_WITH_STDIN: "1"}
    )
    assert launcher.stdin is not None
    pipe = launcher.stdin

    def stop(_number: int, _frame: FrameType | None) -> None:
        pipe.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        return launcher.wait()
    finally:
        pipe.close()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
