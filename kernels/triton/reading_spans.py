"""What rows may choose from, and the bounds of pages: the first half of reading by a rule (kernels/reading.py).

    span_rows       the window's first token, candidates, whether they are all chosen        by row and lane
    compare_rows    whose choice a row takes over                                            by reader, row after row
    bound_pages     least and greatest key channel of pages that became full                 by reader, lane and page

Bytes are counted with integer atomics: their order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.layout import Offsets, PageFormat
from winnow.kernels.reading import ReadMode
from winnow.kernels.triton.columns import LANE, capacity_of, column_at, first_token, table_row
from winnow.kernels.triton.readers import (
    ANCHORED,
    ANCHORS,
    BOUNDED,
    BOUNDED_PAGES,
    BOUNDS,
    BY_BOUNDS,
    FIRST_READER_ROW,
    FIRST_ROW,
    OWNER,
    RECENT,
    REUSES,
    ROWS,
    SETTINGS,
    SHARE,
    SIMILARITY,
    SINKS,
    SPAN,
    TOKENS,
    TOUCHED,
)
from winnow.kernels.triton.tiles import INT2, INT4, INT8, keys_at, padded

ALL_AND_CHOOSE = tl.constexpr(int(ReadMode.ALL_AND_CHOOSE))
CHOSEN = tl.constexpr(int(ReadMode.CHOSEN))
NONE = tl.constexpr(-2)
"""A row that takes no choice over"""
STATE = tl.constexpr(-1)
"""One that takes over what the state holds from earlier steps"""


@triton.constexpr_function
def bytes_of_page(fmt: int, dim: int, tokens: int) -> int:
    """Of the numbers and scales of a full page."""
    return Offsets(PageFormat(fmt), dim, tokens).end


@triton.constexpr_function
def bytes_of_token(fmt: int, dim: int) -> int:
    """Of its key, or its value, in a float format."""
    return dim * PageFormat(fmt).bits // 8


@triton.jit
def setting(settings: tl.tensor, reader: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """int64"""
    return tl.load(settings + reader * SETTINGS + NAME)


@triton.jit
def chooses(mode: tl.tensor) -> tl.tensor:
    return (mode == ALL_AND_CHOOSE) | (mode == CHOSEN)


@triton.constexpr_function
def has_grid(fmt: int) -> bool:
    return PageFormat(fmt).is_integer


@triton.jit
def is_grid(fmt: tl.tensor) -> tl.tensor:
    """Whether a page's numbers are codes with a scale and a zero, which bound them."""
    return (fmt == INT8) | (fmt == INT4) | (fmt == INT2)


