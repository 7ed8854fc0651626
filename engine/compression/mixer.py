"""Lanes of two formats: carrying out the choice of a plan that mixes them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.compression.arrange import Tokens, arrange, moves
from winnow.engine.compression.destination import destination
from winnow.engine.compression.mix import Mix
from winnow.engine.pages import Ints, PageArena
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.sequence import Sequence
from winnow.kernels.dispatch import Backend
from winnow.kernels.host import to_device
from winnow.kernels.kv import Rest
from winnow.kernels.layer_merge import LayerMerge
from winnow.kernels.layout import PageFormat


def by_position(arena: PageArena, slot: int) -> Tensor:
    """[layers, kv_heads, most] int64: the lane indices of each lane's tokens in the order of their positions, then
    those of padding."""
    kv = arena.kv
    tokens, kept = int(arena.kept[slot].max()), to_device(kv.kept[slot], kv.device)
    positions = kv.positions[slot][..., :tokens]
    is_padding = torch.arange(tokens, device=kv.device) >= kept[..., None]
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
    lengths = torch.stack([kv.kept[slot], kv.sealed[slot], kv.rest[slot]]).long()
    kept, sealed, rest = to_device(lengths, kv.device).flatten(1)
    held = torch.arange(order.shape[-1], device=kv.device) < kept[:, None]
    closed = sealed * capacity + rest * layout.capacity(rest_fmt)
    part = (order >= (sealed * capacity)[:, None]).long() + (order >= closed[:, None])
    important, score, bound = held, torch.zeros(held.shape, device=kv.device), part == 0
    if chosen is not None:
        index, score = (side.flatten(0, 1) for side in chosen)
        places = held.new_zeros(len(held), held.shape[-1] + 1)
        important = places.scatter_(1, index.masked_fill(index < 0, held.shape[-1]), True)[:, :-1]
        bound = bound & (not mix.demotes)
    tokens = Tokens(order, held, part, important, score, bound)
    to = arrange(tokens, seq.plan.residual, capacity, layout.capacity(rest_fmt))
    way = moves(to, sealed, rest, capacity, layout.capacity(rest_fmt))
    if way.is_nothing(sealed, rest):
        arena.ensure(0)  # lanes at other ranks may need pages
        return None

    lanes = tuple(kv.kept.shape[1:])
    parts = (way.count, way.sealed, way.rest, way.start, way.rest_start, way.written)
    count, high, low, start, rest_start, moved = torch.stack(parts).int().unflatten(1, lanes).cpu().numpy()
    columns = high + low - (high * capacity + low * layout.capacity(rest_fmt) - count) // layout.page_tokens
    merge = mix.layer_merge(len(columns))
    shared = None if merge is None else _shared(merge, columns, high, low)
    table, fresh = destination(arena, cache, slot, start, columns, high, rest_start, shared)
    keep = way.keep.int().unflatten(0, lanes)
    first, rest_first, written = (torch.from_numpy(part) for part in (start, rest_start, moved))
    target = Rest(rest_first, torch.from_numpy(low), rest_fmt, merge)
    try:
        ops.repack(kv, slot, keep, written, first, torch.from_numpy(table), torch.from_numpy(high), fmt, target)
    except Exception:
        arena.release(fresh)
        raise
    arena.replace(slot, table, columns, count, high, low)
    return way.index.unflatten(0, lanes)


def _shared(merge: LayerMerge, columns: Ints, high: Ints, low: Ints) -> NDArray[np.bool_]:
    """[layers, kv_heads, most]: where lanes, of `high` pages and `low` behind them, have those of the layer below."""
    behind = np.arange(max(1, int(columns.max()))) - high[..., None]
    is_shared = (behind >= 0) & (behind < low[..., None])
    upper = np.zeros(len(columns), bool)
    upper[[layer + 1 for layer in merge.lower_layers(len(columns))]] = True
    return is_shared & upper[:, None, None]
