"""Which compression plans this server takes, and what it says of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from winnow.engine.calibration.frontier import resolve_quality
from winnow.engine.calibration.registry import check_profiles
from winnow.engine.compression.capabilities import for_engine
from winnow.engine.compression.maximum import Maximum
from winnow.engine.compression.merge_plan import merge_schema
from winnow.engine.compression.mix import mix_schema
from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.plan import Plan, evict_schema, plan_schema
from winnow.engine.compression.profiles import PROFILES, load_profiles
from winnow.engine.compression.prompt.plan import prompt_schema
from winnow.engine.compression.read import read_schema
from winnow.engine.compression.vision.plan import vision_schema
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.messages import EngineInfo
from winnow.kernels.layout import PageFormat
from winnow.server.settings import Settings, SettingsError


class Plans:
    """Named profiles, the server's default and its maximum.

    Raises
        SettingsError: a profile, the default or the maximum is wrong
    """

    def __init__(self, settings: Settings):
        try:
            self.profiles = load_profiles(settings.profiles or PROFILES)
            self.maximum: Maximum | None = settings.max_compression
            self.default = Plan.resolve(settings.compression, self.profiles, None, self.maximum)
        except (ValueError, RequestError) as error:
            raise SettingsError(f"compression: {error}") from error

    def resolve(self, asked: Any, info: EngineInfo, model: str) -> Plan:
        """The plan of a request whose `compression` is `asked`, on the engine of `info`.

        Args
            model: as `winnow calibrate --model` takes it, for errors
        Raises
            RequestError
        """
        named = for_engine(Plan.resolve(asked, self.profiles, self.default, self.maximum), info)
        plan = resolve_quality(named, info.frontier, model)
        if plan is not named and self.maximum is not None:
            self.maximum.check(plan)
        plan.sealed_format(PageFormat.parse(info.compute_format))
        plan.check_windows(info.has_windows)
        plan.check_formats(info.formats)
        plan.check_draft(info.draft_max_len is not None)
        check_profiles(plan, info.profiles, model)
        if asked is not None and plan.prunes is not None and not info.sees:
            raise PlanNotSupported("compression.vision", "compression.vision: this model reads text only")
        return plan

    def catalogue_of(self, info: EngineInfo | None) -> dict[str, Any]:
        """`catalogue`, and what the engine says of it: null while it is not up."""
        if info is None:
            return self.catalogue | {"calibrated": None, "missing": None, "refused": None}
        formats = {"formats": {name: what for name, what in FORMATS.items() if name in info.formats}}
        said = {"calibrated": list(info.profiles), "missing": info.missing_policies, "refused": info.refuses}
        return self.catalogue | formats | said

    @cached_property
    def catalogue(self) -> dict[str, Any]:
        """Everything that a request can write under `compression`."""
        return {
            "policies": evict_schema(),
            "merges": merge_schema(),
            "mixes": mix_schema(),
            "vision": vision_schema(),
            "prompt": prompt_schema(),
            "read": read_schema(),
            "formats": FORMATS,
            "profiles": {name: described(plan) for name, plan in self.profiles.items()},
            "default": described(self.default),
            "maximum": self.maximum.model_dump(mode="json", exclude_none=True) if self.maximum else None,
            "schema": plan_schema(),
        }


def described(plan: Plan) -> dict[str, Any]:
    """A plan as resolved, defaults spelled out."""
    return plan.model_dump(mode="json", exclude_none=True)


def labels(plan: Plan, compute_format: str) -> tuple[str, str]:
    """Policy and format as metrics name them: words of our own tables."""
    policy = plan.mix.policy if plan.mix else plan.evict.policy if plan.evict else "none"
    fmt = plan.sealed_format(PageFormat.parse(compute_format)).label
    return policy, fmt if plan.rest_format is None else f"{fmt}+{plan.rest_format.label}"
