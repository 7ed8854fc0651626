"""The merge rules of one lane, written out with loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Lane:
    """One lane before an eviction: float64 tensors of the tokens it holds, and the places of those that stay."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    stands_for: list[float]
    """How many tokens each stands for"""
    keep: list[int]
    sinks: int
    recent: int

    @property
    def given_up(self) -> list[int]:
        return [i for i in range(len(self.keys)) if i not in self.keep]


Merged = tuple[dict[int, Tensor], dict[int, Tensor], dict[int, float]]
"""place -> key, value and how many tokens it stands for"""


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def untouched(lane: Lane) -> Merged:
    return (
        {i: lane.keys[i] for i in lane.keep},
        {i: lane.values[i] for i in lane.keep},
        {i: lane.stands_for[i] for i in lane.keep},
    )


def kv_merging(lane: Lane, threshold: float = 0.0, fraction: float = 1.0, proportional: bool = False) -> Merged:
    keys, values, stands_for = untouched(lane)
    nearest = {e: max(lane.keep, key=lambda t: cosine(lane.keys[e], lane.keys[t])) for e in lane.given_up}
    likeness = {e: cosine(lane.keys[e], lane.keys[t]) for e, t in nearest.items()}
    first = sorted(lane.given_up, key=lambda e: (-likeness[e], e))[: math.ceil(fraction * len(lane.given_up))]
    merging = [e for e in first if likeness[e] >= threshold]
    for t in lane.keep:
        weights = {}
        for e in merging:
            if nearest[e] == t:
                own, other = float(lane.values[e].norm()), float(lane.values[t].norm())
                weights[e] = max(0.0, likeness[e]) * own / (own + other) * lane.stands_for[e]
        total = lane.stands_for[t] + sum(weights.values())
        values[t] = (lane.stands_for[t] * lane.values[t] + sum(w * lane.values[e] for e, w in weights.items())) / total
        if proportional:
            stands_for[t] = total
    return keys, values, stands_for


def ems(lane: Lane, candidates: float = 4.0, threshold: float = 0.6) -> Merged:
    keys, values, stands_for = untouched(lane)
    newest = min(lane.recent, len(lane.keep))
    centres = lane.keep[: len(lane.keep) - newest][lane.sinks :]
    ranked = sorted(lane.given_up, key=lambda e: (-float(lane.scores[e]), e))
    classes: dict[int, list[int]] = {c: [] for c in centres}
    for e in ranked[: int((candidates - 1) * len(centres))]:
        nearest = max(centres, key=lambda c: cosine(lane.keys[e], lane.keys[c]))
        if cosine(lane.keys[e], lane.keys[nearest]) >= threshold:
            classes[nearest].append(e)
    for c, members in classes.items():
        weights = {i: float(lane.scores[i]) for i in (c, *members)}
        if members and sum(weights.values()) > 0:
            total = sum(weights.values())
            values[c] = sum(w * lane.values[i] for i, w in weights.items()) / total  # type: ignore[assignment]
            towards = sum(w * lane.keys[i] / lane.keys[i].norm() for i, w in weights.items())
            length = sum(w * float(lane.keys[i].norm()) for i, w in weights.items()) / total
            keys[c] = towards / towards.norm() * length  # type: ignore[union-attr, operator]
    return keys, values, stands_for


def compensation(lane: Lane) -> Merged:
    keys, values, stands_for = untouched(lane)
    if lane.given_up:
        carrier = lane.keep[min(lane.sinks, len(lane.keep) - 1)]
        members = [*lane.given_up, carrier]
        total = sum(lane.stands_for[i] for i in members)
        keys[carrier] = sum(lane.stands_for[i] * lane.keys[i] for i in members) / total  # type: ignore[assignment]
        values[carrier] = sum(lane.stands_for[i] * lane.values[i] for i in members) / total  # type: ignore[assignment]
        stands_for[carrier] = total
    return keys, values, stands_for


ORACLES: dict[str, Callable[..., Merged]] = {"kv_merging": kv_merging, "ems": ems, "compensation": compensation}
