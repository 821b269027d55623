"""Memory that is kept, in processes of their own: what malloc is told holds for a whole process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from matpo import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

MIB = 2**20
COUNT = """
import json, resource, sys
from matpo import heap
keep, num_buffers, num_bytes = json.loads(sys.argv[1])
assert not keep or heap.keep_buffers()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def fill():
    held = [b"x" * num_bytes for _ in range(num_buffers)]
    del held

base = resident()
fill()
fill()
before = faults()
for _ in range(10):
    fill()
print(json.dumps([faults() - before, resident() - base]))
"""


def after_ten_rounds(*, keep: bool, num_buffers: int, num_bytes: int) -> tuple[int, int]:
    """(pages that were touched for the first time, bytes still resident) of a process that fills buffers and frees."""
    argument = json.dumps([keep, num_buffers, num_bytes])
    command = [sys.executable, "-c", COUNT, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    num_faults, num_resident = json.loads(done.stdout)
    return num_faults, num_resident


def test_a_buffer_that_was_given_back_is_used_again_without_asking_the_kernel() -> None:
    pages = 10 * 16 * MIB // 4096
    assert after_ten_rounds(keep=True, num_buffers=16, num_bytes=MIB)[0] < 0.02 * pages
    assert after_ten_rounds(keep=False, num_buffers=16, num_bytes=MIB)[0] > 0.5 * pages


@pytest.mark.parametrize(("num_buffers", "num_bytes"), [(300, MIB), (8, 16 * MIB)], ids=["many", "large"])
def test_what_is_kept_is_bounded(num_buffers: int, num_bytes: int) -> None:
    assert after_ten_rounds(keep=True, num_buffers=num_buffers, num_bytes=num_bytes)[1] <= heap.KEPT_BYTES + 8 * MIB
