"""Mustafar: of each token only the numbers that are largest (Joo et al., 2025, arXiv:2505.22913)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mustafar:
    """Each side of a page holds, for C tokens of D channels of which n numbers stay:

    bitmap     [C, D/8]    bit d % 8 of byte d / 8 says whether the number of channel d stayed
    numbers    [C, n]      float16, those that did in the order of their channels
    """

    percent: int
    """of a token's numbers that go, of its key and its value alike"""

    def numbers(self, dim: int) -> int:
        """How many stay."""
        return dim - dim * self.percent // 100

    def key_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return tokens * dim // 8, 2 * tokens * self.numbers(dim)

    value_parts = key_parts
