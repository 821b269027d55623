"""Multi-hop questions and a corpus of passages, from files: the formats of MuSiQue, HotpotQA and 2Wiki.

    questions   JSON lines: id, question, answer, and if there are any answer_aliases (other keys are kept for display)
    passages    JSON lines: title, text

Rules kept here; tests in tests/common/test_multihop.py:
1. The split of a question depends on its id alone: adding questions moves no other one from train to test.
2. A line that is not what it should be is a ConfigError that names file and line.
3. Whatever a tool returns is cut to `passage_chars` a passage, so that one long article cannot fill a context.
"""

from __future__ import annotations

import functools
import hashlib
import json
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
    "planner": "Answer the question. Delegate one small subtask at a time to the worker; it can search a collection of "
    "passages and knows nothing of the question but what you tell it. End with the answer alone, in \\boxed{}.",
    "worker": "Do the subtask with the tools. End with a short reply that states what you found.",
    "agent": "Answer the question with the tools, one fact at a time. End with the answer alone, in \\boxed{}.",
}


class Multihop(Environment):
    """Questions whose answer needs several passages."""

    class Options(BaseModel):
        """[environment.options] of multihop."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        questions: Path
        """JSON lines with the questions."""
        passages: Path
        """JSON lines with the passages."""
        test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
        """Share of the questions that are held out."""
        score: Literal["em", "f1"] = "em"
        """What the reward is made of; both are recorded."""
        num_results: Annotated[int, Field(ge=1, le=50)] = 3
        """Passages that one search returns."""
        passage_chars: Annotated[int, Field(ge=16)] = 1200
        """Each passage that a tool returns is cut to this length."""
        format_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
        """reward = (1 - format_weight) score + format_weight format."""
        format_without_workers: Annotated[float, Field(ge=0, le=1)] | None = None
        """Workers' share of `format` when nothing was delegated; unset: the root's share alone. The paper has 0."""

    def tasks(self, split: str) -> Sequence[Task]:
        """The questions of a split, in the file's order."""
        if split not in ("train", "test"):
            raise ConfigError(f'multihop has no split "{split}". Use "train" or "test".')
        return [task for task in self._questions if self._is_test(task.id) == (split == "test")]

    @tool(timeout_s=20)
    def search(self, query: str) -> str:
        """Find passages about `query`. Each is shown with its title."""
        found = self._index.search(query, self.options.num_results)
        return "\n\n".join(self._shown(passage) for passage in found) or "Nothing found. Try other words."

    @tool(timeout_s=20)
    def fetch(self, title: str) -> str:
        """Read the passage with this title."""
        passage = self._index.fetch(title)
        return self._shown(passage) if passage else f'There is no passage with the title "{title[:200]}". Use search.'

    def reward(self, task: Task, episode: Episode) -> Mapping[str, float]:
        """Exact match or F1 of the final answer over all accepted answers, and the share of well-formed calls."""
        answers = task.data["answers"]
        components = {"em": exact_match(episode.answer, answers), "f1": f1(episode.answer, answers)}
        form = format_share(episode, self.options.format_without_workers)
        weight = self.options.format_weight
        return {
            "reward": (1 - weight) * components[self.options.score] + weight * form,
            **components,
            "format": form,
        }

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

    def _shown(self, passage: Passage) -> str:
        text = passage.text
        cut = text if len(text) <= self.options.passage_chars else text[: self.options.passage_chars].rstrip() + " ..."
        return f"{passage.title}\n{cut}"

    def _is_test(self, task_id: str) -> bool:
        digest = hashlib.blake2b(task_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64 < self.options.test_fraction

    @functools.cached_property
    def _questions(self) -> list[Task]:
        tasks = [_task(row, where) for row, where in _rows(self.options.questions, ("id", "question", "answer"))]
        if len({task.id for task in tasks}) != len(tasks):
            raise ConfigError(f"{self.options.questions}: two questions have the same id. Make them unique.")
        return tasks

    @functools.cached_property
    def _index(self) -> SearchIndex:
        rows = _rows(self.options.passages, ("title", "text"))
        return SearchIndex(Passage(title=row["title"], text=row["text"]) for row, _ in rows)


def _task(row: Mapping[str, Any], where: str) -> Task:
    aliases = row.get("answer_aliases", [])
    if not (isinstance(aliases, list) and all(isinstance(a, str) for a in aliases)):
        raise ConfigError(f"{where}: answer_aliases is not a list of texts.")
    extra = {key: value for key, value in row.items() if key not in ("id", "question", "answer", "answer_aliases")}
    data = {"answers": [row["answer"], *aliases], **extra}
    return Task(id=row["id"], environment="multihop", question=row["question"], data=data)


def _rows(path: Path, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """JSON objects of a file, each with the text keys asked for, and their "file:line"."""
    try:
        lines = path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Set [environment.options] to files that exist.") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not a JSON object: {error.msg}.") from None
            missing = [key for key in keys if not (isinstance(row, dict) and isinstance(row.get(key), str))]
            if missing:
                raise ConfigError(f"{where}: wants a text for {', '.join(missing)}.")
            yield row, where
