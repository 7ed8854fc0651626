"""`on_pressure` of a plan: what a request gives up when pages run out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.evict_plan import AnyEvict
from winnow.engine.compression.format_plan import check_compact
from winnow.engine.compression.part import FormatName, Part
from winnow.engine.compression.policy import StagedPolicy
from winnow.engine.compression.registry import eviction_policy
from winnow.engine.compression.signals import Signal
from winnow.kernels.layout import PageFormat

if TYPE_CHECKING:
    from winnow.engine.compression.plan import KV


class OnPressure(Part):
    """What a request gives up when pages run out, before anybody is preempted."""

    evict: AnyEvict | None = Field(None, description="evicts at once, and from then on instead of `kv.evict`")
    format: FormatName | None = Field(None, description="page format of full pages from then on; as before if unset")
    residual: int = Field(32, ge=0, le=65536, description="newest tokens that stay unquantized from then on")

    @model_validator(mode="after")
    def _can_be_done_at_any_time(self) -> OnPressure:
        if self.format is None and "residual" in self.model_fields_set:
            raise PydanticCustomError("unused", "has no effect without `format`", {"at": "residual"})
        if self.format is None and (self.evict is None or self.evict.keeps_all):
            raise PydanticCustomError(
                "unused", "must be given where `format` is not, and keep less than all", {"at": "evict"}
            )
        if self.evict is not None and self.evict.is_compact:
            raise PydanticCustomError(
                "combination", "compact positions rule from the beginning or not at all", {"at": "evict"}
            )
        if self.format is not None and PageFormat.parse(self.format).drops_channels:
            why = f"'{self.format}' chooses channels by the last queries of the prompt, which nobody has noted by then"
            raise PydanticCustomError("combination", why, {"at": "format"})
        policy = None if self.evict is None else eviction_policy(self.evict.policy)
        if policy is not None and (Signal.ATTENTION in policy.signals or isinstance(policy, StagedPolicy)):
            raise PydanticCustomError(
                "combination",
                "'{policy}' goes by attention, which nobody has noted when pages run out",
                {"at": "evict", "policy": self.evict and self.evict.policy},
            )
        return self

    def check_with(self, kv: KV) -> None:
        """PydanticCustomError for what cannot follow a plan's `kv`."""
        if kv.mix is not None:
            why = f"'{kv.mix.policy}' has given lanes two formats, which nothing further can follow"
            raise PydanticCustomError("combination", why, {"at": "on_pressure"})
        if self.evict is not None and kv.evict is not None and kv.evict.is_compact:
            why = "compact positions of `kv.evict` cannot become others"
            raise PydanticCustomError("combination", why, {"at": "on_pressure"})
        if self.format is not None:
            check_compact(PageFormat.parse(self.format), kv.evict, "on_pressure")
        if kv.read is not None:
            why = "what `kv.read` chooses by is kept for lanes that are not rewritten between events"
            raise PydanticCustomError("combination", why, {"at": "on_pressure"})
        if self.format is not None and kv.format is not None:
            change = PageFormat.parse(self.format).mean_bits - PageFormat.parse(kv.format).mean_bits
            if change > 0 or (change == 0 and self.evict is None):
                raise PydanticCustomError(
                    "combination",
                    "'{format}' is no smaller than `kv.format`, '{base}'",
                    {"at": "on_pressure", "format": self.format, "base": kv.format},
                )
