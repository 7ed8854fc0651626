"""How vision policies pick tokens: ties go to the one that stands first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from winnow.engine.compression.vision.features import Features

if TYPE_CHECKING:
    from torch import Tensor

MOST_IN_FULL = 4096
"""Tokens whose cosines are held all at once; of more they are computed when they are asked for"""
WORTH_IT = 16
"""The cosines of a 16th of the tokens to all, one token at a time, take as long as all cosines at once"""
BLOCK = 512
"""Tokens that are compared with all others at a time"""


def top(scores: Tensor, count: int) -> Tensor:
    """[count] int64, ascending: the indices of the largest of scores [n]."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def evenly(total: int, count: int) -> Tensor:
    """[count] int64, ascending: floor((i + 1/2) * total / count)."""
    import torch

    return (2 * torch.arange(count) + 1) * total // (2 * count)


def unit(x: Tensor) -> Tensor:
    """[n, d] the rows at length one, so that their products are cosines; zeros stay."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def rest(total: int, chosen: Tensor) -> Tensor:
    """Ascending: the indices below `total` that are not among these."""
    import torch

    is_left = torch.ones(total, dtype=torch.bool)
    is_left[chosen] = False
    return is_left.nonzero().squeeze(1)


def likeness(units: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The cosines of tokens to all, some tokens at a time: the first of these, and [some, n] of the rows `units` [n, d]
    of length one."""
    for first in range(0, len(units), BLOCK):
        yield first, units[first : first + BLOCK] @ units.T


class Likeness:
    """Cosines of tokens to one another: rows `units` [n, d] of length one."""

    def __init__(self, units: Tensor, asked: int):
        """asked: of how many tokens those to all others will be wanted, about"""
        self._units = units
        is_full = len(units) <= min(MOST_IN_FULL, WORTH_IT * asked)
        self._full = _products(units) if is_full else None

    def of(self, one: int) -> Tensor:
        """[n] of one token to all."""
        return self._units @ self._units[one] if self._full is None else self._full[one]

    def nearest(self, chosen: Tensor) -> Tensor:
        """[n] of each token to the one of the chosen [m >= 1] int64 that is most like it."""
        import torch

        blocks = (
            self._units[some] @ self._units.T if self._full is None else self._full[some]
            for some in chosen.split(BLOCK)
        )
        return reduce(torch.maximum, (block.amax(0) for block in blocks))

    def largest(self) -> Tensor:
        """[n] of each token to the one other that is most like it, n > 1."""
        import torch

        found = self._units.new_full((len(self._units),), -torch.inf)
        for first in range(0, len(found), BLOCK):
            end = first + BLOCK
            # Pairs with tokens before these have been seen from the other side.
            if self._full is None:
                like = self._units[first:end] @ self._units[first:].T
            else:
                like = self._full[first:end, first:].clone()
            like.fill_diagonal_(-torch.inf)
            found[first:end] = torch.maximum(found[first:end], like.amax(1))
            found[first:] = torch.maximum(found[first:], like.amax(0))
        return found


def _products(units: Tensor) -> Tensor:
    """[n, n]; what is below the diagonal is copied from above."""
    import torch

    full = units.new_empty(len(units), len(units))
    for first in range(0, len(units), BLOCK):
        end = first + BLOCK
        torch.mm(units[first:end], units[first:].T, out=full[first:end, first:])
        full[end:, first:end] = full[first:end, end:].T
    return full


def spread(like: Likeness, chosen: Tensor, count: int, worth: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """The tokens chosen and `count` more, in the order in which they were: each time the one of the largest

        worth - weight * (its largest cosine to a token chosen so far)

    Args
        chosen [m >= 1] int64
        worth  [n] float32; None: zeros, and the weight is 1
        weight at least 0
    """
    import torch

    def loss(cosines: Tensor) -> Tensor:
        return cosines if worth is None else weight * cosines - worth

    # The steps are many and small: in place, and by numpy, whose calls cost a fraction of torch's.
    losses = loss(like.nearest(chosen)).index_fill_(0, chosen, torch.inf).numpy()
    picked = chosen.tolist()
    for _ in range(count):
        one = int(losses.argmin())
        picked.append(one)
        np.fmax(losses, loss(like.of(one)).numpy(), out=losses)
        losses[one] = np.inf
    return torch.tensor(picked)


def absorbed(values: Tensor, units: Tensor, targets: Tensor) -> Tensor:
    """[t, d] means of the rows of values [n, d], each of which counts to the target that it is most like, and a target
    to itself.

    Args
        units   [n, k] by which they are compared, of length one
        targets [t] int64: which of the rows they are
    """
    import torch

    group = (units @ units[targets].T).argmax(1)
    group[targets] = torch.arange(len(targets))
    return means(values, group, len(targets))


def share(count: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """`count` tokens in parts that go by the weights (by the sizes, where all weights are zero) and are no larger than
    the sizes: what full parts cannot take goes to the others, and what rounding leaves to the largest remainders.

    Args
        count  at most the sum of the sizes
    """
    parts = [0] * len(sizes)
    is_open = [size > 0 for size in sizes]
    while True:
        opened = [index for index, still in enumerate(is_open) if still]
        by = weights if sum(weights[index] for index in opened) > 0 else sizes
        total = sum(by[index] for index in opened)
        left = count - sum(parts)
        quotas = {index: left * (by[index] / total) for index in opened}
        full = [index for index, quota in quotas.items() if quota >= sizes[index]]
        if not full:
            break
        for index in full:
            parts[index], is_open[index] = sizes[index], False
    for index, quota in quotas.items():
        parts[index] = int(quota)
    left = count - sum(parts)
    for index in sorted(quotas, key=lambda index: (int(quotas[index]) - quotas[index], index))[:left]:
        parts[index] += 1
    return parts


def shared_out(image: Features, keep: int) -> Iterator[tuple[Tensor, int]]:
    """The patches of each crop, as indices into `image.patches`, and its share of `keep`, by its size: 0 or more."""
    members = crops(image)
    sizes = [len(crop) for crop in members]
    return zip(members, share(keep, sizes, sizes), strict=True)


def crops(image: Features) -> list[Tensor]:
    """The patches of each crop or frame, as indices into `image.patches`."""
    crop = image.grid[:, 0]
    return [(crop == one).nonzero().squeeze(1) for one in crop.unique()]


def frames(image: Features) -> Tensor:
    """[frames, cells] the patches of each frame of a video, as indices into `image.patches`."""
    import torch

    return torch.stack(crops(image))


def means(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """[groups, d] the mean of the rows of x [n, d] in each group, of which none is empty.

    Args
        group  [n] int64
    """
    sums = x.new_zeros(groups, x.shape[1]).index_add_(0, group, x)
    return sums / group.bincount(minlength=groups)[:, None]
