"""A plan for every registered method of compression."""

from __future__ import annotations

from typing import Any

from winnow.engine.compression.registry import EVICTION, MERGE, MIX, READ
from winnow.kernels.layout import PageFormat

from ..compression.knobs import BUDGETED

ONCE = {"kvzip", "prompt_distill", "spec_kv"}
"""Policies that evict at the end of a prompt only"""
LEAD_INS = [[3, 9, 4], [11, 2], [8]]
"""What kvzip's prompts are repeated after"""


def evict(policy: str, **knobs: Any) -> dict[str, Any]:
    """`kv` of a plan that evicts at the end of the prompt and, where that can be, every seven tokens from there on."""
    all_along = {} if policy in ONCE else {"during": "both", "interval": 7}
    return {"evict": {"policy": policy, "budget": 0.5} | all_along | knobs}


KV: dict[str, dict[str, Any]] = {
    **{policy: evict(policy) for policy in EVICTION},
    **{f"{policy}, shared out": evict(policy, head_budget="adaptive", layer_budget="pyramid") for policy in BUDGETED},
    **{f"h2o, {merge}": evict("h2o", merge={"policy": merge}) for merge in MERGE},
    "h2o, proportional": evict("h2o", merge={"policy": "kv_merging", "fraction": 0.5, "proportional": True}),
    "prompt_distill, keeping": evict("prompt_distill", lower="keep"),
    "compact": evict("streaming_llm", budget=40, positions="compact", block=32),
    **{fmt.label: {"format": fmt.label, "residual": 5} for fmt in PageFormat if not fmt.spans_layers},
    "snapkv, int4": evict("snapkv") | {"format": "int4"},
    **{mix: {"mix": {"policy": mix}} | (evict("h2o") if mix == "mikv" else {}) for mix in MIX},
    **{read: {"read": {"policy": read, "tokens": 40, "sinks": 2, "recent": 8, "dense_layers": 0}} for read in READ},
}
"""`kv` of plans, by what is special about them"""
