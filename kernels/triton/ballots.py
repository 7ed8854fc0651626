"""What rows vote with: where that is on the device, and the logits of a block of rows over tokens of a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.reading import ReadMode
from winnow.kernels.triton.step import DeviceBatch
from winnow.kernels.triton.tiles import keys_at, padded

HELD = tl.constexpr(9)
"""Numbers of a sequence in `DeviceBatch.ballot`"""
_CHOSEN = tl.constexpr(int(ReadMode.CHOSEN))


def ballot_of(native: DeviceBatch) -> Tensor:
    """[B, 9] int64: address and capacity of mass, log weights, positions, choices; address of the noise; 0 for none."""
    sides = [part for name in ("mass", "log_weights", "positions", "choices") for part in native.side(name)]
    return torch.stack([*(part.long() for part in sides), native.side("noise")[0]], 1)


@triton.jit
def queries(
    first: tl.tensor, head: tl.tensor, heads: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Row of each query of a block from row `first` on, and its head; what the rows do not fill comes last."""
    m = tl.arange(0, BLOCK)
    return first + m // GROUP, head * GROUP + m % GROUP


@triton.jit
def of_lane(
    held: tl.tensor, b: tl.tensor, PART: tl.constexpr, layer: tl.tensor, head: tl.tensor, heads: tl.constexpr
) -> tl.tensor:
    """Address of a lane's part of [layers, kv_heads, capacity] numbers of four bytes; 0 for a sequence without."""
    address, capacity = tl.load(held + b * HELD + PART), tl.load(held + b * HELD + PART + 1)
    return tl.where(address == 0, 0, address + (layer * heads + head) * capacity * 4)


@triton.jit
def key_tile(
    page: tl.tensor, t: tl.tensor, q: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """[padded(D), tokens]: the keys at places t of a page, in the type of the queries."""
    d = tl.arange(0, padded(D))[:, None]
    return keys_at(page, d, t[None, :], (t < C)[None, :], FORMAT, D, C).to(q.dtype.element_ty)


@triton.jit
def vote_logits(
    q: tl.tensor,
    keys: tl.tensor,
    token: tl.tensor,
    inside: tl.tensor,
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
) -> tl.tensor:
    """[BLOCK, tokens] f32: what the block of rows from `first` on votes with; -inf where a row does not look."""
    r, of_row = queries(first, head, heads, GROUP, BLOCK)
    live = (tl.arange(0, BLOCK) < BLOCK // GROUP * GROUP) & (r < rows)
    d = tl.arange(0, padded(D))
    place = ((begin + r) * (heads * GROUP) + of_row).to(tl.int64)
    block = tl.load(q + place[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    logits = tl.dot(block, keys, input_precision="ieee") * scale
    kept = tl.load(lane)
    inside = inside & (token < kept)
    weights = of_lane(held, b, 2, layer, head, heads)
    if weights != 0:
        logits += tl.load(weights.to(tl.pointer_type(tl.float32)) + token, mask=inside, other=0.0)[None, :]
    position = tl.load(positions + begin + r, mask=live, other=0)
    if tl.load(kinds + b * 4 + 3) != 0:
        if tl.load(kinds + b * 4 + 2) != 0:
            noise = tl.load(held + b * HELD + 8) + (layer * heads + head) * tl.load(held + b * HELD + 1) * 4
            logits += tl.load(noise.to(tl.pointer_type(tl.float32)) + token, mask=inside, other=0.0)[None, :]
        beyond = tl.maximum(position - tl.load(kinds + b * 4), 0).to(tl.float32)
        logits /= (tl.load(numbers + b * 4 + 1) + tl.load(numbers + b * 4 + 2) * beyond)[:, None]
    seen = live[:, None] & inside[None, :] & (token[None, :] <= (kept - rows + r)[:, None])
    if window > 0:
        places = of_lane(held, b, 4, layer, head, heads)
        at = token
        if places != 0:
            at = tl.load(places.to(tl.pointer_type(tl.int32)) + token, mask=inside, other=0)
        seen &= at[None, :] > (position - window)[:, None]
    choices = tl.load(held + b * HELD + 6)
    if choices != 0:  # noqa: SIM102 - Triton looks at both sides of `and`
        if tl.load(modes + layer * tl.num_programs(2) + b) >= _CHOSEN:
            chosen = choices + (r * heads + head) * tl.load(held + b * HELD + 7)
            chosen = chosen.to(tl.pointer_type(tl.uint8))[:, None] + token[None, :]
            seen &= tl.load(chosen, mask=seen, other=0) != 0
    return tl.where(seen, logits, float("-inf"))
