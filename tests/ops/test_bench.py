"""`matpo bench broker`: what its load says on the wire, what it refuses, and that it leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from matpo import wire
from matpo.errors import ConfigError, SetupError
from matpo_ops.bench import broker, redis_streams
from matpo_ops.bench.load import Crew, Job, Measured
from matpo_ops.bench.producer import episode_header

LEASE = {"lease": "j-1", "group": "g-00000007", "member": 2, "attempt": 1}
needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="make tools")


def test_the_header_that_the_load_packs_by_hand_is_that_of_the_wire() -> None:
    payload = b"x" * 100
    message, _ = wire.decode([episode_header(3, LEASE, len(payload), wire.crc32c(payload)), payload])
    assert isinstance(message, wire.StoreEpisode)
    wire.check_payload(message, payload)
    by_hand = episode_header(3, LEASE, len(payload), wire.crc32c(payload))
    assert wire.encode(message)[0] == by_hand  # every field is there, and no other


def test_a_folder_in_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="tmpfs, in memory"):
        broker.check_disk(Path("/dev/shm"))


def test_without_redis_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="make tools"):
        broker.run(broker.large_and_medium, tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_many_producers_share_a_few_processes_and_one_budget() -> None:
    jobs = broker.producer_jobs("broker", "run.toml", broker.LARGE, 64, 0)
    assert sum(job.argument["connections"] for job in jobs) == 64
    assert len(jobs) == broker.MAX_PROCESSES
    four = broker.producer_jobs("broker", "x", broker.LARGE, 4, 0)
    assert {job.argument["window"] for job in four} == {broker.IN_FLIGHT[broker.LARGE] // 4}


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians() -> None:
    assert broker.median_ratio([(100, 50), (10, 10), (300, 100)]) == 2.0


def test_quantiles_are_of_the_latencies_that_were_measured() -> None:
    found = Measured(
        seconds=2.0, episodes=4, payload_bytes=2**20, consumed_bytes=0, latencies_ms=[1, 2, 3, 4], server_cpu_s=1.0
    )
    assert (found.mib_s, found.quantile_ms(0), found.quantile_ms(1)) == (2.0, 1, 4)
    assert found.cpu_s_per_gib == pytest.approx(256.0)


def test_cpu_time_is_that_of_both_ends_for_each_episode_and_its_median_over_rounds() -> None:
    rounds = [
        Measured(
            seconds=1.0, episodes=4, payload_bytes=1, consumed_bytes=0, latencies_ms=[], server_cpu_s=of_server,
            producers_cpu_s=of_producers,
        )
        for of_server, of_producers in ((1.0, 9.0), (2.0, 4.0), (3.0, 2.0))
    ]  # fmt: skip
    assert rounds[0].cpu_us_per_episode == (250_000, 2_250_000)
    assert broker.cpu_us(rounds) == [500_000, 1_000_000]


def test_resp_sends_all_parts_and_reads_nested_answers() -> None:
    left, right = socket.socketpair()
    parts = [b"head", b"p" * 5_000_000, b"\r\n"]
    sender = threading.Thread(target=redis_streams.send_all, args=(left, parts))
    sender.start()
    received = b""
    while len(received) < sum(map(len, parts)):
        received += right.recv(1 << 20)
    sender.join()
    assert received == b"".join(parts)
    left.sendall(b"*2\r\n$3\r\n1-0\r\n*1\r\n$-1\r\n")
    with right.makefile("rb") as answers:
        assert redis_streams._read_reply(answers) == [b"1-0", [None]]
    left.close()
    right.close()


@pytest.mark.processes
@pytest.mark.parametrize("keys", [True, False])
def test_our_side_stores_and_a_learner_reads_it(tmp_path: Path, keys: bool) -> None:
    bench = broker.Bench(folder=tmp_path, keys=keys, seconds=1.0)
    found = bench.ours(broker.MEDIUM, consume=True)
    assert found.episodes > 0
    assert found.consumed_bytes > 0
    assert len(found.latencies_ms) == found.episodes
    assert min(found.cpu_us_per_episode) > 0
    assert list(tmp_path.iterdir()) == []


@needs_redis
@pytest.mark.processes
@pytest.mark.parametrize(("consume", "tls"), [(True, False), (False, False), (False, True)])
def test_redis_answers_and_its_data_are_removed(tmp_path: Path, consume: bool, tls: bool) -> None:
    bench = broker.Bench(folder=tmp_path, seconds=1.0)
    found = bench.redis(broker.MEDIUM, consume=consume, tls=tls)
    assert found.episodes > 0
    assert (found.consumed_bytes > 0) is consume
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_the_ceiling_moves_episodes(tmp_path: Path) -> None:
    assert broker.Bench(folder=tmp_path, seconds=0.5).ceiling(broker.LARGE).episodes > 0


@pytest.mark.processes
def test_a_load_process_that_dies_is_an_error_and_its_siblings_end() -> None:
    jobs = [Job(module="ceiling", argument={"role": "push"})]  # no endpoint
    with pytest.raises(SetupError, match="ceiling process ended"), Crew(jobs):
        pass


@pytest.mark.processes
def test_ctrl_c_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "matpo_ops", "bench", "broker", "--small", "--folder", str(tmp_path / "runs")]
    # A shell starts what it sends to the background with SIGINT ignored, and that is inherited.
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    bench = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ, **hears)
    process = psutil.Process(bench.pid)
    deadline = time.monotonic() + 60
    while len(children := process.children(recursive=True)) < 6:  # broker, learner, four producers
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.send_signal(signal.SIGINT)
    out, _ = bench.communicate(timeout=60)
    assert bench.returncode != 0
    assert out == b""
    psutil.wait_procs(children, timeout=5)
    assert [child for child in children if child.is_running()] == []
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.processes
def test_small_ends_with_one_line_of_json(tmp_path: Path) -> None:
    found = broker.run(lambda bench: broker.small(_shortened(bench)), tmp_path)
    assert found["leased_and_stored_s"] > 0
    json.dumps(found)


def _shortened(bench: broker.Bench) -> broker.Bench:
    bench.seconds, bench.num_pairs = 0.5, 1
    return bench
