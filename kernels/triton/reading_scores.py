"""What candidates promise: bounds of a page's products with the queries, or those of tokens over some channels.

The logit of a candidate, a page's column or a token's lane index, goes to its own place in [R, Hq, units].
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.columns import LANE, column_at, table_row
from winnow.kernels.triton.readers import (
    BOUNDED_PAGES,
    BOUNDS,
    BY_BOUNDS,
    CHANNEL_LIST,
    CHANNELS,
    FIRST_ROW,
    OWNER,
    SPAN,
)
from winnow.kernels.triton.reading_spans import NONE, chooses, column_of, has_grid, is_grid, setting
from winnow.kernels.triton.tiles import GROUP as KEY_BLOCK
from winnow.kernels.triton.tiles import INT2, f16_part, key_scale_offset, key_zero_offset, keys_at, padded


@triton.constexpr_function
def levels(fmt: int) -> int:
    return 2 ** PageFormat(fmt).bits - 1


@triton.constexpr_function
def grids(fmt: int, tokens: int) -> int:
    """Blocks of tokens with a grid of their own in a page."""
    return tokens // KEY_BLOCK.value if fmt == INT2.value else 1


@triton.jit(do_not_specialize=["layer", "size", "width", "units"])
def score_pages(
    q: tl.tensor,
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    scores: tl.tensor,
    modes: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    lanes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    units: tl.tensor,
    scale: tl.tensor,
    page_bytes: tl.constexpr,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
) -> None:
    """No key of a page has a greater product with a query: PAGES at a time."""
    head, i = tl.program_id(1), tl.program_id(2)
    reader, j = tl.load(places + 2 * i), tl.load(places + 2 * i + 1)
    b = setting(settings, reader, OWNER).to(tl.int32)
    span = spans + (i * heads + head) * SPAN
    is_done = (setting(settings, reader, BY_BOUNDS) == 0) | (tl.load(span + 6) != 0)
    if is_done | (chooses(tl.load(modes + layer * size + b)) == 0):
        return
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    row = table_row(table, width, lane, layer, head, layers, heads)
    fmt = tl.load(lane + 3)
    base = tl.where(is_grid(fmt), tl.load(lane + 1), 0)
    bounds = setting(settings, reader, BOUNDS).to(tl.pointer_type(tl.bfloat16))
    bounds += (layer * heads + head) * setting(settings, reader, BOUNDED_PAGES) * 2 * D
    first, last = tl.load(span + 4), tl.load(span + 5)
    d = tl.arange(0, padded(D))
    inside = (d < D)[None, :]
    queries = q + ((setting(settings, reader, FIRST_ROW) + j) * heads + head) * GROUP * D
    out = scores + (i * heads + head).to(tl.int64) * GROUP * units
    for start in range(first + tl.program_id(0) * PAGES, last, tl.num_programs(0) * PAGES):
        column = start + tl.arange(0, PAGES)
        has_bounds = (column >= base) & (column < last)
        ends = bounds + ((column - base).to(tl.int64) * 2 * D)[:, None] + d[None, :]
        least = tl.load(ends, mask=has_bounds[:, None] & inside, other=0.0).to(tl.float32)
        greatest = tl.load(ends + D, mask=has_bounds[:, None] & inside, other=0.0).to(tl.float32)
        in_grid = (column < base) & (column < last)
        page = data + tl.load(row + column, mask=in_grid, other=0).to(tl.int64) * page_bytes
        for g in range(GROUP):
            query = (tl.load(queries + g * D + d, mask=d < D, other=0.0).to(tl.float32) * scale)[None, :]
            score = tl.sum(tl.maximum(query * least, query * greatest), 1)
            for k in tl.static_range(len(FORMATS)):
                if has_grid(FORMATS[k]):  # noqa: SIM102 - the first is known when this is compiled
                    if (fmt == FORMATS[k]) & (start < base):
                        of_grid = _grid_scores(page, in_grid, query, FORMATS[k], D, CAPACITIES[FORMATS[k]], PAGES)
                        score = tl.where(in_grid, of_grid, score)
            tl.store(out + g * units + column, score, mask=column < last)


@triton.jit
def _grid_scores(
    page: tl.tensor,
    in_grid: tl.tensor,
    query: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    PAGES: tl.constexpr,
) -> tl.tensor:
    """[PAGES] f32: by the ends of the grids that a page's numbers lie on, the greatest of its blocks'."""
    d = tl.arange(0, padded(D))[None, :]
    mask = in_grid[:, None] & (d < D)
    best = tl.full([PAGES], float("-inf"), tl.float32)
    for block in range(grids(FORMAT, C)):
        place = block * D + d
        scales = tl.load(f16_part(page, key_scale_offset(FORMAT, D, C))[:, None] + place, mask=mask, other=0.0)
        least = tl.load(f16_part(page, key_zero_offset(FORMAT, D, C))[:, None] + place, mask=mask, other=0.0)
        least = least.to(tl.float32)
        greatest = least + levels(FORMAT) * scales.to(tl.float32)
        best = tl.maximum(best, tl.sum(tl.maximum(query * least, query * greatest), 1))
    return best


@triton.jit(do_not_specialize=["layer", "size", "width", "units"])
def score_tokens(
    q: tl.tensor,
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    scores: tl.tensor,
    modes: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    lanes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    units: tl.tensor,
    scale: tl.tensor,
    page_bytes: tl.constexpr,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """Products of a lane's queries with the candidates over the channels that the rule names."""
    head, i = tl.program_id(1), tl.program_id(2)
    reader, j = tl.load(places + 2 * i), tl.load(places + 2 * i + 1)
    b = setting(settings, reader, OWNER).to(tl.int32)
    span = spans + (i * heads + head) * SPAN
    is_done = (setting(settings, reader, BY_BOUNDS) != 0) | (tl.load(span + 6) != 0) | (tl.load(sources + i) != NONE)
    if is_done | (chooses(tl.load(modes + layer * size + b)) == 0):
        return
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    row = table_row(table, width, lane, layer, head, layers, heads)
    begin, end = tl.load(span + 2), tl.load(span + 3)
    count = setting(settings, reader, CHANNELS).to(tl.int32)
    channels = setting(settings, reader, CHANNEL_LIST).to(tl.pointer_type(tl.int32)) + (layer * heads + head) * count
    queries = q + ((setting(settings, reader, FIRST_ROW) + j) * heads + head) * GROUP * D
    out = scores + (i * heads + head).to(tl.int64) * GROUP * units
    first = column_of(begin, lane, COMPUTE, CAPACITIES)
    last = column_of(end - 1, lane, COMPUTE, CAPACITIES) + 1
    for column in range(first + tl.program_id(0), last, tl.num_programs(0)):
        fmt, start = column_at(column, lane, COMPUTE, CAPACITIES)
        page = data + tl.load(row + column).to(tl.int64) * page_bytes
        for k in tl.static_range(len(FORMATS)):
            if fmt == FORMATS[k]:
                _score_page(
                    page, start, begin, end, queries, channels, count, out, units, scale,
                    FORMATS[k], D, CAPACITIES[FORMATS[k]], GROUP, QUERIES
                )  # fmt: skip


@triton.jit
def _score_page(
    page: tl.tensor,
    start: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    queries: tl.tensor,
    channels: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    units: tl.tensor,
    scale: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """Of the page that begins with token `start`, 16 channels at a time."""
    T: tl.constexpr = min(32, padded(C))
    g = tl.arange(0, QUERIES)
    for at in range(0, C, T):
        t = at + tl.arange(0, T)
        token = start + t
        inside = (t < C) & (token >= begin) & (token < end)
        total = tl.zeros([QUERIES, T], tl.float32)
        for first in range(0, count, 16):
            n = first + tl.arange(0, 16)
            d = tl.load(channels + n, mask=n < count, other=D)
            mask = (g < GROUP)[:, None] & (n < count)[None, :]
            x = tl.load(queries + g[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32) * scale
            keys = keys_at(page, d[:, None], t[None, :], inside[None, :], FORMAT, D, C)
            total = tl.dot(x, keys, total, input_precision="ieee")
        places = out + g[:, None] * units + token[None, :]
        tl.store(places, total, mask=(g < GROUP)[:, None] & inside[None, :])
