"""The multihop environment: files, splits, scores, and the real MuSiQue and HotpotQA files where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from matpo.environments.multihop import Multihop
from matpo.environments.scoring import exact_match, f1, normalise
from matpo.episode import Episode, Segment, Task
from matpo.errors import ConfigError
from matpo.plugins import load_environment

REAL = Path(__file__).parents[3] / "shared" / "data" / "multihop"
QUESTIONS = [{"id": f"q{i}", "question": f"Question {i}?", "answer": f"Answer {i}"} for i in range(200)]
PASSAGES = [
    {"title": "Cusco", "text": "Cusco is a city in Peru. " + "Long. " * 1000},
    {"title": "Peru", "text": "The currency of Peru is the sol."},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def environment(folder: Path, questions: list = QUESTIONS, passages: list = PASSAGES, **options: object) -> Multihop:
    files = {"questions": write(folder / "q.jsonl", questions), "passages": write(folder / "p.jsonl", passages)}
    found = load_environment("multihop", None, {**files, **options})
    assert isinstance(found, Multihop)
    return found


def episode(answer: str, task: Task) -> Episode:
    ids = np.array([1, 2], dtype=np.int32)
    planner = Segment(
        index=0,
        parent=-1,
        role="planner",
        token_ids=ids,
        sampled=np.array([False, True]),
        logprobs=np.zeros(2, dtype=np.float32),
        versions=np.array([-1, 0], dtype=np.int32),
        num_calls=4,
        num_malformed_calls=1,
    )
    return Episode(id="g.0.0", group="g", member=0, attempt=0, task=task, segments=(planner,), answer=answer, reward=0)


def test_the_splits_share_no_question_and_lose_none(tmp_path: Path) -> None:
    multihop = environment(tmp_path)
    train, test = ({t.id for t in multihop.tasks(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 200
    assert 15 <= len(test) <= 70


def test_more_questions_move_none_from_train_to_test(tmp_path: Path) -> None:
    few = {t.id for t in environment(tmp_path, QUESTIONS[:50]).tasks("test")}
    assert few <= {t.id for t in environment(tmp_path).tasks("test")}


def test_a_long_passage_is_cut(tmp_path: Path) -> None:
    found = environment(tmp_path, passage_chars=100).search("Cusco")
    assert len(found) < 120
    assert found.startswith("Cusco\nCusco is a city in Peru.")


def test_a_passage_is_fetched_by_its_title(tmp_path: Path) -> None:
    multihop = environment(tmp_path)
    assert multihop.fetch("peru") == "Peru\nThe currency of Peru is the sol."
    assert "There is no passage" in multihop.fetch("Chile")


@pytest.mark.parametrize("query", ['"', "NEAR(", "title:*", "a OR", "'; DROP TABLE passages; --", ""])
def test_a_query_is_words_and_never_syntax(tmp_path: Path, query: str) -> None:
    multihop = environment(tmp_path)
    multihop.search(query)
    assert "sol" in multihop.search("currency")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "1", "question": "?"}], r"q.jsonl:1: wants a text for answer"),
        ([{"id": "1", "question": "?", "answer": 3}], r"q.jsonl:1: wants a text for answer"),
        ([[1]], r"q.jsonl:1: wants a text for id, question, answer"),
        ([{"id": "1", "question": "?", "answer": "x", "answer_aliases": "y"}], "answer_aliases is not a list"),
        ([QUESTIONS[0], QUESTIONS[0]], "same id"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment(tmp_path, rows).tasks("train")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    options = {"questions": tmp_path / "none.jsonl", "passages": tmp_path / "none.jsonl"}
    with pytest.raises(ConfigError, match=r"none.jsonl: No such file"):
        load_environment("multihop", None, options).tasks("train")


# Expected values by hand from the definition in the SQuAD evaluation (lower, punctuation, articles, white space).
@pytest.mark.parametrize(
    ("answer", "accepted", "em", "score"),
    [
        ("The Sol.", ["sol"], 1.0, 1.0),
        ("G. Stanley Hall", ["Stanley Hall"], 0.0, 0.8),
        ("in New York City", ["New York"], 0.0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("", ["x"], 0.0, 0.0),
        ("yes it is", ["yes"], 0.0, 0.0),
        ("b", ["a b", "b c d"], 1.0, 1.0),
    ],
)
def test_answers_are_scored_by_the_standard_definition(answer: str, accepted: list, em: float, score: float) -> None:
    assert exact_match(answer, accepted) == em
    assert f1(answer, accepted) == pytest.approx(score)


def test_normalisation_is_that_of_squad() -> None:
    assert normalise("  The  U.S.A., an   Apple-pie!") == "usa applepie"


def test_the_reward_is_made_of_the_chosen_score_and_the_format_share(tmp_path: Path) -> None:
    multihop = environment(tmp_path, score="f1", format_weight=0.1)
    task = Task(id="1", environment="multihop", question="?", data={"answers": ["Stanley Hall"]})
    found = multihop.reward(task, episode("G. Stanley Hall", task))
    assert found == pytest.approx({"reward": 0.9 * 0.8 + 0.1 * 0.75, "em": 0.0, "f1": 0.8, "format": 0.75})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MuSiQue and HotpotQA files are not shipped")
@pytest.mark.parametrize("name", ["musique", "hotpotqa"])
def test_the_real_files_load_and_the_supporting_passages_are_found(name: str) -> None:
    files = {"questions": REAL / f"{name}_train.jsonl", "passages": REAL / f"{name}_corpus.jsonl"}
    multihop = load_environment("multihop", None, files)
    assert isinstance(multihop, Multihop)
    tasks = [*multihop.tasks("train"), *multihop.tasks("test")]
    assert len(tasks) == 100
    titles = {title for task in tasks for title in task.data["supporting"]}
    fetched = [multihop.fetch(title) for title in sorted(titles)]
    assert sum("There is no passage" not in text for text in fetched) >= 0.95 * len(fetched)
    assert all(len(text) < 1400 for text in fetched)
