"""Which of the common knobs a policy takes: for tests that try all policies with all knobs."""

from __future__ import annotations

from typing import Any

from winnow.engine.compression.policy import SetsBudgets, StagedPolicy
from winnow.engine.compression.registry import EVICTION, eviction_policy

BUDGETED = [name for name in EVICTION if not isinstance(eviction_policy(name), SetsBudgets | StagedPolicy)]
"""Policies whose lanes keep what the plan's budget says, shared out by `head_budget` and `layer_budget`"""


def taken(evict: dict[str, Any]) -> dict[str, Any]:
    """The object without the knobs that its policy refuses."""
    shares = () if evict["policy"] in BUDGETED else ("head_budget", "layer_budget")
    return {name: value for name, value in evict.items() if name not in shares}
