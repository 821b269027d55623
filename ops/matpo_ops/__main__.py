"""The operator's command, `matpo`."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from matpo import logs
from matpo.errors import ConfigError, MatpoError, SetupError
from matpo.settings import LogSettings, RunFile, load_run_file

app = typer.Typer(
    help="Train teams of LLM agents by asynchronous reinforcement learning. Start with `matpo demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run file that every process reads.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. learner.learning_rate=3e-4."),
]


@app.command()
def up(
    run_path: RunPath,
    sets: Sets = None,
    actors: Annotated[int, typer.Option(min=0, help="Actor processes; 0 takes up.num_actors.")] = 0,
) -> None:
    """Start broker, learner and actors on this machine and watch them. Ctrl-C drains; the same command resumes."""
    from matpo_ops import up as up_module
    from matpo_ops.summary import account, plot

    run_file = _load(run_path, sets)
    console = Console()
    up_module.run(
        run_path, run_file, num_actors=actors or run_file.up.num_actors, overrides=sets or [], console=console
    )
    folder = run_file.run.folder
    plot(folder, folder / "curves.png")
    summary = account(folder, max_open=run_file.learner.max_open_groups).as_json()
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print_json(data=summary)
    console.print(f"snapshots {run_file.snapshot_folder}\ncurves    {folder / 'curves.png'}", highlight=False)


@app.command()
def demo(
    engine: Annotated[str, typer.Option(help="transformers (embedded) or vllm.")] = "transformers",
    single_agent: Annotated[bool, typer.Option(help='One agent that holds the tools, credit = "grpo".')] = False,
    folder: Annotated[Path | None, typer.Option(help="Run folder; default runs/demo-TIME.")] = None,
    sets: Sets = None,
) -> None:
    """Train the shipped tiny policy on `atlas` with real processes, measured before and after on held-out tasks."""
    from matpo_ops import demo as demo_module

    logs.configure(LogSettings(level="warning"), process="demo")
    run_path, overrides = demo_module.demo_run_file(engine, single_agent, folder, sets or [])
    figures = demo_module.run_demo(run_path, overrides, Console())
    print("demo: " + json.dumps(figures), flush=True)


@app.command("eval")
def evaluate(
    run_path: RunPath,
    snapshot: Annotated[str, typer.Option(help="v12, latest, base (model.path), or a folder.")] = "latest",
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Accuracy on held-out tasks with a 95 % interval."""
    from matpo_ops.evaluate import evaluate as run_evaluation

    run_file = _load(run_path, sets)
    policy_folder, policy = _policy(run_file, snapshot)
    console = Console(stderr=True)
    with console.status("evaluating") as status:
        found = run_evaluation(
            run_file, policy_folder, policy=policy, progress=lambda done, n: status.update(f"evaluating {done}/{n}")
        )
    if as_json:
        print(json.dumps(found.as_json()))
        return
    score = found.score
    print(
        f"{policy} on {score.num_tasks} tasks of {found.environment}/{found.split}: "
        f"reward {score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]"
    )
    for name, value in found.components.items():
        print(f"  {name:<24} {value:.3f}")
    if found.num_failed:
        print(f"  {found.num_failed} tasks failed for infrastructure reasons and are not scored")


@app.command()
def replay(
    run_path: RunPath,
    journal: Annotated[
        Path | None, typer.Option(help="A journal folder elsewhere, e.g. copied/journal. Default: that of the run.")
    ] = None,
    compare: Annotated[str, typer.Option(help="Several losses on the same data: tis,ppo_clip")] = "",
    start: Annotated[
        str, typer.Option(help="base (model.path), v12 (a snapshot), c000020 (a checkpoint), or a model folder.")
    ] = "base",
    by_index: Annotated[
        bool, typer.Option("--by-index", help="Groups by index, not in the order in which the learner trained them.")
    ] = False,
    with_eval: Annotated[bool, typer.Option("--eval", help="Also measure the result on held-out tasks.")] = False,
    out: Annotated[Path | None, typer.Option(help="New folder; default runs/replay-TIME.")] = None,
    sets: Sets = None,
) -> None:
    """Train offline on the episodes that a run recorded: same credit, packing and losses, no broker, no actors.

    With the run's own settings the result is the run's own weights. With --set learner.loss=..., or --compare, it shows
    what another loss makes of the same data; as nothing is played anew, KL and ESS say how far the data still speak for
    the replayed policy. Lag is that of the record: update n trains what the live learner trained in its update n.

    The journal is only read, also that of a live or a killed run. A run keeps every episode with
    broker.keep_consumed = true; otherwise the oldest go once the learner's checkpoints cover them.

    The result: OUT/metrics/learner.jsonl, OUT/model (a model folder), OUT/replay.json, OUT/curves.png.
    """
    from matpo_ops import replay as replay_module

    source = replay_module.Source(journal=journal or _load(run_path, sets).journal_folder)
    folder = out or Path("runs") / f"replay-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    losses = [name.strip() for name in compare.split(",") if name.strip()]
    runs = {name: _load(run_path, [*(sets or []), f"learner.loss={name}"]) for name in losses}
    how = replay_module.How(start=start, by_index=by_index, with_eval=with_eval)
    if runs:
        figures = replay_module.compare(runs, source, folder, how)
    else:
        figures = replay_module.run(_load(run_path, sets), source, folder, how)
    print("replay: " + json.dumps(figures), flush=True)


