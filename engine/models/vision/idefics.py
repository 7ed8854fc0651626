"""Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): crops of one size, the whole image as the last of them;
squares of patches become one token (pixel shuffle)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import View
from winnow.engine.errors import RequestError
from winnow.engine.models.vision.reduction import cannot
from winnow.engine.models.vision.tower import CropTower, grid_places
from winnow.engine.tower_protocol import Inputs


class IdeficsTower(CropTower):
    def __init__(self, config: Any, parts: Any):
        """
        Args
            config: transformers' of the whole model
            parts: its model, of which the language model may be missing
        """
        self._vit: Any = parts.vision_model
        self._connector: Any = parts.connector
        self._edge: int = config.scale_factor
        self._model: str = config.model_type
        vision = config.vision_config
        self.crop = (vision.num_channels, vision.image_size, vision.image_size)
        super().__init__(parts, {"image": config.image_token_id}, self._vit.encoder.layers, has_class=False)

    def embed(self, pixels: Tensor) -> Tensor:
        crops, _, height, width = pixels.shape
        size: int = self._vit.patch_size
        seen = torch.ones(crops, height // size, width // size, dtype=torch.bool, device=pixels.device)
        x: Tensor = self._vit.embeddings(pixel_values=pixels, patch_attention_mask=seen)
        return x

    def project(self, states: list[Tensor]) -> Tensor:
        projected: Tensor = self._connector(self._vit.post_layernorm(states[-1]))
        return projected

    def join(self, projected: Tensor, inputs: Inputs) -> Tensor:
        return projected.flatten(0, 1)

    def reduced(self, inputs: Inputs, vision: Vision) -> View:
        raise cannot(vision, self._model, "makes each token of a square of patches")

    def to_tokens(self, x: Tensor, inputs: Inputs) -> Tensor:
        crops, rows, width = x.shape
        side, edge = round(rows**0.5), self._edge
        squares = x.view(crops, side // edge, edge, side // edge, edge, width)
        return squares.mean((2, 4)).flatten(0, 2)

    def places(self, crops: int, inputs: Inputs) -> Tensor:
        side = inputs["pixel_values"].shape[-1] // self._vit.patch_size // self._edge
        order = torch.arange(crops).roll(-1)  # the whole image comes last, and is crop 0
        return grid_places(order, side, side)

    def crop_grid(self, crops: int, inputs: Inputs) -> tuple[int, int] | None:
        if crops == 1 or "rows" not in inputs or "cols" not in inputs:
            return None
        rows, columns = inputs["rows"], inputs["cols"]
        if rows.shape != (1,) or columns.shape != (1,) or int(rows[0]) * int(columns[0]) != crops - 1:
            raise RequestError("pictures", f"pictures: 'rows' and 'cols' must say how {crops - 1} crops lie")
        return int(rows[0]), int(columns[0])
