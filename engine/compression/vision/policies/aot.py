"""AOT: anchors take in the tokens around them, by optimal transport (Li et al., 2026, arXiv:2603.01400).

    1. In each frame, half of the anchors are the tokens with most attention of each of 3 x 3 windows, a fifth of the
       way up the tower; the others those with most attention of all, in its last layer but one.
    2. The other tokens of the frame are transported to the anchors:
           cost = 1 - cos + 0.5 * distance in the frame, whose edges are 1
           anchor <- 0.9 * (anchor + plan^T x) / (1 + mass) + 0.1 * mean of the anchor and the tokens nearest to it
    3. The video is cut into `clips`. The anchors of each one's first frame take in those of the others, frame by frame:
           cost = (1 - cos - its minimum) * (1 - exp(-frames between^2 / (2 * 1.5^2)))
           anchor <- (anchor + p^T x) / (1 + sum of p),  p = plan, rows scaled to sum to one
       but for the tokens whose largest p is smallest, which stay.

A plan is what 100 rounds of Sinkhorn's algorithm make of exp(-cost / 0.1), every source and every anchor having the
same mass. Attention is the class token's. A later frame keeps `distinct` of what a clip's first frame does.

Where we depart: the reference keeps the first frame's anchors twice, before and after they have taken in the others; a
token has one place, and there it is the latter. It takes the number of anchors from its caller and lets `keep` follow.
Windows give the same number each, or one more, where the reference gives less if that is not a whole number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import VIDEOS, View, kept
from winnow.engine.compression.vision.ranking import frames, rest, share, top, unit

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 0.1
ROUNDS = 100
WINDOWS = 3
SIGMA = 1.5
"""Frames"""


class AOT:
    """Let anchors in space, then in time, take in the tokens around them by optimal transport."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = VIDEOS

    class Params(PolicyParams):
        clips: int = Field(8, ge=1, le=1024, description="parts whose first frames are anchors, if there are as many")
        distinct: float = Field(
            0.3, ge=0, le=1, allow_inf_nan=False, description="what a later frame keeps, to what the first one does"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches, at = image.patches, frames(image)
        count, cells = at.shape
        x = image.embeddings[patches[at]].double()
        layers = image.signals.layers
        low, high = (
            image.signals.attention(layer)[patches[at]] for layer in (layers * 5 // 26 - layers, max(-layers, -2))
        )
        places = image.grid[at[0], 1:]
        clips = torch.arange(count).tensor_split(min(params.clips, count, keep))
        later = count - len(clips)
        anchors = round(keep * len(clips) / (len(clips) + later * params.distinct))
        anchors = min(max(anchors, len(clips), keep - later * cells), len(clips) * cells)
        firsts = share(anchors, [1] * len(clips), [cells] * len(clips))
        others = iter(share(keep - anchors, [1] * later, [cells] * later) if later else [])
        chosen, merged = [], []
        for clip, first in zip(clips, firsts, strict=True):
            key, *following = clip.tolist()
            mine = _anchors(low[key], high[key], places, first)
            taken = _within(x[key], mine, places)
            for steps, frame in enumerate(following, 1):
                part = next(others)
                those = _anchors(low[frame], high[frame], places, max(first, part))
                sources = _within(x[frame], those, places)
                taken, stays = _across(taken, sources, steps, part)
                chosen.append(at[frame, those[stays]])
                merged.append(sources[stays])
            chosen.append(at[key, mine])
            merged.append(taken)
        return kept(image, patches[torch.cat(chosen)], torch.cat(merged).float())


def _anchors(low: Tensor, high: Tensor, places: Tensor, count: int) -> Tensor:
    """[count] int64, ascending: of a frame's cells, by attention [cells] in two layers and places [cells, 2]."""
    import torch

    row, column = (places * WINDOWS // (places.amax(0) + 1)).unbind(1)
    window = row * WINDOWS + column
    order = low.sort(descending=True, stable=True).indices
    turn = torch.empty_like(order)  # how many of its window come before
    for one in window.unique():
        members = order[window[order] == one]
        turn[members] = torch.arange(len(members))
    local = order[turn[order].argsort(stable=True)][: count // 2]
    return torch.cat((local, top(high.index_fill(0, local, -1), count - len(local)))).sort().values


def _within(x: Tensor, anchors: Tensor, places: Tensor) -> Tensor:
    """[m, hidden] the anchors of a frame x [cells, hidden] when they have taken in its other tokens."""
    import torch

    others = rest(len(x), anchors)
    if not len(others):
        return x[anchors]
    similarity = unit(x)[others] @ unit(x)[anchors].T
    at = places / places.amax(0).clamp(min=1)
    plan = _plan(1 - similarity + 0.5 * torch.cdist(at[others], at[anchors]))
    transported = (x[anchors] + plan.T @ x[others]) / (1 + plan.sum(0)[:, None])
    nearest = torch.nn.functional.one_hot(similarity.argmax(1), len(anchors)).to(x.dtype)
    assigned = (x[anchors] + nearest.T @ x[others]) / (1 + nearest.sum(0)[:, None])
    return 0.9 * transported + 0.1 * assigned


def _across(anchors: Tensor, sources: Tensor, steps: int, count: int) -> tuple[Tensor, Tensor]:
    """The anchors [m, hidden] when they have taken in the sources [s, hidden], and which `count` of these stay."""
    cost = 1 - unit(sources) @ unit(anchors).T
    plan = _plan((cost - cost.min()) * (1 - math.exp(-(steps**2) / (2 * SIGMA**2))))
    weights = plan / plan.sum(1, keepdim=True)
    stays = top(-weights.amax(1), count)
    weights[stays] = 0
    return (anchors + weights.T @ sources) / (1 + weights.sum(0)[:, None]), stays


def _plan(cost: Tensor) -> Tensor:
    """[s, m] how much of each source goes to each anchor; the sum is 1."""
    kernel = (-cost / TEMPERATURE).exp()
    columns = cost.new_ones(cost.shape[1])
    for _ in range(ROUNDS):
        rows = 1 / (len(cost) * (kernel @ columns))
        columns = 1 / (cost.shape[1] * (rows @ kernel))
    return rows[:, None] * kernel * columns
