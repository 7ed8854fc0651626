"""Mosaics of easy-VQA images: what the shipped vision model is trained on and asked about.

An easy-VQA image shows one shape of one colour. A mosaic shows four or nine of them, some cells left empty, so that a
question is about one of many cells, or about all of them. The images come from the PyPI package `easy-vqa` (MIT
licence, extra `train`); its training and test images are never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = len(SHAPES) * len(COLOURS)
"""Kinds of filled cells; kind = shape * 8 + colour."""

SIDE, PATCH = 96, 8
GRIDS = (2, 3)
PLACES = sum(grid**2 for grid in GRIDS)
"""Cells of all grids"""
SMALLEST = 16
"""Shapes that are less than this many pixels across (of 64) are left out: in a 3x3 mosaic little is left of them."""

Split = Literal["train", "test"]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Mosaic:
    """Cells in rows from the top left."""

    grid: int
    cells: tuple[int, ...]
    """Kind of each cell; -1 for an empty one."""
    sources: tuple[int, ...]
    """The image in `Bank` that each cell comes from; an empty one has only its background."""


class Bank:
    """The images of one split, resized to the cells of each grid.

    Attributes:
        kinds: [n] kind of each image.
        cells: by grid, [n, cell, cell, 3] pixels.
        covers: by grid, [n, cell/8, cell/8] part of each patch that the shape covers.
        backgrounds: [n, 3].
    """

    def __init__(self, pixels: Bytes, kinds: NDArray[np.int64], flips: bool):
        """`pixels`: [n, 64, 64, 3]. `flips`: add the images mirrored in each direction and in both."""
        backgrounds = _backgrounds(pixels)
        if flips:
            pixels = np.concatenate([pixels, pixels[:, ::-1], pixels[:, :, ::-1], pixels[:, ::-1, ::-1]])
            kinds, backgrounds = np.tile(kinds, 4), np.tile(backgrounds, (4, 1))
        masks = _masks(pixels, backgrounds).astype(np.float32)
        self.kinds, self.backgrounds = kinds, backgrounds
        self.cells = {grid: _resized(pixels, SIDE // grid, Image.Resampling.BILINEAR) for grid in GRIDS}
        self.covers = {grid: _resized(masks, SIDE // grid // PATCH, Image.Resampling.BOX) for grid in GRIDS}
        self.of_kind = [np.flatnonzero(kinds == kind) for kind in range(KINDS)]

    def draw(self, rng: np.random.Generator) -> Mosaic:
        """A mosaic: either grid, any number of filled cells, and half the time of few colours and shapes only."""
        grid = int(rng.choice(GRIDS))
        total = grid * grid
        # Few cells of nine are filled less often: with the 2x2 ones, every count is then about as frequent.
        weights = np.where(np.arange(1, total + 1) <= 4, 0.06 if grid == 3 else 0.25, 0.152)
        filled = int(rng.choice(np.arange(1, total + 1), p=weights / weights.sum()))
        few = rng.random() < 0.5
        colours = rng.permutation(len(COLOURS))[: rng.integers(1, 4) if few else None]
        shapes = rng.permutation(len(SHAPES))[: rng.integers(1, 4) if few else None]
        cells = np.full(total, -1)
        places = rng.permutation(total)[:filled]
        cells[places] = rng.choice(shapes, filled) * len(COLOURS) + rng.choice(colours, filled)
        sources = [
            int(rng.integers(len(self.kinds))) if kind < 0 else int(rng.choice(self.of_kind[kind])) for kind in cells
        ]
        return Mosaic(grid, tuple(cells.tolist()), tuple(sources))

    def render(self, mosaics: Sequence[Mosaic]) -> Bytes:
        """[mosaics, 96, 96, 3] pixels."""
        out = np.empty((len(mosaics), SIDE, SIDE, 3), np.uint8)
        for grid, places, cells, sources in _by_grid(mosaics):
            pixels = np.where(
                cells[..., None, None, None] < 0,
                self.backgrounds[sources][..., None, None, :],
                self.cells[grid][sources],
            )
            out[places] = _tiled(pixels, grid)
        return out

    def patch_kinds(self, mosaics: Sequence[Mosaic]) -> NDArray[np.int64]:
        """[mosaics, 144] what each patch shows: 0 for background, 1 + kind where a shape covers a quarter or more."""
        out = np.empty((len(mosaics), (SIDE // PATCH) ** 2), np.int64)
        for grid, places, cells, sources in _by_grid(mosaics):
            covered = self.covers[grid][sources] >= 0.25
            shown = np.where(covered & (cells[..., None, None] >= 0), cells[..., None, None] + 1, 0)
            out[places] = _tiled(shown[..., None], grid).reshape(len(places), -1)
        return out

    @staticmethod
    def patch_places(mosaics: Sequence[Mosaic]) -> NDArray[np.int64]:
        """[mosaics, 144] which of all grids' cells each patch is in: 0 to 3 are those of 2x2, 4 to 12 those of 3x3."""
        first = {grid: sum(smaller**2 for smaller in GRIDS if smaller < grid) for grid in GRIDS}
        of_grid = {}
        for grid in GRIDS:
            numbers = np.arange(grid * grid).reshape(grid, grid) + first[grid]
            side = SIDE // grid // PATCH
            of_grid[grid] = numbers.repeat(side, 0).repeat(side, 1).reshape(-1)
        return np.stack([of_grid[mosaic.grid] for mosaic in mosaics])


