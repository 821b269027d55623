"""The processes of one measurement, from the side that starts them: they begin and end at the same instants."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil

from matpo.errors import SetupError

WARM_S = 0.7
START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of the crew: a module of this package and its JSON argument."""

    module: str
    argument: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What happened between two instants. Latencies are send to acknowledgement, in ms, sorted."""

    seconds: float
    episodes: int
    payload_bytes: int
    consumed_bytes: int
    latencies_ms: Sequence[float]
    server_cpu_s: float
    producers_cpu_s: float = 0.0

    @property
    def cpu_us_per_episode(self) -> tuple[float, float]:
        """CPU time for each episode that was acknowledged: of the server, of all producers."""
        num = max(self.episodes, 1)
        return self.server_cpu_s / num * 1e6, self.producers_cpu_s / num * 1e6

    @property
    def mib_s(self) -> float:
        """Payload MiB acknowledged in a second."""
        return self.episodes * self.payload_bytes / 2**20 / self.seconds

    @property
    def cpu_s_per_gib(self) -> float:
        """CPU seconds of the server for each GiB acknowledged."""
        return self.server_cpu_s / max(self.episodes * self.payload_bytes / 2**30, 1e-9)

    def quantile_ms(self, fraction: float) -> float:
        """A quantile of the latency."""
        return self.latencies_ms[int(fraction * (len(self.latencies_ms) - 1))] if self.latencies_ms else 0.0


class Crew:
    """Load-making processes. They end with the `with` block, and when this process does: they read our pipe."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Crew:
        """Start every process and wait until it is ready. Raises SetupError when one fails."""
        try:
            for job in self._jobs:
                command = [sys.executable, "-m", f"matpo_ops.bench.{job.module}", json.dumps(job.argument)]
                pipe = subprocess.PIPE
                # Its own session: a Ctrl-C in the terminal is ours; they go with the pipe.
                process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
                self._processes.append(process)
            for process in self._processes:
                self._read(process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        """End every process."""
        self._end()

    def measure(self, seconds: float, *, payload_bytes: int, server: psutil.Process | None = None) -> Measured:
        """Let them work for a warm-up and then `seconds`, and add up what they say."""
        begin_s = time.monotonic() + WARM_S
        end_s = begin_s + seconds
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"begin_s": begin_s, "end_s": end_s}) + "\n")
            process.stdin.flush()
        time.sleep(max(0.0, begin_s - time.monotonic()))
        before_s, producers_before_s = _cpu_s(server), self._producers_cpu_s()
        time.sleep(max(0.0, end_s - time.monotonic()))
        cpu_s, producers_cpu_s = _cpu_s(server) - before_s, self._producers_cpu_s() - producers_before_s
        found = [json.loads(self._read(process)) for process in self._processes]
        return Measured(
            seconds=seconds,
            episodes=sum(each.get("episodes", 0) for each in found),
            payload_bytes=payload_bytes,
            consumed_bytes=sum(each.get("consumed_bytes", 0) for each in found),
            latencies_ms=sorted(ms for each in found for ms in each.get("latencies_ms", ())),
            server_cpu_s=cpu_s,
            producers_cpu_s=producers_cpu_s,
        )

    def _producers_cpu_s(self) -> float:
        processes = zip(self._jobs, self._processes, strict=True)
        return sum(_cpu_s(psutil.Process(process.pid)) for job, process in processes if job.module == "producer")

    def _read(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            name = self._jobs[self._processes.index(process)].module
            raise SetupError(f"the {name} process ended with exit code {process.wait()}; its error stands above")
        return line

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with contextlib.suppress(OSError):  # what was still to be written to one that died
                process.communicate()


def _cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)
