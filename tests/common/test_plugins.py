"""The plug-in API that users touch."""

from pathlib import Path

import pytest

from matpo.errors import ConfigError
from matpo.plugins import ToolArgumentError, as_tool, load_environment, tool

PLUGIN = '''
from matpo import Environment, Task, tool

class Sums(Environment):
    """Adds."""

    def tasks(self, split):
        return [Task(id=f"{split}-1", environment="sums", question="2+2", data={"answer": "4"})]

    @tool(timeout_s=5)
    def add(self, a: int, b: int = 2) -> str:
        """Add two numbers."""
        return str(a + b)

    def reward(self, task, episode):
        return float(episode.answer == task.data["answer"])
'''


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "sums.py"
    path.write_text(PLUGIN)
    return f"{path}:Sums"


def test_a_user_file_of_fifteen_lines_is_an_environment(plugin: str) -> None:
    environment = load_environment("mine", plugin, {})
    (add,) = environment.tools()
    assert (add.name, add.description, add.timeout_s) == ("add", "Add two numbers.", 5)
    assert add.parameters["required"] == ["a"]
    assert add.function(**add.bind_arguments({"a": "40"})) == "42"


@pytest.mark.parametrize("arguments", [{}, {"a": "x"}, {"a": 1, "c": 2}])
def test_arguments_that_do_not_fit_are_named(plugin: str, arguments: dict) -> None:
    (add,) = load_environment("mine", plugin, {}).tools()
    with pytest.raises(ToolArgumentError, match="add: "):
        add.bind_arguments(arguments)


def test_an_option_that_the_environment_does_not_know_lists_those_it_does(plugin: str) -> None:
    with pytest.raises(ConfigError, match="known options of Sums: none"):
        load_environment("mine", plugin, {"noise": 1})


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("atlass", None, "is not known"),
        ("x", "no_such_file.py:X", "cannot be imported"),
        ("x", "matpo.episode:Task", "not a subclass"),
        ("x", "Task", "want"),
    ],
)
def test_an_environment_that_cannot_be_found_says_why(name: str, target: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_environment(name, target, {})


def test_a_tool_with_star_arguments_is_refused() -> None:
    @tool
    def f(*words: str) -> str:
        return ""

    with pytest.raises(ConfigError, match="has no schema"):
        as_tool(f)
