"""The learner process: the loop, its ranks, how it starts and how it ends.

Rules kept here, each with a test in tests/flow/test_learner_process.py:
1. Rank 0 leads: it alone talks to the broker and writes files (matpo_learner.leader), and says what all do next. The
   others follow: they get the encoded groups from it, and make the same plan from them.
2. Killed at any instruction, it resumes from the newest checkpoint, and no group moves the weights twice or never.
3. SIGTERM or SIGINT: finish the update in progress, write a checkpoint, exit 0. So it takes one update, one snapshot
   and one checkpoint at most. A second signal ends it at once.
4. While rank 0 waits for broker, groups or an older learner, the others hear from it: no collective times out.
5. When a newer learner has taken over, this one ends with a named error and writes nothing more.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import msgpack

from matpo import logs, schema
from matpo.episode import Group
from matpo.errors import ConfigError
from matpo.run_folder import claim
from matpo.settings import RunFile
from matpo_learner import checkpoint, credit
from matpo_learner.deepspeed_engine import LearnerEngine, StepReport
from matpo_learner.deepspeed_ranks import RENDEZVOUS_FILE
from matpo_learner.leader import Leader
from matpo_learner.lineage import NEVER_RESUMED, Lineage
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
    if int(os.environ.get("RANK", "0")):
        _leave_signals_to_rank_0()
        with closing(LearnerEngine(run_file.model_folder, run_file.learner, seed=run_file.run.seed)) as engine:
            _follow(engine, run_file)
        return
    identity = claim(run_file)
    _check_start(run_file, start)
    stopping = _stop_on_signals()
    with closing(LearnerEngine(run_file.model_folder, run_file.learner, seed=run_file.run.seed)) as engine:
        keep_alive = KeepAlive(engine)

        def idle() -> None:
            if stopping.is_set():
                raise _StoppedError
            keep_alive()

        try:
            idle()  # a large model takes its time to load
            with closing(Leader(run_file, identity, stopping, idle)) as leader:
                _lead(run_file, engine, leader, keep_alive, idle)
                leader.say_goodbye()
        except _StoppedError:
            log.info("learner.ends", why="told to stop before it had begun: nothing is new")
        _tell(engine, "stop")


class _StoppedError(Exception):
    """Told to stop before anything began."""


def _lead(
    run_file: RunFile, engine: LearnerEngine, leader: Leader, keep_alive: KeepAlive, idle: Callable[[], None]
) -> None:
    """Groups -> update -> snapshot -> checkpoint."""
    settings = run_file.learner
    watch = Stopwatch(leader.metrics, leader.waits)
    if leader.resumed:
        _tell(engine, "load")
        engine.load(leader.resumed[0])
        log.info("learner.resumed", checkpoint=leader.resumed[0].name, update=engine.num_updates)
    with leader.waits.on("publish"):
        _publish(engine, leader)
    with leader.waits.on("start"):
        leader.open(idle)

    def meanwhile() -> None:
        keep_alive()
        if leader.is_checkpoint_due():
            with leader.waits.on("checkpoint"):
                _checkpoint(engine, leader)

    while engine.num_updates < settings.num_updates:
        with watch.phase("wait"):
            deliveries = leader.collect(meanwhile)
        if deliveries is None:
            break
        trainable = [d.group for d in deliveries if d.group]
        batch = Batch(version=leader.version, lineage=leader.lineage, groups=trainable)
        if engine.world_size > 1:
            _tell(engine, "train", **batch_message(batch, [(d.id, d.payloads) for d in deliveries]))
        report = update(engine, batch, run_file, watch)
        if report.num_steps:  # the weights moved
            with watch.phase("publish"):
                _publish(engine, leader)
        leader.finish(report, watch.lap())
        if leader.is_checkpoint_due():
            with watch.phase("checkpoint"):
                _checkpoint(engine, leader)
    if not leader.is_saved:
        with leader.waits.on("checkpoint"):
            _checkpoint(engine, leader)
    log.info("learner.ends", update=engine.num_updates, num_updates=settings.num_updates)


def _follow(engine: LearnerEngine, run_file: RunFile) -> None:
    """Do what rank 0 says, until it says stop."""
    with closing(_waits_of_others(run_file)) as waits:
        watch = Stopwatch(None, waits)
        while True:
            with waits.on("wait"):
                message = _hear(engine)
            match message["do"]:
                case "stop":
                    return
                case "load":
                    engine.load(Path())  # rank 0 reads
                case "publish":
                    for _ in engine.tensors():  # rank 0 needs our shards
                        pass
                case "checkpoint":
                    engine.save(Path())  # rank 0 writes
                case "train":
                    update(engine, batch_of(message), run_file, watch)


def _waits_of_others(run_file: RunFile) -> Waits:
    """What a rank other than 0 waits for."""
    rank_0 = Reason(who="rank_0", why="rank 0 has nothing for us yet: its own log says who it waits for")
    ranks = Reason(who="ranks", why="the ranks train together: the slowest, or one that died. See their logs.")
    reasons = {"wait": lambda: rank_0, "forward_backward": lambda: ranks}
    return Waits(reasons, None, warn_after_s=run_file.learner.group_timeout_s)


def _hear(engine: LearnerEngine) -> dict[str, Any]:
    """What rank 0 tells us to do; that it waits itself is nothing to do."""
    while True:
        message: dict[str, Any] = msgpack.unpackb(engine.broadcast_bytes(None), max_bin_len=2**32 - 1)
        if message["do"] != "wait":
            return message


def _tell(engine: LearnerEngine, what: str, **fields: Any) -> None:
    """What all ranks do next."""
    if engine.world_size > 1:
        engine.broadcast_bytes(msgpack.packb({"do": what, **fields}))


class KeepAlive:
    """Called often, it lets the other ranks hear from rank 0 every KEEP_ALIVE_S."""

    def __init__(self, engine: LearnerEngine) -> None:
        self._engine = engine
        self._last_s = time.monotonic()

    def __call__(self) -> None:
        """Speak if it is time."""
        if time.monotonic() - self._last_s > KEEP_ALIVE_S:
            _tell(self._engine, "wait")
            self._last_s = time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """The groups of one update, and the version of the weights that will train on them."""

    version: int
    groups: Sequence[Group]
    lineage: Lineage = NEVER_RESUMED


def batch_message(batch: Batch, payloads: Sequence[tuple[str, Sequence[bytes]]]) -> dict[str, Any]:
    """What the other ranks hear of a batch. `payloads`: each group's name and its episodes, as they came."""
    groups = [(name, list(episodes)) for name, episodes in payloads]
    return {"version": batch.version, "branches": batch.lineage.branches, "groups": groups}


