"""How a process keeps its memory while large buffers come and go. glibc only; elsewhere nothing happens.

Rules kept here; each has a test in tests/common/test_heap.py:
1. A buffer of up to KEPT_BUFFER_BYTES that was given back is used again without asking the kernel: to touch a fresh
   page can cost more than to fill it.
2. What is kept for that is bounded: KEPT_BYTES of free memory at the top of a heap; larger buffers not at all.

It knows nothing of messages. By itself malloc gives memory back above twice the largest buffer that it has seen: with
many of 1 MiB on the way it takes and gives the same pages for ever.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 64 * 2**20
KEPT_BUFFER_BYTES = 8 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_buffers() -> bool:
    """Let malloc keep what is freed, for the whole process. Returns whether this C library can do so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, KEPT_BUFFER_BYTES))
