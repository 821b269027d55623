"""The plug-in API: `@tool`, `@reward`, `Environment`, and how an environment is found.

A user's file, outside the package, named in the run file as `plugin = "my_env.py:MyEnvironment"`:

    from matpo import Environment, Task, tool

    class MyEnvironment(Environment):
        def tasks(self, split):
            return [Task(id="1", environment="mine", question="2 + 2 = ?", data={"answer": "4"})]

        @tool(timeout_s=5)
        def calculator(self, expression: str) -> str:
            \"""Work out an arithmetic expression.\"""
            ...

        def reward(self, task, episode):
            return float(episode.answer.strip() == task.data["answer"])

Anything that a plug-in raises inside a tool is an observation for the model; inside a reward it is an infra error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from matpo.episode import Episode, Task
from matpo.errors import ConfigError

ENTRY_POINT_GROUP = "matpo.environments"
BUILT_IN = {
    "atlas": "matpo.environments.atlas:Atlas",
    "multihop": "matpo.environments.multihop:Multihop",
}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that a model may call.

    `parameters` is a JSON schema (object). `call(arguments)` checks the arguments and runs the function; it raises
    ToolArgumentError when the model's arguments do not fit.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str | Awaitable[str]]
    timeout_s: float | None = None  # None: rollout.tool_timeout_s
    max_concurrent: int = 64
    arguments: TypeAdapter[Any]

    def bind_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Check and convert a model's arguments. Raises ToolArgumentError."""
        try:
            checked = self.arguments.validate_python(dict(arguments))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ToolArgumentError(f"{self.name}: {problems}") from None
        return {name: getattr(checked, name) for name in type(checked).model_fields}


class ToolArgumentError(ValueError):
    """A model called a tool with arguments that do not fit its schema. An observation, not a failure."""


@overload
def tool(function: Function, /) -> Function: ...
@overload
def tool(
    *, timeout_s: float | None = None, max_concurrent: int = 64, name: str | None = None
) -> Callable[[Function], Function]: ...
def tool(
    function: Function | None = None,
    /,
    *,
    timeout_s: float | None = None,
    max_concurrent: int = 64,
    name: str | None = None,
) -> Function | Callable[[Function], Function]:
    """Mark a function or an Environment's method as a tool. Its signature and docstring become the schema.

    Sync functions run in a thread, async ones on the actor's loop. The result is text; anything else is made text.
    """

    def mark(f: Function) -> Function:
        f.__matpo_tool__ = {"timeout_s": timeout_s, "max_concurrent": max_concurrent, "name": name or f.__name__}  # type: ignore[attr-defined]
        return f

    return mark(function) if function is not None else mark


def reward(function: Function) -> Function:
    """Mark an Environment's method as a named component of the reward (its name, its value a float)."""
    function.__matpo_reward__ = function.__name__  # type: ignore[attr-defined]
    return function


def as_tool(function: Callable[..., Any]) -> Tool:
    """Build the Tool of a function marked with @tool."""
    options = getattr(function, "__matpo_tool__", None)
    if options is None:
        raise ConfigError(f"{function!r} is not a tool. Put @tool above it.")
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(f"tool {options['name']}: *{parameter.name} has no schema. Name each parameter.")
        annotation = str if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (annotation, default)
    model: type[BaseModel] = create_model(
        f"{options['name']}_arguments", __config__=ConfigDict(extra="forbid"), **fields
    )
    schema = model.model_json_schema()
    schema.pop("title", None)
    return Tool(
        name=options["name"],
        description=inspect.getdoc(function) or "",
        parameters=schema,
        function=function,
        timeout_s=options["timeout_s"],
        max_concurrent=options["max_concurrent"],
        arguments=TypeAdapter(model),
    )


class Environment(ABC):
    """Where tasks, tools and reward come from. One object per process; methods may be called from several threads.

    `Options` is a pydantic model of what `[environment.options]` may hold.
    """

    class Options(BaseModel):
        """Nothing by default."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abstractmethod
    def tasks(self, split: str) -> Sequence[Task]:
        """All tasks of a split ("train", "test"), in a fixed order. Splits share no task."""

    @abstractmethod
    def reward(self, task: Task, episode: Episode) -> float | Mapping[str, float]:
        """Score a finished episode: one float, or named components, of which "reward" is the one that is trained.

        `episode.answer` is the planner's final answer; its reward field is still 0. May be async.
        """

    def prompt(self, role: str) -> str:
        """System prompt of a role whose [roles.NAME] gives none."""
        return f"You are the {role}."

    def tools(self) -> Sequence[Tool]:
        """Every method marked with @tool."""
        marked = (
            getattr(self, name) for name in dir(type(self)) if hasattr(getattr(type(self), name), "__matpo_tool__")
        )
        return [as_tool(method) for method in marked]

    def extract_answer(self, text: str) -> str:
        """The answer inside the planner's last message. Default: all of it."""
        return text.strip()

    def close(self) -> None:  # noqa: B027 - nothing to release by default
        """Release what the environment holds."""


def load_environment(name: str, plugin: str | None, options: Mapping[str, Any]) -> Environment:
    """Find an environment and build it with its options.

    Raises ConfigError when it is not found, is no Environment, or refuses the options.
    """
    environment_class = _find(name, plugin)
    try:
        checked = environment_class.Options.model_validate(dict(options))
    except ValidationError as error:
        known = ", ".join(environment_class.Options.model_fields) or "none"
        problems = [f"environment.options.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join([*problems, f"known options of {environment_class.__name__}: {known}"])) from None
    return environment_class(checked)


def _find(name: str, plugin: str | None) -> type[Environment]:
    if plugin is not None:
        target = plugin
    elif name in BUILT_IN:
        target = BUILT_IN[name]
    else:
        installed = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
        if name not in installed:
            known = ", ".join(sorted({*BUILT_IN, *installed}))
            raise ConfigError(
                f'environment.name="{name}" is not known ({known}). For your own file set environment.plugin.'
            )
        target = installed[name]
    source, _, attribute = target.rpartition(":")
    if not source:
        raise ConfigError(f'environment.plugin="{target}": want "file.py:Class" or "package.module:Class"')
    try:
        module = _module_of(source)
    except (ImportError, OSError) as error:
        raise ConfigError(f'environment "{target}" cannot be imported: {error}') from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ConfigError(f'environment "{target}": {attribute} is not a subclass of matpo.Environment')
    return found


def _module_of(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source)
    name = f"matpo_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
