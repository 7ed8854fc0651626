"""Page formats and byte layout: the one place that says where a token's bytes lie.

A page is a fixed number of bytes that holds tokens of one lane (one sequence, one layer, one KV head)
in one format. Inside a page, for head dimension D and capacity C tokens of the page's format:

    keys     [D, C]    channel-major, so that q.K is a row-by-row multiply-add over channels and a channel's
                       quantization scale applies to one contiguous row
    values   [C, D]    token-major, so that p.V is a row-by-row multiply-add over tokens
    quantized formats add, all float16:
    k_scale  [D], k_zero [D]     one per channel, over the page's tokens   (KIVI, arXiv:2402.02750)
    v_scale  [C], v_zero [C]     one per token

A quantized number is ``code * scale + zero`` with unsigned codes. Four-bit codes hold two numbers a byte:
in a key row, token t (low nibble) and token t + C/2 (high); in a value row, channel d (low) and d + D/2 (high).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

VECTOR = 8
"""Capacities are multiples of this, so that a key row is whole vectors on every target."""


class PageFormat(IntEnum):
    """How a page stores tokens. The values are those of `Format` in kernels/cpu/page.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def bits(self) -> int:
        """Bits of one stored number, scales aside."""
        return {PageFormat.F32: 32, PageFormat.BF16: 16, PageFormat.INT8: 8, PageFormat.INT4: 4}[self]

    @property
    def is_quantized(self) -> bool:
        return self in (PageFormat.INT8, PageFormat.INT4)

    @classmethod
    def parse(cls, label: str) -> PageFormat:
        return cls[label.upper()]


@dataclass(frozen=True)
class Offsets:
    """Byte offsets of a page's parts; `k_scale` and what follows are meaningful for quantized formats."""

    keys: int
    values: int
    k_scale: int
    k_zero: int
    v_scale: int
    v_zero: int
    end: int


@dataclass(frozen=True)
class PageLayout:
    """Sizes of a model's pages.

    `page_tokens` is the capacity of a page in the compute format, the one new tokens are written in.
    """

    head_dim: int
    compute: PageFormat = PageFormat.F32
    page_tokens: int = 16

    def __post_init__(self) -> None:
        if self.head_dim % (2 * VECTOR) or not 16 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of {2 * VECTOR} from 16 to 256, not {self.head_dim}")
        if self.page_tokens % (2 * VECTOR) or not 2 * VECTOR <= self.page_tokens <= 256:
            raise ValueError(f"page_tokens must be a multiple of {2 * VECTOR} up to 256, not {self.page_tokens}")
        if self.compute.is_quantized:
            raise ValueError("the compute format must be a float format")

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes(self.compute)

    def token_bytes(self, fmt: PageFormat) -> int:
        """Bytes that one more token costs in a page: its key, its value and its own scales."""
        per_token_scales = 4 if fmt.is_quantized else 0
        return 2 * self.head_dim * fmt.bits // 8 + per_token_scales

    @cache  # noqa: B019 - layouts are few and live as long as the process
    def capacity(self, fmt: PageFormat) -> int:
        """Tokens that fit a page of this format."""
        per_page_scales = 4 * self.head_dim if fmt.is_quantized else 0
        # Four-bit key rows split into halves of whole vectors.
        multiple = 2 * VECTOR if fmt is PageFormat.INT4 else VECTOR
        fit = (self.page_bytes - per_page_scales) // self.token_bytes(fmt)
        return fit // multiple * multiple

    @cache  # noqa: B019
    def offsets(self, fmt: PageFormat) -> Offsets:
        tokens, dim = self.capacity(fmt), self.head_dim
        side = tokens * dim * fmt.bits // 8
        k_scale = 2 * side
        k_zero = k_scale + 2 * dim
        v_scale = k_zero + 2 * dim
        v_zero = v_scale + 2 * tokens
        end = v_zero + 2 * tokens if fmt.is_quantized else 2 * side
        return Offsets(0, side, k_scale, k_zero, v_scale, v_zero, end)

    def pages(self, tokens: int, fmt: PageFormat | None = None) -> int:
        """Pages that hold `tokens` tokens of one lane."""
        return -(-tokens // self.capacity(self.compute if fmt is None else fmt))
