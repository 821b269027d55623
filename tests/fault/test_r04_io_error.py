"""R4: an I/O error never yields an acknowledgement.

strace lets a system call of a live broker fail with EIO, from some call on and for ever: a dying disk. The broker has
to end within a second, with code 4 and nothing acknowledged after the call that failed; started again on a disk that
works, it has everything that it acknowledged before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from tests.fault.harness import GoneError, Peer, Place, episode_of, payload_of, stored_bytes
from tests.fault.strace import SENDS, SYNCS, Call, exit_of, read_trace, skip_without_strace, under_strace

from matpo import wire
from matpo_broker.tables import LEDGER_NAME, accounting

pytestmark = pytest.mark.processes

MAX_END_S = 1.0
WAL = LEDGER_NAME + "-wal"
_STORED = re.compile(rb"\xa4kind\xa6stored")


def store_until_it_ends(actor: Peer) -> set[str]:
    """Eight episodes at a time for as long as there is a broker. Returns those that were acknowledged."""
    acked: set[str] = set()
    try:
        while leases := actor.ask(wire.LeaseRequest(num_members=8)).leases:
            for lease in leases:
                actor.send(*episode_of(lease))
            for _ in leases:
                reply, _ = actor.receive()
                acked |= {reply.episode} if reply.kind == "stored" else set()
        raise AssertionError("the disk never failed: every member was stored")
    except GoneError:  # what was sent before it ended is still to be read
        while actor.socket.poll(200):
            reply, _ = actor.receive()
            acked |= {reply.episode} if reply.kind == "stored" else set()
    return acked


def acks_after(calls: list[Call], failed: Call) -> int:
    """Acknowledgements whose send began after the failing call had returned."""
    sends = [call for call in calls if call.name in SENDS and call.target.startswith(("socket:", "TCP"))]
    return sum(len(_STORED.findall(call.data)) for call in sends if call.begins > failed.ends)


def fail_from(place: Place, calls: tuple[str, ...], first: int) -> tuple[Call, dict[str, Any]] | None:
    """Let these calls fail from the `first` one of a thread on. Returns the call that failed first, and the figures;
    None when it was one of the start's."""
    log = place.folder / "strace.txt"
    injection = f"--inject={','.join(calls)}:error=EIO:when={first}+"
    life = place.start(under=under_strace(log, injection, calls=(*SYNCS, *SENDS, *calls)))
    try:
        place.learner(400, 4).close()
        actor = place.peer("actor", "a0")
    except GoneError:
        assert life.wait() not in (None, 0), life.log.read_text()[-2000:]
        return None
    acked = store_until_it_ends(actor)
    code = life.wait()
    trace = list(read_trace(log))
    failed = next(call for call in trace if call.injected)
    exit_code, ended_s = exit_of(log)
    assert (code, exit_code) == (4, 4), life.log.read_text()[-2000:]
    assert "Nothing more was acknowledged" in life.log.read_text()
    place.start()
    place.wait_ready()
    payloads = stored_bytes(place.journal)
    wrong = {name for name, payload in payloads.items() if payload != payload_of(name)}
    lost = acked - set(accounting(place.journal).stored.values()) | acked - payloads.keys()
    return failed, {
        "exit_code": exit_code, "seconds": ended_s - failed.ends_s, "acked": len(acked),
        "acks_after": acks_after(trace, failed), "lost": len(lost), "altered": len(wrong),
    }  # fmt: skip


# Which calls fail, on which file of the journal, and from which one on: past the start, and in mid-load. strace counts
# calls, not files, and a commit syncs two: where the wanted file is not hit, the next call is tried.
@pytest.mark.parametrize(
    ("calls", "wanted", "first"),
    [
        pytest.param(("fdatasync", "fsync"), "payload-*.bin", 20, id="payload-sync"),
        pytest.param(("fdatasync", "fsync"), WAL, 20, id="ledger-sync"),
        pytest.param(("pwritev", "pwritev2"), "payload-*.bin", 10, id="payload-write"),
        pytest.param(("pwrite64",), WAL, 1000, id="ledger-write"),
        pytest.param(("fallocate",), "payload-*.bin", 2, id="payload-reserve"),
    ],
)
def test_after_a_call_that_failed_nothing_is_acknowledged_and_the_broker_ends_and_loses_nothing(
    make_place: Callable[..., Place], report: Callable[..., None], calls: tuple[str, ...], wanted: str, first: int
) -> None:
    skip_without_strace()
    for number in range(first, first + 6):
        found = fail_from(make_place(journal_file_bytes=256 * 1024), calls, number)
        if found is None:
            continue
        failed, figures = found
        file = Path(failed.target).name
        report("R4", failed=f"{failed.name}({file})", **figures)
        assert (figures["acks_after"], figures["lost"], figures["altered"]) == (0, 0, 0)
        assert figures["seconds"] < MAX_END_S
        if fnmatch(file, wanted) and figures["acked"] > 0:
            return
    raise AssertionError(f"no {calls} on {wanted} failed in mid-load: does the broker write it in another way?")
