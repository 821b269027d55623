"""The command `matpo-broker`."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from matpo import logs
from matpo.errors import ConfigError, JournalError, MatpoError, SetupError
from matpo.settings import LogSettings, RunFile, load_run_file
from matpo_broker import keys, maintenance, operate, process
from matpo_broker.tables import LEDGER_NAME

DAMAGED = 4  # exit code, as of every DataError


class ServeByDefault(TyperGroup):
    """`matpo-broker RUN.TOML` is `matpo-broker serve RUN.TOML`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `serve` in front of what can only be a run file or one of serve's options."""
        first = args[0] if args else "--help"
        if first not in self.commands and first != "--help" and (first.startswith("-") or _names_a_file(first)):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


def _names_a_file(text: str) -> bool:
    return "." in text or "/" in text or Path(text).exists()


app = typer.Typer(
    cls=ServeByDefault,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Hold the work orders and episodes of one run, durably, and hand them out: `matpo-broker RUN.TOML`.

    Start one per run, before or after learner and actors: they wait for it. Everything is kept in run.folder/journal;
    kill the broker at any time and start it again with the same command, nothing that it acknowledged is lost.

    The other commands look at a run and repair it. With --json each prints one JSON document. Exit codes: 2 run file or
    command line, 3 this machine, 4 damaged data, 5 the broker said no, 75 nobody answered: try again.

    \b
    matpo-broker run.toml                       serve it (the same as: matpo-broker serve run.toml)
    matpo-broker stat run.toml                  what is where
    matpo-broker peek run.toml --state open     which groups wait for members
    matpo-broker quarantine ls run.toml         which groups were set aside, and why
    matpo-broker drain run.toml                 hand out no more leases, wait for those that are out
    matpo-broker verify run.toml                read and hash everything
    matpo-broker compact run.toml               give space back (broker stopped)
    matpo-broker keys new run.toml              keys for connections from other machines
    """,
)
quarantine = typer.Typer(
    no_args_is_help=True,
    help="""Groups that were set aside: their content is invalid, or learners died with them in hand.

    The learner goes on without them; their payloads are kept until you requeue or purge them.

    \b
    matpo-broker quarantine ls run.toml
    matpo-broker quarantine show run.toml g-00000007 --out suspects/
    matpo-broker quarantine requeue run.toml g-00000007
    matpo-broker quarantine purge run.toml --all --yes
    """,
)
app.add_typer(quarantine, name="quarantine")
app.add_typer(keys.app, name="keys")

RunPath = Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run file that every process of the run reads.")]
Target = Annotated[Path, typer.Argument(metavar="RUN.TOML|FOLDER", help="The run file, or the journal's folder.")]
Group = Annotated[str, typer.Argument(metavar="GROUP", help="For example g-00000007.")]
Groups = Annotated[list[str] | None, typer.Argument(metavar="[GROUP...]", help="For example g-00000007.")]
All = Annotated[bool, typer.Option("--all", help="Every quarantined group.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set broker.lease_s=30"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many rows, oldest groups first.")]


class State(StrEnum):
    """States that `peek` can ask for."""

    OPEN = "open"
    READY = "ready"
    DELIVERED = "delivered"
    CONSUMED = "consumed"
    DROPPED = "dropped"
    QUARANTINED = "quarantined"


@app.command()
def serve(
    run_path: RunPath,
    override: Sets = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow other machines to connect without keys. Only on a private network."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve a run. `matpo-broker RUN.TOML` does the same.

    SIGTERM and Ctrl-C end it with exit code 0. Other codes: 2 run file, 3 this machine (a port in use), 4 the journal.

    \b
    matpo-broker run.toml
    matpo-broker run.toml --set broker.lease_s=30 --set broker.durability=always
    """
    with told(debug=debug):
        process.run(load_run_file(run_path, override or []), insecure=insecure)


@app.command()
def stat(run_path: RunPath, override: Sets = None, as_json: Json = False, debug: Debug = False) -> None:
    """Count orders, groups, leases, episodes, bytes and refusals.

    Asks the broker; if none answers within 2 s it reads the journal, and says so (then without actors and refusals).

    \b
    matpo-broker stat run.toml
    matpo-broker stat run.toml --json | jq .counts.groups_ready
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        source, counts = operate.stat(run_file)
        _say_source(screen, run_file, source)
        screen.counts(counts)
        screen.document({"source": source.name, "counts": dict(counts)})


@app.command()
def peek(
    run_path: RunPath,
    state: Annotated[State | None, typer.Option(help="Only groups in this state.")] = None,
    group: Annotated[str, typer.Option(metavar="GROUP", help="The members of this group.")] = "",
    limit: Limit = 50,
    override: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List groups, or the members of one; nothing is handed out.

    Asks the broker; if none answers within 2 s it reads the journal, and says so.

    \b
    matpo-broker peek run.toml --state open --limit 10
    matpo-broker peek run.toml --group g-00000007
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        found = operate.peek(run_file, state=state.value if state else "", group=group, limit=limit)
        _say_source(screen, run_file, found.source)
        screen.listing(found)
        screen.document({"source": found.source.name, "rows": found.as_dicts()})


@quarantine.command("ls")
def quarantine_ls(run_path: RunPath, override: Sets = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the groups that are set aside, and why. If no broker answers it reads the journal, and says so.

    \b
    matpo-broker quarantine ls run.toml
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        found = operate.peek(run_file, state="quarantined")
        _say_source(screen, run_file, found.source)
        screen.listing(found)
        screen.say(f"{operate.count(len(found.rows), 'group')} quarantined.")
        screen.document({"source": found.source.name, "rows": found.as_dicts()})


@quarantine.command("show")
def quarantine_show(
    run_path: RunPath,
    group: Group,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write each payload to FOLDER/EPISODE.arrow.")
    ] = None,
    override: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the episodes of a group, and with --out save their payloads (Arrow IPC streams). It stays where it is.

    If no broker answers it reads the journal, and says so.

    \b
    matpo-broker quarantine show run.toml g-00000007 --out suspects/
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        found, payloads = operate.show(run_file, group)
        _say_source(screen, run_file, found.source)
        written = operate.write_payloads(out, payloads) if out is not None else []
        screen.listing(found)
        for path in written:
            screen.say(f"wrote {path}")
        screen.document({"group": group, "rows": found.as_dicts(), "written": [str(path) for path in written]})


@quarantine.command("requeue")
def quarantine_requeue(
    run_path: RunPath,
    groups: Groups = None,
    every: All = False,
    override: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put quarantined groups back into the stream, for example after a fix of the learner.

    The next learner gets them: start it again. Refused for a group that a checkpoint of the learner covers already.

    \b
    matpo-broker quarantine requeue run.toml g-00000007
    matpo-broker quarantine requeue run.toml --all
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        chosen = _chosen(run_file, groups, every=every)
        operate.requeue(run_file, chosen)
        screen.say(f"{operate.count(len(chosen), 'group')} go to the next learner: start it again.")
        screen.document({"requeued": chosen})


@quarantine.command("purge")
def quarantine_purge(
    run_path: RunPath,
    groups: Groups = None,
    every: All = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    override: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let the payloads of quarantined groups go, for good.

    \b
    matpo-broker quarantine purge run.toml g-00000007
    matpo-broker quarantine purge run.toml --all --yes
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        chosen = _chosen(run_file, groups, every=every)
        if chosen and not yes:
            if as_json:
                raise ConfigError("purge with --json asks nothing. Add --yes.")
            typer.confirm(
                f"Delete the payloads of {operate.count(len(chosen), 'group')} for good?", abort=True, err=True
            )
        operate.purge(run_file, chosen)
        screen.say(f"{operate.count(len(chosen), 'group')} purged.")
        screen.document({"purged": chosen})


@app.command()
def drain(
    run_path: RunPath,
    undo: Annotated[bool, typer.Option("--undo", help="Hand out leases again.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until no lease is out.")] = True,
    override: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hand out no more leases, and wait until those that are out have come back as episodes.

    What is finished is still stored and delivered; then actors can be stopped without losing work. It lasts until
    --undo, or until the broker is started again.

    \b
    matpo-broker drain run.toml
    matpo-broker drain run.toml --undo
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        last: list[int] = []

        def progress(leases: int, actors: int) -> None:
            if not undo and last != [leases]:
                screen.note(f"{operate.count(leases, 'lease')} out, {operate.count(actors, 'actor')}")
                last[:] = [leases]

        counts = operate.drain(_load(run_path, override), on=not undo, wait=wait, progress=progress)
        leases = counts["members_leased"]
        if undo:
            screen.say("The broker hands out leases again.")
        else:
            screen.say(
                f"The broker drains, {operate.count(leases, 'lease')} out." + " Actors can be stopped." * (not leases)
            )
        screen.document({"draining": not undo, "leases": leases, "counts": dict(counts)})


@app.command()
def verify(target: Target, override: Sets = None, as_json: Json = False, debug: Debug = False) -> None:
    """Read and hash every record and every sealed file, and check the ledger. Changes nothing; the broker may run.

    Exit code 4 if something is damaged; each damage is listed with file, byte and episode.

    \b
    matpo-broker verify run.toml
    matpo-broker verify /backup/run-7/journal --json
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        folder = _journal(target, override)
        with screen.progress("verify") as progress:
            found = maintenance.verify(folder, progress)
        screen.verified(folder, found)
        screen.document({"folder": str(folder), "sound": not found.damage, **asdict(found)})
        if found.damage:
            raise typer.Exit(DAMAGED)


@app.command()
def compact(run_path: RunPath, override: Sets = None, as_json: Json = False, debug: Debug = False) -> None:
    """Give back the space of what every kept checkpoint covers. The broker must be stopped.

    Payload files that are mostly dead are written anew, and the ledger forgets old orders (the counts stay). It may be
    killed at any time. A file with a damaged record stays as it is (exit code 4).

    \b
    matpo-broker compact run.toml
    """
    screen = operate.Screen(as_json=as_json)
    with told(debug=debug):
        run_file = _load(run_path, override)
        folder, file_bytes = run_file.journal_folder, run_file.broker.journal_file_bytes
        with screen.progress("compact") as progress:
            done = maintenance.compact(folder, run_file.run.name, file_bytes=file_bytes, progress=progress)
        screen.compacted(folder, done)
        screen.document({"folder": str(folder), **asdict(done)})
        if done.damage:
            raise typer.Exit(DAMAGED)


# ---- what the commands share


@contextlib.contextmanager
def told(*, debug: bool) -> Iterator[None]:
    """An error of ours is one line and its exit code; with --debug its traceback."""
    try:
        try:
            yield
        except sqlite3.Error as error:
            text = f"the ledger: {error}. Mend the disk, or restore {LEDGER_NAME}."
            raise JournalError(text, reason="ledger") from error
        except OSError as error:
            raise SetupError(f"{error}. Mend that on this machine, then repeat the command.", reason="os") from error
    except MatpoError as error:
        if debug:
            raise
        typer.echo(f"matpo-broker: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def _load(run_path: Path, override: list[str] | None) -> RunFile:
    logs.configure(LogSettings(level="error"), process="operator")  # what goes wrong is in the error
    return load_run_file(run_path, override or [])


def _journal(target: Path, override: list[str] | None) -> Path:
    """The journal that a command line names: by run file, run folder or journal folder."""
    if not target.is_dir():
        return _load(target, override).journal_folder
    return target if (target / LEDGER_NAME).is_file() else target / "journal"


def _chosen(run_file: RunFile, groups: list[str] | None, *, every: bool) -> list[str]:
    if bool(groups) == every:
        raise ConfigError("name the groups, or say --all. `matpo-broker quarantine ls RUN.TOML` lists them.")
    return groups or [str(row["group"]) for row in operate.peek(run_file, state="quarantined").as_dicts()]


def _say_source(screen: operate.Screen, run_file: RunFile, source: operate.Source) -> None:
    if source.name == "journal":
        screen.note(f"{source.why} What follows is from {run_file.journal_folder}.")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
