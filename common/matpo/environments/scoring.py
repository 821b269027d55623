"""How a final answer and a tree's calls are scored. Pure text; shared by the built-in environments.

`normalise`, `exact_match` and `f1` are the standard ones of SQuAD and of the MuSiQue and HotpotQA evaluations:
lower case, no punctuation, no articles, single spaces; the best score over all accepted answers counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from matpo.episode import Episode, Segment

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKED = re.compile(r"\\boxed\{([^{}]*)\}|(?:^|\n)\s*(?:final )?answer\s*:\s*([^\n]*)", re.IGNORECASE)


def normalise(text: str) -> str:
    """Lower case, punctuation and articles removed, white space collapsed. "The Sol." -> "sol"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Iterable[str]) -> float:
    """1.0 if the normalised answer equals a normalised accepted one, else 0.0. An empty answer is never right."""
    given = normalise(answer)
    return float(bool(given) and any(given == normalise(a) for a in accepted))


def f1(answer: str, accepted: Iterable[str]) -> float:
    """Best F1 over the accepted answers, of bags of normalised words; yes, no and noanswer match only themselves."""
    return max((_f1(normalise(answer), normalise(a)) for a in accepted), default=0.0)


def _f1(given: str, wanted: str) -> float:
    if given != wanted and {given, wanted} & {"yes", "no", "noanswer"}:
        return 0.0
    given_words, wanted_words = given.split(), wanted.split()
    num_common = sum((Counter(given_words) & Counter(wanted_words)).values())
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(given_words), num_common / len(wanted_words)
    return 2 * precision * recall / (precision + recall)


def marked_answer(text: str) -> str:
    r"""The answer in an agent's last message: the last \boxed{...} or "Answer: ..." line if there is one, else all."""
    marks = _MARKED.findall(text)
    if not marks:
        return text.strip()
    boxed, line = marks[-1]
    return str(boxed or line).strip()


def format_share(episode: Episode, without_workers: float | None) -> float:
    """fmt = (fmt_root + mean fmt_workers) / 2, each the share of well-formed calls of a segment (1.0 without calls).

    Source: MATPO, arXiv 2510.04678. There a planner that delegates nothing gets fmt_workers = 0, a hidden push to
    delegate; here that number is `without_workers`, and None leaves fmt to the root alone (a single agent).
    """
    root, workers = _share(episode.segments[:1]), episode.segments[1:]
    if workers:
        return (root + sum(_share([w]) for w in workers) / len(workers)) / 2
    return root if without_workers is None else (root + without_workers) / 2


def _share(segments: Sequence[Segment]) -> float:
    num_calls = sum(s.num_calls for s in segments)
    return 1.0 - sum(s.num_malformed_calls for s in segments) / num_calls if num_calls else 1.0