def batch_of(message: dict[str, Any]) -> Batch:
    """The batch that `batch_message` told of."""
    groups = [
        Group(
            id=name,
            # Rank 0 has checked them against the vocabulary and what is published.
            episodes=tuple(schema.decode(p, vocab_size=None, published_version=None) for p in payloads),
        )
        for name, payloads in message["groups"]
    ]
    lineage = Lineage(tuple((first, update) for first, update in message["branches"]))
    return Batch(version=message["version"], lineage=lineage, groups=groups)


def update(engine: LearnerEngine, batch: Batch, run_file: RunFile, watch: Stopwatch) -> StepReport:
    """One update of the weights."""
    with watch.phase("credit"):
        groups, advantages = credit.assign(batch.groups, run_file.learner)
        plan = pack_update(
            groups,
            advantages,
            run_file.learner,
            version=batch.version,
            lineage=batch.lineage,
            rank=engine.rank,
            world_size=engine.world_size,
        )
    with watch.phase("forward_backward"):
        return engine.step(plan)


def _publish(engine: LearnerEngine, leader: Leader) -> None:
    _tell(engine, "publish")
    leader.publish(engine.tensors(), update=engine.num_updates)


def _checkpoint(engine: LearnerEngine, leader: Leader) -> None:
    folder = leader.staging()
    _tell(engine, "checkpoint")
    try:
        engine.save(folder)
        leader.save()
    except OSError:
        leader.check_fence()  # a newer learner clears the folder: then that is what happened
        raise


# ---- start and end


def _check_start(run_file: RunFile, start: Start) -> None:
    """Raises ConfigError when a checkpoint is there, or is not, against what the command line says."""
    found = checkpoint.found(run_file.checkpoint_folder)
    if start == "resume" and not found:
        raise ConfigError(
            f"--resume: {run_file.checkpoint_folder} holds no checkpoint. Leave --resume out to start at the beginning."
        )
    if start == "fresh" and found:
        raise ConfigError(
            f"--fresh: {run_file.checkpoint_folder} holds {found[-1].name} of this run. Set run.folder to a new "
            "folder, or leave --fresh out to resume."
        )


def _stop_on_signals() -> threading.Event:
    """Set by the first SIGTERM or SIGINT, or by the end of stdin where `launch` asks for that."""
    stopping = threading.Event()

    def stop(_number: int = 0, _frame: FrameType | None = None) -> None:
        stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # the second one ends us at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if os.environ.get(STOP_WITH_STDIN):
        threading.Thread(target=_stop_at_end_of_stdin, args=(stopping,), name="stdin", daemon=True).start()
    return stopping


def _stop_at_end_of_stdin(stopping: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    stopping.set()


def _leave_signals_to_rank_0() -> None:
    """Other ranks end when rank 0 says so. `launch` sends them a signal only when rank 0 is dead."""
    if not os.environ.get(STOP_WITH_STDIN):
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
    where = [f"--world_info={world}", "--master_addr=127.0.0.1"]
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
    with tempfile.TemporaryDirectory(prefix="matpo-learner-") as folder:
        # The ranks meet in a file and talk over loopback: nothing of them can be reached from another machine.
        alone = {
            RENDEZVOUS_FILE: str(Path(folder) / "ranks"),
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            STOP_WITH_STDIN: "1",
        }
        return _wait_for(
            subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, **alone})
        )


def _wait_for(launcher: subprocess.Popen[bytes]) -> int:
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
