"""Multi-hop questions and a passage corpus from JSON-lines files, in the shape that MuSiQue and HotpotQA are kept in.

    questions   {"id": "2hop__1", "question": "...", "answer": "...", "answer_aliases": ["..."]}   (aliases: optional)
    corpus      {"title": "...", "text": "..."}

Rules kept here; tests in tests/common/test_multihop.py:
1. A question's split depends on its id and the fraction alone: adding questions moves no other one.
2. Scores are the standard ones (matpo.environments.scoring); the best over answer and aliases counts.
3. However long a passage is, a tool's output has a bound.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from matpo.environments.scoring import exact_match, f1, format_share, marked_answer
from matpo.environments.search_index import Passage, SearchIndex
from matpo.episode import Episode, Task
from matpo.errors import ConfigError
from matpo.plugins import Environment, tool

_PROMPTS = {
    "planner": "Answer the question. Ask the worker for one fact at a time; it can search an encyclopedia. "
    "End with a line that holds only the answer, as short as possible: Answer: ...",
    "worker": "Find the fact you are asked for: search for passages, fetch one by its title to read more. "
    "End with the fact in one sentence.",
    "agent": "Answer the question. Search for passages, fetch one by its title to read more; one fact at a time. "
    "End with a line that holds only the answer, as short as possible: Answer: ...",
}


class Multihop(Environment):
    """Questions over a corpus, with `search` and `fetch`."""

    class Options(BaseModel):
        """[environment.options] of multihop."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        questions: Path
        """JSON-lines file of questions."""
        corpus: Path
        """JSON-lines file of passages."""
        test_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
        """Share of the questions that are the test split."""
        score: Literal["exact_match", "f1"] = "exact_match"
        """What `accuracy` is, and so what is trained."""
        num_results: Annotated[int, Field(ge=1, le=50)] = 3
        """Passages that one search returns."""
        max_search_characters: Annotated[int, Field(ge=50)] = 400
        """Each passage in a search result is cut to this."""
        max_fetch_characters: Annotated[int, Field(ge=50)] = 4000
        """What a fetch returns is cut to this."""
        format_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
        """reward = (1 - format_weight) accuracy + format_weight format."""
        format_without_workers: Annotated[float, Field(ge=0, le=1)] | None = None
        """Workers' share of `format` when nothing was delegated; unset: the root's share alone. The paper has 0."""

    def tasks(self, split: str) -> Sequence[Task]:
        """The questions of a split, in the file's order."""
        if split not in ("train", "test"):
            raise ConfigError(f'multihop has no split "{split}". Use "train" or "test".')
        return [task for task in self._all_tasks if self._is_test(task.id) == (split == "test")]

    @tool(timeout_s=20)
    def search(self, query: str) -> str:
        """Search an encyclopedia for passages about a query."""
        found = self._index.search(query, self.options.num_results)
        limit = self.options.max_search_characters
        return "\n".join(f"[{p.title}] {cut(p.text, limit)}" for p in found) or "Nothing found."

    @tool(timeout_s=20)
    def fetch(self, title: str) -> str:
        """Read the passages with this title."""
        found = self._index.fetch(title)
        if not found:
            return f'There is no passage titled "{cut(title, 100)}". Search for one.'
        return cut("\n".join(p.text for p in found), self.options.max_fetch_characters)

    def reward(self, task: Task, episode: Episode) -> Mapping[str, float]:
        """Exact match or F1 of the final answer, and the share of well-formed calls."""
        scores = {
            "exact_match": exact_match(episode.answer, task.data["answers"]),
            "f1": f1(episode.answer, task.data["answers"]),
        }
        form = format_share(episode, self.options.format_without_workers)
        weight, accuracy = self.options.format_weight, scores[self.options.score]
        return {"reward": (1 - weight) * accuracy + weight * form, "accuracy": accuracy, "format": form, **scores}

    def prompt(self, role: str) -> str:
        """Prompts for planner, worker and agent (a single agent that holds the tools)."""
        return _PROMPTS.get(role) or super().prompt(role)

    def extract_answer(self, text: str) -> str:
        r"""What is marked by \boxed{} or "Answer:", else the whole message."""
        return marked_answer(text)

    def close(self) -> None:
        """Free the index if it was built."""
        if "_index" in self.__dict__:
            self._index.close()

    def _is_test(self, task_id: str) -> bool:
        return bool(zlib.crc32(task_id.encode()) / 2**32 < self.options.test_fraction)

    @functools.cached_property
    def _all_tasks(self) -> list[Task]:
        tasks = []
        for where, row in _rows(self.options.questions, "questions"):
            number, question, answer = (_text(row, key, where) for key in ("id", "question", "answer"))
            aliases = row.get("answer_aliases") or []
            if not (isinstance(aliases, list) and all(isinstance(a, str) for a in aliases)):
                raise ConfigError(f"{where}: answer_aliases must be a list of texts.")
            data = {"answers": [answer, *aliases], "supporting": row.get("supporting", [])}
            tasks.append(Task(id=number, environment="multihop", question=question, data=data))
        if len({t.id for t in tasks}) < len(tasks):
            raise ConfigError(
                f"environment.options.questions: {self.options.questions} has an id twice. Make ids unique."
            )
        return tasks

    @functools.cached_property
    def _index(self) -> SearchIndex:
        rows = _rows(self.options.corpus, "corpus")
        return SearchIndex(Passage(title=_text(r, "title", w), text=_text(r, "text", w)) for w, r in rows)


def cut(text: str, max_characters: int) -> str:
    """The text, or as many whole words of it as fit, and " [cut]"."""
    if len(text) <= max_characters:
        return text
    kept = text[: max_characters - 6]
    return (kept.rsplit(maxsplit=1)[0] if not text[len(kept)].isspace() and " " in kept else kept.rstrip()) + " [cut]"


def _rows(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", row) of a JSON-lines file. Raises ConfigError naming the line that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}:{number}: want one JSON object per line, got a {type(row).__name__}.")
                yield f"{path}:{number}", row
    except OSError as error:
        raise ConfigError(f"environment.options.{option}: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ConfigError(f"environment.options.{option}: {path} is not JSON lines: {error}.") from error


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or (not value and key != "text"):
        raise ConfigError(f'{where}: "{key}" is missing or no text.')
    return value
