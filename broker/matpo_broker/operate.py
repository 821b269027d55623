"""What the operator's commands ask the broker, and how they show it. What is inside a payload is not known here.

Rules kept here; each has a test in tests/broker/test_operate.py:
1. With `as_json` one JSON document goes to stdout and nothing else; what only people want goes to stderr.
2. What only looks (`stat`, `peek`, `quarantine ls`, `show`) reads the journal of a broker that does not answer, and
   says so, and why.
3. Names come from peers: they are shown without control characters or styles, and name no file outside its folder.
4. A broker that does not answer is an error that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from matpo import security, wire
from matpo.errors import JournalError, ProtocolError, RefusedError, TryAgainError
from matpo.link import Link, Reply
from matpo.settings import RunFile
from matpo_broker import views
from matpo_broker.journal import file_numbers, path_of, read_payload
from matpo_broker.maintenance import Compacted, Damage, Verified
from matpo_broker.tables import LEDGER_NAME, open_read_only, rows_of

QUICK_S = 2.0  # after this without an answer, `stat` and `peek` read the journal
CONNECT_S = 5.0
PATIENT_S = 30.0  # a broker whose disk is slow answers late
POLL_S = 0.5
PIPE_COLUMNS = 200  # of a table that goes to no terminal
MAX_FILE_NAME = 200

PAGE_ROWS = 4096  # asked for at a time
PAGE_GROUPS = 1024  # names of groups in one message

Rows_ = tuple[Sequence[str], Sequence[Sequence[views.Cell]]]  # columns, rows
Counts = Mapping[str, int | float | str]
Wanted = TypeVar("Wanted")
State = Literal["", "open", "ready", "delivered", "consumed", "dropped", "quarantined"]

_GROUP_COLUMNS = ("group", "state", "reason", "stored", "members", "bytes", "tokens", "min_version", "strikes", "actor")
_MEMBER_COLUMNS = ("member", "state", "attempt", "episode", "actor", "environment", "tokens", "bytes", "failures")
_SECTIONS = {
    "orders": ("orders", "orders_open", "members_open", "members_leased", "actors", "parked"),
    "groups": ("groups_whole", "groups_ready", "groups_delivered", "groups_consumed", "groups_dropped",
               "groups_quarantined"),
    "store": ("episodes_stored", "backlog_bytes", "journal_bytes", "durability", "disk_full", "draining"),
    "learner": ("epoch", "snapshot_version"),
}  # fmt: skip
_ALARMS = ("disk_full", "draining", "groups_quarantined")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Who told: "broker", or "journal" when no broker answered; then `why` says what we know of that."""

    name: Literal["broker", "journal"]
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A table of groups or members, and who told."""

    source: Source
    columns: Sequence[str]
    rows: Sequence[Sequence[views.Cell]]

    def as_dicts(self) -> list[dict[str, views.Cell]]:
        """One mapping for each row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


# ---- asking


@contextlib.asynccontextmanager
async def connected(run_file: RunFile, timeout_s: float) -> AsyncIterator[Link]:
    """A link to the broker as operator. Raises TryAgainError (no answer), RefusedError, ConfigError (keys)."""
    endpoint = f"tcp://{run_file.broker.host}:{run_file.broker.learner_port}"
    hello = wire.Hello(
        peer="operator",
        name=f"{_user()}@{socket.gethostname()}"[:256],
        incarnation=secrets.token_hex(8),
        run=run_file.run.name,
        schema_version=0,
    )
    link = Link(endpoint, hello, keys=security.client_keys(run_file, "operator"))
    try:
        await link.connect(timeout_s)
        yield link
    except TryAgainError as error:
        if link.trouble:  # it is there
            raise
        raise TryAgainError(
            f"{error} Start it with `matpo-broker RUN.TOML`, or name the run file that it was started with.",
            reason=error.reason,
        ) from None
    finally:
        await link.close()


def ask(
    run_file: RunFile, message: wire.AnyMessage, *, connect_s: float = CONNECT_S, timeout_s: float = PATIENT_S
) -> Reply:
    """One request to the broker and its reply."""

    async def talk() -> Reply:
        async with connected(run_file, connect_s) as link:
            return await link.request(message, timeout_s=timeout_s)

    return asyncio.run(talk())


def stat(run_file: RunFile) -> tuple[Source, Counts]:
    """Counts of everything, from the broker or else from its journal."""

    def from_broker() -> Counts:
        reply, _ = ask(run_file, wire.Stat(), connect_s=QUICK_S, timeout_s=QUICK_S)
        return _expect(reply, wire.StatReply).counts

    def from_journal() -> Counts:
        folder = run_file.journal_folder
        with contextlib.closing(_ledger(folder)) as db:
            num_bytes = sum(path_of(folder, number).stat().st_size for number in file_numbers(folder))
            return {**views.counts(db), "journal_bytes": num_bytes}

    return _either(from_broker, from_journal)


