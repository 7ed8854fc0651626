"""From votes to choices: the last part of reading by a rule (kernels/reading.py).

select         the highest votes until they weigh as much as is wanted, as a mask     by row and lane
take_over      candidates of rows that take a choice over                             by row and lane
keep_choice    what the state holds of the last choice                                by reader
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.triton.columns import LANE, first_token
from winnow.kernels.triton.readers import (
    ANCHOR_CHOICE,
    ANCHOR_TOKENS,
    BOUNDED,
    BY_BOUNDS,
    BY_LAYER,
    CHOICE_TOKENS,
    CHOICES,
    FIRST_READER_ROW,
    OWNER,
    REUSES,
    ROWS,
    SPAN,
)
from winnow.kernels.triton.reading_bytes import count_looks
from winnow.kernels.triton.reading_spans import NONE, STATE, chooses, pages_to_bound, setting


@triton.jit(do_not_specialize=["layer", "size", "units"])
def select(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    votes: tl.tensor,
    modes: tl.tensor,
    lanes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    units: tl.tensor,
    layers: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMATS: tl.constexpr,
    CAPACITIES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes a row's mask for a lane, but for what it takes over; counts the bytes that were looked at to choose."""
    head, i = tl.program_id(0), tl.program_id(1)
    reader, j = tl.load(places + 2 * i), tl.load(places + 2 * i + 1)
    b = setting(settings, reader, OWNER).to(tl.int32)
    if chooses(tl.load(modes + layer * size + b)) == 0:
        return
    lane = lanes + ((b * layers + layer) * heads + head) * LANE
    by_bounds = setting(settings, reader, BY_BOUNDS) != 0
    if by_bounds & (j + 1 == setting(settings, reader, ROWS).to(tl.int32)):
        _, known, full = pages_to_bound(settings, spans, lane, reader, layer, head, heads, COMPUTE, CAPACITIES)
        bounded = setting(settings, reader, BOUNDED).to(tl.pointer_type(tl.int32)) + layer * heads + head
        tl.store(bounded, tl.maximum(known, full))
    # Heads that vote together have their votes with the first of them.
    voter = tl.where(setting(settings, reader, BY_LAYER) != 0, 0, head)
    span = spans + (i * heads + voter) * SPAN
    low, seen, begin, end = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    first, last, all_, wanted = tl.load(span + 4), tl.load(span + 5), tl.load(span + 6), tl.load(span + 7)
    room = setting(settings, reader, CHOICE_TOKENS)
    choice = setting(settings, reader, CHOICES).to(tl.pointer_type(tl.uint8)) + (j * heads + head) * room
    is_again = tl.load(sources + i) != NONE
    is_open = ((all_ == 0) & (is_again == 0)).to(tl.int32)
    for start in range(0, room.to(tl.int32), BLOCK):
        t = start + tl.arange(0, BLOCK)
        among = (t >= begin) & (t < end)
        value = tl.where(among, all_, ((t >= low) & (t < seen)).to(tl.int32))
        tl.store(choice + t, value.to(tl.uint8), mask=(t < room) & (tl.where(among, is_open, 0) == 0))
    if is_open == 0:
        return
    count_looks(settings, reader, lane, first, last, begin, end, D, COMPUTE, FORMATS, CAPACITIES)
    row = votes + (i * heads + voter).to(tl.int64) * units
    # The greatest threshold whose numbers weigh enough, two bits at a time: numbers from 0 on order as their bits do.
    least = first * 0
    for step in range(15):
        one = (first * 0 + 1) << (29 - 2 * step)
        by_one, by_two, by_three = _weigh(
            row, first, last, begin, lane, least + one, least + 2 * one, least + 3 * one, by_bounds, COMPUTE,
            CAPACITIES, BLOCK
        )  # fmt: skip
        digit = (by_one >= wanted).to(tl.int32) + (by_two >= wanted).to(tl.int32) + (by_three >= wanted).to(tl.int32)
        least += digit * one
    above, beyond, _ = _weigh(
        row, first, last, begin, lane, least + 1, least + 2, least + 2, by_bounds, COMPUTE, CAPACITIES, BLOCK
    )
    rest = wanted - tl.where(above >= wanted, beyond, above)
    least += (above >= wanted).to(tl.int32)
    # Of equal numbers the first are taken until they bring the rest.
    if by_bounds:
        for start in range(first, last, PAGES):
            u = start + tl.arange(0, PAGES)
            taken, rest = _taken(row, u, last, begin, lane, least, rest, by_bounds, COMPUTE, CAPACITIES)
            from_ = first_token(u, lane, COMPUTE, CAPACITIES)
            to = first_token(u + 1, lane, COMPUTE, CAPACITIES)
            t = from_[:, None] + tl.arange(0, PAGE_TOKENS)[None, :]
            inside = (u < last)[:, None] & (t >= begin) & (t < to[:, None])
            tl.store(choice + t, taken[:, None].to(tl.uint8), mask=inside)
    else:
        for start in range(first, last, BLOCK):
            u = start + tl.arange(0, BLOCK)
            taken, rest = _taken(row, u, last, begin, lane, least, rest, by_bounds, COMPUTE, CAPACITIES)
            tl.store(choice + u, taken.to(tl.uint8), mask=u < last)


