"""Where the tokens of a lane go when two formats share it.

    [ important, full pages of the plan's format | the rest, full pages of its second one | open ]

Full pages only: important tokens are rounded up to whole pages with the next important ones, so that none of them gets
fewer bits, and what fills no page stays open beside the newest. A token of the second part stays there, since the bits
it lost are lost; it moves no more, so that it is rounded once. Ties go to the lower position, so the outcome depends on
nothing but positions and scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Lanes as they are: tokens in the order of their positions, padded at the end. All [lanes, tokens]."""

    index: Tensor
    """int64: where the token lies in its lane"""
    is_held: Tensor
    """bool: false for padding"""
    part: Tensor
    """int64: 0 in the first format's pages, 1 in the second's, 2 open"""
    is_important: Tensor
    """bool"""
    score: Tensor
    """float32: which of two is more important"""
    is_bound: Tensor
    """bool: must stay important"""


@dataclass(frozen=True)
class Arrangement:
    """Lanes as they are to be."""

    index: Tensor
    """[lanes, tokens] int64: the tokens' old lane indices in their new order, padded with -1"""
    count: Tensor
    """[lanes] int64"""
    sealed: Tensor
    """[lanes] int64: pages of the first format"""
    rest: Tensor
    """[lanes] int64: pages of the second format"""


def arrange(tokens: Tokens, residual: int, capacity: int, rest_capacity: int) -> Arrangement:
    """Parts of the lanes' tokens.

    Args:
        residual: newest tokens of a lane that stay open, unless they are in a full page already.
        capacity: tokens of a page of the first format; 0 where that is the compute format and has no pages of its own.
        rest_capacity: tokens of a page of the second format.
    """
    held, part = tokens.is_held, tokens.part
    count = held.sum(-1)
    order = torch.arange(held.shape[-1], device=held.device).expand_as(held)
    is_old = held & ((order < (count - residual)[:, None]) | (part < 2))
    is_low = held & (part == 1)
    free = is_old & ~is_low
    bound = free & tokens.is_bound

    wanted, available, low = (mask.sum(-1) for mask in (free & (tokens.is_important | bound), free, is_low))
    pages = torch.zeros_like(wanted)
    if capacity:
        pages = torch.minimum(-(-wanted // capacity), available // capacity)
    rest = (low + available - torch.maximum(wanted, pages * capacity)) // rest_capacity
    if capacity:  # what no page of the second part takes may fill pages of the first, where those are smaller
        pages += (low + available - pages * capacity - rest * rest_capacity) // capacity

    rank = _rank(free, bound, tokens.is_important, tokens.score)
    is_high = free & (rank < (pages * capacity)[:, None])
    is_rest = is_low | (free & (rank >= (low + available - rest * rest_capacity)[:, None]))

    # Within a part, tokens that were in it keep their order and come first; the others follow by position.
    segment = torch.full_like(part, 2).masked_fill(is_rest, 1).masked_fill(is_high & bool(capacity), 0)
    was_there = (segment == part) & (part < 2)
    behind = tokens.index.max() + 1 if held.numel() else 0
    within = torch.where(was_there, tokens.index, order + behind)
    key = (segment * (behind + held.shape[-1]) + within).masked_fill(~held, torch.iinfo(torch.int64).max)
    sequence = torch.sort(key, dim=-1, stable=True).indices
    index = tokens.index.gather(-1, sequence).masked_fill(~held.gather(-1, sequence), -1)
    return Arrangement(index, count, pages, rest)


def _rank(free: Tensor, bound: Tensor, is_important: Tensor, score: Tensor) -> Tensor:
    """[lanes, tokens] place of each free token: bound ones, important ones, others, each by descending score."""
    limit = torch.finfo(torch.float32).max
    score = score.float().nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    by_score = torch.sort(score, dim=-1, descending=True, stable=True).indices
    tier = torch.full_like(by_score, 3).masked_fill(free, 2).masked_fill(free & is_important, 1).masked_fill(bound, 0)
    by_tier = torch.sort(tier.gather(-1, by_score), dim=-1, stable=True).indices
    order = by_score.gather(-1, by_tier)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


@dataclass(frozen=True)
class Moves:
    """What `repack` is told to bring about an arrangement. All [lanes] int64 but `keep` and `index`."""

    index: Tensor
    """[lanes, tokens] int64, of the arrangement"""
    count: Tensor
    sealed: Tensor
    rest: Tensor
    start: Tensor
    """Leading pages of the first part that stay"""
    rest_start: Tensor
    """Leading pages of the second part that stay, though maybe in other columns"""
    keep: Tensor
    """[lanes, most] int64: old lane indices of the tokens to write, padded with -1"""
    written: Tensor
    """How many these are"""

    def is_nothing(self, sealed: Tensor, rest: Tensor) -> bool:
        """Whether lanes that have `sealed` and `rest` pages are so arranged already."""
        first = (self.start != self.sealed) | (self.start != sealed)
        second = (self.rest_start != self.rest) | (self.rest_start != rest)
        return not (first | second).any()


def moves(to: Arrangement, sealed: Tensor, rest: Tensor, capacity: int, rest_capacity: int) -> Moves:
    """From lanes that have `sealed` and `rest` pages [lanes] to an arrangement of their tokens."""
    place = torch.arange(to.index.shape[-1], device=to.index.device).expand_as(to.index)
    high, was_high = (to.sealed * capacity)[:, None], (sealed * capacity)[:, None]

    same = (to.index == place) & (place < torch.minimum(high, was_high))
    start = same.long().cumprod(-1).sum(-1) // max(capacity, 1)
    # The second part begins elsewhere than before, but a page is the same page in any column.
    behind = place - high
    same = (to.index == behind + was_high) | (behind < 0)
    same &= behind < (torch.minimum(to.rest, rest) * rest_capacity)[:, None]
    rest_start = (same.long().cumprod(-1).sum(-1) - high[:, 0]).clamp_min(0) // rest_capacity

    stays = (place < (start * capacity)[:, None]) | ((behind >= 0) & (behind < (rest_start * rest_capacity)[:, None]))
    is_written = ~stays & (place < to.count[:, None])
    written = is_written.sum(-1)
    order = torch.sort(is_written.long(), dim=-1, descending=True, stable=True).indices
    order = order[:, : max(1, int(written.max()))]
    keep = to.index.gather(-1, order).masked_fill(~is_written.gather(-1, order), -1)
    return Moves(to.index, to.count, to.sealed, to.rest, start, rest_start, keep, written)
