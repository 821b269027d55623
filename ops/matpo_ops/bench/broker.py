"""`matpo bench broker`: storing episodes durably, against Redis Streams, the disk, and a transport that keeps nothing.

Every ratio is the median over pairs: our side and the other in turn, seconds apart, because the machine's speed drifts.
Both sides sync before they answer. Ours has keys (CURVE) and checks a CRC32C; Redis has neither.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from matpo import security
from matpo.errors import ConfigError
from matpo.testing import free_port, write_run_file
from matpo_ops.bench import producer
from matpo_ops.bench.load import Crew, Job, Measured
from matpo_ops.bench.redis_streams import RedisServer
from matpo_ops.processes import Child

MIB = 2**20
LARGE, MEDIUM, SMALL = MIB, 64 * 1024, 2000
IN_FLIGHT = {LARGE: 32, MEDIUM: 256, SMALL: 2048}  # episodes on the way, shared by all producers
GROUP_SIZE = {LARGE: 8, MEDIUM: 64, SMALL: 64}
MOST_EPISODES_S = {LARGE: 3000, MEDIUM: 20000, SMALL: 20000}  # orders are placed for as many
PRODUCERS = 4
NUM_TLS_PAIRS = 3
MAX_PROCESSES = 4  # many producers share a few processes
MEMORY_FOLDERS = ("tmpfs", "ramfs", "devtmpfs")
NEEDED_BYTES = 8 * 2**30
DISK_BATCH = 16 * MIB


@dataclass(kw_only=True)
class Bench:
    """One call of the command: where it writes, and how long each measurement takes."""

    folder: Path  # made by us, removed at the end
    keys: bool = True
    seconds: float = 3.0
    num_pairs: int = 5
    began_s: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Progress, for people."""
        print(f"[{time.monotonic() - self.began_s:4.0f} s] {text}", file=sys.stderr, flush=True)

    # ---- sides

    def ours(
        self, payload_bytes: int, *, producers: int = PRODUCERS, window: int = 0, consume: bool = False, **broker: Any
    ) -> Measured:
        """A broker process on a fresh folder, producers, a learner."""
        num_episodes = int(MOST_EPISODES_S[payload_bytes] * (self.seconds + 1))
        size = GROUP_SIZE[payload_bytes]
        with self._fresh("ours") as folder:
            run_path = self._run_file(folder, consume, broker)
            child = Child(
                name="broker",
                command=[sys.executable, "-m", "matpo_broker", str(run_path)],
                log_path=folder / "broker.log",
                restarts=False,
            )
            child.start()
            assert child.process is not None
            try:
                orders = {"num_groups": -(-num_episodes // size), "group_size": size, "consume": consume}
                jobs = [Job(module="consumer", argument={"run_file": str(run_path), **orders})]
                jobs += producer_jobs("broker", str(run_path), payload_bytes, producers, window)
                with Crew(jobs) as crew:
                    server = psutil.Process(child.process.pid)
                    return crew.measure(self.seconds, payload_bytes=payload_bytes, server=server)
            finally:
                child.process.kill()  # its journal is thrown away
                child.process.wait()

    def redis(self, payload_bytes: int, *, consume: bool = False, tls: bool = False) -> Measured:
        """A Redis with an append-only file on a fresh folder, the same producers and windows."""
        with self._fresh("redis") as folder, RedisServer(folder / "data", tls=tls) as server:
            more = {"trim": not consume, "certificate": server.certificate}
            jobs = producer_jobs("redis", server.address, payload_bytes, PRODUCERS, 0, **more)
            if consume:
                argument = {"address": server.address, "payload_bytes": payload_bytes}
                jobs.append(Job(module="redis_streams", argument=argument))
            with Crew(jobs) as crew:
                process = psutil.Process(server.pid)
                return crew.measure(self.seconds, payload_bytes=payload_bytes, server=process)

    def ceiling(self, payload_bytes: int) -> Measured:
        """PUSH/PULL with pickle: no keys, no disk, no answers."""
        common = {"endpoint": f"tcp://127.0.0.1:{free_port()}", "payload_bytes": payload_bytes}
        jobs = [Job(module="ceiling", argument={**common, "role": role}) for role in ("pull", *["push"] * PRODUCERS)]
        with Crew(jobs) as crew:
            return crew.measure(self.seconds, payload_bytes=payload_bytes)

    def disk_mib_s(self, num_bytes: int = 512 * MIB) -> float:
        """What the disk takes in order: 16 MiB and fdatasync, again and again."""
        batch = os.urandom(DISK_BATCH)
        with self._fresh("disk") as folder, (folder / "data").open("xb", buffering=0) as file:
            began_s = time.perf_counter()
            for _ in range(num_bytes // DISK_BATCH):
                file.write(batch)
                os.fdatasync(file.fileno())
            return num_bytes / MIB / (time.perf_counter() - began_s)

    def fdatasync_ms(self, times: int = 200) -> float:
        """Median time of a small append and its fdatasync."""
        found = []
        with self._fresh("disk") as folder, (folder / "data").open("xb", buffering=0) as file:
            for _ in range(times):
                began_s = time.perf_counter()
                file.write(b"x" * 200)
                os.fdatasync(file.fileno())
                found.append((time.perf_counter() - began_s) * 1e3)
        return statistics.median(found)

    # ---- inside

    def _run_file(self, folder: Path, consume: bool, broker: Mapping[str, Any]) -> Path:
        settings = {
            "actor_port": free_port(),
            "learner_port": free_port(),
            "lease_s": 600.0,
            "heartbeat_s": 100.0,
            # Without a learner that takes groups, nothing holds the actors back: storing is what is measured.
            "credit_bytes": 256 * MIB if consume else 2**40,
            **broker,
        }
        sections: dict[str, Any] = {"broker": settings, "log": {"level": "warning"}}
        if self.keys:
            sections["security"] = {"keys": str(folder / "keys")}
            security.new_keys(folder / "keys", now="2026-01-01T00:00:00Z")
        model = Path("builtin:tiny")
        return write_run_file(folder / "run.toml", model=model, name=producer.RUN, **sections)

    @contextmanager
    def _fresh(self, name: str) -> Iterator[Path]:
        folder = self.folder / name
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def producer_jobs(kind: str, address: str, payload_bytes: int, producers: int, window: int, **more: Any) -> list[Job]:
    """Producers, spread over a few processes. `window` 0: an equal share of what may be on the way."""
    processes = min(producers, MAX_PROCESSES)
    argument = {
        "kind": kind,
        "address": address,
        "payload_bytes": payload_bytes,
        "window": window or max(1, IN_FLIGHT[payload_bytes] // producers),
        "connections": producers // processes,
        **more,
    }
    return [Job(module="producer", argument={**argument, "name": f"p-{i}"}) for i in range(processes)]


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, for example "ext4"."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    return next((mounts[each] for each in (place, *place.parents) if each in mounts), "unknown")


def check_disk(folder: Path) -> str:
    """The file system's type. Raises ConfigError when it is in memory, or has no room."""
    found = file_system(folder)
    if found in MEMORY_FOLDERS:
        raise ConfigError(
            f"{folder} is {found}, in memory: fsync costs nothing there. Name a folder on a disk: "
            "matpo bench broker --folder DIR.",
            reason="tmpfs",
        )
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{folder} has {free / 2**30:.1f} GiB free, the benchmark wants {NEEDED_BYTES / 2**30:.0f} GiB for a few "
            "minutes. Free some, or name another folder: matpo bench broker --folder DIR.",
            reason="space",
        )
    return found


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Median over pairs of ours divided by the other's."""
    return round(statistics.median(ours / max(other, 1e-9) for ours, other in pairs), 3)


def cpu_us(measured: list[Measured]) -> list[int]:
    """CPU time for one episode, medians in us: of the server, of all producers."""
    sides = zip(*(each.cpu_us_per_episode for each in measured), strict=True)
    return [round(statistics.median(side)) for side in sides]


def large_and_medium(bench: Bench) -> dict[str, Any]:
    """The figures of `matpo bench broker`."""
    bench.say(f"on {file_system(bench.folder)}, keys {'on' if bench.keys else 'OFF'}; a warm-up of both sides")
    bench.ours(LARGE)
    bench.redis(LARGE)
    found: dict[str, Any] = {}
    disk: list[tuple[float, float]] = []
    for size, name in ((LARGE, "1mib"), (MEDIUM, "64kib")):
        for consume, suffix in ((False, ""), (True, "_read")):
            pairs, pairs_tls, all_ours, all_redis = [], [], [], []
            for pair in range(bench.num_pairs if not consume else max(1, bench.num_pairs // 2)):
                ours, redis = bench.ours(size, consume=consume), bench.redis(size, consume=consume)
                pairs.append((ours.mib_s, redis.mib_s))
                all_ours.append(ours)
                all_redis.append(redis)
                if not consume and pair < NUM_TLS_PAIRS:
                    pairs_tls.append((ours.mib_s, bench.redis(size, tls=True).mib_s))
                if size == LARGE and not consume:
                    disk.append((ours.mib_s, bench.disk_mib_s()))
                what = f"{name} {'and read ' if consume else ''}pair {pair + 1}"
                bench.say(
                    f"{what}: ours {ours.mib_s:.0f}, redis {redis.mib_s:.0f} MiB/s, p99 {ours.quantile_ms(0.99)} ms"
                )
            found[f"ratio_to_redis_{name}{suffix}"] = median_ratio(pairs)
            found[f"mib_s_{name}{suffix}"] = [round(statistics.median(side)) for side in zip(*pairs, strict=True)]
            if not consume:
                found[f"ratio_to_redis_tls_{name}"] = median_ratio(pairs_tls)
                found[f"mib_s_redis_tls_{name}"] = round(statistics.median(other for _, other in pairs_tls))
                found[f"p50_ack_ms_{name}"] = statistics.median(each.quantile_ms(0.5) for each in all_ours)
                found[f"p99_ack_ms_{name}"] = statistics.median(each.quantile_ms(0.99) for each in all_ours)
                cpu = statistics.median(each.cpu_s_per_gib for each in all_ours)
                found[f"broker_cpu_s_per_gib_{name}"] = round(cpu, 2)
                found[f"cpu_us_{name}"], found[f"cpu_us_redis_{name}"] = cpu_us(all_ours), cpu_us(all_redis)
    found["p99_ack_ms"] = found["p99_ack_ms_1mib"]
    found["ratio_to_disk"] = median_ratio(disk)
    found["disk_mib_s"] = round(statistics.median(each for _, each in disk))
    found["fdatasync_ms"] = round(bench.fdatasync_ms(), 3)
    return {**found, **_without_keys(bench), **_by_producers(bench), **_ceiling(bench), **_moderate(bench)}


def _without_keys(bench: Bench) -> dict[str, Any]:
    """Like for like: Redis has no encryption here, so ours without it too."""
    plain = replace(bench, keys=False)
    found: dict[str, Any] = {}
    for size, name in ((LARGE, "1mib"), (MEDIUM, "64kib")):
        pairs = [(plain.ours(size).mib_s, plain.redis(size).mib_s) for _ in range(3)]
        found[f"ratio_to_redis_{name}_without_keys"] = median_ratio(pairs)
        found[f"mib_s_{name}_without_keys"] = [round(statistics.median(side)) for side in zip(*pairs, strict=True)]
        bench.say(f"{name} without keys: ours {pairs[-1][0]:.0f}, redis {pairs[-1][1]:.0f} MiB/s")
    return found


def _by_producers(bench: Bench) -> dict[str, Any]:
    """Throughput with 1, 4, 8 and 64 producers, in turn, three rounds."""
    counts = (1, 4, 8, 64)
    rounds: list[dict[int, float]] = []
    for number in range(3):
        rounds.append({count: bench.ours(LARGE, producers=count).mib_s for count in counts})
        bench.say(f"producers, round {number + 1}: " + ", ".join(f"{n}: {v:.0f} MiB/s" for n, v in rounds[-1].items()))
    return {
        "throughput_mib_s": {str(count): round(statistics.median(each[count] for each in rounds)) for count in counts},
        "ratio_64_to_1_producers": median_ratio([(each[64], each[1]) for each in rounds]),
    }


def _ceiling(bench: Bench) -> dict[str, Any]:
    pairs = [(bench.ours(LARGE).mib_s, bench.ceiling(LARGE).mib_s) for _ in range(2)]
    bench.say(f"ceiling (no keys, no disk, no answers): {pairs[-1][1]:.0f} MiB/s")
    return {"ratio_to_ceiling": median_ratio(pairs), "ceiling_mib_s": round(statistics.median(c for _, c in pairs))}


def _moderate(bench: Bench) -> dict[str, Any]:
    """Latency when each of the four producers waits for each answer."""
    found = bench.ours(LARGE, window=1)
    bench.say(f"one episode at a time: {found.mib_s:.0f} MiB/s, p99 {found.quantile_ms(0.99)} ms")
    return {"p50_ack_ms_window_1": found.quantile_ms(0.5), "p99_ack_ms_window_1": found.quantile_ms(0.99)}


def small(bench: Bench) -> dict[str, Any]:
    """The figures of `matpo bench broker --small`: 2 kB episodes leased and stored in a second."""
    found = []
    for number in range(bench.num_pairs):
        found.append(bench.ours(SMALL))
        bench.say(f"2 kB, round {number + 1}: {found[-1].episodes / bench.seconds:.0f} episodes/s")
    rates = [each.episodes / bench.seconds for each in found]
    return {
        "leased_and_stored_s": round(statistics.median(rates)),
        "best_s": round(max(rates)),
        "p50_ack_ms": statistics.median(each.quantile_ms(0.5) for each in found),
        "p99_ack_ms": statistics.median(each.quantile_ms(0.99) for each in found),
        "cpu_us_2kb": cpu_us(found),
    }


def run(measure: Callable[[Bench], dict[str, Any]], parent: Path, *, keys: bool = True) -> dict[str, Any]:
    """Measure in a folder of our own below `parent`, removed whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    disk = check_disk(parent)
    if measure is not small:
        RedisServer.require()
    folder = Path(tempfile.mkdtemp(prefix="bench-broker-", dir=parent))
    try:
        bench = Bench(folder=folder, keys=keys)
        windows = {f"{size // 1024}kib": count for size, count in IN_FLIGHT.items() if size != SMALL}
        about = {"file_system": disk, "keys": keys, "durability": "group", "producers": PRODUCERS, "in_flight": windows}
        return {**measure(bench), **about, "seconds": round(time.monotonic() - bench.began_s)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
