"""Video policies once more, token by token and in float64; see `vision_oracles`."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from .vision_oracles import Case, Left, Rows, best, cos, shares


def evs(case: Case) -> Left:
    first, *later = case.crops()
    change = {}
    for before, frame in itertools.pairwise([first, *later]):
        change |= {one: 1 - cos(case.x[one], case.x[same]) for one, same in zip(frame, before, strict=True)}
    return Left(first + best(change, max(0, case.keep - len(first))))


def stc(case: Case) -> Left:
    frames, tokens = case.crops(), []
    parts = shares(case.keep, [1.0] * len(frames), [len(frame) for frame in frames])
    seen: list[Rows] = []
    for at in range(0, len(frames), case.params.chunk):
        chunk = frames[at : at + case.params.chunk]
        x = {one: case.x[one] for frame in chunk for one in frame}
        values = np.stack(list(x.values()))
        seen.append(values.mean(0))
        memory = sum(seen) / len(seen)
        variance = {channel: float(values[:, channel].var()) for channel in range(values.shape[1])}
        channels = sorted(best({channel: -spread for channel, spread in variance.items()}, values.shape[1] // 2))
        short = {one: row[channels] / np.linalg.norm(row[channels]) for one, row in x.items()}
        remembered = memory[channels] / np.linalg.norm(memory[channels])
        for frame, part in zip(chunk, parts[at : at + case.params.chunk], strict=True):
            mean = sum(short[one] for one in frame) / len(frame)
            near = {one: gaussians(short[one] - mean) + gaussians(short[one] - remembered) for one in frame}
            tokens += best({one: -score for one, score in near.items()}, part)
    return Left(tokens)


def gaussians(difference: Rows) -> float:
    return sum(math.exp(-float(difference @ difference) / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))


def flash_vid(case: Case) -> Left:
    frames, params = case.crops(), case.params
    parts = shares(case.keep, [1.0] * len(frames), [len(frame) for frame in frames])
    left = Left([])
    chosen = [salient(case, frame, math.ceil(part * params.alpha)) for frame, part in zip(frames, parts, strict=True)]
    means = [sum(case.x[one] for one in frame) / len(frame) for frame in frames]
    joints = {at: -cos(means[at - 1], means[at]) for at in range(1, len(frames))}
    below = sum(-joints[at] < params.segment_threshold for at in joints)
    cuts = sorted(best(joints, max(below, min(params.segments, len(frames)) - 1)))
    for begin, end in itertools.pairwise([0, *cuts, len(frames)]):
        free = [[one for one in frames[at] if one not in chosen[at]] for at in range(begin, end)]
        spare = sum(parts[at] - len(chosen[at]) for at in range(begin, end))
        parents, likes = {}, {}
        for before, frame in itertools.pairwise(free):
            for one in frame:
                if before:
                    parents[one] = best({other: cos(case.x[one], case.x[other]) for other in before}, 1)[0]
                    likes[one] = cos(case.x[one], case.x[parents[one]])
        over = sum(like > params.temporal_threshold for like in likes.values())
        children = best(likes, max(0, min(over, sum(map(len, free)) - spare)))
        trees: dict[int, list[int]] = defaultdict(list)
        for one in itertools.chain(*free):
            root = one
            while root in children:
                root = parents[root]
            trees[root].append(one)
        roots = {root: sum(case.x[one] for one in tree) / len(tree) for root, tree in trees.items()}
        in_frame = [[one for one in frame if one in roots] for frame in free]
        sizes = [len(frame) for frame in in_frame]
        for frame, count in zip(in_frame, shares(spare, [float(size) for size in sizes], sizes), strict=True):
            for centre, members in clusters({root: roots[root] for root in frame}, count).items():
                left.tokens.append(centre)
                left.merged[centre] = sum(roots[one] for one in members) / len(members)
    left.tokens = sorted([*left.tokens, *itertools.chain(*chosen)])
    return left


def salient(case: Case, frame: list[int], count: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < count:
        merits = {}
        for one in frame:
            if one not in chosen:
                others = chosen or [other for other in frame if other != one]
                merits[one] = case.attention[one] * min((1 - case.likes[one, other] for other in others), default=1)
        chosen += best(merits, 1)
    return chosen


def clusters(x: dict[int, Rows], count: int) -> dict[int, list[int]]:
    """Density peaks, each with its members."""
    if count == len(x):
        return {one: [one] for one in x}
    if not count:
        return {}
    far = {(a, b): float(np.linalg.norm(x[a] - x[b])) / math.sqrt(len(x[a])) for a in x for b in x}
    density = {a: math.exp(-np.mean([d**2 for d in sorted(far[a, b] for b in x)[: min(count, 7)]])) for a in x}
    order = best(density, len(x))
    scores = {}
    for place, one in enumerate(order):
        scores[one] = density[one] * min([far[one, other] for other in order[:place]] or [max(far.values())])
    centres = sorted(best(scores, count))
    members = {centre: [centre] for centre in centres}
    for one in x:
        if one not in centres:
            members[min(centres, key=lambda centre: (far[one, centre], centre))].append(one)
    return members


def aot(case: Case) -> Left:
    frames = case.crops()
    count, cells, layers = len(frames), len(frames[0]), case.image.signals.layers
    low, high = (case.image.signals.attention(at).double().tolist() for at in (int(layers * 5 / 26) - layers, -2))
    number = min(case.params.clips, count, case.keep)
    later = count - number
    anchors = round(case.keep * number / (number + later * case.params.distinct))
    anchors = min(max(anchors, number, case.keep - later * cells), number * cells)
    firsts = shares(anchors, [1.0] * number, [cells] * number)
    rests = shares(case.keep - anchors, [1.0] * later, [cells] * later) if later else []
    lengths = [count // number + (at < count % number) for at in range(number)]
    begins = [sum(lengths[:at]) for at in range(number)]
    left = Left([])
    for begin, length, first in zip(begins, lengths, firsts, strict=True):
        key = frames[begin]
        mine = sorted(anchors_of(case, key, low, high, first))
        taken = within(case, key, mine)
        for steps in range(1, length):
            frame = frames[begin + steps]
            part = rests.pop(0)
            those = sorted(anchors_of(case, frame, low, high, max(first, part)))
            sources = within(case, frame, those)
            cost = np.array([[1 - cos(source, anchor) for anchor in taken.values()] for source in sources.values()])
            plan = transport((cost - cost.min()) * (1 - math.exp(-(steps**2) / (2 * 1.5**2))))
            rows = {one: plan[i] / plan[i].sum() for i, one in enumerate(those)}
            stays = best({one: -float(row.max()) for one, row in rows.items()}, part)
            for j, anchor in enumerate(mine):
                goes = [one for one in those if one not in stays]
                mass = sum(rows[one][j] for one in goes)
                taken[anchor] = (taken[anchor] + sum(rows[one][j] * sources[one] for one in goes)) / (1 + mass)
            left.tokens += stays
            left.merged |= {one: sources[one] for one in stays}
        left.tokens += mine
        left.merged |= taken
    left.tokens.sort()
    return left


def anchors_of(case: Case, frame: list[int], low: list[float], high: list[float], count: int) -> list[int]:
    height, width = (max(case.places[one][axis] for one in frame) + 1 for axis in (1, 2))
    windows: dict[Any, list[int]] = defaultdict(list)
    for one in sorted(frame, key=lambda one: (-low[one], one)):
        _, row, column = case.places[one]
        windows[row * 3 // height, column * 3 // width].append(one)
    local: list[int] = []
    for turn in range(len(frame)):
        local += best({window[turn]: low[window[turn]] for window in windows.values() if turn < len(window)}, 9)
    local = local[: count // 2]
    return local + best({one: high[one] for one in frame if one not in local}, count - len(local))


def within(case: Case, frame: list[int], anchors: list[int]) -> dict[int, Rows]:
    others = [one for one in frame if one not in anchors]
    if not others:
        return {one: case.x[one] for one in anchors}
    edges = [max(max(case.places[one][axis] for one in frame), 1) for axis in (1, 2)]
    at = {one: np.array(case.places[one][1:]) / edges for one in frame}
    cost = [[1 - case.likes[one, a] + 0.5 * float(np.linalg.norm(at[one] - at[a])) for a in anchors] for one in others]
    plan = transport(np.array(cost))
    nearest = {one: best({a: case.likes[one, a] for a in anchors}, 1)[0] for one in others}
    out = {}
    for j, anchor in enumerate(anchors):
        moved = sum(plan[i, j] * case.x[one] for i, one in enumerate(others))
        mine = [case.x[anchor], *(case.x[one] for one in others if nearest[one] == anchor)]
        out[anchor] = 0.9 * (case.x[anchor] + moved) / (1 + plan[:, j].sum()) + 0.1 * sum(mine) / len(mine)
    return out


def transport(cost: Rows) -> Rows:
    """Sinkhorn's algorithm on the plan itself: its rows, then its columns, get their mass."""
    plan = np.exp(-cost / 0.1)
    for _ in range(100):
        plan = plan / plan.sum(1, keepdims=True) / plan.shape[0]
        plan = plan / plan.sum(0, keepdims=True) / plan.shape[1]
    return plan


ORACLES: dict[str, Callable[[Case], Left]] = {"evs": evs, "flash_vid": flash_vid, "aot": aot, "stc": stc}
