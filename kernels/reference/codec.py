"""How a page stores tokens: encode and decode for every format (the byte layout is in kernels/layout.py).

    f32     as it is
    bf16    round to nearest even
    int8, int4, in float32, with levels = 255 or 15:
            lo, hi = min, max of the group           keys: a channel over the page's tokens
                                                     values: a token over its channels
            scale = f16(max((hi - lo) / levels, 1e-6))    zero = f16(lo)        both clamped to ±65504
            code  = clamp(⌊(x - zero) / scale + 0.5⌋, 0, levels)                 scale and zero as stored
            x'    = code · scale + zero

Quantized pages are always full: a key channel's scale needs all its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.layout import PageFormat, PageLayout

F16_MAX = 65504.0
MIN_SCALE = 1e-6

_FLOAT = {PageFormat.F32: torch.float32, PageFormat.BF16: torch.bfloat16}


def decode_pages(raw: Tensor, layout: PageLayout, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """raw [n, page_bytes] uint8 -> keys and values, each [n * capacity, D] f32, in the order of the tokens."""
    if fmt.is_quantized:
        keys, values = _decode_quantized(raw, layout, fmt)
    else:
        channels, tokens = float_views(raw, layout, fmt)
        keys, values = channels.transpose(1, 2), tokens
    return keys.float().flatten(0, 1), values.float().flatten(0, 1)


def encode_pages(keys: Tensor, values: Tensor, layout: PageLayout, fmt: PageFormat) -> Tensor:
    """keys and values [n * capacity, D] f32 -> [n, offsets.end] uint8: whole pages, all full."""
    capacity = layout.capacity(fmt)
    keys, values = keys.unflatten(0, (-1, capacity)).transpose(1, 2), values.unflatten(0, (-1, capacity))
    if not fmt.is_quantized:
        return torch.cat([_as_bytes(part.to(_FLOAT[fmt])) for part in (keys, values)], dim=1)
    k_codes, k_scale, k_zero = quantize(keys, fmt)
    v_codes, v_scale, v_zero = quantize(values, fmt)
    if fmt is PageFormat.INT4:
        k_codes, v_codes = _pack_nibbles(k_codes), _pack_nibbles(v_codes)
    return torch.cat([_as_bytes(part) for part in (k_codes, v_codes, k_scale, k_zero, v_scale, v_zero)], dim=1)


def float_views(raw: Tensor, layout: PageLayout, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Pages of a float format as they lie: keys [n, D, capacity] and values [n, capacity, D], views of `raw`."""
    at, size = layout.offsets(fmt), (layout.head_dim, layout.capacity(fmt))
    keys = raw[:, at.keys : at.values].view(_FLOAT[fmt]).unflatten(1, size)
    values = raw[:, at.values : at.end].view(_FLOAT[fmt]).unflatten(1, size[::-1])
    return keys, values


def quantize(x: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., group] f32 -> codes [..., group] uint8, one a byte; scale and zero [...] f16."""
    levels = 2**fmt.bits - 1
    lo, hi = x.amin(dim=-1), x.amax(dim=-1)
    scale = ((hi - lo) / levels).clamp(MIN_SCALE, F16_MAX).half()
    zero = lo.clamp(-F16_MAX, F16_MAX).half()
    codes = ((x - zero.float()[..., None]) / scale.float()[..., None] + 0.5).floor().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


def _decode_quantized(raw: Tensor, layout: PageLayout, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    at, dim, capacity = layout.offsets(fmt), layout.head_dim, layout.capacity(fmt)
    k_codes = raw[:, at.keys : at.values].unflatten(1, (dim, -1))
    v_codes = raw[:, at.values : at.k_scale].unflatten(1, (capacity, -1))
    if fmt is PageFormat.INT4:
        k_codes, v_codes = _unpack_nibbles(k_codes), _unpack_nibbles(v_codes)

    def halves(start: int, end: int) -> Tensor:
        return raw[:, start:end].view(torch.float16).float()[..., None]

    keys = k_codes.float() * halves(at.k_scale, at.k_zero) + halves(at.k_zero, at.v_scale)
    values = v_codes.float() * halves(at.v_scale, at.v_zero) + halves(at.v_zero, at.end)
    return keys.transpose(1, 2), values


def _pack_nibbles(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _as_bytes(part: Tensor) -> Tensor:
    return part.contiguous().flatten(1).view(torch.uint8)