@triton.jit
def _weights(
    u: tl.tensor,
    last: tl.tensor,
    begin: tl.tensor,
    lane: tl.tensor,
    by_bounds: tl.tensor,
    COMPUTE: tl.constexpr,
    CAPACITIES: tl.constexpr,
) -> tl.tensor:
    """Tokens of candidates; 0 from `last` on."""
    weight = (u < last).to(tl.int32)
    if by_bounds:
        from_ = first_token(u, lane, COMPUTE, CAPACITIES)
        to = first_token(u + 1, lane, COMPUTE, CAPACITIES)
        weight *= to - tl.maximum(from_, begin)
    return weight


@triton.jit
def _weigh(
    row: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    begin: tl.tensor,
    lane: tl.tensor,
    one: tl.tensor,
    two: tl.tensor,
    three: tl.tensor,
    by_bounds: tl.tensor,
    COMPUTE: tl.constexpr,
    CAPACITIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """What the candidates weigh whose votes are not below each of three thresholds."""
    by_one, by_two, by_three = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        u = start + tl.arange(0, BLOCK)
        order = tl.load(row + u, mask=u < last, other=0.0).to(tl.int32, bitcast=True)
        weight = _weights(u, last, begin, lane, by_bounds, COMPUTE, CAPACITIES)
        by_one += tl.where(order >= one, weight, 0)
        by_two += tl.where(order >= two, weight, 0)
        by_three += tl.where(order >= three, weight, 0)
    return tl.sum(by_one), tl.sum(by_two), tl.sum(by_three)


@triton.jit
def _taken(
    row: tl.tensor,
    u: tl.tensor,
    last: tl.tensor,
    begin: tl.tensor,
    lane: tl.tensor,
    least: tl.tensor,
    rest: tl.tensor,
    by_bounds: tl.tensor,
    COMPUTE: tl.constexpr,
    CAPACITIES: tl.constexpr,
) -> tl.tensor:
    """Which candidates of a block are taken; what those at the threshold must still bring."""
    order = tl.load(row + u, mask=u < last, other=0.0).to(tl.int32, bitcast=True)
    tied = tl.where(order == least, _weights(u, last, begin, lane, by_bounds, COMPUTE, CAPACITIES), 0)
    before = tl.cumsum(tied) - tied
    return (order > least) | ((order == least) & (before < rest)), rest - tl.sum(tied)


@triton.jit(do_not_specialize=["layer", "size"])
def take_over(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    heads: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Candidates of rows that do not choose anew: those of their source."""
    head, i = tl.program_id(0), tl.program_id(1)
    source = tl.load(sources + i)
    reader, j = tl.load(places + 2 * i), tl.load(places + 2 * i + 1)
    if (source == NONE) | (chooses(tl.load(modes + layer * size + setting(settings, reader, OWNER))) == 0):
        return
    room = setting(settings, reader, CHOICE_TOKENS)
    choices = setting(settings, reader, CHOICES).to(tl.pointer_type(tl.uint8))
    span = spans + i * heads * SPAN
    begin, end = tl.load(span + 2), tl.load(span + 3)
    if source == STATE:
        theirs = setting(settings, reader, ANCHOR_CHOICE) + layer * setting(settings, reader, ANCHOR_TOKENS)
        first, last = begin, end
    else:
        theirs = setting(settings, reader, CHOICES) + source * heads * room
        other = spans + (i - j + source) * heads * SPAN
        first, last = tl.load(other + 2), tl.load(other + 3)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = (t >= first) & (t < last) & (t < end)
        value = tl.load(theirs.to(tl.pointer_type(tl.uint8)) + t, mask=mask, other=0)
        tl.store(choices + (j * heads + head) * room + t, value, mask=t < end)


@triton.jit(do_not_specialize=["layer", "size"])
def keep_choice(
    settings: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    heads: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The state's choice becomes that of the last row that chose anew."""
    reader = tl.program_id(0)
    mode = tl.load(modes + layer * size + setting(settings, reader, OWNER))
    if (setting(settings, reader, REUSES) == 0) | (chooses(mode) == 0):
        return
    first = setting(settings, reader, FIRST_READER_ROW).to(tl.int32)
    newest = first * 0 - 1
    for j in range(0, setting(settings, reader, ROWS).to(tl.int32)):
        is_new = (tl.load(sources + first + j) == NONE) & (tl.load(spans + (first + j) * heads * SPAN + 6) == 0)
        newest = tl.where(is_new, j, newest)
    if newest < 0:
        return
    span = spans + (first + newest) * heads * SPAN
    begin, end = tl.load(span + 2), tl.load(span + 3)
    capacity = setting(settings, reader, ANCHOR_TOKENS)
    kept = setting(settings, reader, ANCHOR_CHOICE).to(tl.pointer_type(tl.uint8)) + layer * capacity
    choices = setting(settings, reader, CHOICES).to(tl.pointer_type(tl.uint8))
    choices += newest * heads * setting(settings, reader, CHOICE_TOKENS)
    for start in range(0, capacity.to(tl.int32), BLOCK):
        t = start + tl.arange(0, BLOCK)
        value = tl.load(choices + t, mask=(t >= begin) & (t < end), other=0)
        tl.store(kept + t, value, mask=t < capacity)