def load_bank(split: Split, images: Path | None = None, flips: bool = False) -> Bank:
    """The bank of a split. `images`: a file that caches the package's images, written if it is not there."""
    if images is None:
        return Bank(*_from_package(split), flips)
    if not images.is_file():
        images.parent.mkdir(parents=True, exist_ok=True)
        train, test = _from_package("train"), _from_package("test")
        np.savez_compressed(images, train_x=train[0], train_y=train[1], test_x=test[0], test_y=test[1])
    with np.load(images) as file:
        return Bank(file[f"{split}_x"], file[f"{split}_y"], flips)


def _from_package(split: str) -> tuple[Bytes, NDArray[np.int64]]:
    """Pixels and kinds of the images whose questions tell both shape and colour, and that are large enough."""
    import easy_vqa

    questions, paths = (
        (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
        if split == "train"
        else (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
    )
    shape_of, colour_of = {}, {}
    for text, answer, image in zip(*questions, strict=True):
        # "What colour is the shape?", or a yes to "Is there a red shape?", or a no to "Is no red shape present?".
        negated = {"no", "not"} & set(text.split())
        told = text if answer == ("no" if negated else "yes") else answer
        for word in told.rstrip("?").split():
            if word in SHAPES:
                shape_of[image] = SHAPES.index(word)
            elif word in COLOURS:
                colour_of[image] = COLOURS.index(word)
    known = sorted(shape_of.keys() & colour_of.keys())
    pixels = np.stack([np.asarray(Image.open(paths[image]).convert("RGB")) for image in known])
    kinds = np.array([shape_of[image] * len(COLOURS) + colour_of[image] for image in known])
    masks = _masks(pixels, _backgrounds(pixels))
    across = np.minimum(masks.any(1).sum(-1), masks.any(2).sum(-1))
    return pixels[across >= SMALLEST], kinds[across >= SMALLEST]


def _backgrounds(pixels: Bytes) -> Bytes:
    """[n, 3]: the median of the edges, which a shape may touch but does not fill."""
    edges = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    return np.median(edges, axis=1).astype(np.uint8)


def _masks(pixels: Bytes, backgrounds: Bytes) -> NDArray[np.bool_]:
    """[n, 64, 64]: where the shape is."""
    return np.abs(pixels.astype(np.int16) - backgrounds[:, None, None]).max(-1) > 24


def _resized(images: NDArray, side: int, method: Image.Resampling) -> NDArray:
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), method)) for image in images])


def _by_grid(mosaics: Sequence[Mosaic]) -> list[tuple[int, NDArray, NDArray, NDArray]]:
    """For each grid: places among the mosaics, kinds and sources of their cells [mosaics, cells]."""
    parts = []
    for grid in GRIDS:
        places = np.array([place for place, mosaic in enumerate(mosaics) if mosaic.grid == grid], np.int64)
        if len(places):
            cells = np.array([mosaics[place].cells for place in places])
            parts.append((grid, places, cells, np.array([mosaics[place].sources for place in places])))
    return parts


def _tiled(cells: NDArray, grid: int) -> NDArray:
    """[n, cells, h, w, c] -> [n, grid*h, grid*w, c]."""
    n, _, height, width, channels = cells.shape
    rows = cells.reshape(n, grid, grid, height, width, channels).swapaxes(2, 3)
    return rows.reshape(n, grid * height, grid * width, channels)
