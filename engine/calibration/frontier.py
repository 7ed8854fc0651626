"""The frontier of a model: what plans cost in quality and what they hold, so that a caller may name the quality alone.

    "compression": {"quality": 0.98}

is the plan that holds least among those whose quality, less its standard error, is no worse. Uncompressed is always
among them. Kept like a profile (see `store`), as frontier.json. No torch: the server chooses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from winnow.engine.calibration.store import PACKAGED, VERSION, cache_folder, weights_hash
from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.messages import FrontierPoint

log = logging.getLogger(__name__)

NAME = "frontier.json"


class Frontier(msgspec.Struct, frozen=True):
    """The file."""

    version: str
    facts: dict[str, Any]
    points: tuple[FrontierPoint, ...]


def choose(points: Sequence[FrontierPoint], quality: float) -> FrontierPoint | None:
    """The point that holds least of those that are sure of the quality; the better one of equals."""
    sure = [point for point in points if point.quality - point.error >= quality]
    return min(sure, key=lambda point: (point.memory, -point.quality), default=None)


def resolve_quality(plan: Plan, points: Sequence[FrontierPoint], model: str, at: str = "compression") -> Plan:
    """The plan itself, or the one that its `quality` chooses. PlanNotSupported, with the command to run, if the model's
    frontier was never measured."""
    if plan.quality is None:
        return plan
    point = choose(points, plan.quality)
    if point is None:
        raise PlanNotSupported(
            f"{at}.quality",
            f"{at}.quality chooses among plans whose quality on this model is known, and that of none is; measure it "
            f"with `winnow calibrate --model {model} --frontier` and start the server again",
        )
    return Plan.parse(point.plan)


def load_frontier(path: Path, folders: Sequence[Path] | None = None) -> tuple[FrontierPoint, ...]:
    """The frontier of the model at `path` (see `resolve_model`); of two folders the later wins. () if there is none."""
    points: tuple[FrontierPoint, ...] = ()
    key = weights_hash(path)
    for folder in (PACKAGED, cache_folder()) if folders is None else folders:
        file = folder / key / NAME
        if not file.is_file():
            continue
        try:
            frontier = msgspec.json.decode(file.read_bytes(), type=Frontier)
            if frontier.version != VERSION:
                raise ValueError(f"it is of version {frontier.version}, not {VERSION}")
            for point in frontier.points:
                Plan.parse(point.plan)
            points = frontier.points
        except (OSError, ValueError, msgspec.MsgspecError, RequestError) as error:
            log.warning("%s is not used: %s", file, error)
    return points


def save_frontier(folder: Path, path: Path, points: Sequence[FrontierPoint], facts: dict[str, Any]) -> Path:
    """Writes the frontier of the model at `path`; `facts` say how it was measured. Returns the file."""
    file = folder / weights_hash(path) / NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    data = msgspec.json.encode(Frontier(VERSION, facts, tuple(points)))
    part.write_bytes(msgspec.json.format(data, indent=1) + b"\n")
    part.replace(file)
    return file
