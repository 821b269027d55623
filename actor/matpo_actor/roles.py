"""The role graph: what each role is told, and what it may call. Resolved once, before any episode.

A role appears to its caller as a tool with one string parameter, `subtask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matpo.errors import ConfigError
from matpo.plugins import Environment, Tool
from matpo.settings import RoleSettings, RunFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One role, ready to play."""

    name: str
    settings: RoleSettings
    prompt: str  # system prompt
    tools: Mapping[str, Tool]  # that it may call
    delegates: frozenset[str]  # roles that it may call
    schemas: Sequence[Mapping[str, Any]]  # what it is shown of both, OpenAI style, in the order of `calls`


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """All roles, and the one that gets the task."""

    root: str
    roles: Mapping[str, Role]


def resolve(run_file: RunFile, environment: Environment) -> Team:
    """Build the team. Raises ConfigError naming every call that leads nowhere."""
    tools = {tool.name: tool for tool in environment.tools()}
    problems = [
        f"roles.{name} and a tool of the environment have the same name. Rename the role."
        for name in run_file.roles
        if name in tools
    ]
    known = sorted({*tools, *run_file.roles})
    for name, settings in run_file.roles.items():
        problems += [
            f'roles.{name}.calls: "{call}" is neither a role nor a tool of this environment ({", ".join(known)}).'
            for call in settings.calls
            if call not in known
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    roles = {name: _role(name, settings, run_file, tools, environment) for name, settings in run_file.roles.items()}
    return Team(root=run_file.rollout.root, roles=roles)


def _role(
    name: str, settings: RoleSettings, run_file: RunFile, tools: Mapping[str, Tool], environment: Environment
) -> Role:
    if settings.prompt is not None:
        prompt = settings.prompt
    elif settings.prompt_file is not None:
        prompt = settings.prompt_file.read_text(encoding="utf-8").strip()
    else:
        prompt = environment.prompt(name)
    delegates = frozenset(call for call in settings.calls if call in run_file.roles)
    schemas = [
        _schema(call, run_file.roles[call].description or f"Hand a subtask to the {call}.", _SUBTASK)
        if call in delegates
        else _schema(call, tools[call].description, tools[call].parameters)
        for call in settings.calls
    ]
    allowed = {call: tools[call] for call in settings.calls if call in tools}
    return Role(name=name, settings=settings, prompt=prompt, tools=allowed, delegates=delegates, schemas=schemas)


def _schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": dict(parameters)}}


_SUBTASK = {"type": "object", "properties": {"subtask": {"type": "string"}}, "required": ["subtask"]}
