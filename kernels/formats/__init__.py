"""The page formats: the one list of them, from which schema, docs and tests follow."""

from __future__ import annotations

from enum import IntEnum

from winnow.kernels.formats.gear import Gear
from winnow.kernels.formats.low_rank import LowRank
from winnow.kernels.formats.mini_cache import MiniCache
from winnow.kernels.formats.mustafar import Mustafar
from winnow.kernels.formats.opened import Opened
from winnow.kernels.formats.think import THINK, Think


class PageFormat(IntEnum):
    """How a page stores tokens. The values are those of `Format` in kernels/cpu/kernels.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3
    INT2 = 4
    FP8 = 5
    F16 = 6
    MUSTAFAR50 = 7
    MUSTAFAR70 = 8
    GEAR = 9
    THINK = 10
    MATRYOSHKA = 11
    CSKV = 12
    MINI_CACHE = 13

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def what(self) -> str:
        """A sentence on what the format does, and where it comes from."""
        return WHAT[self]

    @property
    def bits(self) -> int:
        """Bits of one stored number, scales aside; KeyError for a format whose pages are opened."""
        return BITS[self]

    @property
    def mean_bits(self) -> float:
        """Bits by which formats compare: of one number, scales aside, or where pages are opened, of all that a page
        of 128 tokens with 128 channels holds."""
        if not self.is_opened:
            return self.bits
        side = 128
        parts = (*self.opened.key_parts(side, side), *self.opened.value_parts(side, side))
        return 8 * sum(parts) / (2 * side * side * (2 if self.spans_layers else 1))

    @property
    def is_float(self) -> bool:
        """Each number stands for itself, so that tokens can be written one by one."""
        return self in (PageFormat.F32, PageFormat.BF16, PageFormat.F16)

    @property
    def is_integer(self) -> bool:
        """Codes with a scale and a zero."""
        return self in (PageFormat.INT8, PageFormat.INT4, PageFormat.INT2)

    @property
    def is_quantized(self) -> bool:
        """Tokens share something, so that a page is written whole or not at all."""
        return not self.is_float

    @property
    def is_opened(self) -> bool:
        """A page is decoded whole before any of it is read: see kernels/formats/opened.py."""
        return self in OPENED

    @property
    def spans_layers(self) -> bool:
        """A page holds tokens of two lanes, those of a KV head in adjacent layers. Only `kv.mix` makes such pages."""
        return self is PageFormat.MINI_CACHE

    @property
    def opened(self) -> Opened:
        """Sizes of a format whose pages are opened."""
        return OPENED[self]

    @property
    def drops_channels(self) -> bool:
        """Keys lack some channels, the same ones in all pages of a lane: `PagedKV.channels`."""
        return self.is_opened and isinstance(self.opened, Think)

    @property
    def has_bases(self) -> bool:
        """Pages hold coordinates in bases of the model: `PagedKV.bases`."""
        return self.is_opened and isinstance(self.opened, LowRank)

    @property
    def goes_by_position(self) -> bool:
        """Keys are held as they are before RoPE, so that who reads them must know their positions."""
        return self.is_opened and isinstance(sizes := self.opened, LowRank) and sizes.before_rope

    @classmethod
    def parse(cls, label: str) -> PageFormat:
        return cls[label.upper()]


BITS: dict[PageFormat, int] = {
    PageFormat.F32: 32,
    PageFormat.BF16: 16,
    PageFormat.F16: 16,
    PageFormat.INT8: 8,
    PageFormat.INT4: 4,
    PageFormat.INT2: 2,
    PageFormat.FP8: 8,
}

OPENED: dict[PageFormat, Opened] = {
    PageFormat.MUSTAFAR50: Mustafar(percent=50),
    PageFormat.MUSTAFAR70: Mustafar(percent=70),
    PageFormat.GEAR: Gear(),
    PageFormat.THINK: THINK,
    PageFormat.MATRYOSHKA: LowRank(before_rope=False),
    PageFormat.CSKV: LowRank(before_rope=True),
    PageFormat.MINI_CACHE: MiniCache(),
}

_KIVI = "with a scale and a zero for each key channel of a page and each token's value (KIVI, arXiv:2402.02750)"
_HALF = "by half as many coordinates in half precision, in calibrated bases of each layer and head"
_MUSTAFAR = "of each token's key and value, the rest is zero: a bitmap and the numbers in half precision"

WHAT: dict[PageFormat, str] = {
    PageFormat.F32: "single precision, in which the CPU computes",
    PageFormat.BF16: "bfloat16: eight bits of exponent, eight of fraction",
    PageFormat.INT8: f"eight-bit codes {_KIVI}",
    PageFormat.INT4: f"four-bit codes {_KIVI}",
    PageFormat.INT2: "two-bit codes, as above for each 32 tokens of a key channel and 32 channels of a value",
    PageFormat.FP8: "e4m3 with one scale for the keys of a page and one for its values (arXiv:2209.05433)",
    PageFormat.F16: "half precision: five bits of exponent, eleven of fraction; what is beyond 65504 becomes that",
    PageFormat.MUSTAFAR50: f"the largest half {_MUSTAFAR} (Mustafar, arXiv:2505.22913)",
    PageFormat.MUSTAFAR70: f"the largest 30 % {_MUSTAFAR} (Mustafar, arXiv:2505.22913)",
    PageFormat.GEAR: "int4 after 2 % outliers are taken out, and its error at rank 2 (GEAR, arXiv:2403.05527)",
    PageFormat.THINK: "keys without the 40 % of channels that say least about the last queries of the prompt, the "
    "others and values in half precision (ThinK, arXiv:2407.21018)",
    PageFormat.MATRYOSHKA: f"keys and values {_HALF}, in which attention is computed (MatryoshkaKV, arXiv:2410.14731)",
    PageFormat.CSKV: f"keys before RoPE and values {_HALF}; opened keys are turned anew (CSKV, arXiv:2409.10593)",
    PageFormat.MINI_CACHE: "one direction of a token's vectors in two layers and the norms of both, in half precision "
    "(MiniCache, arXiv:2405.14366)",
}
