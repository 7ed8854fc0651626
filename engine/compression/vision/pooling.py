"""Controls that average neighbouring tokens, which makes the grid of a crop smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.policy import View, kept
from winnow.engine.compression.vision.ranking import crops, evenly
from winnow.engine.errors import PlanNotSupported

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """How the rows, or columns, of a grid become fewer."""

    weights: Tensor
    """[cells, length] float32: what each counts for in each of the cells"""
    middles: Tensor
    """[cells] int64, ascending: where what was averaged stands from now on"""


@dataclass(frozen=True)
class Grid:
    """A crop or frame."""

    patches: Tensor
    """[height * width] int64: indices into `Features.patches`, row by row"""
    height: int
    width: int


def grids(image: Features, keep: int, policy: str) -> list[Grid]:
    """The crops and frames of an image; where they are more than `keep`, as many of them, at even distances.

    Raises
        PlanNotSupported: one of them is no full grid
    """
    found = []
    for crop in crops(image):
        # Rows and columns are counted: of a grid that was shrunk by the model some are missing.
        (rows, row), (columns, column) = (axis.unique(return_inverse=True) for axis in image.grid[crop, 1:].unbind(1))
        height, width = len(rows), len(columns)
        cell = row * width + column
        if len(crop) != height * width or len(cell.unique()) != len(crop):
            path = "compression.vision.policy"
            raise PlanNotSupported(path, f"{path}: '{policy}' averages grids, and this image's tokens form none")
        found.append(Grid(crop[cell.argsort()], height, width))
    return found if len(found) <= keep else [found[int(one)] for one in evenly(len(found), keep)]


def windows(length: int, size: int) -> Axis:
    """Cells of `size` each; the last may have less."""
    import torch

    cells = -(-length // size)
    index = torch.arange(length)
    weights = (index // size == torch.arange(cells)[:, None]).float()
    first = torch.arange(cells) * size
    return Axis(weights, (first + (first + size).clamp(max=length) - 1) // 2)


def areas(length: int, cells: int) -> Axis:
    """Cells of one size, which need not be whole: what lies in two of them counts for both in parts."""
    import torch

    cell, index = torch.arange(cells)[:, None], torch.arange(length)
    ends = torch.minimum((cell + 1) * length, (index + 1) * cells)
    overlap = (ends - torch.maximum(cell * length, index * cells)).clamp(min=0)
    return Axis(overlap.float(), ((2 * torch.arange(cells) + 1) * length - 1) // (2 * cells))


def pooled(image: Features, pieces: list[tuple[Grid, Axis, Axis]]) -> View:
    """What is left if each of these grids is averaged along its rows' axis and its columns'; other crops go."""
    import torch

    patches = image.patches
    chosen, merged = [], []
    for grid, rows, columns in pieces:
        values = image.embeddings[patches[grid.patches]].view(grid.height, grid.width, -1)
        weights = (rows.weights.sum(1)[:, None] * columns.weights.sum(1))[..., None]
        cells = torch.einsum("jc,icd->ijd", columns.weights, torch.einsum("ir,rcd->icd", rows.weights, values))
        at = rows.middles[:, None] * grid.width + columns.middles
        chosen.append(patches[grid.patches[at.flatten()]])
        merged.append((cells / weights).flatten(0, 1))
    return kept(image, torch.cat(chosen), torch.cat(merged))
