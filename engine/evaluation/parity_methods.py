"""The methods that both Winnow and kvpress have, each as both have it, and why they differ where they do.

Plans are written as kvpress has the method: with no sinks where it knows none. Not compared is eviction while tokens
are generated (DecodingPress): kvpress' side reads a text that is foretold in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from winnow.engine.compression.channels import WINDOW
from winnow.engine.compression.registry import EVICTION
from winnow.kernels.formats import THINK

BUDGETS = (0.25, 0.5, 0.75)
CHANNELS = "key_channel_compression_ratio"
"""What ThinKPress calls the share that it drops"""


@dataclass(frozen=True)
class Method:
    """One method as both have it."""

    policy: str
    """Of ours: what evicts tokens, or a page format that drops channels of keys"""
    knobs: dict[str, Any]
    """Of ours"""
    press: str
    press_knobs: dict[str, Any] = field(default_factory=dict)
    ratio: str = "compression_ratio"
    """The press' knob for the share that it drops"""
    attention: str = "sdpa"
    """What transformers must run for it"""
    sums: bool = False
    """Whether the press' means over the queries that could see a token are made sums again"""
    wrapper: str = ""
    """A press that takes the other one as its own"""
    spares: bool = False
    """Whether the press is made to leave the newest tokens alone that fill no page"""
    note: str = ""
    """Why the two may differ"""


ROUNDING = "sums in another order move scores in their last bits, so tokens at the threshold may swap"
SAME = f"same rule; {ROUNDING}"
METHODS: dict[str, Method] = {
    "random": Method("random", {"sinks": 0}, "RandomPress", {"seed": 1}, note="other random numbers"),
    "streaming_llm": Method("streaming_llm", {"sinks": 4}, "StreamingLLMPress", {"n_sink": 4}, note="same rule"),
    "streaming_llm compact": Method(
        "streaming_llm",
        {"sinks": 4, "positions": "compact"},
        "StreamingLLMPress",
        {"n_sink": 4},
        wrapper="KeyRerotationPress",
        note="same rule: what stays is turned to where it now stands, and the text goes on behind it",
    ),
    "knorm": Method("knorm", {"sinks": 0}, "KnormPress", note=SAME),
    "keydiff": Method("keydiff", {"sinks": 0}, "KeyDiffPress", note=SAME),
    "tova": Method("tova", {"sinks": 0}, "TOVAPress", note=SAME),
    "snapkv": Method("snapkv", {"sinks": 0, "recent": 64}, "SnapKVPress", {"window_size": 64}, note=SAME),
    "h2o": Method(
        "h2o",
        {"sinks": 0, "recent": 0},
        "ObservedAttentionPress",
        attention="eager",
        sums=True,
        note="same rule: ObservedAttention, its means made sums again, with no recent tokens protected; " + ROUNDING,
    ),
    "h2o as served": Method(
        "h2o",
        {},
        "ObservedAttentionPress",
        attention="eager",
        note="another rule: h2o sums the attention that a token received and protects the newest half, as its paper "
        "says; ObservedAttention divides by the number of queries that could see the token and protects none",
    ),
    "lagkv": Method(
        "lagkv",
        {},
        "LagKVPress",
        note="same rule; ranks are equal between partitions, and of equals at the threshold the earlier stays here, "
        "whichever topk likes there. Sinks, the last full partition and what follows it have one score there: where "
        "they alone are more than the budget, as at 25 % of these prompts, topk keeps any of them, the sinks or not; "
        "here the sinks and the newest stay",
    ),
    "expected_attention": Method("expected_attention", {}, "ExpectedAttentionPress", note=SAME),
    "kvzip": Method("kvzip", {"sinks": 4}, "KVzipPress", note=SAME + "; the same words ask for the repetition"),
    "snapkv adaptive": Method(
        "snapkv",
        {"sinks": 0, "recent": 64, "head_budget": "adaptive"},
        "SnapKVPress",
        {"window_size": 64},
        wrapper="AdaKVPress",
        note=SAME,
    ),
    "snapkv pyramid": Method(
        "snapkv",
        {"sinks": 0, "recent": 64, "layer_budget": "pyramid"},
        "PyramidKVPress",
        {"window_size": 64},
        note="another rule: here the protected window comes on top of every layer's share, as in the paper, and layers "
        "keep what the budget says in all; PyramidKVPress counts the window as a part of the share, and where the last "
        "layer would keep less than the window it falls back to SnapKV, as at 25 % of these prompts",
    ),
    "snapkv merging": Method(
        "snapkv",
        {"sinks": 0, "recent": 64, "merge": {"policy": "kv_merging"}},
        "SnapKVPress",
        {"window_size": 64},
        wrapper="MergingPress",
        note=SAME,
    ),
    "think": Method(
        "think",
        {"residual": 0},
        "ThinKPress",
        {"window_size": WINDOW},
        ratio=CHANNELS,
        spares=True,
        note="same rule, and ThinKPress is made to leave the newest tokens alone that fill no page here; the keys and "
        "values of the others are rounded to half precision here, where ThinKPress only zeroes",
    ),
    "think as served": Method(
        "think",
        {},
        "ThinKPress",
        {"window_size": WINDOW},
        ratio=CHANNELS,
        note="another rule: the newest tokens of the prompt, at least 32, keep all channels here, as in the paper; "
        "ThinKPress takes the channels from all of them",
    ),
}


def plan_of(name: str, budget: float, tokens: int) -> dict[str, Any]:
    """For a prompt of so many tokens."""
    method = METHODS[name]
    if method.policy not in EVICTION:
        return {"kv": {"format": method.policy, **method.knobs}}
    evict = {"policy": method.policy, "budget": budget} | method.knobs
    if method.knobs.get("positions") == "compact":  # takes a count; evicted from once, at the prompt's end
        evict |= {"budget": int(budget * tokens), "block": tokens, "interval": tokens}
    return {"kv": {"evict": evict}}


def cases_of(names: Sequence[str], head_dim: int) -> list[tuple[str, float]]:
    """Methods, each with what it keeps: shares of the tokens, or the one share of the channels that it knows."""
    channels = (THINK.channels(head_dim) / head_dim,)
    return [(name, budget) for name in names for budget in (BUDGETS if METHODS[name].policy in EVICTION else channels)]
