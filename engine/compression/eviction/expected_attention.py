"""Expected attention: keep what queries to come will look at (Devoto et al., 2025, arXiv:2510.00636).

    The queries seen so far, before RoPE, have mean m and covariance C; those to come are taken to be as they were,
    turned by R, the mean of the rotations at the next `future` positions:

    logit(key)  = k.Rm / sqrt(d) + k.(R C R^T)k / 2d        the log of E[e^(q.k / sqrt(d))] for normal q
    score(key)  = (mean over the KV group's query heads of softmax(logit) + epsilon) * ||v||

As in kvpress, the plan's sinks take no part: neither their queries, which are like no other, nor their keys.

Where we depart: kvpress leaves out the bias of the query projection (Qwen2) and refuses models that normalise queries
(Qwen3); here the queries are what the model makes of them. In decode, the generated tokens' queries count too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class ExpectedAttention:
    """Keep the tokens that queries like those so far would attend to from later positions."""

    signals = frozenset({Signal.KEYS, Signal.VALUES, Signal.QUERIES})
    query_agnostic = True

    class Params(PolicyParams):
        future: int = Field(512, ge=1, le=65536, description="positions to come over which RoPE is averaged")
        use_covariance: bool = Field(True, description="count the queries' spread, not only their mean")
        use_values: bool = Field(True, description="weigh a token with the norm of its value")
        epsilon: float = Field(
            0.0, ge=0, le=1, description="added to the attention before it is weighed with the value's norm"
        )

    def voters(self, params: Params, seen: int) -> None:
        return None

    def default_recent(self, params: Params, budget: int) -> int:
        return 0

    def score(self, view: LaneView, params: Params) -> Tensor:
        import torch

        assert view.keys is not None
        assert view.values is not None
        assert view.queries is not None
        rotation = _mean_rotation(view, params.future)
        keys = view.keys.double()
        heads, dim = keys.shape[1], keys.shape[3]
        mean = (view.queries.mean @ rotation.T).unflatten(1, (heads, -1))  # [layers, kv_heads, group, head_dim]
        logits = torch.einsum("lhgd,lhtd->lhgt", mean, keys) / dim**0.5
        if params.use_covariance:
            covariance = (rotation @ view.queries.covariance @ rotation.T).unflatten(1, (heads, -1))
            for member in range(view.q_per_kv):  # one at a time: a group's products of long lanes would be large
                logits[:, :, member] += ((keys @ covariance[:, :, member]) * keys).sum(-1) / (2 * dim)
        is_sink = (view.positions < view.sinks) | ~view.is_held
        attention = logits.masked_fill(is_sink.unsqueeze(2), -torch.inf).softmax(-1).mean(2).nan_to_num(0.0)
        if params.use_values:
            attention = (attention + params.epsilon) * view.values.double().norm(dim=-1)
        return attention.float()


def _mean_rotation(view: LaneView, future: int) -> Tensor:
    """[head_dim, head_dim] float64: what RoPE makes of a query at the next `future` positions, on average."""
    import torch

    first, device = view.seen + view.ahead, view.inv_freq.device
    positions = torch.arange(first, first + future, dtype=torch.float64, device=device)
    angles = positions[:, None] * view.inv_freq.double()
    cos, sin = (torch.diag(side.mean(0) * view.rope_factor) for side in (angles.cos(), angles.sin()))
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
