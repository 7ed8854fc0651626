"""What formats mean whose pages are opened before they are read: one file each, and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from winnow.kernels.formats import PageFormat
from winnow.kernels.formats.gear import Gear
from winnow.kernels.formats.low_rank import LowRank
from winnow.kernels.formats.mustafar import Mustafar
from winnow.kernels.formats.think import THINK
from winnow.kernels.kv import PagedKV
from winnow.kernels.reference.formats.gear import GearCodec
from winnow.kernels.reference.formats.low_rank import LowRankCodec
from winnow.kernels.reference.formats.mini_cache import MiniCacheCodec
from winnow.kernels.reference.formats.mustafar import MustafarCodec
from winnow.kernels.reference.formats.think import ThinkCodec


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens of some pages belong, for formats that go by it."""

    kv: PagedKV
    layer: int
    head: int
    positions: Tensor
    """[n * capacity] int64: where the tokens stand in the text"""
    channels: Tensor | None = None
    """[D] uint8: 1 for the channels of keys that stay, to seal formats that lack some; None where nobody has chosen"""
    upper: tuple[Tensor, Tensor] | None = None
    """Keys and values [n * capacity, D] f32 of the same tokens one layer up, where pages are sealed for both"""
    t: float = 0.0
    """`LayerMerge.t`"""


class Codec(Protocol):
    """Seals and opens pages of one format. Shapes: n pages of C tokens of D channels."""

    def seal(self, keys: Tensor, values: Tensor, place: Place | None) -> tuple[Tensor, ...]:
        """keys and values [n, C, D] f32 -> the parts of the pages in their order, each [n, ...]."""

    def open(self, parts: tuple[Tensor, ...], tokens: int, dim: int, place: Place | None) -> tuple[Tensor, Tensor]:
        """The parts, each [n, bytes] uint8 -> keys and values [n, C, D] f32."""


CODECS: dict[PageFormat, Codec] = {
    PageFormat.MUSTAFAR50: MustafarCodec(Mustafar(percent=50)),
    PageFormat.MUSTAFAR70: MustafarCodec(Mustafar(percent=70)),
    PageFormat.GEAR: GearCodec(Gear()),
    PageFormat.THINK: ThinkCodec(THINK),
    PageFormat.MATRYOSHKA: LowRankCodec(PageFormat.MATRYOSHKA, LowRank(before_rope=False)),
    PageFormat.CSKV: LowRankCodec(PageFormat.CSKV, LowRank(before_rope=True)),
    PageFormat.MINI_CACHE: MiniCacheCodec(),
}
