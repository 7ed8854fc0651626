"""How vision policies pick tokens: ties go to the one that stands first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from winnow.engine.compression.vision.features import Features

if TYPE_CHECKING:
    from torch import Tensor

MOST_IN_FULL = 4096
"""Tokens whose cosines are held all at once, which is faster; of more they are computed when they are asked for"""
BLOCK = 1024
"""Tokens of these at a time"""


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


class Likeness:
    """Cosines of tokens to one another: rows `units` [n, d] of length one."""

    def __init__(self, units: Tensor):
        self._units = units
        self._full = units @ units.T if len(units) <= MOST_IN_FULL else None

    def of(self, one: int) -> Tensor:
        """[n] of one token to all."""
        return self._units @ self._units[one] if self._full is None else self._full[one]

    def largest(self) -> Tensor:
        """[n] of each token to the one that is most like it, n > 1."""
        import torch

        found = []
        for first in range(0, len(self._units), BLOCK):
            end = first + BLOCK
            like = self._units[first:end] @ self._units.T if self._full is None else self._full[first:end].clone()
            like.diagonal(first).fill_(-torch.inf)
            found.append(like.amax(1))
        return torch.cat(found)


def spread(like: Likeness, chosen: Tensor, count: int, worth: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """The tokens chosen and `count` more, in the order in which they were: each time the one of the largest

        worth - weight * (its largest cosine to a token chosen so far)

    Args
        chosen [m >= 1] int64
        worth  [n] float32; zeros if None
    """
    import torch

    nearest = torch.stack([like.of(int(one)) for one in chosen]).amax(0)
    is_chosen = torch.zeros(len(nearest), dtype=torch.bool)
    is_chosen[chosen] = True
    picked = chosen.tolist()
    for _ in range(count):
        scores = -weight * nearest if worth is None else worth - weight * nearest
        one = int(scores.masked_fill(is_chosen, -torch.inf).argmax())
        picked.append(one)
        is_chosen[one] = True
        nearest = torch.maximum(nearest, like.of(one))
    return torch.tensor(picked)


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
