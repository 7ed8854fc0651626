"""Vision policies once more, token by token and in float64, after the papers. They share no code with the policies.

An oracle says which patch tokens stay (placeholders, ascending) and what stands at those that are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.policy import View

Rows = NDArray[np.float64]


@dataclass
class Left:
    tokens: list[int]
    merged: dict[int, Rows] = field(default_factory=dict)
    keys: list[int] | None = None
    """Those that choices between layers are to spare"""

    def __post_init__(self) -> None:
        self.tokens = sorted(self.tokens)


def assert_left(image: Features, view: View, left: Left) -> None:
    """That this is what is left of an image, the marks beside it left out."""
    at = {token: row for row, token in enumerate(view.tokens.tolist())}
    assert [token for token in at if image.places[token, 0] >= 0] == left.tokens
    for token, row in left.merged.items():
        torch.testing.assert_close(view.embeddings[at[token]].double(), torch.from_numpy(row), rtol=1e-4, atol=1e-5)
    assert (None if view.is_key is None else view.tokens[view.is_key].tolist()) == left.keys
    others = [token for token in at if token not in left.merged]
    assert torch.equal(view.embeddings[[at[token] for token in others]], image.embeddings[others])


class Case:
    """An image in plain numbers."""

    def __init__(self, image: Features, keep: int, text: Any, seed: int, params: Any):
        self.image, self.keep, self.seed, self.params = image, keep, seed, params
        self.places = image.places.tolist()
        self.patches = [index for index, place in enumerate(self.places) if place[0] >= 0]
        self.x: Rows = image.embeddings.double().numpy()
        self.text: Rows = text.double().numpy()
        self.hidden: Rows = image.signals.hidden(-1).double().numpy()
        self.keys: Rows = image.signals.keys(-1).double().numpy()
        self.attention: list[float] = image.signals.attention(-1).double().tolist()

    @cached_property
    def likes(self) -> dict[tuple[int, int], float]:
        """Cosines of what the language model reads."""
        return {(one, other): cos(self.x[one], self.x[other]) for one in self.patches for other in self.patches}

    def crops(self) -> list[list[int]]:
        ids = sorted({self.places[index][0] for index in self.patches})
        return [[index for index in self.patches if self.places[index][0] == crop] for crop in ids]


def cos(a: Rows, b: Rows) -> float:
    length = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / length if length > 0 else 0.0


def best(scores: dict[int, float], count: int) -> list[int]:
    """The keys of the largest; of equal ones the smallest key."""
    return sorted(scores, key=lambda one: (-scores[one], one))[:count]


def shares(count: int, weights: list[float], sizes: list[int]) -> list[int]:
    """In proportion to the weights, none above its size; largest remainders."""
    full: set[int] = set()
    while True:
        rest = [index for index in range(len(sizes)) if index not in full and sizes[index] > 0]
        left = count - sum(sizes[index] for index in full)
        use = weights if sum(weights[index] for index in rest) > 0 else [float(size) for size in sizes]
        exact = {index: left * (use[index] / sum(use[one] for one in rest)) for index in rest}
        beyond = {index for index in rest if exact[index] >= sizes[index]}
        if not beyond:
            break
        full |= beyond
    parts = [sizes[index] if index in full else math.floor(exact.get(index, 0.0)) for index in range(len(sizes))]
    missing = count - sum(parts)
    for index in best({index: exact[index] % 1 for index in rest}, missing):
        parts[index] += 1
    return parts


def by_size(case: Case) -> list[tuple[list[int], int]]:
    crops = case.crops()
    sizes = [len(crop) for crop in crops]
    return list(zip(crops, shares(case.keep, [float(size) for size in sizes], sizes), strict=True))


def greedy(case: Case, chosen: list[int], worth: dict[int, float] | None = None, weight: float = 1.0) -> list[int]:
    """Adds what is least like the chosen ones, until there are `keep`."""
    chosen = list(chosen)
    while len(chosen) < case.keep:
        scores = {}
        for one in case.patches:
            if one not in chosen:
                nearest = max(case.likes[one, other] for other in chosen)
                scores[one] = (worth[one] if worth else 0.0) - weight * nearest
        chosen += best(scores, 1)
    return chosen


def uniform(case: Case) -> Left:
    patches = len(case.patches)
    return Left([case.patches[math.floor((place + 0.5) * patches / case.keep)] for place in range(case.keep)])


def vtc_cls(case: Case) -> Left:
    scores = dict.fromkeys(case.patches, 0.0)
    for layer in range(1, min(case.params.layers, case.image.signals.layers) + 1):
        attention = case.image.signals.attention(-layer).tolist()
        for one in case.patches:
            scores[one] += attention[one]
    return Left(best(scores, case.keep))


def div_prune(case: Case) -> Left:
    distance = {one: min(1 - case.likes[one, other] for other in case.patches if other != one) for one in case.patches}
    return Left(greedy(case, best(distance, 1)))


def to_dre(case: Case) -> Left:
    mean = sum(case.x[one] / math.sqrt(float(case.x[one] @ case.x[one])) for one in case.patches)
    return Left(greedy(case, best({one: -cos(case.x[one], mean) for one in case.patches}, 1)))


def id_pruner(case: Case) -> Left:
    values = [case.attention[one] for one in case.patches]
    worth = {
        one: (case.attention[one] - min(values)) / (max(values) - min(values) + 1e-6) * case.params.relevance
        for one in case.patches
    }
    return Left(
        greedy(case, best({one: case.attention[one] for one in case.patches}, 1), worth, 1 - case.params.relevance)
    )


def flash_vlm(case: Case) -> Left:
    towards = sum((word / math.sqrt(float(word @ word)) for word in case.text), np.zeros(case.x.shape[1]))
    logits = {one: cos(case.x[one], towards) / case.params.temperature for one in case.patches}
    highest = max(logits.values())
    total = math.log(sum(math.exp(logit - highest) for logit in logits.values())) + highest
    weight = case.params.text_weight
    scores = {
        one: weight * (logits[one] - total) + (1 - weight) * math.log(case.attention[one]) for one in case.patches
    }
    diverse = min(case.keep - 1, math.floor(case.keep * case.params.diverse))
    return Left(greedy(case, best(scores, case.keep - diverse)))


def vision_zip(case: Case) -> Left:
    tokens, merged = [], {}
    for crop, part in by_size(case):
        contextual = round(part * case.params.contextual)
        dominant = best({one: case.attention[one] for one in crop}, part - contextual)
        others = [one for one in crop if one not in dominant]
        targets = [others[index * (len(others) // contextual)] for index in range(contextual)]
        groups = {target: [target] for target in targets}
        for one in others:
            if targets and one not in targets:
                likes = [cos(case.keys[one], case.keys[target]) for target in targets]
                groups[targets[likes.index(max(likes))]].append(one)
        merged |= {target: np.mean([case.x[one] for one in group], axis=0) for target, group in groups.items()}
        tokens += dominant + targets
    return Left(tokens, merged)


def vis_pruner(case: Case) -> Left:
    tokens = []
    for crop, part in by_size(case):
        order = best({one: case.attention[one] for one in crop}, len(crop))
        important = math.floor(part * case.params.important)
        tokens += order[:important]
        left = order[important:]
        while len(left) > part - important and part > important:
            odd = left[1::2]
            likes = {
                place: max(cos(case.hidden[one], case.hidden[other]) for other in odd)
                for place, one in enumerate(left[::2])
            }
            dropped = min(case.params.step, len(left) - part + important)
            left = [left[::2][place] for place in best(likes, len(likes))[dropped:]] + odd
        tokens += left if part > important else []
    return Left(tokens)


def holo_v(case: Case) -> Left:
    count, total = min(case.params.segments, len(case.patches)), len(case.patches)
    segments, first = [], 0
    for index in range(count):
        size = total // count + (index < total % count)
        segments.append(case.patches[first : first + size])
        first += size
    spread = {}
    for segment in segments:
        for one in segment:
            likes = [cos(case.x[one], case.x[other]) for other in segment if other != one]
            spread[one] = float(np.var(likes)) if len(likes) > 1 else 0.0
    scale = sum(case.attention[one] for one in case.patches) / max(sum(spread.values()), 1e-12 * total)
    weights = [
        sum(case.attention[one] + case.params.variance_weight * spread[one] * scale for one in segment) / len(segment)
        for segment in segments
    ]
    parts = shares(case.keep, weights, [len(segment) for segment in segments])
    return Left(
        [
            one
            for segment, part in zip(segments, parts, strict=True)
            for one in best({one: case.attention[one] for one in segment}, part)
        ]
    )


def apet(case: Case) -> Left:
    tokens, merged = [], {}
    for crop, part in by_size(case):
        x = case.hidden
        if not part:
            continue
        mean = np.mean([x[one] for one in crop], axis=0)
        basis = best({one: float(np.sum((x[one] - mean) ** 2)) for one in crop}, 1)
        while len(basis) < min(case.params.basis, max(1, part // 2)):
            far = {one: min(float(np.sum((x[one] - x[b]) ** 2)) for b in basis) for one in crop if one not in basis}
            basis += best(far, 1)
        seeds = x[basis]
        errors = {}
        for one in crop:
            # Ridge regression of one token on the seeds, by its normal equations.
            weights = np.linalg.inv(seeds @ seeds.T + 1e-5 * np.eye(len(basis))) @ seeds @ x[one]
            errors[one] = math.sqrt(float(np.sum((x[one] - weights @ seeds) ** 2)))
        worst = best({one: errors[one] for one in crop if one not in basis}, part - len(basis))
        groups = {one: [one] for one in worst}
        for one in crop:
            if worst and one not in worst and one not in basis:
                groups[best({other: cos(x[one], x[other]) for other in worst}, 1)[0]].append(one)
        merged |= {target: np.mean([case.x[one] for one in group], axis=0) for target, group in groups.items()}
        tokens += basis + worst
    return Left(tokens, merged)


def global_com2(case: Case) -> Left:
    crops = case.crops()
    if len(crops) == 1:
        return Left(best({one: case.attention[one] for one in crops[0]}, case.keep))
    assert case.image.crop_grid is not None
    rows, columns = case.image.crop_grid
    height = 1 + max(case.places[one][1] for one in crops[0])
    width = 1 + max(case.places[one][2] for one in crops[0])
    thumbnail = {(case.places[one][1], case.places[one][2]): case.attention[one] for one in crops[0]}
    logs = {place: math.log(max(value, 1e-12)) for place, value in thumbnail.items()}
    mean = sum(logs.values()) / len(logs)
    sums = [0.0] * (rows * columns)
    for (row, column), value in logs.items():
        part = min(row // (height // rows), rows - 1) * columns + min(column // (width // columns), columns - 1)
        sums[part] += value - mean
    powers = [math.exp((value - max(sums)) / case.params.temperature) for value in sums]
    ratios = [1 + power / sum(powers) - 1 / len(powers) for power in powers]
    weights = [float(len(crops[0]))]
    weights += [ratios[case.places[crop[0]][0] - 1] * len(crop) for crop in crops[1:]]
    parts = shares(case.keep, weights, [len(crop) for crop in crops])

    across = {}
    for crop in crops[1:]:
        for one in crop:
            index, row, column = case.places[one]
            across[one] = ((index - 1) // columns * height + row, (index - 1) % columns * width + column)
    tops, lefts = zip(*across.values(), strict=True)
    tall, wide = max(tops) - min(tops) + 1, max(lefts) - min(lefts) + 1

    def looked_at(one: int) -> float:
        y = max(0.0, (across[one][0] - min(tops) + 0.5) * height / tall - 0.5)
        x = max(0.0, (across[one][1] - min(lefts) + 0.5) * width / wide - 0.5)
        value = 0.0
        for row, by_row in ((math.floor(y), 1 - y % 1), (math.floor(y) + 1, y % 1)):
            for column, by_column in ((math.floor(x), 1 - x % 1), (math.floor(x) + 1, x % 1)):
                value += thumbnail[min(row, height - 1), min(column, width - 1)] * by_row * by_column
        return value

    tokens = best({one: case.attention[one] for one in crops[0]}, parts[0])
    for crop, part in zip(crops[1:], parts[1:], strict=True):
        own = math.sqrt(sum(case.attention[one] ** 2 for one in crop))
        above = math.sqrt(sum(looked_at(one) ** 2 for one in crop))
        tokens += best({one: case.attention[one] / own + looked_at(one) / above for one in crop}, part)
    return Left(tokens)


def duet_vlm(case: Case) -> Left:
    anchors = round(case.params.contextual * case.keep)
    ranking = best({one: case.attention[one] for one in case.patches}, len(case.patches))
    dominant, pool = ranking[: case.keep - anchors], ranking[case.keep - anchors :][: case.params.width * anchors]
    groups = {pool[place * (len(pool) // anchors)]: [] for place in range(anchors)}
    for one in pool:
        groups[one if one in groups else max(groups, key=lambda to: cos(case.keys[one], case.keys[to]))].append(one)
    return Left(
        [*dominant, *groups], {one: np.mean([case.x[i] for i in group], axis=0) for one, group in groups.items()}
    )


def must_drop(case: Case) -> Left:
    first = case.image.signals.hidden(-case.image.signals.layers).double().numpy()
    windows: dict[tuple[int, int, int], list[int]] = {}
    for one in case.patches:
        crop, row, column = case.places[one]
        windows.setdefault((crop, row // case.params.window, column // case.params.window), []).append(one)
    tokens, merged, attention = [], {}, {}
    for window in windows.values():
        likes = [cos(first[one], first[other]) for one in window for other in window if one != other]
        if likes and sum(likes) / len(likes) >= case.params.similarity:
            tokens.append(window[-1])
            merged[window[-1]] = np.mean([case.x[one] for one in window], axis=0)
            attention[window[-1]] = sum(case.attention[one] for one in window) / len(window)
        else:
            tokens += window
            attention |= {one: case.attention[one] for one in window}
    return Left(tokens, merged, sorted(best(attention, math.ceil(case.params.key_share * len(tokens)))))


ORACLES: dict[str, Callable[[Case], Left]] = {
    "uniform": uniform,
    "vtc_cls": vtc_cls,
    "div_prune": div_prune,
    "vision_zip": vision_zip,
    "vis_pruner": vis_pruner,
    "holo_v": holo_v,
    "apet": apet,
    "flash_vlm": flash_vlm,
    "id_pruner": id_pruner,
    "to_dre": to_dre,
    "global_com2": global_com2,
    "duet_vlm": duet_vlm,
    "must_drop": must_drop,
}
