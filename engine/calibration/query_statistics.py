"""The mean of a head's queries before RoPE, for tri_attention (Mao et al., 2026).

    mean      [layers, q_heads, head_dim] float32      E[q]: a frequency's real part at f, its imaginary one at f + D/2
    length    [layers, q_heads, head_dim / 2] float32  E|q_f|

Queries are turned back by RoPE's angles only: a factor on cos and sin (yarn) stays in, as it does in the cached keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnow.engine.calibration.store import Profile
from winnow.engine.calibration.text import excerpts
from winnow.engine.calibration.watch import Glimpse, unrotated
from winnow.engine.models.config import ModelConfig

EXCERPTS, EXCERPT_TOKENS = 48, 512


class QueryStatistics:
    """Sums queries over excerpts of a text."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._sum = torch.zeros(config.layers, config.heads, config.head_dim, dtype=torch.float64)
        self._length = torch.zeros(config.layers, config.heads, config.head_dim // 2, dtype=torch.float64)
        self._tokens = 0

    def prompts(self, text: Sequence[int]) -> list[list[int]]:
        return excerpts(text, EXCERPTS, min(EXCERPT_TOKENS, self._config.max_position))

    def see(self, glimpse: Glimpse) -> None:
        queries = unrotated(glimpse.queries, self._config.inv_freq)
        real, imaginary = queries.chunk(2, dim=-1)
        self._sum[glimpse.layer] += queries.sum(1)
        self._length[glimpse.layer] += torch.hypot(real, imaginary).sum(1)
        self._tokens += queries.shape[1] if glimpse.layer == 0 else 0

    def profile(self) -> Profile:
        return {"mean": (self._sum / self._tokens).float(), "length": (self._length / self._tokens).float()}
