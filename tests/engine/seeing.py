"""Pictures and a tower for the engine's tests: what it sees of a pixel is a product with a matrix drawn once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import View
from winnow.engine.errors import RequestError
from winnow.engine.messages import Array, Picture
from winnow.engine.models.decoder import Decoder
from winnow.engine.pages import Ints
from winnow.engine.tower_protocol import Inputs
from winnow.kernels.dispatch import Backend

from ..compression.images import FakeSignals, drawn, grid
from ..models.checkpoints import SIZES, prompt_of

IMAGE, VIDEO = 150, 151
"""Tokens that stand for parts of pictures"""
SIDE = 6
"""Rows and columns of most pictures"""
CHANNELS = 5
SECTIONS = (2, 3, 3)
"""Frequencies that turn by time, row and column"""


@dataclass
class TinyEyes:
    """Sees one token a pixel, row by row."""

    has_axes: bool = False
    encoded: int = 0
    """Pictures that it was shown"""
    sees: dict[str, int] = field(default_factory=lambda: {"image": IMAGE, "video": VIDEO})

    def encode(self, inputs: Inputs) -> Features:
        self.encoded += 1
        pixels = torch.from_numpy(inputs["pixels"])
        if pixels.isnan().any():
            raise RuntimeError("the tower cannot see this")
        if pixels.shape[-1] != CHANNELS:
            raise RequestError("pictures", "pictures: not what this tower reads")
        height, width, _ = pixels.shape
        places = torch.tensor(grid(0, height, width))
        embeddings = pixels.flatten(0, 1) @ drawn((CHANNELS, SIZES["hidden_size"]), 3)
        return Features(embeddings=embeddings, places=places, signals=FakeSignals(places[:, 0] >= 0, 4, 0))

    def reduced(self, inputs: Inputs, vision: Vision) -> View:
        """The first tokens; what a policy would do is no matter here."""
        whole = self.encode(inputs)
        keep = vision.tokens(len(whole.patches))
        return View(whole.patches[:keep], whole.embeddings[:keep] * 2)

    def positions(self, tokens: Ints, pictures: Sequence[Picture]) -> Ints | None:
        return mrope(tokens, pictures) if self.has_axes else None


def with_axes(model: Decoder, ops: Backend) -> Decoder:
    """A model of heads of 16 as if it turned them by three axes."""
    config = replace(model.config, rope_sections=SECTIONS)
    return Decoder(config, ops, model._embedding, model._blocks, model._norm, model._head)


def mrope(tokens: Ints, pictures: Sequence[Picture]) -> Ints:
    """[3, n] as Qwen2-VL has them: the rows and columns of a picture begin behind the text before it."""
    parts, upto, behind = [], 0, 0
    for picture in pictures:
        count = picture.first - upto
        parts.append(np.repeat(behind + np.arange(count)[None], 3, 0))
        height, width = picture.inputs["pixels"].shape[:2]
        y, x = np.divmod(np.arange(height * width), width)
        parts.append(behind + count + np.stack((np.zeros_like(y), y, x)))
        upto, behind = picture.first + picture.span, behind + count + max(height, width)
    parts.append(np.repeat(behind + np.arange(len(tokens) - upto)[None], 3, 0))
    return np.concatenate(parts, 1).astype(np.int32)


def pixels(seed: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    return drawn((height, width, CHANNELS), 50 + seed)


def picture(seed: int, first: int, height: int = SIDE, width: int = SIDE, **changes: object) -> Picture:
    shown = pixels(seed, height, width).numpy()
    data = shown.tobytes()
    parts = {
        "key": blake2b(data, digest_size=16).digest(),
        "first": first,
        "span": height * width,
        "inputs": {"pixels": Array("float32", list(shown.shape), data)},
        "text": [3, 5, 9],
        "turn_end": first + height * width,
    }
    return Picture(**(parts | changes))  # type: ignore[arg-type]


def pictured(parts: Sequence[int | Picture], seed: int = 1) -> tuple[list[int], list[Picture]]:
    """A prompt, and its pictures where they stand: numbers are tokens of text, pictures come between them."""
    prompt: list[int] = []
    pictures: list[Picture] = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            prompt += [token % IMAGE for token in prompt_of(part, seed + i)]
            continue
        first = len(prompt)
        pictures.append(
            Picture(part.key, first, part.span, part.inputs, part.text, turn_end=first + part.span + 1, kind=part.kind)
        )
        prompt += [IMAGE if part.kind == "image" else VIDEO] * part.span
    return prompt, pictures
