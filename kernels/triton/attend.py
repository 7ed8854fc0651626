"""The kernel of attention: a block of rows of one sequence over a share of one part of a lane.

A part is the lane's sealed pages, its rest or its open ones, in one format that is given when the kernel is compiled:
it is launched once for each part and format of a step, and a program whose lane has another one leaves at once. A block
holds the query heads of a KV head's group for some rows of a sequence, row after row. Softmax is online, base 2, f32.

    decode   few rows; a program for each share of a part; each writes its own result and log-sum-exp, to be merged
    chunk    many rows; one program goes through a part, and takes up what the program for the part before left

What a row's result is depends on its own lane alone: shares follow from the lane's length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.reading import ReadMode
from winnow.kernels.triton.tiles import float_keys, float_values, keys_at, padded, values_at

SEALED, REST, OPEN = (tl.constexpr(part) for part in range(3))
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
    log_weights: tl.tensor,
    position_tokens: tl.tensor,
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
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    IS_DECODE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BY_PAGE: tl.constexpr,
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

    i = tl.arange(0, M)
    d = tl.arange(0, padded(D))
    row, member = i // GROUP, i % GROUP
    is_row = (first_row + row < rows) & (row < ROWS)
    q_row = ((row_start + first_row + row).to(tl.int64) * HEADS + head) * GROUP + member
    inside = is_row[:, None] & (d < D)[None, :]
    queries = tl.load(q + q_row[:, None] * D + d[None, :], mask=inside, other=0.0)

    begin = 0
    oldest = tl.zeros([M], tl.int32)
    positions_of_lane = tl.cast(0, tl.int64)
    if WINDOWED:
        oldest = tl.load(positions + row_start + first_row + row, mask=is_row, other=0) - window + 1
        if lane_positions is not None:
            positions_of_lane = tl.load(lane_positions + b)
        if positions_of_lane == 0:  # a position is an index: what comes before the first row's window is passed over
            begin = tl.load(positions + row_start + first_row) - window + 1 - first_token
            begin = tl.minimum(tl.maximum(begin, 0), tokens) // N
    end = tl.cdiv(tokens, N)
    if IS_DECODE:
        share = tl.maximum(tl.cdiv(end - begin, SPLITS), LEAST)
        begin += split * share
        end = tl.minimum(begin + share, end)

    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, padded(D)], tl.float32)
    if before is not None and first_page > 0:
        highest = tl.load(before_lse + q_row, mask=is_row, other=float("-inf"))
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
        acc = tl.load(before + q_row[:, None] * D + d[None, :], mask=inside, other=0.0)

    lane_of_slot = (layer * HEADS + head).to(tl.int64)
    if log_weights is not None:
        weights_of_lane = tl.load(log_weights + b)
    if choices is not None:
        choices_of_rows = tl.load(choices + b)
        if tl.load(modes + b) < _CHOSEN:
            choices_of_rows = tl.cast(0, tl.int64)
        choice_stride = HEADS * tl.load(choice_tokens + b).to(tl.int64)
        if choices_of_rows != 0:
            choices_of_rows += head * tl.load(choice_tokens + b)
    pages = table + ((tl.load(slots + b).to(tl.int64) * layers + layer) * HEADS + head) * width + first_page
    if BY_PAGE:
        one, other = page_ids(pages, begin, tokens, C, N)
    for tile in range(begin, end):
        t = tile * N + tl.arange(0, N)
        held = t < tokens
        seen = held[None, :] & is_row[:, None]
        if PART == OPEN:
            seen = seen & (t[None, :] < seen_by_first + row[:, None])
        if WINDOWED:
            position = first_token + t
            if lane_positions is not None and positions_of_lane != 0:
                own = positions_of_lane.to(tl.pointer_type(tl.int32)) + lane_of_slot * tl.load(position_tokens + b)
                position = tl.load(own + position, mask=held, other=0)
            seen = seen & (position[None, :] >= oldest[:, None])
        if choices is not None:
            own = choices_of_rows.to(tl.pointer_type(tl.uint8)) + (first_row + row) * choice_stride
            chosen = tl.load(own[:, None] + (first_token + t)[None, :], mask=seen & (choices_of_rows != 0), other=1)
            seen = seen & (chosen != 0)
        if choices is None or (tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0):
            if BY_PAGE:
                page, place = data + tl.where(t // C == tile * N // C, one, other).to(tl.int64) * PAGE_BYTES, t % C
                keys = float_keys(
                    page[None, :], d[:, None], place[None, :], (t // 8 * 8 < tokens)[None, :], FORMAT, D, C
                )
            else:
                page, place = data + tl.load(pages + t // C, mask=held, other=0).to(tl.int64) * PAGE_BYTES, t % C
                keys = keys_at(page[None, :], d[:, None], place[None, :], held[None, :], FORMAT, D, C)
            keys = keys.to(queries.dtype)
            scores = tl.dot(queries, keys, input_precision="ieee") * (scale * LOG2E)
            if log_weights is not None:
                own = weights_of_lane.to(tl.pointer_type(tl.float32)) + lane_of_slot * tl.load(weight_tokens + b)
                weights = tl.load(own + first_token + t, mask=held & (weights_of_lane != 0), other=0.0)
                scores += (weights * LOG2E)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            above = tl.maximum(highest, tl.max(scores, 1))
            level = tl.where(above == float("-inf"), 0.0, above)
            fade = tl.exp2(highest - level)
            shares = tl.exp2(scores - level[:, None])
            total = total * fade + tl.sum(shares, 1)
            if BY_PAGE:
                values = float_values(page[:, None], place[:, None], d[None, :], held[:, None], FORMAT, D, C)
            else:
                values = values_at(page[:, None], place[:, None], d[None, :], held[:, None], FORMAT, D, C)
            acc = tl.dot(
                shares.to(queries.dtype), values.to(queries.dtype), acc * fade[:, None], input_precision="ieee"
            )
            highest = above
        if BY_PAGE:
            one, other = page_ids(pages, tile + 1, tokens, C, N)

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    level = tl.where(total == 0, float("-inf"), highest + tl.log2(total))
    if IS_DECODE:
        place = (((b * most_rows + row) * HEADS + head) * GROUP + member).to(tl.int64) * slots_of_row + slot + split
    else:
        place = q_row
    tl.store(out + place[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside)
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


@triton.jit(do_not_specialize=["most_rows", "slots_of_row", "parts", "splits"])
def merge(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    cu_rows: tl.tensor,
    most_rows: tl.tensor,
    parts: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Merges what the programs of decode found for a row's query head: out [T, Hq, D], lse [T, Hq] in base e or None.

    Part by part, so that the order of sums does not depend on the parts that other sequences have.
    """
    b, row, head = tl.program_id(0) // most_rows, tl.program_id(0) % most_rows, tl.program_id(1)
    row_start = tl.load(cu_rows + b)
    rows = tl.load(cu_rows + b + 1) - row_start
    if (row >= rows) | (rows > ROWS):
        return
    split, d = tl.arange(0, SPLITS), tl.arange(0, padded(D))
    place = (tl.program_id(0) * HEADS + head).to(tl.int64) * parts * splits
    highest = float("-inf")
    for part in range(parts):
        level = tl.load(partial_lse + place + part * splits + split, mask=split < splits, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(level, 0))
    total = 0.0
    acc = tl.zeros([padded(D)], tl.float32)
    for part in range(parts):
        own = place + part * splits + split
        level = tl.load(partial_lse + own, mask=split < splits, other=float("-inf"))
        weight = tl.exp2(level - highest)
        inside = (level > float("-inf"))[:, None] & (d < D)[None, :]
        found = tl.load(partial + own[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc += tl.sum(found * weight[:, None], 0)
        total += tl.sum(weight, 0)
    place = (row_start + row).to(tl.int64) * HEADS + head
    tl.store(out + place * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)
    if lse is not None:
        tl.store(lse + place, (highest + tl.log2(total)) / LOG2E)
