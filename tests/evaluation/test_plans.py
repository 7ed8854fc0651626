"""Plans as they are written on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import EVICTION, PROMPT
from winnow.engine.errors import EvalError
from winnow.engine.evaluation.plans import (
    OFF,
    check,
    default_plans,
    family,
    is_control,
    read_plan,
    read_plans,
)


@pytest.mark.parametrize(
    ("text", "kv"),
    [
        ("int4", {"format": "int4"}),
        ("snapkv:0.25", {"evict": {"policy": "snapkv", "budget": 0.25}}),
        (
            "h2o:0.25:merge=kv_merging",
            {"evict": {"policy": "h2o", "budget": 0.25, "merge": {"policy": "kv_merging"}}},
        ),
        ("h2o:512+int8", {"evict": {"policy": "h2o", "budget": 512}, "format": "int8"}),
        (
            "snapkv:0.5:adaptive:pyramid:both:window=32",
            {
                "evict": {
                    "policy": "snapkv",
                    "budget": 0.5,
                    "head_budget": "adaptive",
                    "layer_budget": "pyramid",
                    "during": "both",
                    "window": 32,
                }
            },
        ),
    ],
)
def test_brief_plans(text: str, kv: dict[str, Any]) -> None:
    assert read_plan(text) == {"kv": kv}
    assert check({text: {"kv": kv}}) == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int3", "no page format"),
        ("snapkv", "needs a budget"),
        ("selective", "needs a budget"),
        ("snapkv:half", "no budget"),
        ("snapkv:0.5:often", "no option"),
        ("int4+int8", "two parts"),
        ("snapkv:0.5+h2o:0.5", "two parts"),
        ("int4:0.5", "no page format"),
        ("", "no plans"),
    ],
)
def test_what_cannot_be_read(text: str, why: str) -> None:
    with pytest.raises(EvalError, match=why):
        read_plans(text)


def test_plans_that_shorten_prompts() -> None:
    assert read_plan("selective:0.5:unit=sentence+int4") == {
        "kv": {"format": "int4"},
        "prompt": {"policy": "selective", "keep": 0.5, "unit": "sentence"},
    }
    assert list(read_plans("spec_pc:0.3")) == [OFF, "spec_pc:0.3", "random:0.3", "streaming_llm:0.3"]
    assert check(read_plans("spec_pc:0.3,extractive:200:threshold=0.2")) == {}


def test_plans_that_no_request_could_name_are_found() -> None:
    assert "window" in check({"a": read_plan("snapkv:0.5:window=0")})["a"]


def test_controls_stand_beside_each_budget() -> None:
    plans = read_plans("h2o:0.3,snapkv:64+int4,int8")
    assert list(plans) == [
        OFF,
        "h2o:0.3",
        "snapkv:64+int4",
        "int8",
        "random:0.3",
        "random:64",
        "streaming_llm:0.3",
        "streaming_llm:64",
    ]
    assert [name for name in plans if is_control(name)] == list(plans)[4:]
    assert not is_control("random:0.5+int4")
    assert list(read_plans("int4")) == [OFF, "int4"]


def test_the_default_names_every_policy() -> None:
    plans = read_plans("default", default_plans([0.5]))
    assert {plan["kv"]["evict"]["policy"] for plan in plans.values() if "evict" in plan.get("kv", {})} == set(EVICTION)
    assert {plan["prompt"]["policy"] for plan in plans.values() if "prompt" in plan} == set(PROMPT)
    assert check(plans) == {}
    assert Plan.parse(plans[OFF]).is_off
    assert len(set(default_plans([0.5]))) == len(default_plans([0.5]))


def test_families_leave_budgets_out() -> None:
    assert family("snapkv:0.25:adaptive+int4") == family("snapkv:512:adaptive+int4") == "snapkv:adaptive+int4"
    assert family("int4") == "int4"


def test_files_of_plans(tmp_path: Path) -> None:
    path = tmp_path / "plans.yaml"
    path.write_text("mine: {kv: {evict: {policy: tova, budget: 0.4}}}\noff: {}\n")
    plans = read_plans(f"{path},int8")
    assert list(plans) == [OFF, "mine", "int8", "random:0.4", "streaming_llm:0.4"]
    for wrong in ("- a list\n", "mine: 7\n", "a: [\n"):
        path.write_text(wrong)
        with pytest.raises(EvalError, match=r"plans\.yaml"):
            read_plans(str(path))
    with pytest.raises(EvalError, match=r"none\.json"):
        read_plans("none.json")
