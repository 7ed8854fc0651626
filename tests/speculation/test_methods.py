"""What the methods guess, against plain searches, and what follows from one line in their registry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.pages import Ints
from winnow.engine.sampler import Sampler
from winnow.engine.sampling import SamplingTable
from winnow.engine.speculation.method import MethodParams, Tools
from winnow.engine.speculation.methods.prompt_lookup import Continuations
from winnow.engine.speculation.methods.token_recycling import SALTS, TokenRecycling
from winnow.engine.speculation.registry import METHODS, drafter_class
from winnow.engine.speculation.speculation import (
    Speculation,
    check_combination,
    parse_speculation,
    speculation_model,
    speculation_schema,
)

VOCAB = 50


# The registry ------------------------------------------------------------------------------------------------------


def test_one_file_and_one_line_per_method() -> None:
    folder = Path(import_module("winnow.engine.speculation.methods").__path__[0])
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_conforms(name: str) -> None:
    method = drafter_class(name)
    assert issubclass(method.Params, MethodParams)
    assert all(knob.description for knob in method.Params.model_fields.values())
    assert not {"method"} & set(method.Params.model_fields)
    assert (method.__doc__ or "").strip()
    parsed = parse_speculation({"method": name})
    assert isinstance(parsed, speculation_model(name))
    assert isinstance(parsed, method.Params)
    assert speculation_schema()[name]["properties"]["method"]["const"] == name
    assert parse_speculation(parsed.model_dump()) == parsed


def test_knobs_are_read_without_torch() -> None:
    code = "import winnow.engine.speculation.speculation, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        ([], "speculative", "must be an object"),
        ({"tokens": 3}, "speculative.method", "must be one of prompt_lookup"),
        ({"method": "magic"}, "speculative.method", "must be one of prompt_lookup"),
        ({"method": ["prompt_lookup"]}, "speculative.method", "must be one of"),
        ({"method": "prompt_lookup", "tokens": 0}, "speculative.tokens", "must be at least 1"),
        ({"method": "prompt_lookup", "tokens": 33}, "speculative.tokens", "must be at most 32"),
        ({"method": "prompt_lookup", "tokens": True}, "speculative.tokens", "must be a whole number"),
        ({"method": "prompt_lookup", "ngram": 3}, "speculative.ngram", "known here: tokens"),
        ({"method": "prompt_lookup", "ngram_max": 1}, "speculative", "ngram_min must be at most ngram_max"),
        ({"method": "token_recycling", "ngram_max": 3}, "speculative.ngram_max", "known here: tokens, method"),
    ],
)
def test_refusals_name_the_field(data: object, param: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_speculation(data)
    assert error.value.param == param
    assert message in error.value.message


@pytest.mark.parametrize(
    ("evict", "allowed"),
    [
        ({"policy": "h2o", "budget": 0.5}, True),
        ({"policy": "h2o", "budget": 0.5, "during": "both"}, False),
        ({"policy": "h2o", "budget": 1.0, "during": "both"}, True),  # evicts nothing
        ({"policy": "snapkv", "budget": 0.5, "during": "both", "interval": 32}, False),  # a window of 64
        ({"policy": "snapkv", "budget": 0.5, "during": "decode", "interval": 65}, True),
        ({"policy": "tova", "budget": 0.5, "during": "both", "interval": 1}, False),
        ({"policy": "tova", "budget": 0.5, "during": "both", "interval": 2}, True),
        ({"policy": "knorm", "budget": 0.5, "during": "both", "interval": 1}, True),
    ],
)
def test_plans_under_which_every_token_votes_are_refused(evict: dict[str, object], allowed: bool) -> None:
    plan = Plan.parse({"kv": {"evict": evict}})
    speculation = parse_speculation({"method": "prompt_lookup"})
    check_combination(None, plan)
    if allowed:
        check_combination(speculation, plan)
        return
    with pytest.raises(PlanNotSupported, match=f"'{evict['policy']}'.*every new token votes") as error:
        check_combination(speculation, plan)
    assert error.value.param == "speculative"


# Prompt lookup -----------------------------------------------------------------------------------------------------


def looked_up(text: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """The paper's search, written out."""
    for order in range(min(longest, len(text) - 1), shortest - 1, -1):
        for at in range(len(text) - 1, order - 1, -1):
            if text[at - order : at] == text[-order:]:
                goes_on = list(text)
                while len(goes_on) < len(text) + count:
                    goes_on.append(goes_on[at + len(goes_on) - len(text)])
                return goes_on[len(text) :]
    return []


