"""Start, watch and stop the processes of one run on this machine.

Rules:
1. No process outlives its owner: each child asks the kernel for SIGTERM when its parent dies (Linux).
2. A child's output goes to {run.folder}/logs/NAME.log; the last lines are shown when it fails.
3. Actors are disposable: one that dies is started again, with a growing pause. So is the broker: its state is on disk.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matpo import logs
from matpo.errors import SetupError

PR_SET_PDEATHSIG = 1
RESTART_PAUSE_S = (1.0, 2.0, 5.0, 15.0, 60.0)


@dataclass(kw_only=True)
class Child:
    """One process of the run."""

    name: str
    command: Sequence[str]
    log_path: Path
    restarts: bool
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    num_restarts: int = 0
    next_start_s: float = 0.0

    def start(self) -> None:
        """Start it; its output is appended to its log."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on, once
                preexec_fn=_die_with_parent,
                env={**os.environ, **self.env},
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs or was never started."""
        return None if self.process is None else self.process.poll()

    def tail(self, num_lines: int = 12) -> str:
        """The last lines of its log."""
        with self.log_path.open(encoding="utf-8", errors="replace") as log:
            return "".join(deque(log, maxlen=num_lines)).rstrip()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Fleet:
    """All children of one run. `watch` is called now and then; it restarts what may be restarted."""

    def __init__(self, children: Sequence[Child]) -> None:
        self.children = list(children)
        self._log = logs.get()

    def start(self) -> None:
        """Start every child."""
        for child in self.children:
            child.start()

    def watch(self, now_s: float) -> None:
        """Restart dead children that may be restarted.

        Raises SetupError for one that may not, and for one that refuses its set-up (exit codes 2 to 5), with the
        end of its log.
        """
        for child in self.children:
            code = child.exit_code
            if code is None or (code == 0 and not child.restarts):
                continue
            if not child.restarts or code in (2, 3, 4, 5):
                raise SetupError(
                    f"{child.name} ended with exit code {code}. The end of {child.log_path}:\n{child.tail()}"
                )
            if child.next_start_s == 0.0:
                pause = RESTART_PAUSE_S[min(child.num_restarts, len(RESTART_PAUSE_S) - 1)]
                child.next_start_s = now_s + pause
                self._log.warning(
                    "child.died", name=child.name, exit_code=code, restart_in_s=pause, log=str(child.log_path)
                )
            elif now_s >= child.next_start_s:
                child.next_start_s = 0.0
                child.num_restarts += 1
                child.start()

    def stop(self, *, grace_s: float) -> None:
        """SIGTERM in order (actors, learner, broker last), each given `grace_s`; then SIGKILL what is left."""
        for child in reversed(self.children):
            self._stop_one(child, grace_s)

    def _stop_one(self, child: Child, grace_s: float) -> None:
        if child.process is None or child.process.poll() is not None:
            return
        child.process.terminate()
        try:
            child.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._log.warning("child.killed", name=child.name, waited_s=grace_s)
            child.process.kill()
            child.process.wait(10)


def fleet_of(
    run_path: Path, folder: Path, *, num_actors: int, overrides: Sequence[str], actor_metrics_port: int = 0
) -> Fleet:
    """The broker, the learner and `num_actors` actors of a run file. The broker first, actors last."""
    sets = [part for override in overrides for part in ("--set", override)]
    log_folder = folder / "logs"

    def child(name: str, module: str, *extra: str, restarts: bool) -> Child:
        command = [sys.executable, "-m", module, str(run_path), *sets, *extra]
        return Child(name=name, command=command, log_path=log_folder / f"{name}.log", restarts=restarts)

    actors = []
    for i in range(1, num_actors + 1):
        port = ["--set", f"metrics.actor_port={actor_metrics_port + i - 1}"] if actor_metrics_port else []
        actors.append(child(f"actor-{i}", "matpo_actor", "--name", f"actor-{i}", *port, restarts=True))
    return Fleet(
        [child("broker", "matpo_broker", restarts=True), child("learner", "matpo_learner", restarts=False), *actors]
    )


def wait_for_exit(child: Child, timeout_s: float) -> int | None:
    """Exit code of a child, or None if it still runs after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while child.exit_code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return child.exit_code
