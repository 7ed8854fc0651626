"""The plan: what a caller writes under "compression", validated and immutable.

    {"kv": {"evict": {"policy": "snapkv", "budget": 0.25, "sinks": 4, "recent": 64, "window": 32},
            "format": "int4", "residual": 32},
     "vision": {"policy": "div_prune", "keep": 64},
     "prompt": {"policy": "selective", "keep": 0.5},
     "on_pressure": {"format": "int4", "residual": 0}}

or, alone, {"quality": 0.98}: the cheapest plan that was measured to hold it on the loaded model.

A policy's own knobs stand flat beside the common ones. Whatever is unknown, out of range or without effect is refused
with the JSON path of the field. `{}` is the plan that compresses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.evict_plan import AnyEvict, Evict, evict_model
from winnow.engine.compression.format_plan import check_compact
from winnow.engine.compression.knobs import schemas
from winnow.engine.compression.merge_plan import merge_model
from winnow.engine.compression.mix import AnyMix, Mix, check_mix, mix_model
from winnow.engine.compression.part import FORMATS, FormatName, Part, described
from winnow.engine.compression.plan_errors import explain
from winnow.engine.compression.pressure_plan import OnPressure
from winnow.engine.compression.prompt.plan import AnyPrompt, Prompt, prompt_model
from winnow.engine.compression.read import AnyRead, Read, read_model
from winnow.engine.compression.registry import EVICTION, MERGE, MIX, PROMPT, READ, eviction_policy
from winnow.engine.compression.vision.plan import AnyVision, Vision, check_vision, vision_model
from winnow.engine.compression.vision.policy import Kind
from winnow.engine.compression.vision.registry import VISION
from winnow.engine.config import NO_DRAFT
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.kernels.layout import PageFormat

if TYPE_CHECKING:
    from winnow.engine.compression.maximum import Maximum


class KV(Part):
    """Compression of keys and values."""

    evict: AnyEvict | None = None
    format: FormatName | None = Field(
        None, description=f"page format of full pages; the engine's own if unset. {described(FORMATS)}"
    )
    mix: AnyMix | None = Field(None, description="how unimportant tokens are held at fewer bits, instead of evicted")
    residual: int = Field(32, ge=0, le=65536, description="newest tokens that stay unquantized")
    read: AnyRead | None = None
    scope: Literal["document"] | None = Field(
        None,
        description="'document': what messages mark as context, and all before it, is compressed before the rest of "
        "the prompt is read, and kept for later requests on it; the whole prompt if unset",
    )

    @model_validator(mode="after")
    def _parts_go_together(self) -> KV:
        if self.format is None and self.mix is None and "residual" in self.model_fields_set:
            raise PydanticCustomError("unused", "has no effect without `format` or `mix`", {"at": "residual"})
        if self.format is not None:
            check_compact(PageFormat.parse(self.format), self.evict, "format")
        if self.mix is not None:
            check_mix(self.mix, self.format, self.evict, self.read)
        if self.read is not None and self.format is not None and PageFormat.parse(self.format).is_opened:
            why = "`kv.read` reads parts of pages, and those of '{format}' are opened whole"
            raise PydanticCustomError("combination", why, {"at": "read", "format": self.format})
        return self

    @model_validator(mode="after")
    def _a_document_is_compressed_whatever_is_asked(self) -> KV:
        if self.scope is None:
            return self
        acts = self.format is not None or self.mix is not None
        if not acts and (self.evict is None or self.evict.during == "decode"):
            why = "has no effect without `format`, `mix`, or an `evict` that is not for decode alone"
            raise PydanticCustomError("unused", why, {"at": "scope"})
        for label in (self.format, None if self.mix is None else self.mix.format):
            if label is not None and PageFormat.parse(label).drops_channels:
                why = (
                    "'{format}' drops channels by the newest queries, and documents are compressed before the question"
                )
                raise PydanticCustomError("combination", why, {"at": "scope", "format": label})
        chooser = self.evict if self.mix is None or self.mix.choice is None else self.mix
        if chooser is not None and not eviction_policy(chooser.policy).query_agnostic:
            agnostic = [name for name in EVICTION if eviction_policy(name).query_agnostic]
            raise PydanticCustomError(
                "combination",
                "'{policy}' goes by what later tokens look at, and a document is compressed before the question is "
                "read; these ask for none: {others}",
                {"at": "scope", "policy": chooser.policy, "others": ", ".join(agnostic)},
            )
        return self


class Plan(Part):
    """The resolved compression of one request."""

    kv: KV = KV()
    vision: AnyVision | None = Field(None, description="which tokens of images and videos the model reads")
    prompt: AnyPrompt | None = Field(None, description="shortens what messages mark as context, before it is read")
    on_pressure: OnPressure | None = Field(None, description="compression beyond `kv`, done when pages run out")

    quality: float | None = Field(
        None, gt=0, le=1, description="how often the likeliest token must be the uncompressed model's: chooses the plan"
    )

    @model_validator(mode="after")
    def _parts_go_together(self) -> Plan:
        if self.on_pressure is not None:
            self.on_pressure.check_with(self.kv)
        if self.prunes is not None:
            check_vision(self.prunes, self.kv)
        named = [name for name in type(self).model_fields if name != "quality" and name in self.model_fields_set]
        if self.quality is not None and named:
            why = f"chooses the plan itself; leave out '{named[0]}'"
            raise PydanticCustomError("combination", why, {"at": "quality"})
        return self

    @cached_property
    def under_pressure(self) -> Plan | None:
        """The plan that rules from the moment when pages run out; None if the request gives nothing up."""
        further = self.on_pressure
        if further is None:
            return None
        changes: dict[str, Any] = {} if further.evict is None else {"evict": further.evict}
        if further.format is not None:
            changes |= {"format": further.format, "residual": further.residual}
        kv = KV.model_construct(**(dict(self.kv) | changes))
        return Plan.model_construct(**(dict(self) | {"kv": kv, "on_pressure": None}))

    @property
    def shortens(self) -> Prompt | None:
        """The prompt compression asked for; None if there is none or it keeps everything."""
        return None if self.prompt is None or self.prompt.keeps_all else self.prompt

    @property
    def prunes(self) -> Vision | None:
        """The pruning of vision tokens asked for; None if there is none or it keeps everything."""
        return None if self.vision is None or self.vision.keeps_all else self.vision

    @cached_property
    def drops_between_layers(self) -> Vision | None:
        """The pruning of vision tokens that takes place, wholly or in part, within the language model."""
        return self.prunes if self.prunes is not None and "llm_layer" in self.prunes.stages else None

    @cached_property
    def evict(self) -> Evict | None:
        """The choice of tokens to keep, or under a mix to keep at more bits; None if there is none or it is all."""
        evict = self.kv.evict
        if self.mix is not None and (choice := self.mix.choice) is not None:
            evict = evict_model(self.mix.policy)(policy=self.mix.policy, **choice)
        return None if evict is None or evict.keeps_all else evict

    @property
    def mix(self) -> Mix | None:
        """How tokens that `evict` does not choose are held; None drops them."""
        return self.kv.mix

    @property
    def read(self) -> Read | None:
        """What generated tokens read by; None if they read everything."""
        read = self.kv.read
        return None if read is None or read.reads_all else read

    @property
    def is_off(self) -> bool:
        """Neither shortens, prunes, evicts, names a format, nor reads a part, nor will: as if there were no plan."""
        does = (self.shortens, self.prunes, self.evict, self.format, self.read, self.on_pressure)
        return all(part is None for part in does)

    @property
    def evicts_at_prefill_end(self) -> bool:
        return self.evict is not None and self.evict.during != "decode"

    @property
    def evicts_in_decode(self) -> bool:
        return self.evict is not None and self.evict.during != "prefill"

    @cached_property
    def interval(self) -> int:
        """Generated tokens between two evictions; 0 if none happen in decode."""
        return self.evict.interval if self.evict is not None and self.evicts_in_decode else 0

    @property
    def format(self) -> PageFormat | None:
        """Format of sealed pages, under a mix those of important tokens; None is the engine's compute format."""
        label = self.kv.format if self.mix is None else self.mix.format
        return None if label is None else PageFormat.parse(label)

    @property
    def rest_format(self) -> PageFormat | None:
        """Format of the pages behind those; None where there are none."""
        return None if self.mix is None else PageFormat.parse(self.mix.rest)

    @cached_property
    def drops_channels(self) -> bool:
        """Pages of its formats lack channels of keys, which must be chosen first."""
        return any(fmt.drops_channels for fmt in (self.format, self.rest_format) if fmt is not None)

    @cached_property
    def goes_by_position(self) -> bool:
        """Who reads pages of its formats must know where their tokens stand in the text."""
        return any(fmt.goes_by_position for fmt in (self.format, self.rest_format) if fmt is not None)

    @property
    def residual(self) -> int:
        """Newest tokens that stay in the compute format."""
        return self.kv.residual if self.kv.format is not None or self.mix is not None else 0

    def sealed_format(self, compute: PageFormat) -> PageFormat:
        """Format of sealed pages on an engine that computes in `compute`; PlanNotSupported if it has more bits."""
        if self.format is None:
            return compute
        if self.format.mean_bits > compute.mean_bits:
            path = f"compression.kv.{'format' if self.mix is None else 'mix.format'}"
            raise PlanNotSupported(path, f"'{self.format.label}' is larger than '{compute.label}', the engine's format")
        return self.format

    def check_formats(self, known: Collection[str]) -> None:
        """PlanNotSupported for a page format that is not among those that the engine's backend reads."""
        further = self.on_pressure
        named = {
            "kv.format": self.kv.format,
            "kv.mix.format": None if self.mix is None else self.mix.format,
            "kv.mix.rest": None if self.mix is None else self.mix.rest,
            "on_pressure.format": None if further is None else further.format,
        }
        for name, label in named.items():
            if label is not None and label not in known:
                path = f"compression.{name}"
                why = f"{path}: this engine has no pages in '{label}'; it has {', '.join(known)}"
                raise PlanNotSupported(path, why)

    def check_windows(self, has_windows: bool) -> None:
        """PlanNotSupported where the model's layers have sliding windows, which are found by the order of positions."""
        if has_windows and self.mix is not None:
            path = "compression.kv.mix"
            raise PlanNotSupported(path, f"{path}: this model's sliding windows need lanes in order of positions")

    def check_draft(self, has_draft: bool) -> None:
        """PlanNotSupported where the plan's policy looks ahead and the server has no draft model to do it."""
        if self.evict is not None and self.evict.looks_ahead and not has_draft:
            path = "compression.kv.evict.policy"
            raise PlanNotSupported(path, f"{path}: '{self.evict.policy}' {NO_DRAFT}")

    def check_pictures(self, kinds: Collection[Kind]) -> None:
        """PlanNotSupported where the plan's methods do not go with prompts that have images or videos: `kinds`."""
        if not kinds:
            return
        instead = 'ask for another plan; "compression": {} is none'
        if self.prunes is not None and (others := sorted(set(kinds) - self.prunes.kinds)):
            path, named = "compression.vision.policy", " and ".join(f"{kind}s" for kind in sorted(self.prunes.kinds))
            why = f"'{self.prunes.policy}' prunes {named}, and there are {others[0]}s"
            raise PlanNotSupported(path, f"{path}: {why}; {instead}")
        if self.evict is not None and (self.evict.recital_chunk or self.evict.looks_ahead):
            path, does = "compression.kv.evict.policy", "repeat" if self.evict.recital_chunk else "read ahead of"
            why = f"'{self.evict.policy}' has a model {does} the prompt, and there are {sorted(kinds)[0]}s in it"
            raise PlanNotSupported(path, f"{path}: {why}; {instead}")

    def budget_tokens(self, seen: int) -> int:
        """Tokens that a lane keeps of `seen`, before layers and heads share them out; at least 1."""
        return max(1, seen) if self.evict is None else self.evict.budget_tokens(seen)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, equal for plans that mean the same, whether or not they spell defaults out."""
        canonical = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return sha256(canonical.encode()).hexdigest()[:32]

    def to_wire(self) -> dict[str, Any]:
        """JSON data for `Submit.plan`; `parse` reads it. What concerned the prompt is over by then."""
        return self.model_dump(exclude_unset=True, exclude={"prompt"})

    @classmethod
    def parse(cls, data: Any, at: str = "compression") -> Plan:
        """The plan that JSON data describes; RequestError names what is wrong, as a path below `at`."""
        if not isinstance(data, dict):
            raise RequestError(at, f"{at} must be an object")
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, at, _fields) from None
        if plan.read is not None:
            plan.read.check_with(plan.evict, at)
        return plan

    @classmethod
    def resolve(
        cls,
        data: Any,
        profiles: Mapping[str, Plan],
        default: Plan | None = None,
        maximum: Maximum | None = None,
    ) -> Plan:
        """The plan of a request whose "compression" is `data`: an object, a profile's name, or None for the default.

        Raises RequestError for a plan that is wrong, unknown, or holds more than `maximum`.
        """
        if data is None:
            plan = default or cls()
        elif isinstance(data, str):
            if data not in profiles:
                known = ", ".join(sorted(profiles)) or "none are configured"
                raise RequestError("compression", f"compression: unknown profile {data[:40]!r}; known: {known}")
            plan = profiles[data]
        elif isinstance(data, dict):
            plan = cls.parse(data)
        else:
            raise RequestError("compression", "compression must be an object or the name of a profile")
        if maximum is not None:
            maximum.check(plan)
        return plan


def evict_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `kv.evict` for each policy, by name."""
    return schemas(evict_model, EVICTION)


def plan_schema() -> dict[str, Any]:
    """JSON schema of the whole plan, with its own `$defs`."""
    return Plan.model_json_schema()


def _fields(path: tuple[str, ...], policy: str | None) -> list[str]:
    """Names that are allowed in the object at `path`."""
    if path == ():
        return list(Plan.model_fields)
    if path == ("kv",):
        return list(KV.model_fields)
    if path == ("on_pressure",):
        return list(OnPressure.model_fields)
    if path == ("kv", "mix"):
        return list(mix_model(policy or next(iter(MIX))).model_fields)
    if path[-1] == "merge":
        return list(merge_model(policy or next(iter(MERGE))).model_fields)
    if path == ("vision",):
        return list(vision_model(policy or next(iter(VISION))).model_fields)
    if path == ("prompt",):
        return list(prompt_model(policy or next(iter(PROMPT))).model_fields)
    if path == ("kv", "read"):
        return list(read_model(policy or next(iter(READ))).model_fields)
    return list(evict_model(policy or next(iter(EVICTION))).model_fields)
