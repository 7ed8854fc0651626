"""Generated tasks of RULER's kinds (Hsieh et al., 2024, arXiv:2404.06654): every context is new, its answer known.

A question ends with the beginning of its answer, so that a model that continues texts can answer it. Small models solve
some of them at short lengths only: results stand beside the uncompressed model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from winnow.engine.evaluation.haystack import Haystack
from winnow.engine.evaluation.words import CITIES, FIRST_NAMES, JOBS, LAST_NAMES, WORDS


@dataclass(frozen=True)
class Sample:
    context: str
    question: str
    answers: tuple[str, ...]
    right: str
    """How the question's text goes on where all of them are said"""

    def score(self, said: str) -> float:
        """Share of the answers that are among the words of what was said."""
        words = set(re.findall(r"\w+", said.lower()))
        return sum(answer.lower() in words for answer in self.answers) / len(self.answers)


Make = Callable[[Haystack, int, Random], Sample]


@dataclass(frozen=True)
class Task:
    title: str
    chance: str
    """What guessing gives"""
    new: int
    """Tokens that an answer may take"""
    make: Make


def sample(name: str, haystack: Haystack, tokens: int, index: int) -> Sample:
    """The same one each time: it depends on its task, length and number, and on the text."""
    seed = int.from_bytes(sha256(f"{name}/{tokens}/{index}".encode()).digest()[:8], "big")
    return TASKS[name].make(haystack, tokens, Random(seed))


def _number(rng: Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _needle(key: str, value: str) -> str:
    return f"The special magic number for {key} is {value}."


def _ask(key: str) -> str:
    return f"\n\nQuestion: What is the special magic number for {key}?\nAnswer: The special magic number for {key} is"


def _needles(keys: int) -> Make:
    """One of several keys is asked for."""

    def make(haystack: Haystack, tokens: int, rng: Random) -> Sample:
        numbers = {key: _number(rng) for key in rng.sample(WORDS, keys)}
        asked = rng.choice(list(numbers))
        context = haystack.around([_needle(*pair) for pair in numbers.items()], tokens, rng)
        return Sample(context, _ask(asked), (numbers[asked],), f" {numbers[asked]}")

    return make


def _values(haystack: Haystack, tokens: int, rng: Random) -> Sample:
    key, values = rng.choice(WORDS), [_number(rng) for _ in range(3)]
    needles = [f"One of the special magic numbers for {key} is {value}." for value in values]
    question = (
        f"\n\nQuestion: What are all the special magic numbers for {key}?\n"
        f"Answer: The special magic numbers for {key} are"
    )
    right = f" {values[0]}, {values[1]} and {values[2]}"
    return Sample(haystack.around(needles, tokens, rng), question, tuple(values), right)


def _variables(haystack: Haystack, tokens: int, rng: Random) -> Sample:
    """A chain of assignments: who holds the value at its start?"""
    first, second, third = ("".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3)) for _ in range(3))
    value = _number(rng)
    needles = [f"VAR {first} = {value}.", f"VAR {second} = VAR {first}.", f"VAR {third} = VAR {second}."]
    question = (
        f"\n\nQuestion: Which three variables are assigned the value {value}?\n"
        f"Answer: The variables that are assigned {value} are VAR"
    )
    right = f" {first}, VAR {second}, VAR {third}"
    return Sample(haystack.around(needles, tokens, rng), question, (first, second, third), right)


def _common_words(haystack: Haystack, tokens: int, rng: Random) -> Sample:
    """A list in which three words come again and again, and the others seldom."""
    words = rng.sample(WORDS, 30)
    common, rare = words[:3], words[3:]
    chosen = [rng.choice(common) if rng.random() < 0.5 else rng.choice(rare) for _ in range(tokens // 2)]
    context = haystack.fit([f"{i}. {word}" for i, word in enumerate(chosen, 1)], tokens)
    question = "\n\nQuestion: What are the three most common words in the list above?\nAnswer: They are:\n1."
    return Sample(context, question, tuple(common), f" {common[0]}\n2. {common[1]}\n3. {common[2]}")


def _facts(haystack: Haystack, tokens: int, rng: Random) -> Sample:
    """People in a long document; one of them is asked for in other words than the document's."""
    people = [" ".join(name) for name in zip(rng.sample(FIRST_NAMES, 4), rng.sample(LAST_NAMES, 4), strict=True)]
    cities, jobs = rng.sample(CITIES, 4), rng.sample(JOBS, 4)
    facts = [
        f"{person} is a {job} who lives in {city}." for person, job, city in zip(people, jobs, cities, strict=True)
    ]
    asked = rng.randrange(4)
    question = f"\n\nQuestion: In which city does {people[asked]} live?\nAnswer: {people[asked]} lives in"
    return Sample(haystack.around(facts, tokens, rng), question, (cities[asked],), f" {cities[asked]}")


TASKS: dict[str, Task] = {
    "niah_single": Task("one needle", "0", 8, _needles(1)),
    "niah_multikey": Task("one of four needles", "0; 25 % for any needle's number", 8, _needles(4)),
    "niah_multivalue": Task("all three values of a key", "0", 28, _values),
    "variables": Task("a chain of three variables", "0; a third for the last one named", 24, _variables),
    "common_words": Task("the three commonest words of a list", "10 %", 16, _common_words),
    "qa": Task("a question about one of four people in a document", "25 % for any city named", 6, _facts),
}
