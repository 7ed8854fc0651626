"""Bytes that rows which read by a rule touch: to choose, and of what they chose.

Counted with integer atomics: their order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.layout import Offsets, PageFormat
from winnow.kernels.triton.columns import LANE, column_at
from winnow.kernels.triton.readers import BY_BOUNDS, CHANNELS, CHOICE_TOKENS, CHOICES, OWNER, SPAN, TOUCHED
from winnow.kernels.triton.reading_spans import CHOSEN, bytes_of_page, bytes_of_token, column_of, has_grid, setting
from winnow.kernels.triton.tiles import padded


@triton.constexpr_function
def is_quantized(fmt: int) -> bool:
    return PageFormat(fmt).is_quantized


@triton.constexpr_function
def bytes_of_channels(fmt: int, tokens: int) -> int:
    """Of a page's keys in one channel, with its scales where it has its own."""
    at = Offsets(PageFormat(fmt), 1, tokens)
    return at.values + (at.v_scale - at.k_scale if PageFormat(fmt).is_integer else 0)


@triton.constexpr_function
def bytes_of_side(fmt: int) -> int:
    """Of the scale that all keys of a page share."""
    return 2 if PageFormat(fmt) is PageFormat.FP8 else 0


@triton.constexpr_function
def bytes_of_grids(fmt: int, dim: int, tokens: int) -> int:
    """Of all scales and zeros of a page's keys."""
    at = Offsets(PageFormat(fmt), dim, tokens)
    return at.v_scale - at.k_scale


@triton.jit
def count_looks(
    settings: tl.tensor,
    reader: tl.tensor,
    lane: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
) -> None:
    """Bytes of the bounds, or of the channels, that candidates were judged by."""
    sealed, fmt = tl.load(lane + 1), tl.load(lane + 3)
    if setting(settings, reader, BY_BOUNDS) != 0:
        from_, to, of_open = first, last, first * 0 + 4 * D
    else:
        from_ = column_of(begin, lane, COMPUTE, CAPACITIES)
        to = column_of(end - 1, lane, COMPUTE, CAPACITIES) + 1
        of_open = bytes_of_channels(COMPUTE, CAPACITIES[COMPUTE]) * setting(settings, reader, CHANNELS).to(tl.int32)
    of_sealed = of_open
    for k in tl.static_range(len(FORMATS)):
        if fmt == FORMATS[k]:
            if setting(settings, reader, BY_BOUNDS) == 0:
                channels = setting(settings, reader, CHANNELS).to(tl.int32)
                of_sealed = channels * bytes_of_channels(FORMATS[k], CAPACITIES[FORMATS[k]]) + bytes_of_side(FORMATS[k])
            else:
                if has_grid(FORMATS[k]):
                    of_sealed = first * 0 + bytes_of_grids(FORMATS[k], D, CAPACITIES[FORMATS[k]])
    in_sealed = tl.maximum(tl.minimum(to, sealed) - from_, 0)
    count = in_sealed.to(tl.int64) * of_sealed + (to - from_ - in_sealed).to(tl.int64) * of_open
    tl.atomic_add(setting(settings, reader, TOUCHED).to(tl.pointer_type(tl.int64)), count)


@triton.jit(do_not_specialize=["layer", "size"])
def touch(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    modes: tl.tensor,
    lanes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
) -> None:
    """Counts what attention reads of the tokens of a choice: all keys of a page with one, and their values."""
    head, i = tl.program_id(1), tl.program_id(2)
    reader, j = tl.load(places + 2 * i), tl.load(places + 2 * i + 1)
    b = setting(settings, reader, OWNER).to(tl.int32)
    if tl.load(modes + layer * size + b) < CHOSEN:
        return
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    seen = tl.load(spans + (i * heads + head) * SPAN + 1)
    choice = setting(settings, reader, CHOICES).to(tl.pointer_type(tl.uint8))
    choice += (j * heads + head) * setting(settings, reader, CHOICE_TOKENS)
    count = tl.full([], 0, tl.int64)
    last = column_of(seen - 1, lane, COMPUTE, CAPACITIES) + 1
    for column in range(tl.program_id(0), last, tl.num_programs(0)):
        fmt, start = column_at(column, lane, COMPUTE, CAPACITIES)
        for k in tl.static_range(len(FORMATS)):
            if fmt == FORMATS[k]:
                count += _touched_bytes(choice, start, seen, FORMATS[k], D, CAPACITIES[FORMATS[k]])
    tl.atomic_add(setting(settings, reader, TOUCHED).to(tl.pointer_type(tl.int64)), count)


@triton.jit
def _touched_bytes(
    choice: tl.tensor,
    start: tl.tensor,
    seen: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
) -> tl.tensor:
    t = tl.arange(0, padded(C))
    chosen = tl.load(choice + start + t, mask=(t < C) & (start + t < seen), other=0)
    values = tl.sum(chosen.to(tl.int32))
    if is_quantized(FORMAT):
        size = values * 0 + bytes_of_page(FORMAT, D, C)
    else:
        size = (C + values) * bytes_of_token(FORMAT, D)
    return tl.where(values > 0, size, 0)
