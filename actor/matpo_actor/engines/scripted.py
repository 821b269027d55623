"""An engine that says what it is told to: for tests without a model, and to write episodes for a warm start."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from matpo.errors import ConfigError, InfraError
from matpo_actor.engines.base import Sampled

Said = str | Sequence[int]
Policy = Callable[[str], Said | Awaitable[Said]]
"""From the text of the prompt to what is said: text (the stop token is added), or ids as they are."""


class ScriptedEngine:
    """Plays a policy given as a function. Every token gets the same log-prob and the current version."""

    def __init__(self, policy: Policy, tokenizer: Any, *, version: int = 0, logprob: float = 0.0) -> None:
        self.version = version
        self._policy = policy
        self._tokenizer = tokenizer
        self._logprob = logprob

    async def start(self) -> None:
        """Nothing to get ready."""

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Collection[int], seed: int | None = None
    ) -> Sampled:
        """What the policy says to this prompt, cut to max_tokens."""
        prompt = self._tokenizer.decode(list(prompt_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        said = self._policy(prompt)
        if inspect.isawaitable(said):
            said = await said
        if isinstance(said, str):
            ids = [*self._tokenizer(said, add_special_tokens=False)["input_ids"], next(iter(stop_ids))]
        else:
            ids = list(said)
        ids = ids[:max_tokens]
        return Sampled(
            token_ids=ids,
            logprobs=[self._logprob] * len(ids),
            versions=[self.version] * len(ids),
            finish="stop" if ids and ids[-1] in stop_ids else "length",
        )

    async def load(self, folder: Path, version: int) -> float:
        """Take the version; there are no weights."""
        self.version = version
        return 0.0

    async def close(self) -> None:
        """Nothing to free."""


def load_script(path: Path) -> Policy:
    """The policy of a JSON-lines file: {"when": regular expression, "say": text}; the first match wins.

    `when` is searched for in the last 2,000 characters of the prompt; without it the line always matches.
    Raises ConfigError when the file cannot be used.
    """
    rules: list[tuple[re.Pattern[str], str]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the script {path}: {error}. Set actor.script.") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            rules.append((re.compile(entry.get("when", ""), re.DOTALL), str(entry["say"])))
        except (ValueError, KeyError, AttributeError, re.error) as error:
            raise ConfigError(
                f'{path}:{number}: want {{"when": regular expression, "say": text}}: {error!r}'
            ) from error

    def policy(prompt: str) -> str:
        tail = prompt[-2000:]
        for when, say in rules:
            if when.search(tail):
                return say
        raise InfraError(f"no line of {path} matches the prompt that ends with {tail[-80:]!r}", reason="script")

    return policy
