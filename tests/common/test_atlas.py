import re
import subprocess
import sys

import pytest

from matpo.episode import Episode, Task
from matpo.errors import ConfigError
from matpo.plugins import load_environment

EASY = {
    "hops": [2], "num_cities": 600, "city_pattern": "[A-Z][a-z]{2,9}", "num_results": 2, "facts_per_passage": 1,
    "noise_sentences": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def easy():
    environment = load_environment("atlas", None, EASY)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def full():
    environment = load_environment("atlas", None, {"num_cities": 2000})
    yield environment
    environment.close()


def played(answer):
    task = Task(id="1", environment="atlas", question="?", data={"answers": ["Bogotá", "COP"]})
    return task, Episode(id="g.0.0", group="g", member=0, attempt=0, task=task, segments=[], answer=answer, reward=0.0)


def test_train_and_test_share_no_city(full):
    def cities(split):
        return {task.data["chain"][0]["fact"] for task in full.tasks(split)}

    assert len(cities("train")) == 1800
    assert not cities("train") & cities("test")


def test_another_process_makes_the_same_tasks_and_passages(easy):
    code = (
        "from matpo.plugins import load_environment;"
        f"e = load_environment('atlas', None, {EASY!r}); t = e.tasks('test')[7];"
        "print([t.id, t.question, t.data, e.search(query=t.data['chain'][0]['fact'])])"
    )
    task = easy.tasks("test")[7]
    here = [task.id, task.question, task.data, easy.search(query=task.data["chain"][0]["fact"])]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert there.strip() == str(here)


def test_no_other_city_or_country_bears_an_asked_city_s_name(full):
    from matpo.environments.atlas import _cities, _countries

    names = [c.name.casefold() for c in _cities()] + [c.name.casefold() for c in _countries().values()]
    for task in full.tasks("test"):
        assert names.count(task.data["chain"][0]["fact"].removeprefix("country of ").casefold()) == 1


def test_every_link_of_a_chain_can_be_found_by_searching_for_it(easy):
    chains = [link for task in easy.tasks("test") for link in task.data["chain"]]
    missing = [link for link in chains if link["answer"] not in easy.search(query=link["fact"])]
    assert len(missing) <= 0.02 * len(chains)


def test_three_hop_chains_can_be_found_among_noise(full):
    chains = [link for task in full.tasks("test")[:40] if task.data["hops"] == 3 for link in task.data["chain"]]
    missing = [link for link in chains if link["answer"] not in full.search(query=link["fact"])]
    assert chains
    assert len(missing) <= 0.1 * len(chains)


def test_two_and_three_hops_are_both_asked(full):
    assert {task.data["hops"] for task in full.tasks("test")} == {2, 3}


def test_a_question_names_its_links_from_the_last_to_the_first(full):
    task = next(t for t in full.tasks("test") if t.data["hops"] == 3)
    asked = [link["fact"].split(" of ")[0] for link in task.data["chain"]]
    assert re.search(f"the {asked[2]} of the {asked[1]} of the country where", task.question)


def test_distractors_come_with_the_passage(easy):
    city = easy.tasks("test")[0].data["chain"][0]["fact"].removeprefix("country of ")
    assert sorted(line.split(" in ")[0] for line in easy.search(query=city).splitlines()) == [
        "A street",
        f"{city} is a city",
    ]


@pytest.mark.parametrize("option", ["num_results", "noise_sentences", "facts_per_passage"])
def test_noise_length_and_number_of_results_are_options(easy, option):
    more = load_environment("atlas", None, {**EASY, option: 4})
    fact = easy.tasks("test")[0].data["chain"][option == "facts_per_passage"]["fact"]
    assert len(more.search(query=fact)) > len(easy.search(query=fact))
    more.close()


@pytest.mark.parametrize(
    ("answer", "accuracy"), [("bogota.", 1.0), ("The Bogotá", 1.0), ("cop", 1.0), ("Lima", 0.0), ("", 0.0)]
)
def test_answers_match_whatever_their_case_accents_and_articles(easy, answer, accuracy):
    assert easy.reward(*played(answer))["accuracy"] == accuracy


def test_reward_is_mostly_accuracy(easy):
    assert easy.reward(*played("Lima"))["reward"] == pytest.approx(0.1)
    assert easy.reward(*played("Bogotá"))["reward"] == pytest.approx(1.0)


def test_an_unknown_split_is_refused(easy):
    with pytest.raises(ConfigError, match='no split "dev"'):
        easy.tasks("dev")


@pytest.mark.parametrize("options", [{"city_pattern": "("}, {"city_pattern": "xyz"}])
def test_a_city_pattern_that_cannot_work_is_refused(options):
    with pytest.raises(ConfigError, match="city_pattern"):
        load_environment("atlas", None, options).tasks("train")
