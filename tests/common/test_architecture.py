"""The house rules that no linter checks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for root in ("common/matpo", "actor/matpo_actor", "broker/matpo_broker", "learner/matpo_learner", "ops/matpo_ops")
    for path in sorted((ROOT / root).rglob("*.py"))
]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("library", "adapters"),
    [
        ("vllm", {"actor/matpo_actor/engines/vllm.py", "actor/matpo_actor/engines/vllm_worker.py"}),
        ("deepspeed", {f"learner/matpo_learner/deepspeed_{part}.py" for part in ("engine", "ranks", "state")}),
        ("pickle", {"ops/matpo_ops/bench/ceiling.py"}),  # what the broker is measured against, not part of it
        ("cloudpickle", set()),
    ],
)
def test_a_heavy_or_dangerous_library_has_one_door_at_most(library: str, adapters: set[str]) -> None:
    users = {str(path.relative_to(ROOT)) for path in SOURCES if library in imports_of(path)}
    assert users <= adapters


def test_sockets_are_opened_only_at_the_ends_of_the_pipes() -> None:
    users = {str(path.relative_to(ROOT)) for path in SOURCES if "zmq" in imports_of(path)}
    ends = {"common/matpo/link.py", "broker/matpo_broker/server.py", "broker/matpo_broker/gate.py"}
    keys = {"common/matpo/security.py"}  # makes key pairs
    assert {user for user in users if "/bench/" not in user} <= ends | keys


def test_nothing_pickled_is_received() -> None:
    pattern = re.compile(r"recv_pyobj|send_pyobj|broadcast_object_list|weights_only\s*=\s*False")
    guilty = [str(p.relative_to(ROOT)) for p in SOURCES if pattern.search(p.read_text(encoding="utf-8"))]
    assert guilty == []


def test_there_is_no_utils_module() -> None:
    assert [p for p in SOURCES if p.stem in ("utils", "helpers", "common", "misc")] == []


def test_the_file_tree_in_the_readme_names_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [str(p.relative_to(ROOT)) for p in SOURCES if p.stem != "__init__" and f"{p.name}" not in readme]
    assert missing == []
