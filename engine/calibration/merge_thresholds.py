"""DyMU's thresholds: how alike two tokens are where many images merge (Wang et al., 2025, arXiv:2504.17040).

    threshold(layer) = mean over batches of the cosine of the most similar pair of the batch that does not merge,
                       when its images together lose as many tokens as `keep` asks of each

Images of a batch pass the layers side by side: the plain ones lose more tokens than the busy ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnow.engine.compression.vision.encoder import linear_counts
from winnow.engine.compression.vision.matching import dealt
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.errors import ModelError
from winnow.engine.models.vision.llava import LlavaTower
from winnow.engine.models.vision.reduction import Run
from winnow.engine.tower_protocol import Inputs

BATCH = 64


@torch.inference_mode()
def merge_thresholds(eyes: LlavaTower, images: Sequence[Inputs], vision: Vision) -> list[float]:
    """The cosine above which pairs merge, for each layer that is run.

    Args
        images one crop each
        vision whose `keep` is what an image is to be left with in the mean
    Raises
        ModelError: images are several crops for the model, or have no more patches than they are to keep
    """
    batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
    found = torch.tensor([_of_batch(eyes, batch, vision) for batch in batches])
    return [float(threshold) for threshold in found.mean(0)]


def _of_batch(eyes: LlavaTower, images: Sequence[Inputs], vision: Vision) -> list[float]:
    layers = list(eyes.stack)
    runs = []
    for inputs in images:
        pixels = eyes.pixels(inputs)
        if len(pixels) > 1:
            raise ModelError("an image is several crops for this model, which puts them together from whole grids")
        runs.append(Run(eyes.embed(pixels)[0], eyes.has_class, len(layers)))
    patches = len(runs[0].places)
    if (keep := vision.tokens(patches)) >= patches:
        raise ModelError(f"an image has {patches} patches for this model: to keep {keep} merges nothing")
    counts = [patches, *linear_counts(len(layers), patches, keep)]
    thresholds = []
    for number, layer in enumerate(layers):
        tokens = [run.attend(number, layer) for run in runs]
        pairs = [dealt(each) for each in tokens]
        drop = (counts[number] - counts[number + 1]) * len(runs)
        ranked = torch.cat([each.similarity for each in pairs]).sort(descending=True).values
        threshold = max(0.0, float(ranked[min(drop, len(ranked) - 1)]))
        thresholds.append(threshold)
        for run, each, its in zip(runs, tokens, pairs, strict=True):
            run.go_on(layer, each.reduced(its.merged(int((its.similarity > threshold).sum()))))
    return thresholds
