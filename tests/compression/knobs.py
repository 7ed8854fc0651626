"""Plans that tests write, and which of the common knobs a policy takes."""

from __future__ import annotations

from typing import Any

import pytest

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.policy import SetsBudgets, StagedPolicy
from winnow.engine.compression.registry import EVICTION, eviction_policy
from winnow.engine.errors import RequestError

BUDGETED = [name for name in EVICTION if not isinstance(eviction_policy(name), SetsBudgets | StagedPolicy)]
"""Policies whose lanes keep what the plan's budget says, shared out by `head_budget` and `layer_budget`"""


def taken(evict: dict[str, Any]) -> dict[str, Any]:
    """The object without the knobs that its policy refuses."""
    shares = () if evict["policy"] in BUDGETED else ("head_budget", "layer_budget")
    return {name: value for name, value in evict.items() if name not in shares}


def evict(**knobs: Any) -> dict[str, Any]:
    return {"kv": {"evict": {"policy": "snapkv", "budget": 0.5} | knobs}}


def shorten(**knobs: Any) -> dict[str, Any]:
    return {"prompt": {"policy": "selective", "keep": 0.5} | knobs}


def prune(**knobs: Any) -> dict[str, Any]:
    return {"vision": {"policy": "uniform", "keep": 0.5} | knobs}


def refused(data: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        Plan.parse(data)
    return caught.value
