"""How much each head retrieves, for razor_attention (Tang et al., 2024, arXiv:2407.15891).

The model reads random tokens, the same ones four times over. Where a token comes again, a head's attention to

    its earlier occurrences                      is the head's echo score,
    what followed its earlier occurrences        is its induction score,

both averaged over the tokens of the second to fourth time:

    echo, induction   [layers, q_heads] float32, from 0 to 1

The paper repeats 2500 tokens; a context that is shorter than that gets fewer. No token occurs twice in one round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.engine.calibration.store import Profile
from winnow.engine.calibration.watch import Glimpse
from winnow.engine.models.config import ModelConfig

ROUNDS, TOKENS, PROMPTS = 4, 512, 4
_BLOCK = 256


class HeadClasses:
    """Echo and induction scores of every query head."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._period = min(TOKENS, config.vocab_size // 2, config.max_position // ROUNDS)
        self._echo = torch.zeros(config.layers, config.heads, dtype=torch.float64)
        self._induction = torch.zeros_like(self._echo)
        self._prompts = 0

    def prompts(self, text: Sequence[int]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        rounds = [torch.randperm(self._config.vocab_size, generator=generator)[: self._period] for _ in range(PROMPTS)]
        return [tokens.repeat(ROUNDS).tolist() for tokens in rounds]

    def see(self, glimpse: Glimpse) -> None:
        keys = glimpse.keys.repeat_interleave(self._config.heads // self._config.kv_heads, 0)
        length, period = keys.shape[1], self._period
        at = torch.arange(length)
        for start in range(period, length, _BLOCK):
            queries = at[start : start + _BLOCK, None]
            distance = queries - at
            seen = (distance >= 0) & (distance < (glimpse.window or length))
            logits = glimpse.queries[:, start : start + _BLOCK] @ keys.mT * glimpse.scale
            attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            is_same, follows_same = distance % period == 0, (distance + 1) % period == 0
            self._add(self._echo, glimpse.layer, attention, is_same & (distance > 0))
            self._add(self._induction, glimpse.layer, attention, follows_same & (distance > 0) & (at > 0))
        self._prompts += glimpse.layer == 0

    def _add(self, sums: Tensor, layer: int, attention: Tensor, chosen: Tensor) -> None:
        """Adds each head's attention [q_heads, queries, tokens] to the `chosen` tokens [queries, tokens]."""
        sums[layer] += (attention * chosen).sum((1, 2), dtype=torch.float64)

    def profile(self) -> Profile:
        queries = self._prompts * self._period * (ROUNDS - 1)
        return {"echo": (self._echo / queries).float(), "induction": (self._induction / queries).float()}
