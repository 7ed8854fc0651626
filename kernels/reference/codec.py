"""How a page stores tokens: encode and decode for every format (the byte layout is in kernels/layout.py).

    f32     as it is
    bf16    round to nearest even
    f16     likewise, clamped to ±65504
    int8, int4, int2, in float32, with levels = 255, 15 or 3:
            lo, hi = min, max of the group           keys: a channel over the page's (int2: a block's) tokens
                                                     values: a token over its (int2: a block's) channels
            scale = f16(max((hi - lo) / levels, 1e-6))    zero = f16(lo)        both clamped to ±65504
            code  = clamp(⌊(x - zero) / scale + 0.5⌋, 0, levels)                 scale and zero as stored
            x'    = code · scale + zero
    fp8, in float32:
            scale = f16(max(max |x| / 448, 1e-6)), clamped to 65504              over one side of the page
            code  = e4m3(clamp(x / scale, ±448)), round to nearest even
            x'    = code · scale

Quantized pages are always full: their scales need all of their tokens. What pages mean that are opened says
kernels/reference/formats.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.formats import CODECS, Place
from winnow.kernels.reference.integers import F16_MAX, MIN_SCALE, pack, quantize, unpack

E4M3_MAX = 448.0

_FLOAT = {PageFormat.F32: torch.float32, PageFormat.BF16: torch.bfloat16, PageFormat.F16: torch.float16}


def decode_pages(raw: Tensor, layout: PageLayout, fmt: PageFormat, place: Place | None = None) -> tuple[Tensor, Tensor]:
    """raw [n, page_bytes] uint8 -> keys and values, each [n * capacity, D] f32, in the order of the tokens.

    Formats that do not go by it need no `place`.
    """
    if fmt.is_opened:
        at = layout.offsets(fmt).parts
        parts = tuple(raw[:, start:end].contiguous() for start, end in pairwise(at))
        keys, values = CODECS[fmt].open(parts, layout.capacity(fmt), layout.head_dim, place)
    elif fmt.is_integer:
        keys, values = _decode_integers(raw, layout, fmt)
    elif fmt is PageFormat.FP8:
        keys, values = _decode_fp8(raw, layout)
    else:
        channels, tokens = float_views(raw, layout, fmt)
        keys, values = channels.transpose(1, 2), tokens
    return keys.float().flatten(0, 1), values.float().flatten(0, 1)


def encode_pages(
    keys: Tensor, values: Tensor, layout: PageLayout, fmt: PageFormat, place: Place | None = None
) -> Tensor:
    """keys and values [n * capacity, D] f32 -> [n, offsets.end] uint8: whole pages, all full."""
    capacity = layout.capacity(fmt)
    keys, values = keys.unflatten(0, (-1, capacity)).transpose(1, 2), values.unflatten(0, (-1, capacity))
    parts: Iterable[Tensor]
    if fmt.is_opened:
        parts = CODECS[fmt].seal(keys.transpose(1, 2), values, place)
    elif fmt.is_integer:
        k_codes, k_scale, k_zero = quantize(_blocks(keys, layout.key_block(fmt)), fmt)
        v_codes, v_scale, v_zero = quantize(_blocks(values, layout.value_block(fmt)), fmt)
        parts = [pack(k_codes, fmt), pack(v_codes, fmt), k_scale, k_zero, v_scale, v_zero]
    elif fmt is PageFormat.FP8:
        (k_codes, k_scale), (v_codes, v_scale) = quantize_fp8(keys), quantize_fp8(values)
        parts = [k_codes, v_codes, k_scale, v_scale]
    else:
        parts = [as_float(part, fmt) for part in (keys, values)]
    return torch.cat([_as_bytes(part) for part in parts], dim=1)


def float_views(raw: Tensor, layout: PageLayout, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Pages of a float format as they lie: keys [n, D, capacity] and values [n, capacity, D], views of `raw`."""
    at, size = layout.offsets(fmt), (layout.head_dim, layout.capacity(fmt))
    keys = raw[:, at.keys : at.values].view(_FLOAT[fmt]).unflatten(1, size)
    values = raw[:, at.values : at.end].view(_FLOAT[fmt]).unflatten(1, size[::-1])
    return keys, values


def as_float(x: Tensor, fmt: PageFormat) -> Tensor:
    """f32 numbers as a float format holds them."""
    return (x.clamp(-F16_MAX, F16_MAX) if fmt is PageFormat.F16 else x).to(_FLOAT[fmt])


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, rows, columns] f32 -> codes of the same shape, e4m3; scale [n, 1] f16."""
    scale = (x.abs().amax(dim=(1, 2)) / E4M3_MAX).clamp(MIN_SCALE, F16_MAX).half()
    codes = (x / scale.float()[:, None, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale[:, None]


def _decode_integers(raw: Tensor, layout: PageLayout, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    at, dim, capacity = layout.offsets(fmt), layout.head_dim, layout.capacity(fmt)

    def side(codes: int, end: int, scale: int, zero: int, last: int, rows: int, block: int) -> Tensor:
        """[n, rows, columns] of keys or values, whose blocks of columns lie one after the other."""
        packed = raw[:, codes:end].unflatten(1, (-1, rows, block * fmt.bits // 8))
        scales, zeros = (
            raw[:, first:until].view(torch.float16).float().unflatten(1, (-1, rows, 1))
            for first, until in ((scale, zero), (zero, last))
        )
        return (unpack(packed, fmt).float() * scales + zeros).transpose(1, 2).flatten(2)

    keys = side(at.keys, at.values, at.k_scale, at.k_zero, at.v_scale, dim, layout.key_block(fmt))
    values = side(at.values, at.k_scale, at.v_scale, at.v_zero, at.end, capacity, layout.value_block(fmt))
    return keys.transpose(1, 2), values


def _decode_fp8(raw: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    at, size = layout.offsets(PageFormat.FP8), (layout.head_dim, layout.capacity(PageFormat.FP8))

    def side(start: int, end: int, scale: int, size: tuple[int, ...]) -> Tensor:
        codes = raw[:, start:end].view(torch.float8_e4m3fn).float().unflatten(1, size)
        return codes * raw[:, scale : scale + 2].view(torch.float16).float()[..., None]

    keys = side(at.keys, at.values, at.k_scale, size)
    return keys.transpose(1, 2), side(at.values, at.k_scale, at.v_scale, size[::-1])


def _blocks(x: Tensor, block: int) -> Tensor:
    """[n, rows, columns] -> [n, columns / block, rows, block]"""
    return x.unflatten(2, (-1, block)).transpose(1, 2)


def _as_bytes(part: Tensor) -> Tensor:
    return part.contiguous().flatten(1).view(torch.uint8)
