"""Vision policies that make a token grid smaller, once more, token by token and in float64; see `vision_oracles`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .vision_oracles import Case, Left, shares


def pooled(case: Case, cells: list[tuple[int, dict[int, float]]]) -> Left:
    """Cells: the token that each stands at, and what tokens count in it."""
    merged = {
        at: sum((weight * case.x[one] for one, weight in weights.items()), np.zeros(case.x.shape[1]))
        / sum(weights.values())
        for at, weights in cells
    }
    return Left(list(merged), merged)


def pieces(case: Case) -> list[tuple[dict[tuple[int, int], int], int, int]]:
    """Crops as grids of tokens; as many of them, evenly, as there may be tokens."""
    grids = []
    for crop in case.crops():
        rows, columns = (sorted({case.places[one][axis] for one in crop}) for axis in (1, 2))
        at = {(rows.index(case.places[one][1]), columns.index(case.places[one][2])): one for one in crop}
        grids.append((at, 1 + max(row for row, _ in at), 1 + max(column for _, column in at)))
    if len(grids) <= case.keep:
        return grids
    return [grids[math.floor((place + 0.5) * len(grids) / case.keep)] for place in range(case.keep)]


def avg_pool(case: Case) -> Left:
    grids, size = pieces(case), 1
    while sum(math.ceil(height / size) * math.ceil(width / size) for _, height, width in grids) > case.keep:
        size += 1
    cells = []
    for at, height, width in grids:
        for top in range(0, height, size):
            for left in range(0, width, size):
                bottom, right = min(top + size, height), min(left + size, width)
                members = {at[row, column]: 1.0 for row in range(top, bottom) for column in range(left, right)}
                cells.append((at[(top + bottom - 1) // 2, (left + right - 1) // 2], members))
    return pooled(case, cells)


def downsample(case: Case) -> Left:
    grids = pieces(case)
    sizes = [height * width for _, height, width in grids]
    extra = shares(
        min(case.keep, sum(sizes)) - len(grids), [float(size) for size in sizes], [size - 1 for size in sizes]
    )
    cells = []
    for (at, height, width), part in zip(grids, extra, strict=True):
        options = [
            (max(height / rows, width / columns), -rows * columns, rows, columns)
            for rows in range(1, height + 1)
            for columns in range(1, width + 1)
            if rows * columns <= part + 1
        ]
        *_, rows, columns = min(options)
        for i in range(rows):
            for j in range(columns):
                members = {}
                for (row, column), one in at.items():
                    tall = min((i + 1) * height / rows, row + 1) - max(i * height / rows, row)
                    wide = min((j + 1) * width / columns, column + 1) - max(j * width / columns, column)
                    if tall > 1e-9 and wide > 1e-9:
                        members[one] = tall * wide
                # The token in whose area the middle lies; of two that share it as an edge the first.
                middle = (
                    math.ceil((i + 0.5) * height / rows - 1 - 1e-9),
                    math.ceil((j + 0.5) * width / columns - 1 - 1e-9),
                )
                cells.append((at[middle], members))
    return pooled(case, cells)


ORACLES: dict[str, Callable[[Case], Left]] = {"avg_pool": avg_pool, "downsample": downsample}