def peek(run_file: RunFile, *, state: State = "", group: str = "", limit: int | None = None) -> Listing:
    """Groups, or the members of one, from the broker or else from its journal. `limit` None: all of them."""
    wanted = wire.Peek(state=state, group=group)

    def from_broker() -> Rows_:
        async def talk() -> Rows_:
            async with connected(run_file, QUICK_S) as link:
                return await _gather(link, wanted, limit, timeout_s=QUICK_S)

        return asyncio.run(talk())

    def from_journal() -> Rows_:
        with contextlib.closing(_ledger(run_file.journal_folder)) as db:
            pages = _Pages(wanted, limit)
            while (message := pages.next) is not None:
                pages.take(*views.peek(db, message))
            return pages.columns, pages.rows

    source, (columns, rows) = _either(from_broker, from_journal)
    return Listing(source=source, columns=columns, rows=rows)


class _Pages:
    """A listing put together from replies of which each holds what fits into one message."""

    def __init__(self, wanted: wire.Peek, limit: int | None) -> None:
        self.columns: Sequence[str] = ()
        self.rows: list[Sequence[views.Cell]] = []
        self.next: wire.Peek | None = wanted
        self._left = limit
        self._ask_for(wanted.after)

    def take(self, columns: Sequence[str], rows: Sequence[Sequence[views.Cell]]) -> None:
        self.columns = columns
        self.rows += rows
        if self._left is not None:
            self._left -= len(rows)
        if rows:
            self._ask_for(int(rows[-1][views.key_column(columns)] or 0))
        else:
            self.next = None

    def _ask_for(self, after: int) -> None:
        assert self.next is not None
        size = PAGE_ROWS if self._left is None else min(self._left, PAGE_ROWS)
        self.next = self.next.model_copy(update={"after": after, "limit": size}) if size else None


async def _gather(link: Link, wanted: wire.Peek, limit: int | None, *, timeout_s: float) -> Rows_:
    pages = _Pages(wanted, limit)
    while (message := pages.next) is not None:
        reply, _ = await link.request(message, timeout_s=timeout_s)
        rows = _expect(reply, wire.Rows)
        pages.take(rows.columns, rows.rows)
    return pages.columns, pages.rows


def show(run_file: RunFile, group: str) -> tuple[Listing, dict[str, bytes]]:
    """The members of a group, and the payload of each stored episode, checked. From the broker or else its journal."""

    def from_broker() -> dict[str, bytes]:
        reply, body = ask(run_file, wire.Show(group=group), connect_s=QUICK_S)
        payloads, at = {}, 0
        for episode in _expect(reply, wire.GroupReady).episodes:
            payload = body[at : at + episode.num_bytes]
            wire.check_payload(episode, payload)
            payloads[episode.episode] = payload
            at += episode.num_bytes
        return payloads

    def from_journal() -> dict[str, bytes]:
        folder = run_file.journal_folder
        with contextlib.closing(_ledger(folder)) as db:
            rows = list(rows_of(db, "AND grp = ?", group))
        return {row.episode: read_payload(folder, row.episode, row.location) for row in rows}

    listing = peek(run_file, group=group)
    _, payloads = _either(from_broker, from_journal)
    return listing, payloads


def requeue(run_file: RunFile, groups: Sequence[str]) -> None:
    """Put quarantined groups back into the stream. Raises RefusedError; then earlier pages of many have gone back."""
    _in_pages(run_file, lambda page: wire.Requeue(groups=page), groups)


def purge(run_file: RunFile, groups: Sequence[str]) -> None:
    """Let the payloads of quarantined groups go. Raises RefusedError; then those of earlier pages of many are gone."""
    _in_pages(run_file, lambda page: wire.Purge(groups=page), groups)


def _in_pages(run_file: RunFile, message: Callable[[list[str]], wire.AnyMessage], groups: Sequence[str]) -> None:
    async def talk() -> None:
        async with connected(run_file, CONNECT_S) as link:
            for low in range(0, len(groups), PAGE_GROUPS):
                await link.request(message(list(groups[low : low + PAGE_GROUPS])), timeout_s=PATIENT_S)

    if groups:
        asyncio.run(talk())


