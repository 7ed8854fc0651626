"""Clusters of tokens, for policies that merge them: density peaks among nearest neighbours (Du et al., 2016)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.vision.ranking import means, top

if TYPE_CHECKING:
    from torch import Tensor


def density_peaks(x: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Clusters of vectors, each around one of them.

        distance = |x - y| / sqrt(width)
        density  = exp(-mean of the squared distances to the `neighbours` nearest, itself included)
        score    = density * distance to the nearest that is denser, the largest distance of all for the densest

    Of vectors of one density, as are twins, and with two neighbours any two that are nearest to each other, the first
    counts as denser: they are one peak.

    Args
        x [n, width] float32, n >= clusters
    Returns
        centres [clusters] int64, ascending: those with the highest scores
        means [clusters, width] float32, of the vectors that are nearest to each centre
    """
    import torch

    wide = x.double()
    apart = wide - wide.mean(0)  # what all have in common would only cost digits
    distance = torch.cdist(apart, apart, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0) / x.shape[1] ** 0.5
    distance = torch.maximum(distance, distance.T)  # as far there as back, to the bit: or rounding breaks ties
    density = (-distance.sort(1).values[:, :neighbours].square().mean(1)).exp()
    rank = density.sort(descending=True, stable=True).indices.argsort()
    to_denser = distance.where(rank < rank[:, None], distance.max()).amin(1)
    centres = top(to_denser * density, clusters)
    group = distance[:, centres].argmin(1)
    group[centres] = torch.arange(clusters, device=x.device)
    return centres, means(wide, group, clusters).float()
