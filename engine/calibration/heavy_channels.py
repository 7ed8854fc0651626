"""Which channels of a lane say most about q.k, for double_sparsity (Yang et al., 2024, arXiv:2408.07092).

    channels  [layers, kv_heads, head_dim] int16   channels, the heaviest first, by
    weight    [layers, kv_heads, head_dim] float32 E|q_c k_c|, after RoPE: each token's query with its own key

averaged over the query heads that share the lane, since they share its labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnow.engine.calibration.store import Profile
from winnow.engine.calibration.text import excerpts
from winnow.engine.calibration.watch import Glimpse
from winnow.engine.models.config import ModelConfig

EXCERPTS, EXCERPT_TOKENS = 48, 512


class HeavyChannels:
    """Sums |q_c k_c| over excerpts of a text."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._sum = torch.zeros(config.layers, config.kv_heads, config.head_dim, dtype=torch.float64)
        self._tokens = 0

    def prompts(self, text: Sequence[int]) -> list[list[int]]:
        return excerpts(text, EXCERPTS, min(EXCERPT_TOKENS, self._config.max_position))

    def see(self, glimpse: Glimpse) -> None:
        groups = glimpse.queries.double().unflatten(0, (self._config.kv_heads, -1))
        products = (groups * glimpse.keys.double().unsqueeze(1)).abs()
        self._sum[glimpse.layer] += products.mean(1).sum(1)
        self._tokens += groups.shape[2] if glimpse.layer == 0 else 0

    def profile(self) -> Profile:
        weight = (self._sum / self._tokens).float()
        order = weight.sort(dim=-1, descending=True, stable=True).indices
        return {"channels": order.to(torch.int16), "weight": weight}
