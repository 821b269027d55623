"""The command `matpo-learner`."""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from matpo import __version__, logs
from matpo.errors import ConfigError, MatpoError
from matpo.settings import load_run_file

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
log = logs.get()


class Mode(StrEnum):
    """What to train on."""

    rl = "rl"
    sft = "sft"


@app.command()
def learner(
    run_file: Annotated[Path, typer.Argument(help="The run file (TOML).")],
    mode: Annotated[Mode, typer.Option(help="rl: groups from the broker. sft: recorded episodes.")] = Mode.rl,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, wins over the run file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to start without a checkpoint.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to start with one. Default: resume if there is one.")
    ] = False,
    episodes: Annotated[Path | None, typer.Option(help="sft: file of recorded episodes.")] = None,
    out: Annotated[Path | None, typer.Option(help="sft: folder to write; must not exist.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="sft: optimizer steps.")] = 100,
    segments_per_step: Annotated[int, typer.Option(min=1, help="sft: segments in one step.")] = 32,
    lr: Annotated[float, typer.Option(min=0, help="sft: learning rate.")] = 1e-3,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    """Train the policy: orders out, groups in, snapshots and checkpoints out."""
    try:
        if resume and fresh:
            raise ConfigError(
                "--resume and --fresh exclude each other. Leave both out to resume if there is a checkpoint."
            )
        if mode is Mode.sft and (episodes is None or out is None):
            raise ConfigError("--mode sft needs --episodes FILE and --out FOLDER.")
        settings = load_run_file(run_file, set_ or [])
        rank = os.environ.get("RANK")  # set for ranks that somebody has started: our launcher, DeepSpeed's, torchrun
        logs.configure(settings.log, process="learner" if rank is None else f"learner-{rank}")
        from matpo_learner import process, sft  # torch takes seconds to import: not for --help

        if settings.learner.num_ranks > 1 and rank is None:
            raise typer.Exit(process.launch(sys.argv[1:], settings.learner.num_ranks))
        log.info("learner.starts", version=__version__, run=settings.run.name, settings=settings.learner.model_dump())
        if mode is Mode.rl:
            process.train(settings, "resume" if resume else "fresh" if fresh else "auto")
            return
        assert episodes is not None
        assert out is not None
        sft.run(
            settings,
            sft.SftOptions(
                episodes=episodes, out=out, num_steps=steps, segments_per_step=segments_per_step, learning_rate=lr
            ),
        )
    except MatpoError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"matpo-learner: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
