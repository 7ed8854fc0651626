"""FlashVID: tokens that say much stay, the others merge along trees through time (Fan et al., 2026, arXiv:2602.08024).

    1. The video is cut where the cosine of neighbouring frames' means is below `segment_threshold`, and at the next
       lowest until there are `segments` parts.
    2. Of each frame's share of `keep`, `alpha` are chosen one by one: attention * (1 - its largest cosine to those
       chosen so far) is largest. The first is the one whose attention * distance to its nearest neighbour is.
    3. Each of the others looks for the most similar one of the frame before, within its part, and becomes its child if
       their cosine is above `temporal_threshold`, the most similar first, as long as enough roots are left. A tree
       becomes the mean of its tokens, at its root's place.
    4. The roots of each frame are clustered to what is left of the share (density peaks among nearest neighbours), and
       each cluster becomes the mean of its roots, at its centre's place.

Attention is the class token's in the last layer that is run. A part shares out among its frames by how many roots they
have.

Where we depart: the half of the method that acts within the language model is left out, for which the reference keeps
a quarter more until then. It counts a child as one token even if it has children of its own, so that their sum is
divided by too little; it rounds clusters up frame by frame, draws noise to break ties of density, and in a part of one
frame clusters the chosen tokens once more with the others. Here ties go to the first, and `keep` is met exactly.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.clustering import density_peaks
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import VIDEOS, View, kept
from winnow.engine.compression.vision.ranking import frames, means, share, top, unit

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 7
"""That say how dense it is around a root"""


class FlashVID:
    """Keep what says much in each frame of a video and merge the rest along trees through time."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = VIDEOS

    class Params(PolicyParams):
        alpha: float = Field(
            0.7, ge=0, le=1, allow_inf_nan=False, description="part of `keep` that is chosen, not merged"
        )
        temporal_threshold: float = Field(
            0.8,
            ge=-1,
            le=1,
            allow_inf_nan=False,
            description="cosine above which a token joins one of the last frame",
        )
        segment_threshold: float = Field(
            0.9, ge=-1, le=1, allow_inf_nan=False, description="cosine of frames below which a new part begins"
        )
        segments: int = Field(8, ge=1, le=1024, description="parts that there are at least, if so many frames")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches, at = image.patches, frames(image)
        count, cells = at.shape
        x = image.embeddings[patches[at]]  # [frames, cells, hidden]
        units = unit(x)
        parts = share(keep, [1] * count, [cells] * count)
        salient = [math.ceil(part * params.alpha) for part in parts]
        attention = image.signals.attention(-1)[patches[at]]
        is_free = torch.ones(count, cells, dtype=torch.bool)
        for frame, order in enumerate(_salient(units, attention, max(salient))):
            is_free[frame, order[: salient[frame]]] = False
        chosen, merged = [at[~is_free]], [x[~is_free]]
        first = 0
        for length in _segments(x.mean(1), params):
            part = slice(first, first + length)
            spare = sum(parts[part]) - sum(salient[part])
            roots, trees = _trees(x[part], units[part], is_free[part], spare, params.temporal_threshold)
            frame_of = roots // cells
            sizes = frame_of.bincount(minlength=length).tolist()
            for members, clusters in zip(
                frame_of.argsort(stable=True).split(sizes), share(spare, sizes, sizes), strict=True
            ):
                if clusters:
                    centres, condensed = density_peaks(trees[members], clusters, min(clusters, NEIGHBOURS))
                    chosen.append(at[part].flatten()[roots[members[centres]]])
                    merged.append(condensed)
            first += length
        return kept(image, patches[torch.cat(chosen)], torch.cat(merged))


def _salient(units: Tensor, attention: Tensor, count: int) -> Tensor:
    """[frames, count] int64: the tokens of each frame that are chosen, first come first."""
    import torch

    frame = torch.arange(len(units))
    distance = 1 - units @ units.mT
    alone = distance.clone()
    alone.diagonal(dim1=1, dim2=2).fill_(2)
    merit = alone.amin(2) * attention
    nearest = torch.full_like(attention, torch.inf)
    order = []
    for _ in range(count):
        one = merit.argmax(1)
        order.append(one)
        nearest = torch.minimum(nearest, distance[frame, one])
        nearest[frame, one] = -torch.inf
        merit = torch.where(nearest == -torch.inf, nearest, nearest * attention)
    return torch.stack(order, 1) if order else frame[:, None][:, :0]


def _segments(frames: Tensor, params: FlashVID.Params) -> list[int]:
    """How many frames each part has, of frames [count, hidden]."""
    units = unit(frames)
    similarity = (units[1:] * units[:-1]).sum(1)
    below = int((similarity < params.segment_threshold).sum())
    cuts = top(-similarity, max(below, min(params.segments, len(frames)) - 1)) + 1
    bounds = [0, *cuts.tolist(), len(frames)]
    return [end - begin for begin, end in pairwise(bounds)]


def _trees(x: Tensor, units: Tensor, is_free: Tensor, least: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The roots of a part, as indices into its tokens [r], and the means of their trees [r, hidden].

    Args
        x, units [frames, cells, hidden]
        is_free  [frames, cells] tokens that are not chosen: at least `least`, as are roots
    """
    import torch

    frames, cells = is_free.shape
    like = (units[1:] @ units[:-1].mT).masked_fill(~is_free[:-1, None], -torch.inf)
    like = like.masked_fill(~is_free[1:, :, None], -torch.inf)
    similarity, parent = like.max(2)
    over = int((similarity > threshold).sum())
    links = top(similarity.flatten(), max(0, min(over, int(is_free.sum()) - least)))
    root = torch.arange(frames * cells)
    is_child = torch.zeros(frames * cells, dtype=torch.bool).index_fill_(0, links + cells, True)
    for frame in range(1, frames):
        here = torch.arange(frame * cells, (frame + 1) * cells)
        children = here[is_child[here]]
        root[children] = root[(frame - 1) * cells + parent[frame - 1][children - here[0]]]
    free = is_free.flatten().nonzero().squeeze(1)
    roots, group = root[free].unique(return_inverse=True)
    return roots, means(x.flatten(0, 1)[free], group, len(roots))
