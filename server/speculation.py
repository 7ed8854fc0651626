"""Speculative decoding as this server offers it: its default, and what it says of the methods."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.messages import EngineInfo
from winnow.engine.speculation.registry import drafter_class
from winnow.engine.speculation.speculation import (
    Speculation,
    check_combination,
    check_draft,
    obstacle,
    parse_speculation,
    speculation_schema,
)
from winnow.server.settings import Settings, SettingsError


class Speculations:
    """
    Raises
        SettingsError: the default is wrong
    """

    def __init__(self, settings: Settings):
        default, self._has_draft = settings.speculative or {}, settings.draft_model is not None
        try:
            self.default = parse_speculation({"method": default} if isinstance(default, str) else default)
            check_draft(self.default, self._has_draft)
        except RequestError as error:
            raise SettingsError(error.message) from error

    def resolve(
        self, asked: dict[str, Any] | None, plan: Plan, info: EngineInfo, has_pictures: bool = False
    ) -> Speculation | None:
        """Of a request whose `speculative` is `asked`; the default holds where the plan leaves room for it, and where
        its draft model, if it needs one, can read the prompt.

        Raises
            RequestError
        """
        if asked is None:
            is_blind = has_pictures and self.default is not None and drafter_class(self.default.method).needs_draft
            return None if is_blind or obstacle(plan) is not None else self.default
        speculation = parse_speculation(asked)
        if speculation is not None and (why := info.refuses.get("speculative")):
            raise PlanNotSupported("speculative", f"speculative: {why}")
        check_draft(speculation, self._has_draft)
        check_combination(speculation, plan)
        return speculation

    @cached_property
    def catalogue(self) -> dict[str, Any]:
        """For /v1/models: everything that a request can write under `speculative`."""
        return {"methods": speculation_schema(), "default": self.default and self.default.model_dump(mode="json")}
