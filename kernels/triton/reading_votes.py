"""What candidates are voted: the middle of reading by a rule (kernels/reading.py).

normalise     log-sum-exp of a query head's logits                                       by row and query head
cast_votes    softmax over the candidates, summed over the heads that vote together      by row, lane and candidate
pool_votes    the highest of neighbours                                                  likewise
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.triton.readers import BY_LAYER, OWNER, POOL, SPAN
from winnow.kernels.triton.reading_spans import NONE, chooses, setting


@triton.jit
def votes_of_row(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    i: tl.tensor,
    head: tl.tensor,
    heads: tl.constexpr,
) -> tl.tensor:
    """Whether a row's candidates are voted on in a lane; the first and last of them; its reader."""
    reader = tl.load(places + 2 * i)
    span = spans + (i * heads + head) * SPAN
    mode = tl.load(modes + layer * size + setting(settings, reader, OWNER))
    is_open = chooses(mode) & (tl.load(span + 6) == 0) & (tl.load(sources + i) == NONE)
    return is_open, tl.load(span + 4), tl.load(span + 5), reader


@triton.jit(do_not_specialize=["layer", "size", "units"])
def normalise(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    scores: tl.tensor,
    norms: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    units: tl.tensor,
    heads: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    head, i = tl.program_id(0), tl.program_id(1)
    is_open, first, last, _ = votes_of_row(
        settings, places, spans, sources, modes, layer, size, i, head // GROUP, heads
    )
    if is_open == 0:
        return
    row = scores + (i * (heads * GROUP) + head).to(tl.int64) * units
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(first, last, BLOCK):
        u = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(row + u, mask=u < last, other=float("-inf")))
    highest = tl.max(top)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        u = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(row + u, mask=u < last, other=float("-inf")) - highest)
    tl.store(norms + i * (heads * GROUP) + head, highest + tl.log(tl.sum(total)))


@triton.jit(do_not_specialize=["layer", "size", "units"])
def cast_votes(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    scores: tl.tensor,
    norms: tl.tensor,
    votes: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    units: tl.tensor,
    heads: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """votes [R, heads, units]; heads that vote together have theirs with the first of them."""
    head, i = tl.program_id(1), tl.program_id(2)
    is_open, first, last, reader = votes_of_row(settings, places, spans, sources, modes, layer, size, i, head, heads)
    together = setting(settings, reader, BY_LAYER) != 0
    if (is_open == 0) | (together & (head > 0)):
        return
    count = tl.where(together, heads * GROUP, GROUP)
    for start in range(first + tl.program_id(0) * BLOCK, last, tl.num_programs(0) * BLOCK):
        u = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for g in range(count):
            place = i * (heads * GROUP) + head * GROUP + g
            logits = tl.load(scores + place.to(tl.int64) * units + u, mask=u < last, other=0.0)
            total += tl.exp(logits - tl.load(norms + place))
        tl.store(votes + (i * heads + head).to(tl.int64) * units + u, total, mask=u < last)


@triton.jit(do_not_specialize=["layer", "size", "units"])
def pool_votes(
    settings: tl.tensor,
    places: tl.tensor,
    spans: tl.tensor,
    sources: tl.tensor,
    votes: tl.tensor,
    pooled: tl.tensor,
    modes: tl.tensor,
    layer: tl.tensor,
    size: tl.tensor,
    units: tl.tensor,
    heads: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    head, i = tl.program_id(1), tl.program_id(2)
    is_open, first, last, reader = votes_of_row(settings, places, spans, sources, modes, layer, size, i, head, heads)
    if (is_open == 0) | ((setting(settings, reader, BY_LAYER) != 0) & (head > 0)):
        return
    reach = setting(settings, reader, POOL).to(tl.int32) // 2
    row = (i * heads + head).to(tl.int64) * units
    for start in range(first + tl.program_id(0) * BLOCK, last, tl.num_programs(0) * BLOCK):
        u = start + tl.arange(0, BLOCK)
        top = tl.zeros([BLOCK], tl.float32)
        for shift in range(-reach, reach + 1):
            near = u + shift
            top = tl.maximum(top, tl.load(votes + row + near, mask=(near >= first) & (near < last), other=0.0))
        tl.store(pooled + row + u, top, mask=u < last)
