"""TriAttention: keep the keys that the head's mean query will look at (Mao et al., 2026, WeianMao/triattention).

Before RoPE a head's queries and keys lie close to fixed centres, so that attention is a sum of cosines of the distance:

    s(k, d)    = Σ_f |E[q_f]|·|k_f|·cos(ω_f·d + φ_f)  +  Σ_f (E|q_f| - |E[q_f]|)·|k_f|
    score(key) = max over the KV group's query heads of z( mean over δ = 1, 2, 4, ... of s(k, now - position + δ) )

with φ_f = arg E[q_f] - arg k_f, now the newest token's position, and z what makes a lane's scores have mean
0 and deviation 1. E[q_f] and E|q_f| are measured once for a model: `winnow calibrate --method tri_attention`.

The mean of the cosines is taken before they meet a key: turning E[q] by the mean of e^{iω(now + δ)} makes the first sum
a product with the key as it lies in the cache, after RoPE. The reference turns every key back instead; the second sum
needs lengths only, which RoPE leaves alone. What yarn multiplies cos and sin by is in the keys and in E[q] alike, which
is the reference's s_f².

The reference keeps 2048 tokens, protects the newest 128 and evicts every 128 generated ones: `budget`, `recent`,
`interval`. Here the newest are protected up to half of the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

RECENT = 128
EPSILON = 1e-6


class TriAttention:
    """Keep the tokens that the model's mean queries will look at."""

    signals = frozenset({Signal.KEYS})
    query_agnostic = True

    class Params(PolicyParams):
        horizon: int = Field(
            65536, ge=1, le=1 << 20, description="farthest future distance to score for: 1, 2, 4, ... up to it"
        )

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return min(RECENT, budget // 2)

    def score(self, view: LaneView, params: Params) -> Tensor:
        import torch

        assert view.keys is not None and view.inv_freq is not None and view.profile is not None
        kv_heads = view.keys.shape[1]
        mean, length = view.profile["mean"][view.layers], view.profile["length"][view.layers]
        centre = torch.complex(*mean.double().chunk(2, dim=-1))  # [layers, q_heads, head_dim / 2]
        spare = (length - centre.abs()).float().clamp_min(0)

        powers = torch.arange(params.horizon.bit_length(), dtype=torch.float64, device=view.keys.device)
        distances = 2.0**powers
        phases = (view.seen + view.ahead - 1 + distances).unsqueeze(-1) * view.inv_freq.double()
        turned = centre * torch.polar(torch.ones_like(phases), phases).mean(0)
        query = torch.cat([turned.real, turned.imag], dim=-1).float()

        lengths = torch.hypot(*view.keys.chunk(2, dim=-1))
        by_group = [part.unflatten(1, (kv_heads, -1)).mT for part in (query, spare)]
        scores = (view.keys @ by_group[0] + lengths @ by_group[1]).mT  # [layers, kv_heads, group, tokens]

        held = view.is_held.unsqueeze(2)
        count = held.sum(-1, keepdim=True).clamp_min(1)
        centred = (scores - (scores * held).sum(-1, keepdim=True) / count) * held
        deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp_min(EPSILON)
        return (centred / deviation).amax(2)
