"""Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923): images of any size and videos as they are, rotary
positions in two axes, 2x2 patches become one token. In most layers of 2.5 patches see their own window only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import View
from winnow.engine.errors import RequestError
from winnow.engine.messages import Picture
from winnow.engine.models.vision.mrope import Grid, positions
from winnow.engine.models.vision.reduction import cannot
from winnow.engine.models.vision.signals import Attention, TowerSignals
from winnow.engine.models.vision.tower import grid_places
from winnow.engine.pages import Ints
from winnow.engine.tower_protocol import Inputs, inputs_of


@dataclass(frozen=True)
class _Grid:
    """How the patches of an image or video lie. Rows go by squares of patches, and where there are windows by these."""

    frames: int
    height: int
    width: int
    order: Tensor | None
    """[squares] the square at each place, in host memory; None where they are in their own order"""
    turns: tuple[Tensor, Tensor]
    """cos, sin [rows, head_dim]"""
    bounds: list[Tensor]
    """[groups + 1] int32 for each layer: where rows begin that see one another"""


class QwenTower:
    """`tower_protocol.Eyes`"""

    def __init__(self, config: Any, parts: Any):
        """
        Args
            config: transformers' of the whole model
            parts: its model, of which the language model may be missing
        """
        self.sees = {"image": config.image_token_id, "video": config.video_token_id}
        self._model: str = config.model_type
        self._vit: Any = parts.visual
        weight = next(parts.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        vision = config.vision_config
        self._edge: int = vision.spatial_merge_size
        self._patch: int = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self._ticks: int = getattr(vision, "tokens_per_second", 1)
        self._windows: tuple[int, frozenset[int]] | None = None
        if config.model_type == "qwen2_5_vl":
            self._windows = vision.window_size, frozenset(vision.fullatt_block_indexes)

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Features:
        kind = "video" if "pixel_values_videos" in inputs else "image"
        shape = self._shape(inputs, kind)
        patches = inputs.get("pixel_values_videos" if kind == "video" else "pixel_values")
        if patches is None or patches.shape != (math.prod(shape), self._patch):
            raise RequestError("pictures", f"pictures: {shape} patches must have {self._patch} numbers each")
        grid = self._grid(torch.tensor([shape]))
        read = torch.from_numpy(patches).to(self._device, self._dtype)
        states = [self._in_order(self._vit.patch_embed(read), grid)]
        for block, bounds in zip(self._vit.blocks, grid.bounds, strict=True):
            states.append(block(states[-1], cu_seqlens=bounds, position_embeddings=grid.turns))
        projected: Tensor = self._vit.merger(states[-1])
        edge = self._edge
        return Features(
            embeddings=_back(projected, grid).float().cpu(),
            places=grid_places(torch.arange(grid.frames), grid.height // edge, grid.width // edge),
            signals=TowerSignals(
                states=[state.cpu() for state in states],
                attends=lambda layer, x: self._attends(layer, x, grid),
                to_tokens=lambda x: _back(x.unflatten(0, (-1, edge**2)).mean(1), grid),
                has_class=False,
                matrix_rows=grid.height * grid.width,
            ),
        )

    def reduced(self, inputs: Inputs, vision: Vision) -> View:
        raise cannot(vision, self._model, "makes each token of a square of patches")

    def positions(self, tokens: Ints, pictures: Sequence[Picture]) -> Ints:
        """See `mrope.positions`."""
        grids = []
        for picture in pictures:
            inputs = inputs_of(picture, f"{picture.kind}_grid_thw", "second_per_grid_ts")
            frames, height, width = self._shape(inputs, picture.kind)
            seconds = inputs.get("second_per_grid_ts")
            interval = 1.0 if seconds is None else self._ticks * float(seconds)
            grids.append(Grid(frames, height // self._edge, width // self._edge, interval))
        return positions(tokens, self.sees, grids)

    def _shape(self, inputs: Inputs, kind: str) -> tuple[int, int, int]:
        """Frames, height and width in patches."""
        shape = inputs.get(f"{kind}_grid_thw")
        if shape is None or shape.shape != (3,) or shape.dtype.kind != "i" or shape.min() < 1:
            raise RequestError("pictures", f"pictures: '{kind}_grid_thw' must be three counts of patches")
        frames, height, width = shape.tolist()
        if height % self._edge or width % self._edge:
            raise RequestError("pictures", f"pictures: '{kind}_grid_thw' must be in squares of {self._edge} patches")
        return frames, height, width

    def _grid(self, shape: Tensor) -> _Grid:
        """`shape` [1, 3]: frames, height and width in patches."""
        frames, height, width = shape[0].tolist()
        places = get_vision_position_ids(shape, self._edge).to(self._device)
        whole = get_vision_cu_seqlens(shape)
        layers = len(self._vit.blocks)
        cos, sin = self._vit.rotary_pos_emb(places, places)
        if self._windows is None:
            return _Grid(frames, height, width, None, (cos, sin), [whole] * layers)
        size, everywhere = self._windows
        order, windows = get_vision_window_index(shape, self._edge, size, self._vit.patch_size)
        bounds = [whole if layer in everywhere else windows for layer in range(layers)]
        grid = _Grid(frames, height, width, order, (cos, sin), bounds)
        return replace(grid, turns=(self._in_order(cos, grid), self._in_order(sin, grid)))

    def _in_order(self, x: Tensor, grid: _Grid) -> Tensor:
        """[rows, D] as the grid's own order is -> as the layers read them."""
        return x if grid.order is None else x.unflatten(0, (-1, self._edge**2))[grid.order.to(x.device)].flatten(0, 1)

    def _attends(self, layer: int, x: Tensor, grid: _Grid) -> Attention:
        block, bounds = self._vit.blocks[layer], grid.bounds[layer].tolist()
        made = block.attn.qkv(block.norm1(x.to(self._device))).unflatten(1, (3, block.attn.num_heads, -1))
        raw, keys = made[:, 1], made[:, 1]
        queries, keys = apply_rotary_pos_emb_vision(made[:, 0], keys, *grid.turns)
        return Attention(queries, keys, raw, list(pairwise(bounds)))


def _back(squares: Tensor, grid: _Grid) -> Tensor:
    """[N, D] as the layers read them -> in the grid's own order."""
    if grid.order is None:
        return squares
    out = torch.empty_like(squares)
    out[grid.order.to(out.device)] = squares
    return out
