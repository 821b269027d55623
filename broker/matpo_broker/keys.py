"""`matpo-broker keys`: make, list, revoke and rotate keys. Prints names, paths and fingerprints, never a secret."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from matpo import security
from matpo.errors import ConfigError, MatpoError
from matpo.settings import load_run_file

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="""Keys of the connections to the broker: each is encrypted, the broker knows who sends what, and a peer may do
    only what its role (actor, learner, operator) may.

    Name a folder in the run file, on the broker's machine: [security]  keys = "keys". Make the keys. To each other
    machine copy the one file of its peer, and name it there: [security]  key_file = "spot-7.key".

    \b
    matpo-broker keys new RUN.TOML
    matpo-broker keys new RUN.TOML --role actor --name spot-7
    matpo-broker keys list RUN.TOML
    matpo-broker keys revoke RUN.TOML spot-7
    matpo-broker keys rotate RUN.TOML learner
    matpo-broker keys rotate RUN.TOML broker
    """,
)

_RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.TOML", help="The run file; its security.keys is the folder of the keys.")
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key, as `list` shows it.")]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help='Override one key, e.g. --set security.keys="keys"'),
]


@app.command()
def new(
    run_file: _RunFile,
    role: Annotated[
        str | None, typer.Option(help="With --name: what the new key's owner is: actor, learner or operator.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --role: the new key's name, for example spot-7.")] = None,
    override: _Set = None,
) -> None:
    """Make the broker's pair and a key for each role; or, with --role and --name, one more key.

    \b
    matpo-broker keys new RUN.TOML
    matpo-broker keys new RUN.TOML --role actor --name spot-7
    """
    with _told():
        folder = _folder(run_file, override)
        if role is None and name is None:
            made = security.new_keys(folder, now=_now())
            _say("made", made)
            typer.echo("Peers on this machine find their keys by themselves. To another machine copy one file:")
            typer.echo(_copying(folder / "ROLE.key"))
            return
        wanted = next((known for known in security.ROLES if known == role), None)
        if wanted is None or name is None:
            raise ConfigError(
                f"--role {role} --name {name}: want both, the role one of {', '.join(security.ROLES)}. "
                "For example --role actor --name spot-7."
            )
        path = security.add(folder, role=wanted, name=name, now=_now())
        _say("made", [path])
        typer.echo("A running broker knows it already. Copy the file to the machine that uses it:")
        typer.echo(_copying(path))


@app.command("list")
def list_(
    run_file: _RunFile,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: a list of objects.")] = False,
    override: _Set = None,
) -> None:
    """Show every key ever made: name, role, fingerprint, when it was made and when it was revoked.

    \b
    matpo-broker keys list RUN.TOML
    matpo-broker keys list RUN.TOML --json | jq '.[] | select(.revoked == "")'
    """
    with _told():
        columns = ("name", "role", "fingerprint", "created", "revoked")
        entries = security.load_entries(_folder(run_file, override))
        rows = [[str(getattr(entry, column)) for column in columns] for entry in entries]
        if as_json:
            typer.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1))
            return
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(run_file: _RunFile, name: _Name, override: _Set = None) -> None:
    """End a key, for example of a machine that was lost. A running broker refuses its next message.

    \b
    matpo-broker keys revoke RUN.TOML spot-7
    """
    with _told():
        ended = security.revoke(_folder(run_file, override), name, now=_now())
        typer.echo(f"revoked  {ended.name}  {ended.role}  {ended.fingerprint}")


@app.command()
def rotate(run_file: _RunFile, name: _Name, override: _Set = None) -> None:
    """Give a name a new pair; its old one ends at once. With the name broker: the broker's own pair.

    \b
    matpo-broker keys rotate RUN.TOML spot-7
    matpo-broker keys rotate RUN.TOML broker
    """
    with _told():
        folder = _folder(run_file, override)
        if name != security.BROKER:
            path = security.rotate(folder, name, now=_now())
            _say("made", [path])
            typer.echo("The old key is revoked. Restart who used it; on another machine, copy the file there first:")
            typer.echo(_copying(path))
            return
        rotated = security.rotate_broker(folder, now=_now())
        _say("made", rotated.written)
        typer.echo("Now restart the broker, copy these files again to the machines that use them, and restart those.")
        for absent in rotated.absent:
            typer.echo(f"{absent}.key is not in {folder}, so it still names the old broker. Rotate {absent} too.")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """An error is one line and an exit code."""
    try:
        yield
    except MatpoError as error:
        typer.echo(f"matpo-broker: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def _folder(run_file: Path, override: list[str] | None) -> Path:
    folder = load_run_file(run_file, override or []).security.keys
    if folder is None:
        raise ConfigError(
            f'{run_file} names no folder for keys. Add to it:  [security]  keys = "keys"', reason="no_keys"
        )
    return folder


def _say(verb: str, paths: Sequence[Path]) -> None:
    for path in paths:
        typer.echo(f"{verb}  {path}")


def _copying(path: Path) -> str:
    return f'  scp -p {path} MACHINE:  and there:  [security]  key_file = "{path.name}"'


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
