"""Patch tokens within a vision tower: what encoder policies are shown of them, and what they say.

A policy says which tokens stay and which of them the others become part of. Merged tokens are weighted means; a token
that stands for several patches is attended to as that many (proportional attention: the logarithm of its size is added
to the logits), and stands at the place of the patch that took the others in. The class token is none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerTokens:
    """The n patch tokens of one image between the attention and the MLP of a layer."""

    layer: int
    """Which one, from 0"""
    layers: int
    """How many the tower runs"""
    lead: int
    """Tokens that attention has before these: the class token, and patches that are none of the image's tokens"""
    has_class: bool
    """Whether the first of them is the class token"""
    states: Tensor
    """[n, width]: the residual stream"""
    keys: Tensor
    """[n, heads, dim]: of this layer's attention"""
    sizes: Tensor
    """[n] float32: how many patches each stands for"""
    places: Tensor
    """[n] int64: the patch at whose place each stands"""
    attend: Callable[[slice], Tensor]
    """rows -> [heads, rows, lead + m] float32: what some queries pay in this layer, which had m patch tokens"""

    def __len__(self) -> int:
        return len(self.states)

    @property
    def order(self) -> Tensor:
        """[n] int64: 0 ... n - 1, where the tokens are"""
        import torch

        return torch.arange(len(self), device=self.states.device)

    def without(self, gone: Tensor) -> Tensor:
        """[n - k] int64, ascending: all but these [k]."""
        import torch

        return self.order[torch.ones_like(self.order, dtype=torch.bool).index_fill_(0, gone, False)]

    def reduced(self, reduction: Reduction) -> LayerTokens:
        weights = self.sizes if reduction.weights is None else reduction.weights
        return replace(
            self,
            states=reduction.means(self.states, weights),
            keys=reduction.means(self.keys, weights),
            sizes=reduction.sums(self.sizes if reduction.sizes is None else reduction.sizes),
            places=self.places[reduction.stay],
        )


@dataclass(frozen=True)
class Reduction:
    """What becomes of n tokens, of which m stay."""

    stay: Tensor
    """[m] int64: these, in the order in which the next layer has them"""
    sources: Tensor
    """[k] int64: these become part of another; what neither stays nor does that is dropped"""
    into: Tensor
    """[k] int64: which of those that stay (0 ... m - 1)"""
    weights: Tensor | None = None
    """[n] float32, positive: of each in the mean; its size if None"""
    sizes: Tensor | None = None
    """[n] float32: what each adds to the size of the token that it becomes part of; its own if None"""

    @classmethod
    def merging(cls, stay: Tensor, sources: Tensor, targets: Tensor, count: int) -> Reduction:
        """Of `count` tokens these stay, and each source [k] becomes part of its target [k], one that stays."""
        import torch

        place = stay.new_zeros(count)
        place[stay] = torch.arange(len(stay), device=stay.device)
        return cls(stay, sources, place[targets])

    def sums(self, values: Tensor) -> Tensor:
        """[m, ...] float32: values [n, ...] summed over the tokens that each is made of, in one order on any device."""
        import torch

        own, taken = values[self.stay].float(), values[self.sources].float()
        order = torch.arange(len(self.stay), device=self.stay.device)
        members = (self.into == order[:, None]).float()
        return own + (members @ taken.reshape(-1, own[0].numel())).view(own.shape)

    def means(self, values: Tensor, weights: Tensor) -> Tensor:
        """[m, ...] means weighted by `weights` [n]; what takes nothing in keeps its value to the bit."""
        import torch

        if not len(self.sources):
            return values[self.stay]
        weights = weights.view(-1, *[1] * (values.dim() - 1))
        is_merged = self.sums(torch.ones_like(weights)) > 1
        means = self.sums(values * weights) / self.sums(weights)
        return torch.where(is_merged, means.to(values.dtype), values[self.stay])


def linear_counts(layers: int, patches: int, keep: int) -> list[int]:
    """Each layer takes the same number of tokens away, as nearly as whole numbers allow."""
    return [patches - (patches - keep) * (layer + 1) // layers for layer in range(layers)]


def geometric_counts(layers: int, patches: int, keep: int) -> list[int]:
    """Each layer takes the same share of tokens away, as nearly as whole numbers allow."""
    return [round(patches * (keep / patches) ** ((layer + 1) / layers)) for layer in range(layers)]
