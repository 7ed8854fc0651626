"""What turns images and videos into rows that a language model reads: vision towers with their projectors.

    inputs -> embed -> layers -> project -> tokens, laid out as the placeholders that stand for the image in a prompt

The modules are transformers' own, without the language model. Every image passes alone, so that its bits are its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import View
from winnow.engine.errors import RequestError
from winnow.engine.messages import Picture
from winnow.engine.models.vision.signals import Attention, TowerSignals
from winnow.engine.pages import Ints
from winnow.engine.tower_protocol import Inputs


class CropTower(ABC):
    """`tower_protocol.Eyes` whose ViT sees crops of one size, each on its own: CLIP's, SigLIP's and Idefics3's."""

    crop: tuple[int, int, int]
    """Channels, height and width of a crop"""

    def __init__(self, parts: Any, sees: dict[str, int], stack: nn.ModuleList, has_class: bool):
        """
        Args
            parts: the modules whose weights it has
            sees: `EngineInfo.sees`
            stack: the layers that are run
        """
        self.sees = sees
        self.stack = stack
        self.has_class = has_class
        """Whether the first row of a crop stands for the whole of it"""
        weight = next(parts.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def pixels(self, inputs: Inputs) -> Tensor:
        """[crops, channels, height, width], where and as the tower computes."""
        name = "pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"
        pixels = inputs.get(name)
        if pixels is None or pixels.ndim != 4 or pixels.shape[1:] != self.crop or not len(pixels):
            raise RequestError("pictures", f"pictures: '{name}' must be crops of {list(self.crop)}")
        return torch.from_numpy(pixels).to(self._device, self._dtype)

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """[crops, rows, width]: what the first layer reads. A row is a patch, the first the class token's if any."""

    @abstractmethod
    def project(self, states: list[Tensor]) -> Tensor:
        """What each layer reads, and what the last puts out -> [crops, n, hidden], for the language model."""

    @abstractmethod
    def join(self, projected: Tensor, inputs: Inputs) -> Tensor:
        """[crops, n, hidden] -> [N, hidden]: crops become tokens, marks come between them."""

    @abstractmethod
    def reduced(self, inputs: Inputs, vision: Vision) -> View:
        """See `tower_protocol.Eyes`."""

    @abstractmethod
    def to_tokens(self, x: Tensor, inputs: Inputs) -> Tensor:
        """[crops, rows, D] of what is known of patches -> [N, D] of tokens, zeros for marks."""

    @abstractmethod
    def places(self, crops: int, inputs: Inputs) -> Tensor:
        """[N, 3], see `Features.places`."""

    def crop_grid(self, crops: int, inputs: Inputs) -> tuple[int, int] | None:
        """`Features.crop_grid`: None where what the tower reads does not say it."""
        return None

    def positions(self, tokens: Ints, pictures: Sequence[Picture]) -> None:
        """None: positions have one axis."""
        return None

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Features:
        states = [self.embed(self.pixels(inputs))]
        for layer in self.stack:
            states.append(layer(states[-1], None))
        crops, rows = states[0].shape[:2]
        # Without its pixels, which would be remembered as long as the rest.
        layout = {name: x[:0].copy() if name.startswith("pixel_values") else x for name, x in inputs.items()}
        return Features(
            embeddings=self.join(self.project(states), inputs).float().cpu(),
            places=self.places(crops, inputs),
            crop_grid=self.crop_grid(crops, inputs),
            signals=TowerSignals(
                states=[state.cpu() for state in states],
                attends=self.attends,
                to_tokens=lambda x: self.to_tokens(x.unflatten(0, (crops, rows)), layout),
                has_class=self.has_class,
                matrix_rows=rows,
            ),
        )

    def attends(self, layer: int, x: Tensor) -> Attention:
        """What a layer attends by that reads x [crops, rows, width]."""
        block: Any = self.stack[layer]
        attention, read = block.self_attn, block.layer_norm1(x.to(self._device)).flatten(0, 1)
        queries, keys = (
            linear(read).unflatten(1, (attention.num_heads, -1)) for linear in (attention.q_proj, attention.k_proj)
        )
        crops, rows = x.shape[:2]
        return Attention(queries, keys, keys, [(crop * rows, (crop + 1) * rows) for crop in range(crops)])


def grid_places(crops: Tensor, rows: int, columns: int) -> Tensor:
    """[n * rows * columns, 3]: the places of whole grids, one for each of `crops` [n] int64."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cell = torch.stack((row, column), -1).flatten(0, 1).repeat(len(crops), 1)
    return torch.cat((crops.repeat_interleave(rows * columns)[:, None], cell), 1)
