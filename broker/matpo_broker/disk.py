"""The system calls behind the payload files, one method each. Decides nothing, keeps nothing.

A test's RecordingDisk is a Disk that also writes down what it was asked to do: tests/fault/crash_images.py builds from
that every state in which a power cut may leave a disk. So whatever is to survive one goes through here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

IOV_MAX = 1024  # buffers in one pwritev; Linux takes no more
FILE_MODE = 0o600
FOLDER_MODE = 0o700

_FULL = (errno.ENOSPC, errno.EDQUOT)


def says_full(error: OSError) -> bool:
    """Whether this is a full disk, which time mends, and not a broken one."""
    return error.errno in _FULL


class Disk:
    """Real system calls. Every method raises OSError."""

    def make_folder(self, path: Path) -> None:
        """Make a folder that only we may enter, its missing parents included; each is on disk afterwards."""
        if path.is_dir():
            return
        self.make_folder(path.parent)
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
        self.sync_folder(path.parent)

    def create(self, path: Path) -> int:
        """Make a file that was not there, for reading and writing. Its name is on disk after `sync_folder`."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)

    def open(self, path: Path) -> int:
        """Open a file that is there, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, descriptor: int) -> None:
        """Give a descriptor back. Syncs nothing."""
        os.close(descriptor)

    def allocate(self, descriptor: int, offset: int, num_bytes: int) -> None:
        """Reserve space, zeros until written: a full disk shows here, before any byte is written."""
        os.posix_fallocate(descriptor, offset, num_bytes)

    def write(self, descriptor: int, buffers: Iterable[bytes | memoryview], offset: int) -> None:
        """Write all buffers, one after the other, from `offset` on. When it raises, any part may be written."""
        rest = [memoryview(buffer) for buffer in buffers]
        while rest:
            done = os.pwritev(descriptor, rest[:IOV_MAX], offset)
            offset += done
            taken = 0
            while taken < len(rest) and done >= rest[taken].nbytes:
                done -= rest[taken].nbytes
                taken += 1
            rest = rest[taken:]
            if done:
                rest[0] = rest[0][done:]

    def sync(self, descriptor: int) -> None:
        """Put a file's bytes and length on disk."""
        os.fdatasync(descriptor)

    def forget_cache(self, descriptor: int) -> None:
        """Give the kernel's memory for a file's synced bytes back; reading them later asks the disk."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        """Cut a file."""
        os.ftruncate(descriptor, num_bytes)

    def sync_folder(self, path: Path) -> None:
        """Put the names in a folder on disk: what was created is there, what was unlinked is gone."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, path: Path) -> None:
        """Delete a file, if it is there."""
        path.unlink(missing_ok=True)

    def free_bytes(self, folder: Path) -> int:
        """Bytes that we may still write to the folder's file system."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize
