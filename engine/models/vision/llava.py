"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: a ViT, an MLP for each of its patches, and what becomes of the crops.

LLaVA-1.5   one crop                                                                    (arXiv:2310.03744)
NeXT        a thumbnail and the crops of an image of any size, a newline behind each row (arXiv:2401.13601)
OneVision   the same, shrunk where there are too many; an image among others, and a frame of a video, is one crop;
            those of a video are halved in both directions                              (arXiv:2408.03326)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import View, whole, with_marks
from winnow.engine.compression.vision.ranking import share
from winnow.engine.errors import RequestError
from winnow.engine.models.vision.anyres import layout_for
from winnow.engine.models.vision.reduction import cannot, run_layers
from winnow.engine.models.vision.tower import CropTower, grid_places
from winnow.engine.tower_protocol import Inputs


class LlavaTower(CropTower):
    def __init__(self, config: Any, parts: Any):
        """
        Args
            config: transformers' of the whole model
            parts: its model, of which the language model may be missing
        """
        sees = {"image": config.image_token_id}
        if config.model_type == "llava_onevision":
            sees["video"] = config.video_token_id
        self._config = config
        self._vit: Any = parts.vision_tower
        self._projector: Any = parts.multi_modal_projector
        self._newline: Any = getattr(parts, "image_newline", None)
        self._taken = taken_states(config)
        vision = config.vision_config
        self.crop = (vision.num_channels, vision.image_size, vision.image_size)
        has_class = hasattr(self._vit.embeddings, "class_embedding")
        self._drops_class = has_class and config.vision_feature_select_strategy == "default"
        super().__init__(parts, sees, self._vit.encoder.layers[: max(self._taken)], has_class)

    def embed(self, pixels: Tensor) -> Tensor:
        x: Tensor = self._vit.embeddings(pixels)
        return self._vit.pre_layrnorm(x) if hasattr(self._vit, "pre_layrnorm") else x

    def project(self, states: list[Tensor]) -> Tensor:
        x = torch.cat([states[i] for i in self._taken], -1)
        projected: Tensor = self._projector(x[:, 1:] if self._drops_class else x)
        return projected

    def join(self, projected: Tensor, inputs: Inputs) -> Tensor:
        return self._packed(projected, inputs, self._newline, "bilinear")

    def to_tokens(self, x: Tensor, inputs: Inputs) -> Tensor:
        if self._drops_class:
            x = x[:, 1:]
        elif self.has_class:
            x = torch.cat((torch.zeros_like(x[:, :1]), x[:, 1:]), 1)
        return self._packed(x, inputs, x.new_zeros(x.shape[-1]), "bilinear")

    def places(self, crops: int, inputs: Inputs) -> Tensor:
        side = self._side
        grid = grid_places(torch.arange(crops), side, side).double()
        cells = grid.unflatten(0, (crops, -1))
        if self.has_class and not self._drops_class:
            cells = torch.cat((cells.new_full((crops, 1, 3), -1), cells), 1)
        if "pixel_values_videos" in inputs:  # a token's row and column are those of its own, smaller grid
            half = math.ceil(side / 2)
            cells = grid_places(torch.arange(crops), half, half).double()
            return torch.cat((cells, cells.new_full((1, 3), -1))).long()
        return self._packed(cells, inputs, cells.new_full((3,), -1), "nearest-exact").long()

    @torch.inference_mode()
    def reduced(self, inputs: Inputs, vision: Vision) -> View:
        """Each crop keeps its share of the patches that are shown."""
        pixels, model = self.pixels(inputs), self._config.model_type
        if "pixel_values_videos" in inputs or self._is_shrunk(len(pixels), inputs):
            raise cannot(vision, model, "has its grid of patches shrunk, for which all are needed")
        if len(self._taken) > 1:
            raise cannot(vision, model, "has states of several layers put side by side")
        places = self.places(len(pixels), inputs)
        token_of = self._token_of(places, len(pixels), inputs)
        sizes = (token_of >= 0).sum(1).tolist()
        if (keep := vision.tokens(sum(sizes))) >= sum(sizes):
            return whole(self.encode(inputs))
        patches = token_of.shape[1]
        first = int(self.has_class and not self._drops_class)  # the class token is read, too
        rows = pixels.new_zeros(len(pixels), first + patches, self._config.text_config.hidden_size)
        chosen = []
        for crop, part in enumerate(share(keep, sizes, sizes)):
            if part:
                shown = None if sizes[crop] == patches else (token_of[crop] >= 0).nonzero().squeeze(1)
                embedded = self.embed(pixels[crop : crop + 1])[0]
                states, left = run_layers(list(self.stack), embedded, self.has_class, vision, part, shown)
                projected = self._projector(states[None, int(self._drops_class) :])[0]
                rows[crop, :first] = projected[:first]
                rows[crop, first + left] = projected[first:]
                chosen.append(token_of[crop, left.cpu()])
        tokens = with_marks(places, torch.cat(chosen))
        return View(tokens, self.join(rows, inputs).float().cpu()[tokens])

    def _token_of(self, places: Tensor, crops: int, inputs: Inputs) -> Tensor:
        """[crops, patches] int64: the token that each patch is; -1 for padding. The grid must not be shrunk.

        Args
            places: [N, 3] of these crops
        """
        number = torch.arange(crops * self._side**2).view(crops, -1, 1)
        shown = self._packed(number, inputs, number.new_full((1,), -1), "nearest-exact")[:, 0]
        token_of = torch.full((number.numel(),), -1)
        token_of[shown[shown >= 0]] = (places[:, 0] >= 0).nonzero().squeeze(1)
        return token_of.view(crops, -1)

    def _is_shrunk(self, crops: int, inputs: Inputs) -> bool:
        """Whether the grid that the crops of an image make is made smaller."""
        if crops == 1 or self._config.model_type == "llava":
            return False
        layout = layout_for(self._config, self._size(inputs))
        full = [self._side * count - 2 * off for count, off in zip(layout.crops, layout.padding, strict=True)]
        return tuple(full) != layout.shown

    def crop_grid(self, crops: int, inputs: Inputs) -> tuple[int, int] | None:
        is_cut = self._config.model_type != "llava" and crops > 1 and "pixel_values_videos" not in inputs
        return layout_for(self._config, self._size(inputs)).crops if is_cut else None

    @property
    def _side(self) -> int:
        """Patches along an edge of a crop."""
        vision = self._config.vision_config
        return int(vision.image_size // vision.patch_size)

    def _packed(self, x: Tensor, inputs: Inputs, newline: Tensor, mode: str) -> Tensor:
        """[crops, n, D] -> [N, D]. `mode`: how a grid is shrunk."""
        if self._config.model_type == "llava":
            return x.flatten(0, 1)
        if "pixel_values_videos" in inputs:
            half = (math.ceil(self._side / 2),) * 2
            frames = x.unflatten(1, (self._side, self._side)).permute(0, 3, 1, 2)
            small = interpolate(frames, half, mode=mode).permute(0, 2, 3, 1)
            return torch.cat((small.flatten(0, 2), newline[None]))
        if len(x) == 1:
            return torch.cat((x[0], newline[None]))
        layout = layout_for(self._config, self._size(inputs))
        if len(x) != 1 + layout.crops[0] * layout.crops[1]:
            found = len(x) - 1
            raise RequestError("pictures", f"pictures: an image of this size has {layout.crops} crops, not {found}")
        grid = x[1:].unflatten(0, layout.crops).unflatten(2, (self._side, self._side))
        grid = grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # [D, rows, columns]
        top, left = layout.padding
        grid = grid[:, top : grid.shape[1] - top, left : grid.shape[2] - left]
        if grid.shape[1:] != layout.shown:
            grid = interpolate(grid[None], layout.shown, mode=mode)[0]
        ends = newline[:, None, None].expand(-1, len(grid[0]), 1)
        return torch.cat((x[0], torch.cat((grid, ends), 2).flatten(1).T))

    def _size(self, inputs: Inputs) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        size = inputs.get("image_sizes")
        if size is None or size.shape != (2,) or size.dtype.kind != "i" or size.min() < 1:
            raise RequestError("pictures", "pictures: 'image_sizes' must be a height and a width")
        height, width = size.tolist()
        return height, width


def taken_states(config: Any) -> Sequence[int]:
    """How many layers of the ViT have been run for each state that is projected, side by side."""
    stated = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return [layer % states for layer in ([stated] if isinstance(stated, int) else stated)]
