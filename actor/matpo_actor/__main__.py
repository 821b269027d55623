"""`matpo-actor run.toml`: sample episodes until told to stop."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from matpo import heap, logs
from matpo.errors import MatpoError
from matpo.settings import load_run_file

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def actor(
    run_file: Annotated[Path, typer.Argument(help="The run file (TOML) that every process of the run reads.")],
    name: Annotated[str | None, typer.Option(help="Name in logs and at the broker. Default: host and pid.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. May be repeated.")
    ] = None,
) -> None:
    """Lease members from the broker, play them, send the episodes. SIGTERM drains."""
    try:
        settings = load_run_file(run_file, overrides or [])
        logs.configure(settings.log, process=name or f"actor-{os.getpid()}")
        heap.keep_buffers()
        from matpo_actor import process  # heavy libraries only once the run file is known to be good

        asyncio.run(process.run(settings, name=name))
    except MatpoError as error:
        print(f"matpo-actor: {error}", file=sys.stderr)  # noqa: T201 - the one line for the person who started us
        code = error.exit_code
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # A tool that hangs in a thread must not hold a drained actor; nothing is left to clean up.
    os._exit(code)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