@triton.jit
def column_of(token: tl.tensor, lane: tl.tensor, COMPUTE: tl.constexpr, CAPACITIES: tl.constexpr) -> tl.tensor:
    """The page that holds a token of a lane in one sealed format."""
    sealed = tl.load(lane + 1)
    capacity = tl.maximum(capacity_of(tl.load(lane + 3), CAPACITIES), 1)
    beyond = tl.maximum(token - sealed * capacity, 0)
    return tl.where(token < sealed * capacity, token // capacity, sealed + beyond // CAPACITIES[COMPUTE])


@triton.jit
def bytes_of_sealed(fmt: tl.tensor, D: tl.constexpr, FORMATS: tl.constexpr, CAPACITIES: tl.constexpr) -> tl.tensor:
    """Of a full page in a format that is known on the device."""
    size = fmt * 0
    for i in tl.static_range(len(FORMATS)):
        size = tl.where(fmt == FORMATS[i], bytes_of_page(FORMATS[i], D, CAPACITIES[FORMATS[i]]), size)
    return size


@triton.jit(do_not_specialize=["layer", "size", "window"])
def span_rows(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    modes: tl.tensor,
    positions: tl.tensor,
    held: tl.tensor,
    held_capacity: tl.tensor,
    lanes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    window: tl.tensor,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes `spans`, and counts the bytes of rows that read all. held: addresses of the lanes' positions."""
    head, i = tl.program_id(0), tl.program_id(1)
    reader, j = tl.load(places + 2 * i), tl.load(places + 2 * i + 1)
    b = setting(settings, reader, OWNER).to(tl.int32)
    rows = setting(settings, reader, ROWS).to(tl.int32)
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    seen = tl.load(lane) - rows + j + 1
    low = seen * 0
    if window > 0:
        last = tl.load(positions + setting(settings, reader, FIRST_ROW) + j) - window
        address = tl.load(held + b)
        if address == 0:
            low = tl.minimum(tl.maximum(last + 1, 0), seen)
        else:
            numbers = (address + (layer * heads + head) * tl.load(held_capacity + b).to(tl.int64) * 4).to(
                tl.pointer_type(tl.int32)
            )
            for first in range(0, seen, BLOCK):
                t = first + tl.arange(0, BLOCK)
                at = tl.load(numbers + t, mask=t < seen, other=0)
                low += tl.sum(((at <= last) & (t < seen)).to(tl.int32))
    newest = tl.maximum(low, seen - setting(settings, reader, RECENT).to(tl.int32))
    sinks = tl.minimum(setting(settings, reader, SINKS), seen.to(tl.int64)).to(tl.int32)
    if setting(settings, reader, BY_BOUNDS) != 0:  # pages that hold protected tokens are read whole
        behind = tl.where(sinks > 0, column_of(tl.maximum(sinks - 1, 0), lane, COMPUTE, CAPACITIES) + 1, 0)
        first_unit = tl.maximum(column_of(low, lane, COMPUTE, CAPACITIES), behind)
        last_unit = tl.maximum(first_unit, column_of(newest, lane, COMPUTE, CAPACITIES))
        begin = tl.minimum(seen, tl.maximum(low, first_token(first_unit, lane, COMPUTE, CAPACITIES)))
        end = tl.minimum(seen, tl.maximum(begin, first_token(last_unit, lane, COMPUTE, CAPACITIES)))
    else:
        begin = tl.minimum(seen, tl.maximum(low, sinks))
        end = tl.maximum(begin, newest)
        first_unit = begin
        last_unit = end
    share = setting(settings, reader, SHARE).to(tl.float64, bitcast=True)
    wanted = tl.minimum(setting(settings, reader, TOKENS), 1 << 30).to(tl.int32)
    if share > 0:
        wanted = tl.maximum((seen.to(tl.float64) * share).to(tl.int32), 1)
    span = spans + (i * heads + head) * SPAN
    tl.store(span, low)
    tl.store(span + 1, seen)
    tl.store(span + 2, begin)
    tl.store(span + 3, end)
    tl.store(span + 4, first_unit)
    tl.store(span + 5, last_unit)
    tl.store(span + 6, (end - begin <= wanted).to(tl.int32))
    tl.store(span + 7, wanted)
    tl.store(sources + i, NONE)
    # Attention takes about 128 tokens of a format at a time.
    sealed, fmt = tl.load(lane + 1), tl.load(lane + 3)
    column = column_of(low, lane, COMPUTE, CAPACITIES)
    of_format = tl.where((column < sealed) | (fmt == COMPUTE), 0, sealed)
    capacity = capacity_of(tl.where(column < sealed, fmt, COMPUTE), CAPACITIES)
    together = tl.maximum(128 // tl.maximum(capacity, 1), 1)
    column = of_format + (column - of_format) // together * together
    in_sealed = tl.maximum(sealed - column, 0)
    first_read = first_token(tl.maximum(column, sealed), lane, COMPUTE, CAPACITIES)
    # Of an open page that is partly filled, all keys and the values of its tokens.
    values = tl.maximum(seen - first_read, 0)
    keys = tl.cdiv(values, CAPACITIES[COMPUTE]) * CAPACITIES[COMPUTE]
    count = in_sealed.to(tl.int64) * bytes_of_sealed(fmt, D, FORMATS, CAPACITIES)
    count += (values + keys).to(tl.int64) * bytes_of_token(COMPUTE, D)
    touched = setting(settings, reader, TOUCHED).to(tl.pointer_type(tl.int64))
    tl.atomic_add(touched + 1, count)
    if tl.load(modes + layer * size + b) <= ALL_AND_CHOOSE:
        tl.atomic_add(touched, count)
    if (layer == 0) & (head == 0):
        tl.atomic_add(touched + 2, tl.full([], 1, tl.int64))


@triton.jit(do_not_specialize=["layer", "size"])
def compare_rows(
    q: tl.tensor,
    settings: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    heads: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes `sources`; later rows are compared with the queries of the last one that chooses anew."""
    reader = tl.program_id(0)
    mode = tl.load(modes + layer * size + setting(settings, reader, OWNER))
    if (setting(settings, reader, REUSES) == 0) | (chooses(mode) == 0):
        return
    similarity = setting(settings, reader, SIMILARITY).to(tl.float64, bitcast=True)
    first = setting(settings, reader, FIRST_READER_ROW).to(tl.int32)
    anchors = setting(settings, reader, ANCHORS).to(tl.pointer_type(tl.float32)) + layer * NUMBERS
    anchored = setting(settings, reader, ANCHORED).to(tl.pointer_type(tl.int32)) + layer
    n = tl.arange(0, BLOCK)
    anchor = tl.load(anchors + n, mask=n < NUMBERS, other=0.0)
    since = tl.load(anchored)
    source = first * 0 + STATE
    for j in range(0, setting(settings, reader, ROWS).to(tl.int32)):
        all_ = since * 0 + 1
        for head in range(heads):
            all_ = tl.minimum(all_, tl.load(spans + ((first + j) * heads + head) * SPAN + 6))
        if all_ == 0:
            row = q + (setting(settings, reader, FIRST_ROW) + j) * NUMBERS
            mine = tl.load(row + n, mask=n < NUMBERS, other=0.0).to(tl.float32)
            x, y = mine.to(tl.float64), anchor.to(tl.float64)
            product = tl.sum(x * y)
            is_near = (since > 0) & (product >= similarity * tl.sqrt(tl.sum(x * x) * tl.sum(y * y)))
            if is_near:
                tl.store(sources + first + j, source)
            else:
                anchor = mine
                since = tl.load(spans + (first + j) * heads * SPAN + 1)
                source = j
    if source != STATE:
        tl.store(anchors + n, anchor, mask=n < NUMBERS)
        tl.store(anchored, since)


@triton.jit(do_not_specialize=["layer", "size", "width"])
def bound_pages(
    settings: tl.tensor,
    spans: tl.tensor,
    modes: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    lanes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    page_bytes: tl.constexpr,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Notes the bounds of CHANNELS channels of the pages that became full, rounded outward."""
    head, reader = tl.program_id(1), tl.program_id(2)
    b = setting(settings, reader, OWNER).to(tl.int32)
    if (setting(settings, reader, BY_BOUNDS) == 0) | (chooses(tl.load(modes + layer * size + b)) == 0):
        return
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    row = table_row(table, width, lane, layer, head, layers, heads)
    base, known, full = pages_to_bound(settings, spans, lane, reader, layer, head, heads, COMPUTE, CAPACITIES)
    bounds = setting(settings, reader, BOUNDS).to(tl.pointer_type(tl.bfloat16))
    capacity = setting(settings, reader, BOUNDED_PAGES)
    touched = setting(settings, reader, TOUCHED).to(tl.pointer_type(tl.int64))
    for at in range(known + tl.program_id(0), full, tl.num_programs(0)):
        fmt, _ = column_at(base + at, lane, COMPUTE, CAPACITIES)
        page = data + tl.load(row + base + at).to(tl.int64) * page_bytes
        out = bounds + (((layer * heads + head) * capacity + at) * 2) * D
        for i in tl.static_range(len(FORMATS)):
            if not has_grid(FORMATS[i]):  # noqa: SIM102 - the first is known when this is compiled
                if fmt == FORMATS[i]:
                    _bound_page(page, out, touched, FORMATS[i], D, CAPACITIES[FORMATS[i]], CHANNELS)


@triton.jit
def _bound_page(
    page: tl.tensor,
    out: tl.tensor,
    touched: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    t = tl.arange(0, padded(C))[None, :]
    for first in range(0, D, CHANNELS):
        d = first + tl.arange(0, CHANNELS)
        keys = keys_at(page, d[:, None], t, t < C, FORMAT, D, C)
        least = tl.min(tl.where(t < C, keys, float("inf")), 1)
        greatest = tl.max(tl.where(t < C, keys, float("-inf")), 1)
        tl.store(out + d, (-_up(-least)).to(tl.bfloat16), mask=d < D)
        tl.store(out + D + d, _up(greatest).to(tl.bfloat16), mask=d < D)
    tl.atomic_add(touched, tl.full([], bytes_of_token(FORMAT, D) * C, tl.int64))


@triton.jit
def _up(x: tl.tensor) -> tl.tensor:
    """The least bf16 that is not below x, as f32: what does not fit is cut off, and rounds a positive number up."""
    bits = x.to(tl.int32, bitcast=True)
    up = (bits + tl.where(x > 0, 0xFFFF, 0)) & ~0xFFFF
    return up.to(tl.float32, bitcast=True)


@triton.jit
def pages_to_bound(
    settings: tl.tensor,
    spans: tl.tensor,
    lane: tl.tensor,
    reader: tl.tensor,
    layer: tl.tensor,
    head: tl.tensor,
    heads: tl.constexpr,
    COMPUTE: tl.constexpr,
    CAPACITIES: tl.constexpr,
) -> tl.tensor:
    """The lane's first column in a float format; how many of these have bounds; how many are full."""
    base = tl.where(is_grid(tl.load(lane + 3)), tl.load(lane + 1), 0)
    known = tl.load(setting(settings, reader, BOUNDED).to(tl.pointer_type(tl.int32)) + layer * heads + head)
    last = setting(settings, reader, FIRST_READER_ROW) + setting(settings, reader, ROWS) - 1
    span = spans + (last * heads + head) * SPAN
    recent = setting(settings, reader, RECENT).to(tl.int32)
    newest = tl.maximum(tl.load(span), tl.load(span + 1) - recent)
    full = tl.maximum(column_of(newest, lane, COMPUTE, CAPACITIES) - base, 0)
    return base, tl.maximum(known, 0), full
