"""MiniCache: a token's directions for two layers, and its norms in each (Liu et al., 2024, arXiv:2405.14366)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MiniCache:
    """A page holds C tokens of D channels for the lanes of two layers, the lower one first:

    keys       [D, C]    float16, of norm 1           values       [C, D]    float16, of norm 1
    norms      [2, C]    float16, of each layer's     norms        [2, C]    float16, of each layer's
                                                      lower layer  int32
    """

    def key_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return 2 * tokens * dim, 4 * tokens

    def value_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return *self.key_parts(dim, tokens), 4
