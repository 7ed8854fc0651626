"""STC: of each frame of a stream, keep what is unlike the frame and unlike all before it (Wang et al., 2025,
arXiv:2512.00891).

    channels     = the half of the channels that vary least over the chunk
    g(x, mean)   = sum over a in 1/8, 1/4, 1/2, 1, 2 of exp(-|x - mean|^2 / (2 a))
    score(token) = -g(x, mean of its frame) - g(x, memory),  memory = mean over the chunks so far of their means

x is the token's channels at length one, and so is the memory. A chunk is one frame or several; a video is read as a
stream, in which no frame knows of later ones. Each frame keeps the same number of tokens.

Where we depart: the reference averages the memory over channels that every chunk has chosen for itself, so that it
mixes different ones; ours holds all channels, of which those of the chunk are compared. Its other half, STC-Cacher,
reuses what the tower made of parts of the previous frame in place of computing it: that spares the tower and changes
what it says, but not how many tokens there are, and is left out. What the tower made of a whole video is cached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import VIDEOS, View, kept
from winnow.engine.compression.vision.ranking import frames, share, top, unit

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = 0.125, 0.25, 0.5, 1.0, 2.0
"""Of the Gaussians that are added up"""


class STC:
    """Keep the tokens of each frame that are unlike the others and unlike the frames before."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = VIDEOS

    class Params(PolicyParams):
        chunk: int = Field(1, ge=1, le=1024, description="frames that come at once")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches, at = image.patches, frames(image)
        scores = []
        memory = torch.zeros(image.embeddings.shape[1])
        for number, chunk in enumerate(at.split(params.chunk), 1):
            x = image.embeddings[patches[chunk]]  # [frames, cells, hidden]
            memory = memory + (x.mean((0, 1)) - memory) / number
            variance = x.flatten(0, 1).var(0, correction=0)
            channels = top(-variance, max(1, len(variance) // 2))
            x = unit(x[..., channels])
            scores.append(-_near(x, x.mean(1, keepdim=True)) - _near(x, unit(memory[channels])))
        count, cells = at.shape
        parts = share(keep, [1] * count, [cells] * count)
        chosen = [frame[top(score, part)] for frame, score, part in zip(at, torch.cat(scores), parts, strict=True)]
        return kept(image, patches[torch.cat(chosen)])


def _near(x: Tensor, mean: Tensor) -> Tensor:
    """[frames, cells] how near x [frames, cells, d] is to a mean."""
    import torch

    distance = (x - mean).square().sum(2)
    return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0)
