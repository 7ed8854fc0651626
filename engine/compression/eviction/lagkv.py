"""LagKV: keep what the tokens after it do not foreshadow (Liang et al., 2025, arXiv:2504.04704).

    A lane after its sinks is cut into partitions of `lag` tokens; the next partition is the reference of each:
    x'         = (x - min) / (max - min)       channel by channel, over the reference's tokens, for keys and values
    spread     = softmax over the partition's tokens of the standard deviation of x' over its channels
    score(token) = rank within its partition of (spread of keys + spread of values) / 2, as a part of `lag`

No attention is needed, and every partition keeps the same share. The last full partition, which has no reference, and
what follows it come before all others, the newest first; so does everything in a lane of less than two partitions.
As in kvpress; a channel that is constant over the reference counts as spread by nothing there (kvpress divides by 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class LagKV:
    """Keep the tokens whose keys and values stand out from those of the tokens after them."""

    signals = frozenset({Signal.KEYS, Signal.VALUES})
    query_agnostic = True

    class Params(PolicyParams):
        lag: int = Field(128, ge=2, le=65536, description="tokens of a partition, scored against the next one")
        is_ranked: bool = Field(
            True, description="each partition keeps the same share; if false, partitions and heads compete by spread"
        )

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0  # what follows the last partition with a reference comes first anyway

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.keys is not None
        assert view.values is not None
        lag, tokens = params.lag, view.keys.shape[2]
        index = view.kept.new_ones(tokens).cumsum(0) - 1
        scores = (1 + index).float().expand_as(view.positions).clone()  # the newest first; a rank or softmax is below 1
        partitions = (tokens - view.sinks) // lag
        if partitions < 2:
            return scores
        judged = (partitions - 1) * lag
        spread = (
            _spread(view.keys, view.sinks, partitions, lag) + _spread(view.values, view.sinks, partitions, lag)
        ) / 2
        if params.is_ranked:
            spread = spread.sort(dim=-1, stable=True).indices.argsort(-1).float() / lag
        # A shorter lane has fewer partitions: its last full one, and what is cut off by its end, have no reference.
        full = (view.kept - view.sinks).clamp_min(0) // lag
        has_reference = index[:judged] < ((full - 1) * lag).unsqueeze(-1)
        part = scores[..., view.sinks : view.sinks + judged]
        part.copy_(spread.flatten(2).where(has_reference, part))
        return scores


def _spread(tokens: Tensor, sinks: int, partitions: int, lag: int) -> Tensor:
    """tokens [layers, kv_heads, n, head_dim] -> [layers, kv_heads, partitions - 1, lag]"""
    cut = tokens[:, :, sinks : sinks + partitions * lag].unflatten(2, (partitions, lag))
    low, high = cut[:, :, 1:].amin(3, keepdim=True), cut[:, :, 1:].amax(3, keepdim=True)
    width = high - low
    scaled = ((cut[:, :, :-1] - low) / width).masked_fill(width == 0, 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)