@pytest.mark.parametrize(("longest", "shortest"), [(4, 2), (1, 1), (8, 3)])
@pytest.mark.parametrize("vocab", [2, 9, 60])
def test_prompt_lookup_finds_the_longest_and_latest(longest: int, shortest: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    text = rng.integers(0, vocab, 600).tolist()
    text[300:380] = text[100:180]
    room: Ints = np.zeros(len(text) + 64, np.int32)
    room[: len(text)] = text
    tables = Continuations(room, longest, shortest)
    asked = found = displaced = 0
    length = 1
    while length < len(text):
        count = int(rng.integers(1, 9))
        guess = tables.after(length, count).tolist()
        wanted = looked_up(text[:length], longest, shortest, count)
        asked += 1
        found += bool(wanted)
        if guess != wanted:  # an n-gram has lost its place to another: then a shorter or no match is found
            displaced += 1
            ends = [text[:length][-order:] for order in range(shortest, longest + 1)]
            assert not guess or any(text[at - len(end) : at] == end for end in ends for at in range(len(end), length))
        length += int(rng.integers(1, 4))
    assert found > 15
    assert displaced <= asked * 0.02


def test_prompt_lookup_goes_on_with_a_text_that_repeats_itself() -> None:
    room: Ints = np.array([9, 1, 2, 3, 1, 2, 3, 1, *[0] * 20], np.int32)
    assert Continuations(room, 4, 2).after(8, 7).tolist() == [2, 3, 1, 2, 3, 1, 2]
    assert Continuations(room, 4, 2).after(1, 7).tolist() == []
    assert Continuations(room, 4, 2).after(4, 7).tolist() == []


# Token recycling ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Text:
    """As much of a sequence as the method looks at."""

    tokens: Ints
    length: int
    salt: str = ""
    speculation: Speculation | None = field(default_factory=lambda: parse_speculation({"method": "token_recycling"}))


def chain(method: TokenRecycling, last: int, count: int, salt: str = "") -> list[int]:
    text = Text(np.array([3, last], np.int32), 2, salt)
    (draft,) = method.propose([text], [count])  # type: ignore[list-item]
    return draft.tolist()


def learn(method: TokenRecycling, read: list[int], likeliest: list[int], salt: str = "") -> None:
    text = Text(np.zeros(1, np.int32), 1, salt)
    method.learn(text, np.array(read, np.int32), np.array(likeliest, np.int32))  # type: ignore[arg-type]


def test_token_recycling_follows_what_was_likeliest_last() -> None:
    method = TokenRecycling(Tools(SamplingTable(1, VOCAB), Sampler(), None))
    assert chain(method, 5, 4) == []
    learn(method, [5, 6, 7], [6, 7, 0])
    assert chain(method, 5, 4) == [6, 7, 0]
    assert chain(method, 5, 2) == [6, 7]
    assert chain(method, 5, 0) == []
    learn(method, [7, 9, 7], [8, 7, 5])  # the last reading of 7 counts, a wrong guess's too
    assert chain(method, 9, 6) == [7, 5, 6, 7, 5, 6]


def test_token_recycling_keeps_salts_apart_and_few() -> None:
    method = TokenRecycling(Tools(SamplingTable(1, VOCAB), Sampler(), None))
    learn(method, [5], [6], "a")
    assert chain(method, 5, 1, "b") == []
    for other in range(SALTS - 2):
        chain(method, 5, 1, str(other))
    assert chain(method, 5, 1, "a") == [6]
    chain(method, 5, 1, "one more")
    assert chain(method, 5, 1, "a") == [6], "it was used after the others"
    for other in range(SALTS):
        chain(method, 5, 1, str(other))
    assert chain(method, 5, 1, "a") == []
