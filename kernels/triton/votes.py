"""Attention mass: what the voting rows of a step gave to each token of their lanes (the rules are in kernels/vote.py).

    1  _normalise    log-sum-exp of the rows' own softmax, where a rule's is not that of attention
    2  _count        a program has pages of one lane to itself, and takes the rows in blocks, in their order:
                     sum     mass = decay^n · mass + Σ decay^(n-1-i) · P_i       over the block's n rows
                     max     mass = max(mass, P_0, ..., P_n-1)

Logits are those of attention, so that one log-sum-exp serves both. What shares the batch changes no bit; how a prompt
was cut into chunks changes the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.triton.ballots import HELD, ballot_of, key_tile, of_lane, queries, vote_logits
from winnow.kernels.triton.columns import LANE, column_at, columns_of, pages_of, table_row
from winnow.kernels.triton.config import VOTE_REGISTERS
from winnow.kernels.triton.step import device_batch
from winnow.kernels.triton.tiles import padded
from winnow.kernels.vote import FAINT

BLOCK = 32
"""Queries, rows by heads of a group, that a program takes at a time"""
SPLITS = 8
"""Programs that share the pages of a lane in `_normalise`"""
COLUMNS = 64
"""The most programs that share the pages of a lane in `_count`"""
TILE = 4096
"""Numbers of keys that a program holds at a time; of f32 a quarter, as products without tensor cores need registers for
what they multiply"""

_FAINT = tl.constexpr(FAINT)


def add_votes(q: Tensor, lse: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> None:
    """Adds to `kv.mass` what the rows that vote gave to their tokens.

    Args:
        q: [T, Hq, D] contiguous f32, bf16 or f16.
        lse: [T, Hq] f32, natural log of the sum of e^logit over what each row sees, as attention found it; looked at
            for sequences whose rule is plain attention.
    """
    native = device_batch(batch, kv, layer)
    if not native.voting.rows:
        return
    if native.ballot is None:
        native.ballot = ballot_of(native)
    heads, width = kv.table.shape[2:]
    group = q.shape[1] // heads
    block = max(BLOCK, triton.next_power_of_2(group))
    tile = TILE // 4 if q.dtype == torch.float32 else TILE
    given: dict[str, Any] = {
        "q": q,
        "cu_rows": native.cu_rows,
        "first_vote": native.first_vote,
        "positions": native.positions,
        "modes": native.slots if native.modes is None else native.modes,
        "numbers": native.vote_numbers,
        "kinds": native.vote_kinds,
        "held": native.ballot,
        "rows_of_step": len(q),
        "layer": layer,
        "scale": scale,
        "window": window,
        "GROUP": group,
        "BLOCK": block,
        "TOKENS": max(16, tile // triton.next_power_of_2(kv.layout.head_dim)),
        "SPLITS": SPLITS,
        "maxnreg": VOTE_REGISTERS,
        **pages_of(native, kv),
    }
    own = lse
    if native.voting.has_own_softmax:
        own = lse.new_empty(SPLITS, *lse.shape)
        blocks = triton.cdiv(native.voting.rows, block // group)
        _normalise[(blocks * SPLITS, heads, native.size)](own=own, **given)
    _count[(min(width, COLUMNS), heads, native.size)](lse=lse, own=own, **given)


@triton.jit(do_not_specialize=["rows_of_step", "layer", "window", "width"])
def _normalise(
    q: tl.tensor,
    own: tl.tensor,
    cu_rows: tl.tensor,
    first_vote: tl.tensor,
    positions: tl.tensor,
    modes: tl.tensor,
    numbers: tl.tensor,
    kinds: tl.tensor,
    held: tl.tensor,
    rows_of_step: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    width: tl.tensor,
    lanes: tl.tensor,
    page_bytes: tl.constexpr,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """own [SPLITS, T, Hq]: log-sum-exp of what the rows of a block see in every SPLITS-th column."""
    split, head, b = tl.program_id(0) % SPLITS, tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_rows + b)
    rows = tl.load(cu_rows + b + 1) - begin
    first = tl.load(first_vote + b) + tl.program_id(0) // SPLITS * (BLOCK // GROUP)
    if (tl.load(held + b * HELD) == 0) | (tl.load(kinds + b * 4 + 3) == 0) | (first >= rows):
        return
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    row = table_row(table, width, lane, layer, head, layers, heads)
    end = tl.load(lane) - rows + tl.minimum(first + BLOCK // GROUP, rows)  # of what any of the rows sees
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for column in range(split, columns_of(lane, COMPUTE, CAPACITIES), SPLITS):
        fmt, start = column_at(column, lane, COMPUTE, CAPACITIES)
        page = data + tl.load(row + column).to(tl.int64) * page_bytes
        for i in tl.static_range(len(FORMATS)):
            if fmt == FORMATS[i]:
                top, total = _normalise_page(
                    top, total, page, start, end, FORMATS[i], CAPACITIES[FORMATS[i]],
                    q, first, rows, begin, b, head, lane, positions, modes, numbers, kinds, held, layer, scale, window,
                    heads, D, GROUP, BLOCK, TOKENS
                )  # fmt: skip
    found = tl.where(total > 0, top + tl.log(total), float("-inf"))
    r, of_row = queries(first, head, heads, GROUP, BLOCK)
    live = (tl.arange(0, BLOCK) < BLOCK // GROUP * GROUP) & (r < rows)
    tl.store(own + (split * rows_of_step + begin + r) * (heads * GROUP) + of_row, found, mask=live)


@triton.jit
def _normalise_page(
    top: tl.tensor,
    total: tl.tensor,
    page: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    FORMAT: tl.constexpr,
    C: tl.constexpr,
    q: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    b: tl.tensor,
    head: tl.tensor,
    lane: tl.tensor,
    positions: tl.tensor,
    modes: tl.tensor,
    numbers: tl.tensor,
    kinds: tl.tensor,
    held: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    heads: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """The greatest logits [BLOCK] and sums of e^(logit - greatest), with the page that begins with token `start`."""
    T: tl.constexpr = min(TOKENS, padded(C))
    for at in range(0, tl.minimum(C, end - start), T):
        t = at + tl.arange(0, T)
        logits = vote_logits(
            q, key_tile(page, t, q, FORMAT, D, C), start + t, t < C, first, rows, begin, b, head, lane, positions,
            modes, numbers, kinds, held, layer, scale, window, heads, D, GROUP, BLOCK
        )  # fmt: skip
        highest = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = highest
    return top, total


@triton.jit(do_not_specialize=["rows_of_step", "layer", "window", "width"])
def _count(
    q: tl.tensor,
    lse: tl.tensor,
    own: tl.tensor,
    cu_rows: tl.tensor,
    first_vote: tl.tensor,
    positions: tl.tensor,
    modes: tl.tensor,
    numbers: tl.tensor,
    kinds: tl.tensor,
    held: tl.tensor,
    rows_of_step: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    width: tl.tensor,
    lanes: tl.tensor,
    page_bytes: tl.constexpr,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Counts the voting rows of a sequence into the mass of one lane's columns."""
    head, b = tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_rows + b)
    rows = tl.load(cu_rows + b + 1) - begin
    first_voter = tl.load(first_vote + b)
    if (tl.load(held + b * HELD) == 0) | (first_voter >= rows):
        return
    mass = of_lane(held, b, 0, layer, head, heads).to(tl.pointer_type(tl.float32))
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    row = table_row(table, width, lane, layer, head, layers, heads)
    for column in range(tl.program_id(0), columns_of(lane, COMPUTE, CAPACITIES), tl.num_programs(0)):
        fmt, start = column_at(column, lane, COMPUTE, CAPACITIES)
        page = data + tl.load(row + column).to(tl.int64) * page_bytes
        for i in tl.static_range(len(FORMATS)):
            if fmt == FORMATS[i]:
                _count_page(
                    lse, own, rows_of_step, mass, page, start, first_voter, FORMATS[i], CAPACITIES[FORMATS[i]],
                    q, rows, begin, b, head, lane, positions, modes, numbers, kinds, held, layer, scale, window,
                    heads, D, GROUP, BLOCK, TOKENS, SPLITS
                )  # fmt: skip


