"""The command `matpo-broker`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matpo.errors import MatpoError
from matpo.settings import load_run_file
from matpo_broker import process

app = typer.Typer(add_completion=False)


@app.command()
def broker(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.TOML", help="The run file that every process of the run reads.")
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set broker.lease_s=30"),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow other machines to connect without keys. Only on a private network."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Hold the work orders and episodes of one run, durably, and hand them out.

    Start one per run, before or after learner and actors: they wait for it. Everything is kept in run.folder/journal;
    kill the broker at any time and start it again with the same command, nothing that it acknowledged is lost.
    SIGTERM and Ctrl-C end it with exit code 0. Other codes: 2 run file, 3 this machine (a port in use), 4 the journal.
    """
    try:
        process.run(load_run_file(run_file, override or []), insecure=insecure)
    except MatpoError as error:
        if debug:
            raise
        typer.echo(f"matpo-broker: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
