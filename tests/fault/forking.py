"""Processes of the heavy kind, started in milliseconds: a parent that has imported the libraries forks each life.

with ForkServer("learner") as server:                     # or another of PROGRAMS
    life = server.start([str(run_file)], log)             # the command's own main(), in a process of its own
    life.kill()                                           # kill -9, and it is gone when this returns
    life.wait()                                           # the exit code; -9 when a signal ended it

What is forked has one thread, no ZeroMQ context and no process group: it is as if it had just been started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # Linux: this signal when the parent ends
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class ForkServer:
    """Forks one kind of process. Ends with the `with` block, and so does whatever it forked."""

    def __init__(self, program: str) -> None:
        command = [sys.executable, str(Path(__file__)), program]
        env = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._lives: list[Life] = []

    def start(self, arguments: Sequence[str], log: Path) -> Life:
        """A new process. `log` gets what it says."""
        pid = self._ask(arguments=list(arguments), log=str(log))
        self._lives.append(Life(pid, log, lambda: self._ask(wait=pid)))
        return self._lives[-1]

    def _ask(self, **fields: object) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(fields) + "\n")
        self._parent.stdin.flush()
        line = self._parent.stdout.readline()
        assert line, f"the fork server ended with {self._parent.poll()}"
        return int(line)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        for life in self._lives:
            life.kill()
        self._parent.communicate(timeout=20)


class Life:
    """One forked process, from its start to its end."""

    def __init__(self, pid: int, log: Path, reap: Callable[[], int]) -> None:
        self.pid = pid
        self.log = log
        self._reap = reap
        self._code: int | None = None
        self._pidfd = os.pidfd_open(pid)

    @property
    def is_over(self) -> bool:
        return self._code is not None or bool(select.select([self._pidfd], [], [], 0)[0])

    def send_signal(self, number: int) -> None:
        if self._code is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # over, and not waited for
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """kill -9; the process is gone when this returns."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code, or minus the signal that ended it."""
        if self._code is None:
            assert select.select([self._pidfd], [], [], timeout_s)[0], f"{self.pid} does not end: {self.said()}"
            self._code = self._reap()
            os.close(self._pidfd)  # a soak has thousands of lives
        return self._code

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else "(no log)"


# ---- as a program


def learner() -> Callable[[], None]:
    """The command matpo-learner."""
    for late in ("deepspeed", "matpo_learner.process", "matpo_learner.sft"):  # here, so that no life pays for it
        importlib.import_module(late)
    from matpo_learner.__main__ import main

    return main


def operator() -> Callable[[], None]:
    """The command matpo, as far as it trains."""
    for late in ("deepspeed", "matplotlib.pyplot", "matpo_learner.process", "matpo_ops.replay"):
        importlib.import_module(late)
    from matpo_ops.__main__ import main

    return main


def actor() -> Callable[[], None]:
    """The command matpo-actor, with the scripted engine."""
    for late in ("transformers.models.auto.tokenization_auto", "matpo_actor.engines.scripted", "matpo_actor.process"):
        importlib.import_module(late)
    from matpo_actor.__main__ import main

    return main


def publisher() -> Callable[[], None]:
    """RUN.TOML EPOCH UPDATE: publish one version after the other, from the weights of UPDATE on, until killed.

    Every number in the tensors of a version is that version, so that a mixture shows."""
    import torch

    from matpo.settings import load_run_file
    from matpo_learner.publisher import Publisher

    shapes = {f"model.layers.{n}.weight": (64, 64) for n in range(6)} | {"model.embed_tokens.weight": (264, 64)}

    def main() -> None:
        run_file, epoch, first = load_run_file(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
        made = Publisher(run_file, epoch=epoch, update=first, known_version=-1)
        update = first
        while True:
            made.publish({n: torch.full(s, float(made.version)) for n, s in shapes.items()}, update=update)
            update += 1

    return main


PROGRAMS: Mapping[str, Callable[[], Callable[[], None]]] = {
    "learner": learner, "operator": operator, "actor": actor, "publisher": publisher
}  # fmt: skip


def serve(program: str) -> None:
    """Fork for each order on stdin; end with stdin."""
    main = PROGRAMS[program]()
    others = [name for name in _threads()[1:] if name != "jemalloc_bg_thd"]  # pyarrow's, which knows about forks
    assert not others, f"threads after the imports of {program}: {others}. A fork would not have them."
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _become(program, order["arguments"], order["log"], main)
        print(pid, flush=True)


def _threads() -> list[str]:
    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    return [(task / "comm").read_text().strip() for task in tasks]


def _become(program: str, arguments: Sequence[str], log: str, main: Callable[[], None]) -> NoReturn:
    code = 70
    try:
        null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        sys.argv = [f"matpo-{program}", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - outermost: nothing of it may reach the fork server's own loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
