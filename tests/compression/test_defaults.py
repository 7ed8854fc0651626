"""What a request leaves out is as in the papers or their code: a default that went astray shows here."""

from __future__ import annotations

from typing import Any

import pytest

from winnow.engine.compression.channels import WINDOW
from winnow.engine.compression.merge_plan import Merge, merge_model
from winnow.engine.compression.mix import Mix, mix_model
from winnow.engine.compression.plan import Evict, evict_model
from winnow.engine.compression.prompt.plan import Prompt, prompt_model
from winnow.engine.compression.read import read_model
from winnow.engine.compression.registry import EVICTION, MERGE, MIX, PROMPT, READ
from winnow.engine.speculation.registry import METHODS
from winnow.engine.speculation.speculation import Speculation, speculation_model

EVICT: dict[str, tuple[dict[str, Any], int]] = {
    # policy: (its own knobs, the newest tokens that it protects of a budget of 1000)
    "streaming_llm": ({"positions": "original", "block": 256}, 0),
    "snapkv": ({"window": 64, "pool": 5}, 64),
    "h2o": ({}, 500),
    "a2sf": ({"decay": 0.95}, 16),
    "keyformer": ({"temperature": 1.0, "heating": 0.01}, 300),
    "tova": ({}, 1),
    "knorm": ({}, 0),
    "keydiff": ({}, 0),
    "tri_attention": ({"horizon": 65536}, 128),
    "razor_attention": ({"induction": 0.14, "echo": 0.01, "floor": 0}, 0),
    "prompt_distill": ({"layer": None, "pool": 5, "lower": "truncate"}, 1),
    "ems": ({"window": 32}, 32),
    "lagkv": ({"lag": 128, "is_ranked": True}, 0),
    "expected_attention": ({"future": 512, "use_covariance": True, "use_values": True, "epsilon": 0.0}, 0),
    "lacache": ({"span": None, "overlap": 0}, 500),
    "kvzip": ({"chunk": 2048}, 0),
    "spec_kv": ({"lookahead": 32, "window": 64, "pool": 7}, 64),
    "random": ({}, 0),
}
MERGES: dict[str, dict[str, Any]] = {
    "kv_merging": {"threshold": 0.0, "fraction": 1.0, "proportional": False},
    "ems": {"candidates": 4.0, "threshold": 0.6},
    "compensation": {},
}
MIXES: dict[str, dict[str, Any]] = {
    "mikv": {"format": None, "rest": "int2"},
    "zipcache": {"format": "int4", "rest": "int2", "share": 0.6, "every": 100},
    "zipvl": {"format": "int4", "rest": "int2", "tau": 0.975, "every": 100},
    "mini_cache": {"format": "bf16", "rest": "mini_cache", "t": 0.6, "gamma": 0.05, "start": 0.5, "every": 64},
}
READS: dict[str, dict[str, Any]] = {
    "quest": {"tokens": 512, "sinks": 4, "recent": 64, "dense_layers": 2},
    "tidal_decode": {"tokens": 256, "sinks": 4, "recent": 64, "dense_layers": 2, "corrector": 0.4},
    "double_sparsity": {"tokens": 1 / 16, "sinks": 4, "recent": 64, "dense_layers": 2, "channels": 0.25},
    "token_select": {
        "tokens": 2048,
        "sinks": 128,
        "recent": 512,
        "dense_layers": 0,
        "pool": 1,
        "similarity": 0.9,
    },
}
PROMPTS: dict[str, dict[str, Any]] = {
    "selective": {"unit": "phrase"},
    "extractive": {"threshold": None},
    "llmlingua2": {},
    "spec_pc": {"window": 64, "pool": 64, "first_layer": None},
}
GUESSES: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"tokens": 4, "ngram_max": 4, "ngram_min": 2},
    "draft": {"tokens": 4},
    "token_recycling": {"tokens": 4},
}


def defaults(model: Any, *common: str) -> dict[str, Any]:
    """Of the knobs that are not among these."""
    return {name: field.default for name, field in model.model_fields.items() if name not in common}


def test_every_method_is_here() -> None:
    tables = ((EVICT, EVICTION), (MERGES, MERGE), (MIXES, MIX), (READS, READ), (PROMPTS, PROMPT), (GUESSES, METHODS))
    for table, registry in tables:
        assert list(table) == list(registry)


@pytest.mark.parametrize("name", EVICT)
def test_evictions(name: str) -> None:
    knobs, recent = EVICT[name]
    assert defaults(evict_model(name), *Evict.model_fields) == knobs
    evict = evict_model(name)(policy=name, budget=1000)
    assert evict.recent_tokens(1000) == recent
    assert (evict.sinks, evict.during, evict.interval) == (4, "prefill", 32)
    merges = {"ems": "ems", "razor_attention": "compensation"}
    assert (None if evict.merge is None else evict.merge.policy) == merges.get(name)


def test_others() -> None:
    for name in MERGES:
        assert defaults(merge_model(name), *Merge.model_fields) == MERGES[name]
    for name in MIXES:
        assert defaults(mix_model(name), "policy") == MIXES[name]
    for name in READS:
        assert defaults(read_model(name), "policy") == READS[name]
    for name in PROMPTS:
        assert defaults(prompt_model(name), *Prompt.model_fields) == PROMPTS[name]
    for name in GUESSES:
        assert defaults(speculation_model(name), "method") == GUESSES[name]
    assert Mix.model_fields.keys() == {"policy", "format", "rest"}
    assert Speculation.model_fields.keys() == {"method", "tokens"}


def test_the_window_of_think() -> None:
    assert WINDOW == 32
