"""Lanes of two formats: carrying out the choice of a plan that mixes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from winnow.engine.compression.arrange import Tokens, arrange, moves
from winnow.engine.compression.destination import destination
from winnow.engine.compression.mix import Mix
from winnow.engine.pages import Ints, PageArena
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.sequence import Sequence
from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import Rest
from winnow.kernels.layout import PageFormat


def by_position(arena: PageArena, slot: int) -> Tensor:
    """[layers, kv_heads, most] int64: the lane indices of each lane's tokens in the order of their positions, then
    those of padding."""
    kv = arena.kv
    kept = kv.kept[slot]
    positions = kv.positions[slot][..., : int(kept.max())]
    is_padding = torch.arange(positions.shape[-1]) >= kept[..., None]
    return torch.sort(positions.masked_fill(is_padding, torch.iinfo(torch.int32).max), dim=-1, stable=True).indices


def mix_formats(
    arena: PageArena,
    cache: PrefixCache | None,
    ops: Backend,
    seq: Sequence,
    mix: Mix,
    chosen: tuple[Tensor, Tensor] | None,
) -> Tensor | None:
    """Moves a sequence's tokens to the format that each deserves. OutOfPages leaves everything as it was.

    Args:
        chosen: the important tokens [layers, kv_heads, n] int64, by their places in the order of positions, and the
            scores of all [layers, kv_heads, tokens]; without them every token that no full page holds is important.

    Returns:
        [layers, kv_heads, tokens] int64, the tokens' old lane indices in their new order, padded with -1; None where
        nothing has moved.
    """
    slot, layout = seq.slot, arena.layout
    kv, fmt, rest_fmt = arena.kv, seq.timeline.fmt, PageFormat.parse(mix.rest)
    capacity = layout.capacity(fmt) if fmt is not layout.compute else 0
    order = by_position(arena, slot).flatten(0, 1)
    held = torch.arange(order.shape[-1]) < kv.kept[slot].flatten()[:, None]
    sealed, rest = kv.sealed[slot].flatten().long(), kv.rest[slot].flatten().long()
    closed = sealed * capacity + rest * layout.capacity(rest_fmt)
    part = (order >= (sealed * capacity)[:, None]).long() + (order >= closed[:, None])
    important, score, bound = held, torch.zeros(held.shape), part == 0
    if chosen is not None:
        index, score = (side.flatten(0, 1) for side in chosen)
        places = torch.zeros(len(held), held.shape[-1] + 1, dtype=torch.bool)
        important = places.scatter_(1, index.masked_fill(index < 0, held.shape[-1]), True)[:, :-1]
        bound = bound & (not mix.demotes)
    tokens = Tokens(order, held, part, important, score, bound)
    to = arrange(tokens, seq.plan.residual, capacity, layout.capacity(rest_fmt))
    way = moves(to, sealed, rest, capacity, layout.capacity(rest_fmt))
    if way.is_nothing(sealed, rest):
        return None

    lanes = tuple(kv.kept.shape[1:])

    def ints(numbers: Tensor) -> Ints:
        return np.ascontiguousarray(numbers.unflatten(0, lanes).numpy(), np.int32)

    columns = ints(
        way.sealed
        + way.rest
        + -(-(way.count - way.sealed * capacity - way.rest * layout.capacity(rest_fmt)) // layout.page_tokens)
    )
    table, fresh = destination(arena, cache, slot, ints(way.start), columns, ints(way.sealed), ints(way.rest_start))
    keep, counts, start, new_sealed, rest_start, new_rest = (
        torch.from_numpy(ints(part))
        for part in (way.keep, way.written, way.start, way.sealed, way.rest_start, way.rest)
    )
    target = Rest(rest_start, new_rest, rest_fmt)
    try:
        ops.repack(kv, slot, keep, counts, start, torch.from_numpy(table), new_sealed, fmt, target)
    except Exception:
        arena.release(fresh)
        raise
    arena.replace(slot, table, columns, ints(way.count), ints(way.sealed), ints(way.rest))
    return way.index.unflatten(0, lanes)
