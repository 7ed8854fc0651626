"""Pictures of prompts as vLLM's models read them. Nothing here imports vllm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from winnow.engine.models.vision.names import vision_type

SEES = ("qwen2_vl", "qwen2_5_vl")
"""Types of the models that see what they do in transformers; of others, vLLM's read text only"""
PRUNES_VIDEOS = ("qwen2_5_vl",)
"""Those that vLLM has EVS for"""


def seeing_type(model: Path) -> str | None:
    """The model type of a checkpoint that sees in vLLM; None for any other."""
    kind = vision_type(model)
    return kind if kind in SEES else None


def placed(
    prompt: Sequence[int], places: Sequence[NDArray[np.intp]], kept: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The prompt that vLLM reads, which has as many placeholders for a picture as it leaves of it.

    Args
        places: where those of each picture stand, as `places_of` says; there is nothing between them
        kept: how many vLLM leaves of each, one at least
    Returns
        its tokens, and where the first placeholder of each picture stands
    """
    is_left = np.ones(len(prompt), bool)
    for own, count in zip(places, kept, strict=True):
        is_left[own[count:]] = False
    moved = np.cumsum(is_left) - 1
    return np.asarray(prompt)[is_left].tolist(), [int(moved[own[0]]) for own in places]
