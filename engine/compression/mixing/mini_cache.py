"""MiniCache: adjacent layers share the direction of a token's key and value (Liu et al., 2024, arXiv:2405.14366).

    x, y      a token's keys, or values, of one KV head in layers l and l + 1
    d         = arccos(x.y / |x||y|) / pi
    merged    x' = |x| e,  y' = |y| e,  e the direction at t of the way from x's to y's (SLERP)
    divergent d > d_max - gamma (d_max - d_min), over the tokens of the lane: these are not merged

The paper's equation 3 gives t to the upper layer, the second term of its SLERP, of which its t = 0.6 takes more.

From layer `start` on layers are merged in pairs: a token's direction lies in a page that the lanes of both layers have,
beside the two norms. Divergent tokens, and all tokens of other layers, are held in `format`. What has been merged stays
so; the others, but for the newest `kv.residual`, are judged every `every` generated tokens, as they fill pages.

Keys are merged as they are stored, after RoPE: a token stands at one position in both layers, so that RoPE has turned
both of its keys by the same angles, and neither d nor SLERP sees a rotation of both.

What this costs depends on the model: the paper finds that adjacent layers agree from half depth on, while those of
SmolLM2-135M stand at right angles to each other, more or less, so that there merging is far from free (METHODS.md).

Where we depart:
- KV heads are judged and merged one by one. The paper's vectors are those of a whole layer.
- A token is divergent if its key or its value is. The paper has a set for each; here a token lies in one page.
- The paper's text keeps the distinct pairs, its formula d < d_min + gamma (d_max - d_min) those that are alike.
- Shared directions and norms are float16, whatever the engine computes in.
"""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal
from winnow.kernels.layer_merge import LayerMerge

if TYPE_CHECKING:
    from torch import Tensor


class MiniCache:
    """Merge the tokens of adjacent layers that point in one direction, and hold the divergent ones in `format`."""

    format = "bf16"
    rest = "mini_cache"
    demotes = True
    signals = frozenset({Signal.KEYS, Signal.VALUES})
    query_agnostic = True

    class Params(PolicyParams):
        t: float = Field(0.6, ge=0, le=1, description="weight of the upper layer's direction in a shared one")
        gamma: float = Field(0.05, ge=0, le=1, description="part of the range of distances that is divergent")
        start: float = Field(0.5, ge=0, lt=1, description="depth, as a share of the layers, from which they are merged")
        every: int = Field(64, ge=1, le=65536, description="generated tokens between two judgements")

    def choice(self, params: Params) -> dict[str, Any]:
        knobs = {"budget": 1, "sinks": 0, "recent": 0, "during": "both", "interval": params.every}
        return knobs | {"t": params.t, "gamma": params.gamma, "start": params.start}

    def layer_merge(self, params: Params, layers: int) -> LayerMerge:
        return LayerMerge(int(params.start * layers), params.t)

    def voters(self, params: PolicyParams, seen: int) -> int:
        return 0

    def default_recent(self, params: PolicyParams, budget: int) -> int:
        return 0

    def lane_budgets(self, view: LaneView, params: Params) -> Tensor:
        if view.keys is None:  # a layer that is not merged keeps all
            return view.kept
        is_divergent = self.score(view, params) > 1 - params.gamma
        return (is_divergent & view.is_held).sum(-1)

    def score(self, view: LaneView, params: Params) -> Tensor:
        """Where in the range of distances from d_min, 0, to d_max, 1, a token's key or value is, the farther one."""
        if view.keys is None or view.values is None:
            return view.kept.unsqueeze(-1).expand_as(view.positions).float()
        key, value = (_place_in_range(_distance(side), view.is_held[0]) for side in (view.keys, view.values))
        return key.maximum(value).expand_as(view.positions)


def _distance(side: Tensor) -> Tensor:
    """[2, kv_heads, tokens, head_dim] -> angular distance of the two layers' vectors, [kv_heads, tokens]."""
    x, y = side
    norms = (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(1e-30)
    return ((x * y).sum(-1) / norms).clamp(-1, 1).acos() / pi


def _place_in_range(distance: Tensor, is_held: Tensor) -> Tensor:
    """Distances [kv_heads, tokens] by the range of each lane's; zeros where it has none."""
    low = distance.masked_fill(~is_held, 1).amin(-1, keepdim=True)
    high = distance.masked_fill(~is_held, 0).amax(-1, keepdim=True)
    return (distance - low) / (high - low).clamp_min(1e-12)
