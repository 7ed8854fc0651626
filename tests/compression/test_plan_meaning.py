"""What plans mean: when they act, what they hold, how they are told apart, and what profiles and limits do to them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from winnow.engine.compression.maximum import Maximum
from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.plan import Plan, plan_schema
from winnow.engine.compression.registry import EVICTION
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.kernels.layout import PageFormat

from .knobs import evict, shorten

# What plans mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "is_off"),
    [
        ({}, True),
        ({"kv": {}}, True),
        (evict(budget=1.0), True),  # all of it
        (evict(budget=1), False),  # one token
        (evict(budget=0.999), False),
        ({"kv": {"format": "int8"}}, False),
        ({"kv": {"format": "int8"} | evict(budget=1.0)["kv"]}, False),
        (shorten(), False),
        (shorten(keep=1.0), True),
        (shorten(keep=1), False),
        (shorten(policy="extractive", keep=1.0), True),
        (shorten(policy="extractive", keep=1.0, threshold=0.2), False),
    ],
)
def test_is_off(data: Any, is_off: bool) -> None:
    plan = Plan.parse(data)
    assert plan.is_off == is_off
    if is_off:
        assert not plan.evicts_at_prefill_end
        assert not plan.evicts_in_decode
        assert plan.interval == plan.residual == 0
        assert plan.budget_tokens(77) == 77


@pytest.mark.parametrize(
    ("knobs", "at_end", "in_decode", "interval"),
    [
        ({}, True, False, 0),
        ({"during": "prefill"}, True, False, 0),
        ({"during": "decode"}, False, True, 32),
        ({"during": "both", "interval": 5}, True, True, 5),
        ({"during": "both", "budget": 1.0}, False, False, 0),
    ],
)
def test_when_it_evicts(knobs: dict[str, Any], at_end: bool, in_decode: bool, interval: int) -> None:
    plan = Plan.parse(evict(**knobs))
    assert (plan.evicts_at_prefill_end, plan.evicts_in_decode, plan.interval) == (at_end, in_decode, interval)


@pytest.mark.parametrize(
    ("budget", "seen", "tokens"),
    [
        (0.25, 100, 25),
        (0.25, 99, 24),  # rounded down
        (0.25, 3, 1),  # but never to nothing
        (1e-9, 10_000, 1),
        (10, 100, 10),
        (10, 7, 7),
        (1, 0, 1),
    ],
)
def test_budget_tokens(budget: float, seen: int, tokens: int) -> None:
    assert Plan.parse(evict(budget=budget)).budget_tokens(seen) == tokens


def test_formats() -> None:
    plan = Plan.parse({"kv": {"format": "int4"}})
    assert (plan.format, plan.residual) == (PageFormat.INT4, 32)
    assert plan.sealed_format(PageFormat.F32) is PageFormat.INT4
    assert Plan.parse({}).format is None
    assert Plan.parse({}).sealed_format(PageFormat.BF16) is PageFormat.BF16
    for label in FORMATS:
        assert Plan.parse({"kv": {"format": label}}).format is PageFormat.parse(label)
    with pytest.raises(PlanNotSupported, match="'f32' is larger than 'bf16'") as caught:
        Plan.parse({"kv": {"format": "f32"}}).sealed_format(PageFormat.BF16)
    assert caught.value.param == "compression.kv.format"


def test_an_engine_refuses_formats_that_its_backend_lacks() -> None:
    plans: dict[str, dict[str, Any]] = {
        "kv.format": {"kv": {"format": "mustafar50"}},
        "kv.mix.rest": {"kv": {"mix": {"policy": "zipcache", "format": "int8", "rest": "mustafar70"}}},
        "kv.mix.format": {"kv": {"mix": {"policy": "zipcache", "format": "mustafar50"}}},
        "on_pressure.format": {"on_pressure": {"format": "mustafar70"}},
    }
    for path, data in plans.items():
        plan = Plan.parse(data)
        plan.check_formats([fmt.label for fmt in PageFormat])
        with pytest.raises(PlanNotSupported, match="it has f32, int8, int2") as caught:
            plan.check_formats(("f32", "int8", "int2"))
        assert caught.value.param == f"compression.{path}"


def test_formats_compare_by_what_a_number_takes() -> None:
    limit = Maximum(format="int8")
    Plan.resolve({"kv": {"format": "mustafar70"}}, {}, maximum=limit)
    with pytest.raises(RequestError, match="on this server"):
        Plan.resolve({"kv": {"format": "mustafar50"}}, {}, maximum=limit)
    with pytest.raises(RequestError, match="no smaller than"):
        Plan.parse({"kv": {"format": "int8"}, "on_pressure": {"format": "mustafar50"}})
    with pytest.raises(RequestError, match="no fewer bits"):
        Plan.parse({"kv": {"mix": {"policy": "zipcache", "format": "int4", "rest": "mustafar70"}}})


@pytest.mark.parametrize("fmt", [fmt.label for fmt in PageFormat if fmt.is_opened and not fmt.spans_layers])
def test_pages_that_are_opened_are_not_read_in_part(fmt: str) -> None:
    with pytest.raises(RequestError, match=f"those of '{fmt}' are opened whole") as caught:
        Plan.parse({"kv": {"format": fmt, "read": {"policy": "quest", "tokens": 64}}})
    assert caught.value.param == "compression.kv.read"


def test_recent_is_the_callers_or_the_policys() -> None:
    snapkv, mine = Plan.parse(evict(window=16)).evict, Plan.parse(evict(window=16, recent=0)).evict
    assert snapkv is not None
    assert mine is not None
    assert [snapkv.recent_tokens(budget) for budget in (1, 10, 100)] == [1, 5, 16]
    assert mine.recent_tokens(100) == 0
    assert [snapkv.voters(seen) for seen in (1, 10, 100)] == [1, 5, 16]


def test_fingerprints_tell_plans_apart_and_not_spellings() -> None:
    plans = [
        {},
        evict(),
        evict(budget=1),
        evict(budget=1.0),
        evict(window=32),
        evict(policy="h2o"),
        evict(during="both"),
        evict(merge={"policy": "kv_merging"}),
        evict(merge={"policy": "kv_merging", "threshold": 0.5}),
        {"kv": {"format": "int8"}},
        {"kv": {"format": "int4"}},
        {"kv": {"format": "int4", "residual": 0}},
        {"kv": {"format": "int4"} | evict()["kv"]},
    ]
    assert len({Plan.parse(plan).fingerprint for plan in plans}) == len(plans)
    spelled = {"kv": {"evict": {"sinks": 4, "window": 64, "budget": 0.5, "policy": "snapkv"}, "format": None}}
    assert Plan.parse(spelled).fingerprint == Plan.parse(evict()).fingerprint


def test_plans_do_not_change() -> None:
    plan = Plan.parse(evict())
    with pytest.raises(ValueError, match="frozen"):
        plan.kv.evict = None  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        setattr(plan.evict, "budget", 3)  # noqa: B010


def test_the_wire_keeps_the_plan() -> None:
    written: list[dict[str, Any]] = [{}, evict(budget=1), evict(budget=1.0, during="both", interval=7)]
    for data in [*written, {"kv": {"format": "int8"}}]:
        plan = Plan.parse(data)
        assert plan.to_wire() == Plan.parse(data | shorten()).to_wire() == data  # the prompt is short by then
        assert Plan.parse(json.loads(json.dumps(plan.to_wire()))).fingerprint == plan.fingerprint


def test_the_schema_offers_every_policy() -> None:
    schema = plan_schema()
    choice = schema["$defs"]["KV"]["properties"]["evict"]["anyOf"][0]
    assert choice["discriminator"]["propertyName"] == "policy"
    assert set(choice["discriminator"]["mapping"]) == set(EVICTION)


# Profiles and limits ------------------------------------------------------------------------------------------------

HALF = Plan.parse(evict())


def test_resolve() -> None:
    profiles = {"half": HALF}
    assert Plan.resolve(None, profiles).is_off
    assert Plan.resolve(None, profiles, default=HALF) is HALF
    assert Plan.resolve("half", profiles) is HALF
    assert Plan.resolve({}, profiles, default=HALF).is_off
    assert Plan.resolve(evict(), profiles) == HALF
    wrong: list[Any] = [3, True, [], 0.5]
    for data in wrong:
        with pytest.raises(RequestError, match="must be an object or the name of a profile"):
            Plan.resolve(data, profiles)
    with pytest.raises(RequestError, match="unknown profile 'hal'; known: half") as caught:
        Plan.resolve("hal", profiles)
    assert caught.value.param == "compression"
    with pytest.raises(RequestError, match="none are configured"):
        Plan.resolve("", {})


@pytest.mark.parametrize(
    ("maximum", "data", "param"),
    [
        ({"budget": 0.5}, evict(), None),
        ({"budget": 0.5}, evict(budget=0.51), "evict.budget"),
        ({"budget": 0.5}, evict(policy="kvzip"), None),
        ({"budget": 0.5}, evict(policy="kvzip", budget=0.51), "evict.budget"),
        ({"budget": 0.5}, {}, "evict.budget"),  # no compression at all
        ({"budget": 0.5}, {"kv": {"format": "int4"}}, "evict.budget"),
        ({"budget": 0.5}, evict(budget=1), "evict.budget"),  # cannot be compared
        ({"budget": 1024}, evict(budget=1024), None),
        ({"budget": 1024}, evict(budget=1025), "evict.budget"),
        ({"budget": 1024}, evict(budget=0.1), "evict.budget"),
        ({"format": "int8"}, {"kv": {"format": "int8"}}, None),
        ({"format": "int8"}, {"kv": {"format": "int4"}}, None),
        ({"format": "int8"}, {"kv": {"format": "bf16"}}, "format"),
        ({"format": "int8"}, {}, "format"),
        ({"format": "f32"}, {}, None),
        ({}, {}, None),
    ],
)
def test_maximum(maximum: dict[str, Any], data: dict[str, Any], param: str | None) -> None:
    limit = Maximum.model_validate(maximum)
    if param is None:
        Plan.resolve(data, {}, maximum=limit)
        return
    with pytest.raises(RequestError, match="on this server") as caught:
        Plan.resolve(data, {}, maximum=limit)
    assert caught.value.param == f"compression.kv.{param}"
    assert str(next(iter(maximum.values()))) in caught.value.message


def test_heads_that_keep_everything_hold_more_than_any_maximum() -> None:
    with pytest.raises(RequestError, match="'razor_attention' keeps all of some heads, which this server forbids") as e:
        Plan.resolve(evict(policy="razor_attention"), {}, maximum=Maximum(budget=0.5))
    assert e.value.param == "compression.kv.evict.policy"


def test_a_request_without_a_plan_has_the_default_under_the_maximum() -> None:
    limit = Maximum(budget=0.5)
    assert Plan.resolve(None, {}, HALF, limit) is HALF
    with pytest.raises(RequestError):
        Plan.resolve(None, {}, None, limit)