def write_payloads(folder: Path, payloads: Mapping[str, bytes]) -> list[Path]:
    """One file EPISODE.arrow for each payload. An episode's name is its actor's choice: it never leaves the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (episode, payload) in enumerate(payloads.items()):
        name = quote(episode, safe="")
        paths.append(folder / f"{name if len(name) <= MAX_FILE_NAME else f'episode-{number}'}.arrow")
        paths[-1].write_bytes(payload)
    return paths


def drain(run_file: RunFile, *, on: bool, wait: bool, progress: Callable[[int, int], None]) -> Counts:
    """Begin or end draining; with `wait`, until no lease is out. `progress` gets (leases out, actors)."""

    async def talk() -> Counts:
        async with connected(run_file, CONNECT_S) as link:
            await link.request(wire.Drain(on=on), timeout_s=PATIENT_S)
            while True:
                reply, _ = await link.request(wire.Stat(), timeout_s=PATIENT_S)
                counts = _expect(reply, wire.StatReply).counts
                leases = int(counts["members_leased"])
                progress(leases, int(counts["actors"]))
                if not (on and wait and leases):
                    return counts
                if not counts.get("draining", 1):
                    raise RefusedError(
                        "the broker drains no more: it was restarted, or another operator undid it. Drain it again.",
                        reason="undone",
                    )
                await asyncio.sleep(POLL_S)

    return asyncio.run(talk())


def _either(from_broker: Callable[[], Any], from_journal: Callable[[], Any]) -> tuple[Source, Any]:
    try:
        return Source(name="broker"), from_broker()
    except TryAgainError as silent:
        try:
            return Source(name="journal", why=str(silent)), from_journal()
        except JournalError as error:
            raise TryAgainError(f"{silent} Nor is its journal here: {error}", reason=silent.reason) from None


def _ledger(folder: Path) -> Any:
    return open_read_only(folder / LEDGER_NAME)


def _expect(reply: wire.AnyMessage, kind: type[Wanted]) -> Wanted:
    if not isinstance(reply, kind):
        raise ProtocolError(f"the broker answers with {reply.kind}. Use one release here and there.", reason="kind")
    return reply


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as containers have
        return "operator"


# ---- showing


class Screen:
    """Where a command's answer goes: one JSON document, or tables for people."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)

    def document(self, data: object) -> None:
        """The answer for machines; nothing without --json."""
        if self.as_json:
            self._out.file.write(json.dumps(data) + "\n")

    def note(self, text: str) -> None:
        """A remark for people, on stderr."""
        self._err.print(Text(plain(text)), soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """A line of the answer for people."""
        if not self.as_json:
            self._out.print(Text(plain(text), style=style), soft_wrap=True)

    def counts(self, counts: Counts) -> None:
        """What `stat` shows."""
        if self.as_json:
            return
        known = {name for names in _SECTIONS.values() for name in names}
        sections = {**_SECTIONS, "since it started": tuple(sorted(counts.keys() - known))}
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for section, names in sections.items():
            rows = [(name, counts[name]) for name in names if name in counts]
            for number, (name, value) in enumerate(rows):
                alarm = "bold yellow" if name in _ALARMS and value not in (0, "0") else ""
                table.add_row(
                    Text("" if number else section, style="bold"), Text(plain(name)), _cell(name, value, style=alarm)
                )
        self._out.print(table)

    def listing(self, listing: Listing) -> None:
        """A table of groups or members."""
        if self.as_json:
            return
        wanted = _MEMBER_COLUMNS if "member" in listing.columns else _GROUP_COLUMNS
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        shown = [name for name in wanted if name in listing.columns]
        for name in shown:
            table.add_column(plain(name), overflow="fold")
        for row in listing.as_dicts():
            table.add_row(*(_cell(name, row[name]) for name in shown))
        self._out.print(table)

    def damage(self, damage: Sequence[Damage]) -> None:
        """A table of what is wrong."""
        if self.as_json or not damage:
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold red")
        for name in ("file", "byte", "episode", "damage", "what"):
            table.add_column(name, overflow="fold")
        for one in damage:
            at = "" if one.offset < 0 else str(one.offset)
            table.add_row(*(Text(plain(part)) for part in (one.file, at, one.episode, one.reason, one.message)))
        self._out.print(table)

    def verified(self, folder: Path, found: Verified) -> None:
        """What `verify` found."""
        self.damage(found.damage)
        for name in found.unknown:
            self.say(f"{name} is not in the ledger (no damage: the broker's next start deletes it)")
        verdict = f"{len(found.damage)} DAMAGED" if found.damage else "sound"
        self.say(
            f"{folder}: {verdict}. {found.episodes} episodes of {size(found.bytes)} read and hashed, "
            f"{found.sealed_files} of {found.files} files sealed, {found.orders} orders.",
            style="bold red" if found.damage else "green",
        )

    def compacted(self, folder: Path, done: Compacted) -> None:
        """What `compact` did."""
        self.damage(done.damage)
        self.say(
            f"{folder}: {size(done.bytes_before)} before, {size(done.bytes_after)} after. "
            f"{done.files_deleted} files deleted, {done.files_rewritten} of them rewritten; "
            f"{done.orders_forgotten} orders with {done.episodes_forgotten} episodes forgotten."
        )

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on stderr while bytes are worked on, if that is a terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
        with Progress(*columns, console=self._err, transient=True, disable=not self._err.is_terminal) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def plain(text: object) -> str:
    """Text without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))


def count(number: object, noun: str) -> str:
    """A number of things for people: "1 group", "2 groups"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def _cell(name: str, value: views.Cell, *, style: str = "") -> Text:
    text = "" if value is None else size(value) if name.endswith("bytes") and isinstance(value, int) else plain(value)
    return Text(text, style=style, justify="right" if isinstance(value, int | float) else "left")


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=PIPE_COLUMNS)
