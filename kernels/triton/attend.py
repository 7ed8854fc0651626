"""The kernel of attention: a block of rows of one sequence over a share of one part of a lane.

A part is the lane's sealed pages, its rest or its open ones, in one format that is given when the kernel is compiled:
it is launched once for each part and format of a step, and a program whose lane has another one leaves at once. A block
holds the query heads of a KV head's group for some rows of a sequence, row after row. Softmax is online, base 2, f32.

    decode   few rows; a program for each share of a part; each writes its own result and log-sum-exp, to be merged
    chunk    many rows; one program goes through a part, and takes up what the program for the part before left

What a row's result is depends on its own lane alone: shares follow from the lane's length.

Three ways to read:

    FLOATS   pages of a float format, whole vectors, ahead of their use
    CODES    quantized pages for 16-bit activations, a page at a time, ahead of their use; codes become float16 numbers
    GATHER   any page: tokens are read as f32 numbers, each from its page
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.reading import ReadMode
from winnow.kernels.triton.codes import (
    halves,
    key_bytes,
    key_scales,
    numbers,
    value_bytes,
    value_scales,
)
from winnow.kernels.triton.tiles import float_keys, float_values, keys_at, padded, values_at

SEALED, REST, OPEN = (tl.constexpr(part) for part in range(3))
FLOATS, CODES, GATHER = (tl.constexpr(path) for path in range(3))
LOG2E = tl.constexpr(1.4426950408889634)
_CHOSEN = tl.constexpr(int(ReadMode.CHOSEN))


@triton.jit(do_not_specialize=["layer", "layers", "width", "most_rows", "slot", "slots_of_row", "window"])
def attend(
    q: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    before: tl.tensor,
    before_lse: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    cu_rows: tl.tensor,
    positions: tl.tensor,
    kept: tl.tensor,
    sealed: tl.tensor,
    rest: tl.tensor,
    formats: tl.tensor,
    open_tokens: tl.tensor,
    blocks: tl.tensor,
    lane_positions: tl.tensor,
    position_tokens: tl.tensor,
    log_weights: tl.tensor,
    weight_tokens: tl.tensor,
    choices: tl.tensor,
    choice_tokens: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    width: tl.tensor,
    most_rows: tl.tensor,
    slot: tl.tensor,
    slots_of_row: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    PAGE_BYTES: tl.constexpr,
    PART: tl.constexpr,
    FORMAT: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    IS_DECODE: tl.constexpr,
    WINDOWED: tl.constexpr,
    PATH: tl.constexpr,
) -> None:
    """A program has a share (decode) or a block (chunk), a KV head and, in decode, a sequence.

    Args:
        q: [T, Hq, D].
        out, lse: for decode [B * most_rows, Hq, slots_of_row(, D)] f32, of which this part has the slots from `slot`
            on, one a share, lse in base 2; for chunks [T, Hq(, D)], f32 and in base 2 but for the open part, which is
            the last: there in the type of `out` and in base e. A chunk's lse may be None then.
        before, before_lse: for chunks, what the launches for the parts before wrote; None where no lane has such parts.
        blocks: [n, 2] int32, of chunks: b, and the first row.
        lane_positions, log_weights, choices: [B] addresses, each None where no lane has any; `position_tokens`,
            `weight_tokens` and `choice_tokens` [B] int32 are their capacities.
        modes: [B], of the layer, given with `choices`.
        T: tokens of a tile, of which N slots are read at a time: a page of codes, in its halves; N of other pages.
    """
    ROWS: tl.constexpr = M // GROUP
    head = tl.program_id(1)
    if IS_DECODE:
        split, b, first_row = tl.program_id(0), tl.program_id(2), 0
    else:
        split, b = 0, tl.load(blocks + 2 * tl.program_id(0))
        first_row = tl.load(blocks + 2 * tl.program_id(0) + 1)
    row_start = tl.load(cu_rows + b)
    rows = tl.load(cu_rows + b + 1) - row_start
    if IS_DECODE and ((rows == 0) | (rows > ROWS)):
        return
    lane = (b * layers + layer) * HEADS + head
    full, first_page, first_token = tl.load(sealed + lane), 0, 0
    if PART >= REST:
        first_page = full
        full = tl.load(rest + lane)
        first_token = tl.load(kept + lane) - tl.load(open_tokens + lane)
    if PART == REST:
        first_token -= full * C
    if PART == OPEN:
        first_page += full
        seen_by_first = tl.load(open_tokens + lane) - rows + first_row + 1
        tokens = seen_by_first + tl.minimum(ROWS, rows - first_row) - 1
    else:
        tokens = full * C
        if (tokens > 0) & (tl.load(formats + b) != FORMAT):
            return
        if not IS_DECODE and tokens == 0:
            return

    HALVES: tl.constexpr = halves(FORMAT) if PATH == CODES else 1
    WIDTH: tl.constexpr = padded(D // HALVES)
    i, d = tl.arange(0, M), tl.arange(0, padded(D))
    row, member = i // GROUP, i % GROUP
    is_row = (first_row + row < rows) & (row < ROWS)
    q_row = ((row_start + first_row + row).to(tl.int64) * HEADS + head) * GROUP + member
    queries = tl.load(q + q_row[:, None] * D + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    d_out = tl.arange(0, WIDTH)
    inside = is_row[:, None] & (d_out < D // HALVES)[None, :]

    begin, end = 0, tl.cdiv(tokens, T)
    lane_of_slot = (layer * HEADS + head).to(tl.int64)
    oldest, own_positions, own_choices, own_weights = None, None, None, None
    if WINDOWED:
        oldest = tl.load(positions + row_start + first_row + row, mask=is_row, other=0) - window + 1
        begin = tl.load(positions + row_start + first_row) - window + 1 - first_token
        if lane_positions is not None:
            address = tl.load(lane_positions + b)
            own_positions = address + 4 * lane_of_slot * tl.load(position_tokens + b)
            own_positions = tl.where(address == 0, 0, own_positions)
            begin = tl.where(address == 0, begin, 0)
        # Where a position is an index, what comes before the first row's window is passed over.
        begin = tl.minimum(tl.maximum(begin, 0), tokens) // T
    if choices is not None:
        address, stride = tl.load(choices + b), tl.load(choice_tokens + b)
        own_choices = address + ((first_row + row) * HEADS + head).to(tl.int64) * stride
        own_choices = tl.where((address == 0) | (tl.load(modes + b) < _CHOSEN), 0, own_choices)
    if log_weights is not None:
        address = tl.load(log_weights + b)
        own_weights = tl.where(address == 0, 0, address + 4 * lane_of_slot * tl.load(weight_tokens + b))
    if IS_DECODE:
        share = tl.maximum(tl.cdiv(end - begin, SPLITS), LEAST)
        begin += split * share
        end = tl.minimum(begin + share, end)

    highest = tl.full([M], float("-inf"), tl.float32)
    # Sums of weights are left apart by place in the tile until the end where a row's tile has several warps.
    total = tl.zeros([M, N] if IS_DECODE else [M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    acc_high = acc if HALVES == 2 else 0.0
    if before is not None and first_page > 0:
        highest = tl.load(before_lse + q_row, mask=is_row, other=float("-inf"))
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
        acc = tl.load(before + q_row[:, None] * D + d_out[None, :], mask=inside, other=0.0)
        if HALVES == 2:
            acc_high = tl.load(before + q_row[:, None] * D + D // 2 + d_out[None, :], mask=inside, other=0.0)

    pages = table + ((tl.load(slots + b).to(tl.int64) * layers + layer) * HEADS + head) * width + first_page
    if PATH == CODES:
        n = tl.arange(0, N)
        held = n < C // HALVES
        # Queries are float16 numbers of up to 1 times a power of two.
        unit = tl.max(tl.abs(queries.to(tl.float32)), 1)
        unit = tl.exp2(tl.ceil(tl.log2(tl.where(unit == 0, 1.0, unit))))
        factor = unit * (scale * LOG2E)
        queries = (queries.to(tl.float32) / unit[:, None]).to(tl.float16)
        page = data + tl.load(pages + begin, mask=begin < end, other=0).to(tl.int64) * PAGE_BYTES
        k_scale, k_shift = key_scales(page, d, FORMAT, D, C)
        v_scale, v_shift = value_scales(page, n, held, FORMAT, D, C)
        v_scale_high, v_shift_high = v_scale, v_shift
        if HALVES == 2:
            v_scale_high, v_shift_high = value_scales(page, C // 2 + n, held, FORMAT, D, C)
        for tile in range(begin, end):
            # A page's scales are read while those of the page before are used.
            next_page = data + tl.load(pages + tile + 1, mask=tile + 1 < end, other=0).to(tl.int64) * PAGE_BYTES
            next_k_scale, next_k_shift = key_scales(next_page, d, FORMAT, D, C)
            next_v_scale, next_v_shift = value_scales(next_page, n, held, FORMAT, D, C)
            next_v_scale_high, next_v_shift_high = next_v_scale, next_v_shift
            if HALVES == 2:
                next_v_scale_high, next_v_shift_high = value_scales(next_page, C // 2 + n, held, FORMAT, D, C)
            index = first_token + tile * C + n
            seen = narrowed(held[None, :] & is_row[:, None], index, held, oldest, own_positions, own_choices)
            is_read = seen
            if HALVES == 2:
                index_high = index + C // 2
                seen_high = narrowed(
                    held[None, :] & is_row[:, None], index_high, held, oldest, own_positions, own_choices
                )
                is_read = seen | seen_high
            if choices is None or (tl.max(tl.max(is_read.to(tl.int32), 1), 0) > 0):
                packed = key_bytes(page, d, n, FORMAT, D, C)
                keys, keys_high = numbers(packed, k_scale[:, None], k_shift[:, None], FORMAT, not IS_DECODE)
                for half in tl.static_range(HALVES):
                    if half == 1:
                        keys, index, seen = keys_high, index_high, seen_high
                        v_scale, v_shift = v_scale_high, v_shift_high
                    scores = weighed(tl.dot(queries, keys) * factor[:, None], index, held, own_weights)
                    scores = tl.where(seen, scores, float("-inf"))
                    above = tl.maximum(highest, tl.max(scores, 1))
                    level = tl.where(above == float("-inf"), 0.0, above)
                    fade = tl.exp2(highest - level)
                    highest = above
                    weights = tl.exp2(scores - level[:, None])
                    total = added(total, fade, weights, IS_DECODE)
                    weights = weights.to(tl.float16)
                    packed = value_bytes(page, half * (C // HALVES), n, d_out, FORMAT, D, C)
                    values, values_high = numbers(packed, v_scale[:, None], v_shift[:, None], FORMAT, not IS_DECODE)
                    acc = tl.dot(weights, values, acc * fade[:, None])
                    if HALVES == 2:
                        acc_high = tl.dot(weights, values_high, acc_high * fade[:, None])
            page, k_scale, k_shift, v_scale, v_shift = next_page, next_k_scale, next_k_shift, next_v_scale, next_v_shift
            v_scale_high, v_shift_high = next_v_scale_high, next_v_shift_high
    else:
        # Tokens of the part that a row sees; the rows' own are open, and none sees a later one.
        limit = tl.where(is_row, tl.minimum(seen_by_first + row, tokens) if PART == OPEN else tokens, 0)
        factor = scale * LOG2E
        if PATH == FLOATS:
            one, other = page_ids(pages, begin, tokens, C, N)
        for tile in range(begin, end):
            t = tile * N + tl.arange(0, N)
            place = t % C
            held = t < tokens
            index = first_token + t
            seen = narrowed(t[None, :] < limit[:, None], index, held, oldest, own_positions, own_choices)
            if choices is None or (tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0):
                if PATH == FLOATS:
                    page = data + tl.where(t // C == tile * N // C, one, other).to(tl.int64) * PAGE_BYTES
                    readable = t // 8 * 8 < tokens
                    keys = float_keys(page[None, :], d[:, None], place[None, :], readable[None, :], FORMAT, D, C)
                else:
                    page = data + tl.load(pages + t // C, mask=held, other=0).to(tl.int64) * PAGE_BYTES
                    keys = keys_at(page[None, :], d[:, None], place[None, :], held[None, :], FORMAT, D, C)
                scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee")
                if own_weights is not None:
                    # Divided back, they would not have the bits that they have in a step where nobody has weights.
                    with_weights = weighed(scores * factor, index, held, own_weights) / factor
                    scores = tl.where(own_weights == 0, scores, with_weights)
                scores = tl.where(seen, scores, float("-inf"))
                above = tl.maximum(highest, tl.max(scores, 1) * factor)
                level = tl.where(above == float("-inf"), 0.0, above)
                fade = tl.exp2(highest - level)
                highest = above
                weights = tl.exp2(scores * factor - level[:, None])
                total = added(total, fade, weights, IS_DECODE)
                if PATH == FLOATS:
                    values = float_values(page[:, None], place[:, None], d[None, :], held[:, None], FORMAT, D, C)
                else:
                    values = values_at(page[:, None], place[:, None], d[None, :], held[:, None], FORMAT, D, C)
                weights, values = weights.to(queries.dtype), values.to(queries.dtype)
                acc = tl.dot(weights, values, acc * fade[:, None], input_precision="ieee")
            if PATH == FLOATS:
                one, other = page_ids(pages, tile + 1, tokens, C, N)

    if IS_DECODE:
        total = tl.sum(total, 1)
    divisor = tl.where(total == 0, 1.0, total)[:, None]
    level = tl.where(total == 0, float("-inf"), highest + tl.log2(total))
    if IS_DECODE:
        place = (((b * most_rows + row) * HEADS + head) * GROUP + member).to(tl.int64) * slots_of_row + slot + split
    else:
        place = q_row
    tl.store(out + place[:, None] * D + d_out[None, :], (acc / divisor).to(out.dtype.element_ty), mask=inside)
    if HALVES == 2:
        high = (acc_high / divisor).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * D + D // 2 + d_out[None, :], high, mask=inside)
    if lse is not None:
        if not IS_DECODE and PART == OPEN:
            level = level / LOG2E
        tl.store(lse + place, level, mask=is_row)


@triton.jit
def page_ids(
    pages: tl.tensor, tile: tl.tensor, tokens: tl.tensor, C: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of the page in which a tile begins and of the next one, if that is the tile's too; 0 behind the last token."""
    first = tile * N // C
    one = tl.load(pages + first, mask=first * C < tokens, other=0)
    other = one
    if N > C:
        other = tl.load(pages + first + 1, mask=(first + 1) * C < tokens, other=0)
    return one, other


