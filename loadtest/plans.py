"""The plans that are measured: what a request writes under "compression"."""

from __future__ import annotations

from typing import Any


def _evict(policy: str, budget: float, **knobs: Any) -> dict[str, Any]:
    return {"policy": policy, "budget": budget, **knobs}


OFF = "off"
SMALLEST = "snapkv 0.25 + int4"

SPECULATION: dict[str, dict[str, Any]] = {
    OFF: {},
    "prompt_lookup": {"method": "prompt_lookup", "tokens": 8},
    "token_recycling": {"method": "token_recycling", "tokens": 4},
}

ENDLESS: dict[str, dict[str, Any]] = {
    OFF: {},
    "window of 2048": {"kv": {"evict": _evict("streaming_llm", 2048, positions="compact", block=512, interval=512)}},
}

SPEED: dict[str, dict[str, Any]] = {
    OFF: {},
    "int8": {"kv": {"format": "int8"}},
    "int4": {"kv": {"format": "int4"}},
    "snapkv 0.25": {"kv": {"evict": _evict("snapkv", 0.25)}},
    "snapkv 0.25 adaptive": {"kv": {"evict": _evict("snapkv", 0.25, head_budget="adaptive")}},
    SMALLEST: {"kv": {"evict": _evict("snapkv", 0.25), "format": "int4"}},
    "streaming_llm 0.25": {"kv": {"evict": _evict("streaming_llm", 0.25)}},
    "h2o 0.5": {"kv": {"evict": _evict("h2o", 0.5)}},
    "quest 512": {"kv": {"read": {"policy": "quest", "tokens": 512}}},
    "quest 512 + int4": {"kv": {"read": {"policy": "quest", "tokens": 512}, "format": "int4"}},
}
