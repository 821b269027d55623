import json
import string
from pathlib import Path

import numpy as np
import pytest

from matpo.environments.multihop import cut
from matpo.environments.scoring import exact_match, f1, format_share, marked_answer, normalise
from matpo.episode import Episode, Segment, Task
from matpo.errors import ConfigError
from matpo.plugins import load_environment

REAL = Path(__file__).parents[3] / "shared" / "data" / "multihop"


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path):
    def build(questions=None, corpus=None, **options):
        questions = questions or [{"id": f"q{i}", "question": f"Who is {i}?", "answer": str(i)} for i in range(200)]
        corpus = corpus or [{"title": "Lima", "text": "Lima is the capital of Peru."}]
        paths = {"questions": lines(tmp_path / "q.jsonl", questions), "corpus": lines(tmp_path / "c.jsonl", corpus)}
        return load_environment("multihop", None, {k: str(v) for k, v in paths.items()} | options)

    return build


def segment(index=0, calls=0, malformed=0):
    empty = np.zeros(0, dtype=np.int32)
    return Segment(
        index=index, parent=index - 1, role="r", token_ids=empty, sampled=empty.astype(bool), versions=empty,
        logprobs=empty.astype(np.float32), num_calls=calls, num_malformed_calls=malformed,
    )  # fmt: skip


def episode(task, answer, segments=None):
    return Episode(
        id="g.0.0",
        group="g",
        member=0,
        attempt=0,
        task=task,
        segments=segments or [segment()],
        answer=answer,
        reward=0.0,
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("The Sol.", "sol"), ("  A  B, c ", "b c"), ("An apple-pie", "applepie"), ("theatre", "theatre")],
)
def test_normalisation_is_the_one_of_squad(given, wanted):
    assert normalise(given) == wanted


def test_f1_agrees_with_a_plain_loop():
    def plain(a, b):
        left = list(b.split())
        common = 0
        for word in a.split():
            if word in left:
                left.remove(word)
                common += 1
        if not common:
            return 0.0
        p, r = common / len(a.split()), common / len(b.split())
        return 2 * p * r / (p + r)

    words = [" ".join(string.ascii_lowercase[1:][(i * j) % 7] for j in range(1, 5)) for i in range(8)]
    for a in words:
        for b in words:
            assert f1(a, [b]) == pytest.approx(plain(a, b))


def test_the_best_alias_counts():
    assert exact_match("Stanley Hall", ["G. Stanley Hall", "stanley hall"]) == 1.0
    assert f1("Stanley Hall", ["nobody", "G. Stanley Hall"]) == pytest.approx(0.8)


def test_yes_does_not_share_words_with_a_longer_answer():
    assert f1("yes", ["yes it is"]) == 0.0


def test_an_empty_answer_is_never_right():
    assert exact_match("the", ["", "a"]) == 0.0


def test_the_last_marked_answer_is_taken():
    assert marked_answer("Answer: Lima\nno wait\nanswer: Cusco ") == "Cusco"
    assert marked_answer(r"so \boxed{Lima}") == "Lima"
    assert marked_answer(" Lima ") == "Lima"


def test_format_of_a_team_is_the_mean_of_root_and_workers():
    played = [segment(0, calls=2, malformed=1), segment(1, calls=4, malformed=1), segment(2)]
    assert format_share(episode(None, "", played), None) == pytest.approx((0.5 + (0.75 + 1.0) / 2) / 2)


@pytest.mark.parametrize(("without", "wanted"), [(None, 1.0), (0.0, 0.5), (1.0, 1.0)])
def test_format_without_workers_is_what_the_option_says(without, wanted):
    assert format_share(episode(None, "", [segment(0, calls=1)]), without) == wanted


def test_reward_weighs_accuracy_and_format(make):
    environment = make()
    task = Task(id="1", environment="multihop", question="?", data={"answers": ["Lima"]})
    scored = environment.reward(task, episode(task, "lima", [segment(0, calls=2, malformed=1)]))
    assert scored["reward"] == pytest.approx(0.9 + 0.05)


def test_splits_are_disjoint_and_whole(make):
    environment = make()
    train, test = ({t.id for t in environment.tasks(s)} for s in ("train", "test"))
    assert not train & test
    assert len(train | test) == 200
    assert 20 <= len(test) <= 60


def test_adding_questions_moves_no_other_one(make):
    more = [{"id": f"q{i}", "question": f"Who is {i}?", "answer": str(i)} for i in range(300)]
    before = {t.id for t in make().tasks("test")}
    assert before <= {t.id for t in make(questions=more).tasks("test")}


def test_search_takes_words_never_syntax(make):
    environment = make()
    for query in ('peru" OR title:*', "NEAR(peru lima)", "peru AND NOT peru", "-peru", "'; DROP TABLE passages"):
        environment.search(query=query)
    assert environment.search(query="capital of peru") == "[Lima] Lima is the capital of Peru."


def test_search_without_a_known_word_says_so(make):
    assert make().search(query="?!") == "Nothing found."


def test_long_passages_are_cut_in_search_and_fetch(make):
    environment = make(
        corpus=[{"title": "Long", "text": "word " * 5000}], max_search_characters=100, max_fetch_characters=300
    )
    assert len(environment.search(query="word")) <= 100 + len("[Long] ")
    assert len(environment.fetch(title="long")) <= 300


def test_a_cut_text_keeps_whole_words():
    assert cut("alpha beta gamma", 16) == "alpha beta gamma"
    assert cut("alpha beta gamma", 15) == "alpha [cut]"


def test_fetch_gives_all_passages_of_a_title(make):
    environment = make(
        corpus=[
            {"title": "Law", "text": "One."},
            {"title": "Law school", "text": "No."},
            {"title": "law", "text": "Two."},
        ]
    )
    assert environment.fetch(title=" LAW ") == "One.\nTwo."


def test_fetch_of_an_unknown_title_is_an_answer_not_an_error(make):
    assert make().fetch(title="Nowhere") == 'There is no passage titled "Nowhere". Search for one.'


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "1", "question": "?"}], 'q.jsonl:1: "answer"'),
        ([{"id": "1", "question": "?", "answer": "a"}] * 2, "an id twice"),
        ([["id"]], "want one JSON object per line"),
        ([{"id": "1", "question": "?", "answer": "a", "answer_aliases": "b"}], "answer_aliases"),
    ],
)
def test_bad_question_files_are_named(make, rows, says):
    with pytest.raises(ConfigError, match=says):
        make(questions=rows).tasks("train")


def test_a_missing_file_is_named(make):
    environment = make()
    environment.options.questions.unlink()
    with pytest.raises(ConfigError, match=r"environment\.options\.questions: cannot read"):
        environment.tasks("train")


@pytest.mark.parametrize("name", ["musique", "hotpotqa"])
def test_real_questions_are_found_and_scored(name):
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there: real MuSiQue and HotpotQA files are not shipped with the project")
    options = {"questions": str(REAL / f"{name}_train.jsonl"), "corpus": str(REAL / f"{name}_corpus.jsonl")}
    environment = load_environment("multihop", None, options)
    tasks = [*environment.tasks("train"), *environment.tasks("test")]
    assert len(tasks) == 100
    for task in tasks:
        assert environment.reward(task, episode(task, task.data["answers"][0]))["reward"] == 1.0
        assert len(environment.search(query=task.question)) < 2000
    found = [
        title for t in tasks for title in t.data["supporting"] if f"[{title}]" in environment.search(query=t.question)
    ]
    assert len(found) > 50
    environment.close()