@app.command("tiny-policy")
def tiny_policy(
    out: Annotated[Path, typer.Argument(help="Folder to write the policy to.")],
) -> None:
    """Remake the shipped tiny policy: tokenizer, scripted episodes, supervised warm start (ten to twenty minutes)."""
    from matpo_ops.tiny_policy.make import make

    logs.configure(LogSettings(), process="tiny-policy")
    make(out)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="sampling, broker, learner, staleness, or all.")] = "all",
    small: Annotated[bool, typer.Option("--small", help="broker: many 2 kB episodes instead of large ones.")] = False,
    folder: Annotated[
        Path, typer.Option(help="broker: a folder on the disk to measure; a few GiB, removed at the end.")
    ] = Path("runs"),
    keys: Annotated[bool, typer.Option(help="broker: encrypt and authenticate, as between machines.")] = True,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="learner: utilisation of a GPU instead of the CPU's ratios.")
    ] = False,
    lags: Annotated[str, typer.Option(help="staleness: lags to train with.")] = "0,1,2,4,8",
    losses: Annotated[str, typer.Option(help="staleness: with the correction, and without.")] = "tis,reinforce",
    sets: Sets = None,
) -> None:
    """Measure against a peer in the same run; one JSON line each (docs/benchmarks.md). Needs an idle machine."""
    from matpo_ops.bench import BENCHMARKS, Options
    from matpo_ops.demo import CONFIGS

    name = f"{name} small" if small else name
    if name != "all" and name not in BENCHMARKS:
        raise ConfigError(f'no benchmark "{name}". Known: all, {", ".join(BENCHMARKS)}.')
    path = CONFIGS / "demo.toml"
    options = Options(
        run_file=load_run_file(path, sets or []),
        folder=folder,
        keys=keys,
        gpu=gpu,
        lags=_numbers("--lags", lags),
        runs={loss: load_run_file(path, [*(sets or []), f"learner.loss={loss}"]) for loss in losses.split(",")}
        if name == "staleness"
        else {},
    )
    logs.configure(LogSettings(level="warning"), process="bench")
    speed = [known for known in BENCHMARKS if known != "staleness"]  # which is a study, and takes its time
    for each in speed if name == "all" else [name]:
        print(f"bench {each}: " + json.dumps(BENCHMARKS[each](options)), flush=True)


def _numbers(option: str, text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"{option} {text}: want numbers, for example {option} 0,1,2")
    return [int(part) for part in text.split(",")]


def _load(run_path: Path, sets: list[str] | None) -> RunFile:
    run_file = load_run_file(run_path, sets or [])
    logs.configure(run_file.log, process="matpo")
    return run_file


def _policy(run_file: RunFile, name: str) -> tuple[Path, str]:
    from matpo.snapshot import newest, version_folder

    if name == "base":
        return run_file.model_folder, "base"
    if name == "latest":
        version = newest(run_file.snapshot_folder)
        if version is None:
            raise ConfigError(
                f"{run_file.snapshot_folder} holds no snapshot yet. Use --snapshot base, or start the run."
            )
        return version_folder(run_file.snapshot_folder, version), f"v{version}"
    folder = (
        version_folder(run_file.snapshot_folder, int(name[1:]))
        if name[:1] == "v" and name[1:].isdigit()
        else Path(name)
    )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--snapshot {name}: {folder} holds no model. Snapshots of this run: ls {run_file.snapshot_folder}"
        )
    return folder, name


def main() -> None:
    """Run the command; an expected error is one line and its exit code, never a traceback."""
    try:
        app()
    except MatpoError as error:
        print(f"matpo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        missing = SetupError(
            f"{error.name} is not installed. Install the extra that has it: pip install 'matpo[all,bench]'."
        )
        print(f"matpo: {missing}", file=sys.stderr)
        sys.exit(missing.exit_code)


if __name__ == "__main__":
    main()
