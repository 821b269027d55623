"""A disk that loses power: records what a store does to its files, and builds what may be left of them.

    disk = RecordingDisk()                    # a real one that also keeps a log
    ... a Store works on it; its commits and acknowledgements go into the same log (`RecordedStore`, `log.acked`) ...
    for image in images(disk.log, ...):       # after every operation, every state that a power cut may leave
        image.write(folder); check(folder, image, ...)

What a power cut may do here is what POSIX permits, which is more than most file systems do:
* bytes and lengths that were not synced are there or not, each 512-byte sector for itself, in any order;
* a file's name is there only if the folder was synced since, however often the file itself was;
* a deleted file is there again unless the folder was synced since;
* the ledger is SQLite's business: it is as of its last commit, or, if the power went inside a commit, as of either.
What `sync` returned for is there. Nothing is ever there that nobody wrote.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

from matpo_broker.disk import Disk
from matpo_broker.store import BALLAST_NAME, Store
from matpo_broker.tables import LEDGER_NAME

SECTOR = 512


# ---- what happened


@dataclass(frozen=True, slots=True)
class Change:
    """One operation on a file's content: allocate (to `end`), write (`data` up to `end`) or truncate (to `end`)."""

    kind: str
    end: int
    data: bytes = b""

    def apply(self, content: bytearray) -> None:
        if self.kind == "truncate":
            del content[self.end :]
        if len(content) < self.end:
            content.extend(bytes(self.end - len(content)))
        if self.kind == "write":
            content[self.end - len(self.data) : self.end] = self.data

    def sectors(self) -> list[Change]:
        """The pieces that reach the disk each for itself."""
        if self.kind != "write":
            return [self]
        start = self.end - len(self.data)
        cuts = [start, *range(start - start % SECTOR + SECTOR, self.end, SECTOR), self.end]
        return [Change("write", b, self.data[a - start : b - start]) for a, b in pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class Event:
    """create, unlink (name), change, sync (file), sync_folder, commit_begin, commit_end (ledger), ack, dropped."""

    kind: str
    file: int = -1
    name: str = ""
    change: Change | None = None
    ledger: bytes = b""
    episodes: tuple[str, ...] = ()


class RecordingDisk(Disk):
    """A real disk that writes down what it is asked to do. Files are numbered; names come and go."""

    def __init__(self) -> None:
        self.log: list[Event] = []
        self._files: dict[int, int] = {}  # descriptor -> file
        self._names: dict[str, int] = {}
        self._num_files = 0

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        if path.name != BALLAST_NAME:  # it holds nothing
            self._names[path.name] = self._files[descriptor] = self._num_files
            self.log.append(Event("create", self._num_files, path.name))
            self._num_files += 1
        return descriptor

    def open(self, path: Path) -> int:
        descriptor = super().open(path)
        if path.name in self._names:
            self._files[descriptor] = self._names[path.name]
        return descriptor

    def close(self, descriptor: int) -> None:
        self._files.pop(descriptor, None)
        super().close(descriptor)

    def allocate(self, descriptor: int, offset: int, num_bytes: int) -> None:
        super().allocate(descriptor, offset, num_bytes)
        self._change(descriptor, Change("allocate", offset + num_bytes))

    def write(self, descriptor: int, buffers: Iterable[bytes | memoryview], offset: int) -> None:
        data = b"".join(buffers)
        super().write(descriptor, [data], offset)
        self._change(descriptor, Change("write", offset + len(data), data))

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        super().truncate(descriptor, num_bytes)
        self._change(descriptor, Change("truncate", num_bytes))

    def sync(self, descriptor: int) -> None:
        self.log.append(Event("sync", self._files[descriptor]))  # the log is the disk: no need for the real one

    def sync_folder(self, path: Path) -> None:
        self.log.append(Event("sync_folder"))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        if self._names.pop(path.name, None) is not None:
            self.log.append(Event("unlink", name=path.name))

    def _change(self, descriptor: int, change: Change) -> None:
        if descriptor in self._files:
            self.log.append(Event("change", self._files[descriptor], change=change))


class RecordedStore(Store):
    """A store whose ledger commits go into its disk's log, with a copy of the ledger as of then."""

    def _open_ledger(self, now_s: float) -> None:
        super()._open_ledger(now_s)
        commit, log, path = self.ledger.commit, self._disk.log, self._folder / LEDGER_NAME  # type: ignore[attr-defined]

        def recorded() -> None:
            log.append(Event("commit_begin"))
            commit()
            with closing(sqlite3.connect(path)) as db:
                log.append(Event("commit_end", ledger=db.serialize()))

        self.ledger.commit = recorded  # type: ignore[method-assign]


# ---- what may be left


@dataclass(frozen=True, slots=True)
class Image:
    """One state of the folder after a power cut, and what was promised before it."""

    files: Mapping[str, bytes]
    ledger: bytes | None  # None: not there yet
    acked: frozenset[str]
    dropped: frozenset[str]  # their payloads may be deleted
    after: int  # so many events had happened

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.ledger is not None:
            (folder / LEDGER_NAME).write_bytes(self.ledger)

    def digest(self) -> bytes:
        parts = blake2b(self.ledger or b"", digest_size=16)
        for name, content in sorted(self.files.items()):
            parts.update(f"{name} {len(content)}:".encode() + content)
        return parts.digest()


@dataclass(slots=True)
class _State:
    """The disk and its cache, operation by operation."""

    durable: dict[int, bytes] = field(default_factory=dict)  # file -> synced content
    pending: list[tuple[int, Change]] = field(default_factory=list)  # unsynced, by sectors, oldest first
    names: dict[str, int] = field(default_factory=dict)  # synced names
    moves: list[tuple[str, int | None]] = field(default_factory=list)  # unsynced: a name, its file or None (unlinked)
    ledgers: list[bytes | None] = field(default_factory=lambda: [None])  # what the ledger may be
    acked: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    def take(self, event: Event, following: Sequence[Event]) -> None:
        match event.kind:
            case "create":
                self.durable[event.file] = b""
                self.moves.append((event.name, event.file))
            case "unlink":
                self.moves.append((event.name, None))
            case "change":
                assert event.change is not None
                self.pending += ((event.file, piece) for piece in event.change.sectors())
            case "sync":
                content = bytearray(self.durable[event.file])
                for file, change in self.pending:
                    if file == event.file:
                        change.apply(content)
                self.durable[event.file] = bytes(content)
                self.pending = [(file, change) for file, change in self.pending if file != event.file]
            case "sync_folder":
                self.names = self._names([True] * len(self.moves))
                self.moves = []
            case "commit_begin":
                self.ledgers += [later.ledger for later in following[:1] if later.kind == "commit_end"]
            case "commit_end":
                self.ledgers = [event.ledger]
            case "ack":
                self.acked.update(event.episodes)
            case "dropped":
                self.dropped.update(event.episodes)

    def images(self, after: int, limit: int, draw: random.Random) -> Iterator[Image]:
        for happened in _choices(len(self.pending) + len(self.moves), limit, draw):
            contents = {file: bytearray(content) for file, content in self.durable.items()}
            for (file, change), done in zip(self.pending, happened, strict=False):
                if done:
                    change.apply(contents[file])
            names = self._names(happened[len(self.pending) :])
            files = {name: bytes(contents[file]) for name, file in names.items()}
            for ledger in self.ledgers:
                yield Image(files, ledger, frozenset(self.acked), frozenset(self.dropped), after)

    def _names(self, happened: Sequence[bool]) -> dict[str, int]:
        names = dict(self.names)
        for (name, file), done in zip(self.moves, happened, strict=True):
            if done and file is not None:
                names[name] = file
            elif done:
                names.pop(name, None)
        return names


def _choices(num: int, limit: int, draw: random.Random) -> list[tuple[bool, ...]]:
    """Which of `num` unsynced operations happened: every choice if there are few, else the extremes and a sample."""
    if 2**num <= limit:
        return [tuple(bool(bits >> i & 1) for i in range(num)) for bits in range(2**num)]
    found = {(False,) * num: None, (True,) * num: None}  # a dict keeps the order
    for i in range(num):  # all but one, in order up to one
        found[tuple(k != i for k in range(num))] = None
        found[tuple(k < i for k in range(num))] = None
    extremes = list(found)
    draw.shuffle(extremes)
    chosen = dict.fromkeys(extremes[: limit // 2])
    while len(chosen) < limit:
        share = draw.random()
        chosen[tuple(draw.random() < share for _ in range(num))] = None
    return list(chosen)


def images(log: Sequence[Event], *, limit: int, seed: int = 0) -> Iterator[Image]:
    """Every distinct image after every operation, at most `limit` choices of unsynced operations after each."""
    state, draw = _State(), random.Random(seed)
    seen: dict[bytes, frozenset[str]] = {}
    for position, event in enumerate(log):
        state.take(event, log[position + 1 :])
        for image in state.images(position + 1, limit, draw):
            digest = image.digest()
            if seen.get(digest) != image.acked:  # the same bytes with more promised are another case
                seen[digest] = image.acked
                yield image
