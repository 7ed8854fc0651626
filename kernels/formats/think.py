"""ThinK: keys without the channels that say least about q.k (Xu et al., 2024, arXiv:2407.21018)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Think:
    """A page holds, for C tokens of D channels of which n stay in keys:

    bitmap     [D/8]       bit d % 8 of byte d / 8 says whether channel d of the keys stayed
    keys       [n, C]      float16, the channels that did in their order
    values     [C, D]      float16
    """

    percent: int
    """of the channels of keys that stay"""

    def channels(self, dim: int) -> int:
        """How many stay."""
        return dim * self.percent // 100

    def key_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return dim // 8, 2 * tokens * self.channels(dim)

    def value_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return (2 * tokens * dim,)


THINK = Think(percent=60)
