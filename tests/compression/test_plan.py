"""What a caller may write under "compression", and what is said when it is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.compression.budget import MAX_TOKENS
from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import EVICTION, MERGE, PROMPT, READ
from winnow.engine.compression.vision.registry import VISION
from winnow.engine.errors import PlanNotSupported, RequestError

from .knobs import evict, prune, refused, shorten

BUDGET = "compression.kv.evict.budget"


@pytest.mark.parametrize(
    ("budget", "shown"),
    [
        (-1, "-1"),
        (0, "0"),
        (0.0, "0.0"),
        (-0.25, "-0.25"),
        (1.0000001, "1.0000001"),
        (5.0, "5.0"),
        (1e9, "1000000000.0"),
        (MAX_TOKENS + 1, "10000001"),
        (10**100, "1" + 36 * "0" + "..."),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (True, "true"),
        (None, "null"),
        ("0.5", "'0.5'"),
        ([0.5], "a list"),
        ({}, "an object"),
    ],
)
def test_budgets_that_are_none(budget: Any, shown: str) -> None:
    error = refused(evict(budget=budget))
    assert error.param == BUDGET
    assert error.message == (
        f"{BUDGET} must be a fraction in (0, 1] or a count of tokens from 1 to 10000000, not {shown}"
    )


@pytest.mark.parametrize("budget", [1, 1.0, 1e-9, 0.25, 4096, MAX_TOKENS])
def test_budgets(budget: float) -> None:
    plan = Plan.parse(evict(budget=budget))
    assert plan.kv.evict is not None
    assert plan.kv.evict.budget == budget
    assert type(plan.kv.evict.budget) is type(budget)


POLICIES = ", ".join(EVICTION)
MERGES = ", ".join(MERGE)
*_FIRST, _LAST = FORMATS
FORMAT_NAMES = f"{', '.join(map(repr, _FIRST))} or {_LAST!r}"
PROMPT_POLICIES = ", ".join(PROMPT)
VISION_POLICIES = ", ".join(VISION)
NO_BUDGET = "must be a fraction in (0, 1] or a count of tokens from 1 to 10000000"


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        ([], "", "must be an object"),
        (None, "", "must be an object"),
        ({"kw": {}}, ".kw", "is not a known field; known here: kv, vision, prompt, on_pressure, quality"),
        ({"kv": None}, ".kv", "must be an object, not null"),
        ({"kv": 3}, ".kv", "must be an object, not 3"),
        (
            {"kv": {"evicted": {}}},
            ".kv.evicted",
            "is not a known field; known here: evict, format, mix, residual, read, scope",
        ),
        ({"kv": {"evict": []}}, ".kv.evict", "must be an object, not a list"),
        ({"kv": {"evict": {"budget": 0.5}}}, ".kv.evict.policy", f"is required; known policies: {POLICIES}"),
        ({"kv": {"evict": {"policy": "h2o"}}}, ".kv.evict.budget", "is required"),
        (evict(policy="snap"), ".kv.evict.policy", f"must be one of {POLICIES}, not 'snap'"),
        (evict(policy=None), ".kv.evict.policy", f"must be one of {POLICIES}, not null"),
        (evict(policy=["h2o"]), ".kv.evict.policy", f"must be one of {POLICIES}, not a list"),
        (evict(policy="x" * 99), ".kv.evict.policy", f"must be one of {POLICIES}, not '{'x' * 36}..."),
        (
            evict(policy="h2o", window=8),
            ".kv.evict.window",
            "is not a knob of 'h2o'; known here: policy, budget, sinks, recent, during, interval, head_budget, "
            "layer_budget, merge",
        ),
        (evict(window=0), ".kv.evict.window", "must be at least 1, not 0"),
        (evict(window=1025), ".kv.evict.window", "must be at most 1024, not 1025"),
        (evict(window=8.0), ".kv.evict.window", "must be a whole number, not 8.0"),
        (evict(window=True), ".kv.evict.window", "must be a whole number, not true"),
        (evict(pool=4), ".kv.evict.pool", "must be odd, not 4"),
        (evict(sinks=-1), ".kv.evict.sinks", "must be at least 0, not -1"),
        (evict(recent="4"), ".kv.evict.recent", "must be a whole number, not '4'"),
        (evict(during="always"), ".kv.evict.during", "must be 'prefill', 'decode' or 'both', not 'always'"),
        (evict(during="both", interval=0), ".kv.evict.interval", "must be at least 1, not 0"),
        (evict(interval=8), ".kv.evict.interval", "has no effect unless `during` is 'decode' or 'both'"),
        (evict(head_budget="ada"), ".kv.evict.head_budget", "must be 'uniform' or 'adaptive', not 'ada'"),
        (evict(layer_budget=1), ".kv.evict.layer_budget", "must be 'uniform' or 'pyramid', not 1"),
        (evict(merge=[]), ".kv.evict.merge", "must be an object, not a list"),
        (evict(merge={}), ".kv.evict.merge.policy", f"is required; known policies: {MERGES}"),
        (evict(merge={"policy": "h2o"}), ".kv.evict.merge.policy", f"must be one of {MERGES}, not 'h2o'"),
        (
            evict(merge={"policy": "compensation", "threshold": 0.5}),
            ".kv.evict.merge.threshold",
            "is not a knob of 'compensation'; known here: policy",
        ),
        (
            evict(merge={"policy": "kv_merging", "threshold": 1.5}),
            ".kv.evict.merge.threshold",
            "must be at most 1.0, not 1.5",
        ),
        (
            {"kv": {"format": "int3"}},
            ".kv.format",
            f"must be {FORMAT_NAMES}, not 'int3'",
        ),
        ({"kv": {"format": 4}}, ".kv.format", f"must be {FORMAT_NAMES}, not 4"),
        ({"kv": {"residual": 64}}, ".kv.residual", "has no effect without `format` or `mix`"),
        ({"kv": {"format": "int8", "residual": -1}}, ".kv.residual", "must be at least 0, not -1"),
        ({"vision": []}, ".vision", "must be an object, not a list"),
        ({"vision": {"keep": 64}}, ".vision.policy", f"is required; known policies: {VISION_POLICIES}"),
        (prune(policy="snapkv"), ".vision.policy", f"must be one of {VISION_POLICIES}, not 'snapkv'"),
        ({"vision": {"policy": "uniform"}}, ".vision.keep", "is required"),
        (prune(keep=0), ".vision.keep", f"{NO_BUDGET}, not 0"),
        (prune(keep=1.5), ".vision.keep", f"{NO_BUDGET}, not 1.5"),
        (prune(keep="64"), ".vision.keep", f"{NO_BUDGET}, not '64'"),
        (prune(positions="new"), ".vision.positions", "must be 'original' or 'contiguous', not 'new'"),
        (prune(seed=1), ".vision.seed", "is not a knob of 'uniform'; known here: policy, keep, positions"),
        (prune(policy="random", seed=-1), ".vision.seed", "must be at least 0, not -1"),
        ({"prompt": []}, ".prompt", "must be an object, not a list"),
        ({"prompt": {}}, ".prompt.policy", f"is required; known policies: {PROMPT_POLICIES}"),
        (shorten(policy="snapkv"), ".prompt.policy", f"must be one of {PROMPT_POLICIES}, not 'snapkv'"),
        ({"prompt": {"policy": "selective"}}, ".prompt.keep", "is required"),
        (shorten(keep=0), ".prompt.keep", f"{NO_BUDGET}, not 0"),
        (shorten(keep=2.0), ".prompt.keep", f"{NO_BUDGET}, not 2.0"),
        (shorten(unit="word"), ".prompt.unit", "must be 'token', 'phrase' or 'sentence', not 'word'"),
        (shorten(window=3), ".prompt.window", "is not a knob of 'selective'; known here: policy, keep, unit"),
        (shorten(policy="extractive", threshold=1.5), ".prompt.threshold", "must be at most 1.0, not 1.5"),
        (shorten(policy="spec_pc", pool=0), ".prompt.pool", "must be at least 1, not 0"),
    ],
)
def test_what_is_said(data: Any, param: str, message: str) -> None:
    error = refused(data)
    assert (error.param, error.message) == (f"compression{param}", f"compression{param} {message}")
    assert not isinstance(error, PlanNotSupported)


def test_pruning_nothing_is_no_plan() -> None:
    assert Plan.parse(prune(keep=1.0)).is_off
    assert Plan.parse(prune(keep=1.0)).prunes is None
    assert not Plan.parse(prune(keep=1)).is_off
    plan = Plan.parse(prune(keep=0.5))
    assert plan.prunes is plan.vision is not None
    assert Plan.parse(json.loads(json.dumps(plan.to_wire()))) == plan
    error = refused(prune() | {"quality": 0.9})
    assert (error.param, error.message) == (
        "compression.quality",
        "compression.quality: chooses the plan itself; leave out 'vision'",
    )


@pytest.mark.parametrize(
    ("keep", "patches", "tokens"),
    [
        (64, 576, 64),
        (600, 576, 576),
        (1, 1, 1),
        (0.25, 576, 144),
        (0.5, 3, 2),
        (0.5, 1, 1),
        (0.001, 100, 1),
        (1.0, 9, 9),
    ],
)
def test_keep(keep: float, patches: int, tokens: int) -> None:
    vision = Plan.parse(prune(keep=keep)).vision
    assert vision is not None and vision.tokens(patches) == tokens


def test_views_are_told_apart_by_all_but_positions() -> None:
    def fingerprint(**knobs: Any) -> str:
        vision = Plan.parse(prune(**knobs)).vision
        assert vision is not None
        return vision.fingerprint

    assert fingerprint() == fingerprint(positions="contiguous") == fingerprint(positions="original")
    assert fingerprint(policy="random") == fingerprint(policy="random", seed=0)
    others = (fingerprint(), fingerprint(keep=1), fingerprint(policy="random"), fingerprint(policy="random", seed=1))
    assert len(set(others)) == len(others)
    assert Plan.parse(prune(positions="contiguous")).fingerprint != Plan.parse(prune()).fingerprint


def test_a_merge_that_weighs_by_attention_needs_a_policy_that_looks_at_it() -> None:
    error = refused(evict(policy="knorm", merge={"policy": "ems"}))
    assert isinstance(error, PlanNotSupported)
    assert error.param == "compression.kv.evict.merge"
    assert error.message == f"{error.param}: 'ems' weighs tokens by attention, which 'knorm' does not look at"
    for policy in ("snapkv", "h2o", "tova"):
        assert Plan.parse(evict(policy=policy, merge={"policy": "ems"})).evict is not None


@pytest.mark.parametrize(
    ("read", "param", "message"),
    [
        ({}, ".policy", "is required; known policies: " + ", ".join(READ)),
        ({"policy": "conquest"}, ".policy", f"must be one of {', '.join(READ)}, not 'conquest'"),
        (False, "", "must be an object, not false"),
        ({"policy": "quest", "tokens": 0}, ".tokens", None),
        ({"policy": "quest", "tokens": 1.5}, ".tokens", None),
        ({"policy": "quest", "recent": 0}, ".recent", "must be at least 1, not 0"),
        ({"policy": "token_select", "pool": 4}, ".pool", "must be odd, not 4"),
        ({"policy": "token_select", "similarity": 1.1}, ".similarity", "must be at most 1.0, not 1.1"),
        ({"policy": "tidal_decode", "corrector": 1}, ".corrector", None),
        (
            {"policy": "quest", "pool": 3},
            ".pool",
            "is not a knob of 'quest'; known here: tokens, sinks, recent, dense_layers, policy",
        ),
    ],
)
def test_what_is_said_of_reading(read: Any, param: str, message: str | None) -> None:
    error = refused({"kv": {"read": read}})
    assert error.param == f"compression.kv.read{param}"
    if message is not None:
        assert error.message == f"{error.param} {message}"


@pytest.mark.parametrize(
    ("read", "evict", "why"),
    [
        ("tidal_decode", {"policy": "knorm", "budget": 0.5}, "each holds its own"),
        ("token_select", {"policy": "snapkv", "budget": 64}, "each holds its own"),
        ("quest", {"policy": "h2o", "budget": 0.5, "during": "both"}, "'h2o' during 'both' scores what"),
        ("quest", {"policy": "knorm", "budget": 0.5, "merge": {"policy": "kv_merging"}}, "leave out 'evict.merge'"),
    ],
)
def test_reading_and_eviction_that_do_not_go_together(read: str, evict: dict[str, Any], why: str) -> None:
    error = refused({"kv": {"read": {"policy": read}, "evict": evict}})
    assert isinstance(error, PlanNotSupported)
    assert error.param == "compression.kv.read.policy"
    assert why in error.message
    Plan.parse({"kv": {"read": {"policy": read}, "evict": evict | {"budget": 1.0}}})
    Plan.parse({"kv": {"read": {"policy": read, "tokens": 1.0}, "evict": evict}})


def test_reading_everything_is_no_plan() -> None:
    assert Plan.parse({"kv": {"read": {"policy": "quest", "tokens": 1.0}}}).is_off
    assert not Plan.parse({"kv": {"read": {"policy": "quest", "tokens": 1}}}).is_off


STREAM = {"policy": "streaming_llm", "budget": 64, "positions": "compact"}


@pytest.mark.parametrize(
    ("knobs", "param", "message"),
    [
        ({"budget": 0.5}, "budget", ": compact positions need a count of tokens"),
        ({"during": "prefill"}, "during", ": compact positions need 'both'"),
        ({"head_budget": "adaptive"}, "head_budget", ": compact positions need 'uniform'"),
        ({"layer_budget": "pyramid"}, "layer_budget", ": compact positions need 'uniform'"),
        ({"positions": "original", "block": 64}, "block", " has no effect unless `positions` is 'compact'"),
        ({"block": 15}, "block", " must be at least 16, not 15"),
    ],
)
def test_compact_positions_that_are_impossible(knobs: dict[str, Any], param: str, message: str) -> None:
    error = refused({"kv": {"evict": STREAM | knobs}})
    assert (error.param, error.message) == (f"compression.kv.evict.{param}", f"compression.kv.evict.{param}{message}")
    assert isinstance(error, PlanNotSupported) is message.startswith(":")


def test_compact_positions_are_not_read_in_part() -> None:
    error = refused({"kv": {"evict": STREAM, "read": {"policy": "quest"}}})
    assert isinstance(error, PlanNotSupported)
    assert error.param == "compression.kv.read.policy"
    assert "compact positions turn them at every eviction" in error.message


def test_compact_positions_evict_all_along() -> None:
    plan = Plan.parse({"kv": {"evict": STREAM}})
    assert plan.evict is not None and plan.evict.is_compact
    assert (plan.evict.during, plan.interval, plan.evict.block_tokens) == ("both", 32, 256)
    assert plan.evicts_at_prefill_end
    assert Plan.parse(plan.to_wire()) == plan
    assert not Plan.parse(evict(policy="streaming_llm")).evict.is_compact  # type: ignore[union-attr]


def test_a_method_whose_paper_merges_does_unless_told_otherwise() -> None:
    plan = Plan.parse({"kv": {"evict": {"policy": "ems", "budget": 0.5}}})
    assert plan.evict is not None and plan.evict.merge is not None
    assert plan.evict.merge.policy == "ems"
    assert Plan.parse(json.loads(json.dumps(plan.to_wire()))) == plan
    without = Plan.parse({"kv": {"evict": {"policy": "ems", "budget": 0.5, "merge": None}}})
    assert without.evict is not None and without.evict.merge is None
    assert without.fingerprint != plan.fingerprint
    assert Plan.parse(json.loads(json.dumps(without.to_wire()))) == without


def test_null_is_absent() -> None:
    data = {"vision": None, "prompt": None, "kv": {"read": None, "evict": None, "format": None}}
    assert Plan.parse(data).is_off
    assert data == {"vision": None, "prompt": None, "kv": {"read": None, "evict": None, "format": None}}
    assert Plan.parse(evict(recent=None)).fingerprint == Plan.parse(evict()).fingerprint


def test_a_field_name_is_repeated_with_care() -> None:
    assert len(refused({"x" * 10_000: 1}).message) < 200
    assert refused({"a\n": 1}).param == "compression.a\\n"
    assert refused({"\ud800": 1}).message == "compression has a key that is no text"  # JSON may hold it, UTF-8 cannot
    assert refused(evict(policy="\ud800")).message.isascii()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["policy", "budget", "sinks", "recent", "during", "interval", "window", "pool", "head_budget"]


@given(
    knobs=st.dictionaries(st.sampled_from(KEYS), json_values | st.sampled_from([*EVICTION, "both", "adaptive"])),
    rest=json_values,
    whole=json_values,
)
def test_whatever_comes_is_a_plan_or_a_request_error(knobs: Any, rest: Any, whole: Any) -> None:
    for data in (whole, {"kv": rest}, {"kv": {"evict": rest}}, evict(**knobs), evict(window=rest)):
        try:
            plan = Plan.resolve(data, {})
        except RequestError as error:
            sentence = error.message
            is_named = str(error.param).startswith("compression") and sentence.startswith("compression")
        else:
            sentence = ""
            is_named = Plan.parse(json.loads(json.dumps(plan.to_wire()))) == plan
        assert is_named
        assert len(sentence.encode()) < 600