@triton.jit
def _count_page(
    lse: tl.tensor,
    own: tl.tensor,
    rows_of_step: tl.tensor,
    mass: tl.tensor,
    page: tl.tensor,
    start: tl.tensor,
    first_voter: tl.tensor,
    FORMAT: tl.constexpr,
    C: tl.constexpr,
    q: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    b: tl.tensor,
    head: tl.tensor,
    lane: tl.tensor,
    positions: tl.tensor,
    modes: tl.tensor,
    numbers: tl.tensor,
    kinds: tl.tensor,
    held: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    heads: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Counts the rows into the mass of the page that begins with token `start`."""
    T: tl.constexpr = min(TOKENS, padded(C))
    kept, fade = tl.load(lane), tl.load(numbers + b * 4)
    faint = tl.where(fade < 0, _FAINT, 0.0)
    for at in range(0, tl.minimum(C, kept - start), T):
        t = at + tl.arange(0, T)
        inside = (t < C) & (start + t < kept)
        keys = key_tile(page, t, q, FORMAT, D, C)
        total = tl.load(mass + start + t, mask=inside, other=0.0)
        # Rows before this one see none of these tokens.
        seeing = tl.minimum(tl.maximum(first_voter, start + at - (kept - rows)), rows)
        total *= tl.exp2(fade * (seeing - first_voter))
        for first in range(seeing, rows, BLOCK // GROUP):
            logits = vote_logits(
                q, keys, start + t, inside, first, rows, begin, b, head, lane, positions, modes, numbers, kinds, held,
                layer, scale, window, heads, D, GROUP, BLOCK
            )  # fmt: skip
            r, of_row = queries(first, head, heads, GROUP, BLOCK)
            place = (begin + r) * (heads * GROUP) + of_row
            if tl.load(kinds + b * 4 + 3) != 0:
                norm = _merged(own, place, r < rows, rows_of_step * (heads * GROUP), BLOCK, SPLITS)
            else:
                norm = tl.load(lse + place, mask=r < rows, other=0.0)
            given = tl.exp(logits - norm[:, None])
            count = tl.minimum(BLOCK // GROUP, rows - first)
            if tl.load(kinds + b * 4 + 1) != 0:
                total = tl.maximum(total, tl.max(given, 0))
            else:
                later = tl.exp2(fade * tl.maximum(first + count - 1 - r, 0))
                total = total * tl.exp2(fade * count) + tl.sum(given * later[:, None], 0)
        tl.store(mass + start + t, tl.where(total < faint, 0.0, total), mask=inside)


@triton.jit
def _merged(
    own: tl.tensor, place: tl.tensor, live: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr, SPLITS: tl.constexpr
) -> tl.tensor:
    """[BLOCK]: log-sum-exp of all splits."""
    splits = tl.arange(0, SPLITS)[None, :]
    parts = tl.load(own + splits * stride + place[:, None], mask=live[:, None], other=0.0)
    top = tl.max(parts, 1)
    return top + tl.log(tl.sum(tl.exp(parts - top[:, None]), 1))
