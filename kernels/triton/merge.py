"""What the programs of decode found for the shares of a row's lane, put together by their log-sum-exps."""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.triton.attend import LOG2E
from winnow.kernels.triton.tiles import padded


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