@triton.jit
def added(total: tl.tensor, fade: tl.tensor, weights: tl.tensor, IS_APART: tl.constexpr) -> tl.tensor:
    """Faded sums of weights [M] with those of a tile [M, N]; kept apart by place, [M, N], if they are."""
    if IS_APART:
        total = total * fade[:, None] + weights
    else:
        total = total * fade + tl.sum(weights, 1)
    return total


@triton.jit
def narrowed(
    seen: tl.tensor,
    index: tl.tensor,
    held: tl.tensor,
    oldest: tl.tensor,
    own_positions: tl.tensor,
    own_choices: tl.tensor,
) -> tl.tensor:
    """`seen` [M, N] without tokens outside of the rows' windows and those that rows did not choose.

    index [N]: of the tokens in their lane. oldest [M]: first position of the windows. own_positions: address of the
    lane's positions, own_choices [M]: of the rows' choices; 0 where there are none. Each but index may be None.
    """
    if oldest is not None:
        position = index
        if own_positions is not None:
            pointer = tl.multiple_of(own_positions.to(tl.pointer_type(tl.int32)), 4)
            written = tl.load(pointer + index, mask=held & (own_positions != 0), other=0)
            position = tl.where(own_positions != 0, written, index)
        seen = seen & (position[None, :] >= oldest[:, None])
    if own_choices is not None:
        pointer = own_choices.to(tl.pointer_type(tl.uint8))[:, None] + index[None, :]
        seen = seen & (tl.load(pointer, mask=seen & (own_choices != 0)[:, None], other=1) != 0)
    return seen


@triton.jit
def weighed(scores: tl.tensor, index: tl.tensor, held: tl.tensor, own_weights: tl.tensor) -> tl.tensor:
    """Scores [M, N] and the log weights of their tokens. own_weights: address of the lane's, 0 or None for none."""
    if own_weights is not None:
        pointer = tl.multiple_of(own_weights.to(tl.pointer_type(tl.float32)), 4)
        weights = tl.load(pointer + index, mask=held & (own_weights != 0), other=0.0)
        scores += (weights * LOG2E)[None, :]
    return scores
