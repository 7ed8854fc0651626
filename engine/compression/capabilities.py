"""What the engine that runs can do of a plan, by what it states of itself."""

from __future__ import annotations

from collections.abc import Collection
from math import isclose
from typing import Any

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.policy import Kind
from winnow.engine.errors import PlanNotSupported
from winnow.engine.messages import EngineInfo

FORMAT, RESIDUAL = "compression.kv.format", "compression.kv.residual"
VISION = "compression.vision"


def for_engine(plan: Plan, info: EngineInfo) -> Plan:
    """The plan as the engine of `info` carries it out: one that leaves no token unquantized has a `residual` of 0.

    Raises
        PlanNotSupported: the engine refuses a part of it, or holds no pages of its format
    """
    data = plan.model_dump(exclude_unset=True, exclude_none=True)
    for path, why in info.refuses.items():
        asked = _at({"compression": data}, path)
        if asked and not _is_what_it_does(path, asked, info):
            raise PlanNotSupported(path, f"{path}: {why}")
    if plan.kv.format is not None and RESIDUAL in info.refuses:
        return Plan.parse(data | {"kv": data["kv"] | {"residual": 0}})
    return plan


def for_pictures(plan: Plan, kinds: Collection[Kind], info: EngineInfo, is_asked: bool = True) -> Plan:
    """The plan of a prompt with pictures of such kinds. Where the engine prunes every video, one that does is what the
    server does of itself, and images beside them stay whole.

    Args
        is_asked: the request says what it wants; otherwise the plan is the server's
    Raises
        PlanNotSupported: its methods do not go with them, or it leaves videos whole that the engine would prune
    """
    if info.video_keep is None or "video" not in kinds:
        plan.check_pictures(kinds)
        return plan
    if plan.prunes is None:
        if is_asked:
            raise PlanNotSupported(VISION, f"{VISION}: {info.refuses[VISION]}")
        plan = Plan.parse(plan.model_dump(exclude_unset=True) | {"vision": {"policy": "evs", "keep": info.video_keep}})
    plan.check_pictures(["video"])
    return plan


def _is_what_it_does(path: str, asked: Any, info: EngineInfo) -> bool:
    """Whether what is asked for at a path that the engine refuses is what it does for every request."""
    if path == FORMAT:
        return asked in info.formats
    if path != VISION or info.video_keep is None:
        return False
    same = isinstance(asked["keep"], float) and isclose(asked["keep"], info.video_keep)
    return same and asked["policy"] == "evs" and asked.get("positions", "original") == "original"


def _at(data: Any, path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for step in path.split("."):
        data = data.get(step) if isinstance(data, dict) else None
    return data
