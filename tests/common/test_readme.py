"""What the README shows works as it stands."""

import re
from pathlib import Path

from matpo.plugins import load_environment
from matpo.settings import BUILTIN_TINY, load_run_file

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return found


def test_the_run_file_for_a_gpu_node_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(block("toml"))
    run_file = load_run_file(path, [f'model.path="{BUILTIN_TINY}"'])
    assert run_file.learner.zero_stage == 3
    environment = run_file.environment
    found = load_environment(environment.name, environment.plugin, environment.options)
    offered = {tool.name for tool in found.tools()}
    assert set(run_file.roles["worker"].calls) <= offered


def test_the_environment_of_ones_own_has_tasks_a_tool_and_disjoint_splits(tmp_path: Path) -> None:
    path = tmp_path / "sums.py"
    path.write_text(block("python"))
    sums = load_environment("sums", f"{path}:Sums", {})
    assert [tool.name for tool in sums.tools()] == ["add"]
    assert not {t.id for t in sums.tasks("train")} & {t.id for t in sums.tasks("test")}


def test_the_files_that_the_commands_name_exist() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"(?:ops|docs)/[\w./-]+\.(?:toml|md)", README))
    assert named
    assert [name for name in sorted(named) if not (root / name).is_file()] == []
