"""What follows from one line in the registry, for every line."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from winnow.engine.compression.merge_plan import merge_model, merge_schema
from winnow.engine.compression.plan import Evict, evict_model, evict_schema
from winnow.engine.compression.policy import PolicyParams, Voting
from winnow.engine.compression.prompt.plan import Prompt, prompt_model, prompt_schema
from winnow.engine.compression.prompt.policy import PromptSignal
from winnow.engine.compression.read import read_model, read_schema
from winnow.engine.compression.read_policy import LaneShape
from winnow.engine.compression.registry import (
    EVICTION,
    MERGE,
    OWN_MERGE,
    PROMPT,
    READ,
    eviction_policy,
    merge_method,
    prompt_policy,
    read_policy,
)
from winnow.engine.compression.signals import Signal
from winnow.kernels.reading import ReadMode


def test_one_file_and_one_line_per_policy() -> None:
    folder = Path(import_module("winnow.engine.compression.eviction").__path__[0])
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(EVICTION)
    for name, place in EVICTION.items():
        assert place.startswith(f"winnow.engine.compression.eviction.{name}:")


def test_one_file_and_one_line_per_merge_method() -> None:
    folder = Path(import_module("winnow.engine.compression.merging").__path__[0])
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(MERGE)
    assert set(OWN_MERGE.values()) <= set(MERGE) and set(OWN_MERGE) <= set(EVICTION)
    for name, place in MERGE.items():
        assert place.startswith(f"winnow.engine.compression.merging.{name}:")
        method = merge_method(name)
        assert method is merge_method(name)
        assert all(isinstance(signal, Signal) for signal in method.signals)
        assert all(field.description for field in method.Params.model_fields.values())
        assert isinstance(merge_model(name).model_validate({"policy": name}), method.Params)
    assert list(merge_schema()) == list(MERGE)


@pytest.mark.parametrize("name", EVICTION)
def test_conforms(name: str) -> None:
    policy = eviction_policy(name)
    assert policy is eviction_policy(name)
    assert all(isinstance(signal, Signal) for signal in policy.signals)
    assert issubclass(policy.Params, PolicyParams)
    assert not set(policy.Params.model_fields) & set(Evict.model_fields), "a knob hides a common one"
    assert all(field.description for field in policy.Params.model_fields.values())
    params = evict_model(name).model_validate({"policy": name, "budget": 0.5})
    assert isinstance(params, policy.Params)
    voters = policy.voters(params, 1000)
    assert (voters == 0) == policy.signals.isdisjoint({Signal.ATTENTION, Signal.QUERIES})
    assert Signal.ATTENTION in policy.signals or not isinstance(policy, Voting)
    for budget in (1, 2, 3, 100, 5000):
        assert 0 <= policy.default_recent(params, budget) <= budget
    module = import_module(EVICTION[name].split(":")[0])
    assert module.__doc__ is not None
    assert "score(" in module.__doc__


def test_one_file_and_one_line_per_read_policy() -> None:
    folder = Path(import_module("winnow.engine.compression.selection").__path__[0])
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(READ)
    for name, place in READ.items():
        assert place.startswith(f"winnow.engine.compression.selection.{name}:")


@pytest.mark.parametrize("name", READ)
def test_read_policies_conform(name: str) -> None:
    policy = read_policy(name)
    assert policy is read_policy(name)
    assert all(field.description for field in policy.Params.model_fields.values())
    params = read_model(name).model_validate({"policy": name})
    assert isinstance(params, policy.Params)
    profile = {"channels": torch.arange(16, dtype=torch.int16).expand(5, 2, 16)}
    rule = params.rule(LaneShape(5, 2, 6, 16), profile)
    assert rule.modes.shape == (5,)
    assert rule.reuses is policy.keeps_choices
    assert params.keeps_choices is policy.keeps_choices
    assert rule.votes_by_layer <= policy.shares_choices
    assert bool((rule.modes == ReadMode.CHOSEN_BEFORE).any()) <= policy.shares_choices
    module = import_module(READ[name].split(":")[0])
    assert module.__doc__ is not None
    assert "score(" in module.__doc__
    schema = read_schema()[name]["properties"]
    assert schema["policy"]["const"] == name
    assert {"tokens", "sinks", "recent", "dense_layers"} <= set(schema)


def test_schemas_name_all_knobs() -> None:
    schemas = evict_schema()
    assert list(schemas) == list(EVICTION)
    snapkv = schemas["snapkv"]["properties"]
    assert snapkv["window"] == {
        "default": 64,
        "description": "queries at the end that vote",
        "maximum": 1024,
        "minimum": 1,
        "title": "Window",
        "type": "integer",
    }
    assert {"budget", "sinks", "recent", "during", "interval", "head_budget", "layer_budget"} <= set(snapkv)
    assert "window" not in schemas["knorm"]["properties"]
    assert schemas["knorm"]["properties"]["policy"]["const"] == "knorm"


def test_plans_are_validated_without_torch() -> None:
    program = """
import sys
from winnow.engine.compression.plan import Plan, evict_schema, plan_schema
from winnow.engine.compression.profiles import load_profiles
from winnow.engine.compression.read import read_schema
from winnow.engine.compression.prompt.plan import prompt_schema
from winnow.engine.compression.vision.plan import vision_schema
from winnow.engine.sampling import SamplingTable
profiles = load_profiles()
for name in read_schema():
    read = Plan.resolve({"kv": {"read": {"policy": name, "tokens": 64}}}, profiles).read
    read.keeps_choices, read.share, read.count
for name in evict_schema():
    plan = Plan.resolve({"kv": {"evict": {"policy": name, "budget": 0.5}, "format": "int8"}}, profiles)
    plan.evict.voters(100), plan.evict.recent_tokens(100), plan.fingerprint
for name in prompt_schema():
    Plan.parse({"prompt": {"policy": name, "keep": 0.5}})
for name in vision_schema():
    vision = Plan.parse({"vision": {"policy": name, "keep": 64}}).vision
    vision.tokens(576), vision.stages, vision.kinds, vision.reads_text, vision.fingerprint
plan_schema()
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_one_file_and_one_line_per_prompt_policy() -> None:
    folder = Path(import_module("winnow.engine.compression.prompt").__path__[0])
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "plan", "policy", "units"} == set(PROMPT)
    for name, place in PROMPT.items():
        assert place.startswith(f"winnow.engine.compression.prompt.{name}:")
    assert list(prompt_schema()) == list(PROMPT)


@pytest.mark.parametrize("name", PROMPT)
def test_prompt_policies_conform(name: str) -> None:
    policy = prompt_policy(name)
    assert policy is prompt_policy(name)
    assert policy.signal in PromptSignal
    assert not set(policy.Params.model_fields) & set(Prompt.model_fields), "a knob hides a common one"
    assert all(field.description for field in policy.Params.model_fields.values())
    params = prompt_model(name).model_validate({"policy": name, "keep": 0.5})
    assert isinstance(params, policy.Params)
    assert not params.keeps_all
    assert params.budget_tokens(10) == 5
    assert policy.unit(params) in ("token", "word", "phrase", "sentence")
    assert "(" in str(import_module(PROMPT[name].split(":")[0]).__doc__)
