"""MATPO: asynchronous reinforcement learning for teams of LLM agents.

This package is what every process imports, and the public API for plug-ins. The names below load on first use: the
broker imports matpo.wire and matpo.settings, and must not load numpy for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matpo.episode import Episode, Group, Message, Segment, Task
    from matpo.plugins import Environment, Tool, reward, tool

__version__ = "0.1.0"
__all__ = ["Environment", "Episode", "Group", "Message", "Segment", "Task", "Tool", "__version__", "reward", "tool"]

_HOMES = {
    **dict.fromkeys(("Episode", "Group", "Message", "Segment", "Task"), "matpo.episode"),
    **dict.fromkeys(("Environment", "Tool", "reward", "tool"), "matpo.plugins"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'matpo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
