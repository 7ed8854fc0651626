"""The methods that need a profile of the model, and who makes it. No torch: the server asks what a plan needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported

CALIBRATED: dict[str, str] = {
    "tri_attention": "winnow.engine.calibration.query_statistics:QueryStatistics",
    "razor_attention": "winnow.engine.calibration.head_classes:HeadClasses",
    "double_sparsity": "winnow.engine.calibration.heavy_channels:HeavyChannels",
    "matryoshka": "winnow.engine.calibration.bases:BasesAfterRope",
    "cskv": "winnow.engine.calibration.bases:BasesBeforeRope",
}
"""Method, as a plan names it -> the calibrator that makes its profile"""

NAMING = ("policy", "format", "rest")
"""Fields of a plan that name a method, or a page format"""


def profiles_needed(plan: Plan) -> list[tuple[str, str]]:
    """(path below the plan, method) of every method of the plan that needs a profile."""
    return list(_named(plan.model_dump(), ()))


def _named(part: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _named(value, (*path, key))
        elif key in NAMING and value in CALIBRATED:
            yield ".".join((*path, key)), value


def check_profiles(plan: Plan, available: Collection[str], model: str, at: str = "compression") -> None:
    """PlanNotSupported, with the command to run, if the plan needs a profile that the model lacks."""
    for path, method in profiles_needed(plan):
        if method not in available:
            raise PlanNotSupported(
                f"{at}.{path}",
                f"'{method}' needs a profile of this model, which does not exist; make it with "
                f"`winnow calibrate --model {model} --method {method}` and start the server again",
            )
