"""What the engine that runs can do of a plan, by what it states of itself."""

from __future__ import annotations

from typing import Any

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported
from winnow.engine.messages import EngineInfo

FORMAT, RESIDUAL = "compression.kv.format", "compression.kv.residual"


def for_engine(plan: Plan, info: EngineInfo) -> Plan:
    """The plan as the engine of `info` carries it out: one that leaves no token unquantized has a `residual` of 0.

    Raises
        PlanNotSupported: the engine refuses a part of it, or holds no pages of its format
    """
    data = plan.model_dump(exclude_unset=True, exclude_none=True)
    for path, why in info.refuses.items():
        asked = _at({"compression": data}, path)
        if asked and not (path == FORMAT and asked in info.formats):
            raise PlanNotSupported(path, f"{path}: {why}")
    if plan.kv.format is not None and RESIDUAL in info.refuses:
        return Plan.parse(data | {"kv": data["kv"] | {"residual": 0}})
    return plan


def _at(data: Any, path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for step in path.split("."):
        data = data.get(step) if isinstance(data, dict) else None
    return data
