"""The plan: what a caller writes under "compression", validated and immutable.

    {"kv": {"evict": {"policy": "snapkv", "budget": 0.25, "sinks": 4, "recent": 64, "window": 32},
            "format": "int4", "residual": 32},
     "prompt": {"policy": "selective", "keep": 0.5}}

A policy's own knobs stand flat beside the common ones. Whatever is unknown, out of range or without effect is refused
with the JSON path of the field. `{}` is the plan that compresses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, cached_property, reduce
from hashlib import sha256
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.budget import MAX_TOKENS, Budget, is_everything, tokens_of
from winnow.engine.compression.merge_plan import AnyMerge, merge_model
from winnow.engine.compression.plan_errors import explain
from winnow.engine.compression.policy import PolicyParams, SetsBudgets, StagedPolicy
from winnow.engine.compression.prompt.plan import AnyPrompt, Prompt, prompt_model
from winnow.engine.compression.read import AnyRead, Read, read_model
from winnow.engine.compression.registry import EVICTION, MERGE, OWN_MERGE, PROMPT, READ, eviction_policy, merge_method
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.kernels.layout import PageFormat

FormatName = Literal["f32", "bf16", "int8", "int4", "int2", "fp8"]
"""Labels of `PageFormat`"""


class Part(BaseModel):
    """Base of the plan's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Evict(PolicyParams):
    """The knobs that all eviction policies have. An instance is of `evict_model(policy)`: it has the policy's own
    knobs too, and is itself the `params` that the policy's methods take."""

    policy: str
    budget: Budget = Field(description="what a lane keeps: a fraction (0.25) of the tokens seen, or a count (1024)")
    sinks: int = Field(4, ge=0, le=MAX_TOKENS, description="first tokens that are never evicted")
    recent: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="newest tokens that are never evicted; the policy's choice if unset"
    )
    during: Literal["prefill", "decode", "both"] = Field(
        "prefill", description="evict once when the prompt is read, every `interval` generated tokens, or both"
    )
    interval: int = Field(32, ge=1, le=65536, description="generated tokens between evictions during decode")
    head_budget: Literal["uniform", "adaptive"] = Field(
        "uniform", description="each head keeps the same, or the heads of a layer compete for what they keep (AdaKV)"
    )
    layer_budget: Literal["uniform", "pyramid"] = Field(
        "uniform", description="each layer keeps the same, or lower layers keep more (PyramidKV)"
    )
    merge: AnyMerge | None = Field(None, description="how evicted tokens are merged into kept ones; dropped if null")

    @model_validator(mode="after")
    def _interval_is_used(self) -> Evict:
        if self.during == "prefill" and "interval" in self.model_fields_set:
            raise PydanticCustomError(
                "unused", "has no effect unless `during` is 'decode' or 'both'", {"at": "interval"}
            )
        return self

    @model_validator(mode="after")
    def _merge_knows_the_scores(self) -> Evict:
        if (
            self.merge is not None
            and not merge_method(self.merge.policy).signals <= eviction_policy(self.policy).signals
        ):
            raise PydanticCustomError(
                "combination",
                "'{method}' weighs tokens by attention, which '{policy}' does not look at",
                {"at": "merge", "method": self.merge.policy, "policy": self.policy},
            )
        return self

    @model_validator(mode="after")
    def _shares_are_used(self) -> Evict:
        if isinstance(eviction_policy(self.policy), SetsBudgets):
            for name in ("head_budget", "layer_budget"):
                if getattr(self, name) != "uniform":
                    why = f"has no effect: '{self.policy}' itself says what each head keeps"
                    raise PydanticCustomError("unused", why, {"at": name})
        return self

    @model_validator(mode="after")
    def _compact_positions_are_possible(self) -> Evict:
        """Compact positions need lanes that all keep the same tokens, and no more than a window of them."""
        if not self.is_compact:
            if "block" in self.model_fields_set and hasattr(self, "positions"):
                raise PydanticCustomError("unused", "has no effect unless `positions` is 'compact'", {"at": "block"})
            return self
        wanted = {"during": "both", "head_budget": "uniform", "layer_budget": "uniform"}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise PydanticCustomError(
                    "combination", "compact positions need '{value}'", {"at": name, "value": value}
                )
        if isinstance(self.budget, float):
            raise PydanticCustomError("combination", "compact positions need a count of tokens", {"at": "budget"})
        return self

    @property
    def is_compact(self) -> bool:
        """Tokens are placed where they stand in the cache, and the prompt is evicted block by block."""
        return getattr(self, "positions", "original") == "compact"

    @property
    def block_tokens(self) -> int:
        """Tokens of the prompt between two evictions; 0: it is evicted at its end only."""
        return getattr(self, "block", 0) if self.is_compact else 0

    @property
    def keeps_all(self) -> bool:
        return is_everything(self.budget)

    def budget_tokens(self, seen: int) -> int:
        """Tokens that a lane keeps of `seen`."""
        return tokens_of(self.budget, seen)

    def voters(self, seen: int) -> int | None:
        """`EvictionPolicy.voters` of the plan's policy."""
        return eviction_policy(self.policy).voters(self, seen)

    def stage_bounds(self, layers: int) -> tuple[int, ...]:
        """`Staging.bounds` of a policy that acts amid the prefill, () of all others; PlanNotSupported if the model is
        not that deep."""
        policy = eviction_policy(self.policy)
        if not isinstance(policy, StagedPolicy):
            return ()
        chooses = policy.choosing_layer(self, layers)
        if chooses >= layers - 1:
            path = "compression.kv.evict.layer"
            raise PlanNotSupported(path, f"{path}: the model's last layer is {layers - 1}, and one must be above this")
        return 0, chooses + 1, layers

    def recent_tokens(self, budget_tokens: int) -> int:
        """Newest tokens to protect: the caller's number, or the policy's for this budget."""
        if self.recent is not None:
            return self.recent
        return eviction_policy(self.policy).default_recent(self, budget_tokens)


@cache
def evict_model(name: str) -> type[Evict]:
    """The model of `evict` for one policy: common knobs and its own, which therefore may not share a name."""
    policy = eviction_policy(name)
    doc = (type(policy).__doc__ or name).strip()
    fields: dict[str, Any] = {"policy": (Literal[name], Field(description=doc))}
    if name in OWN_MERGE:
        method = OWN_MERGE[name]
        text = f"how evicted tokens are merged into kept ones: as the paper does ('{method}') if unset, dropped if null"
        fields["merge"] = (AnyMerge | None, Field(merge_model(method)(policy=method), description=text))
    bases: Any = (Evict, policy.Params)
    return cast(type[Evict], create_model(f"Evict_{name}", __base__=bases, __doc__=doc, **fields))


if TYPE_CHECKING:
    AnyEvict = Evict
else:
    AnyEvict = Annotated[reduce(or_, (evict_model(name) for name in EVICTION)), Field(discriminator="policy")]


class KV(Part):
    """Compression of keys and values."""

    evict: AnyEvict | None = None
    format: FormatName | None = Field(None, description="page format of full pages; the engine's own if unset")
    residual: int = Field(32, ge=0, le=65536, description="newest tokens that stay unquantized")
    read: AnyRead | None = None

    @model_validator(mode="after")
    def _residual_is_used(self) -> KV:
        if self.format is None and "residual" in self.model_fields_set:
            raise PydanticCustomError("unused", "has no effect without `format`", {"at": "residual"})
        return self


class Plan(Part):
    """The resolved compression of one request."""

    kv: KV = KV()
    prompt: AnyPrompt | None = Field(None, description="shortens what messages mark as context, before it is read")

    @property
    def shortens(self) -> Prompt | None:
        """The prompt compression asked for; None if there is none or it keeps everything."""
        return None if self.prompt is None or self.prompt.keeps_all else self.prompt

    @property
    def evict(self) -> Evict | None:
        """The eviction asked for; None if there is none or its budget is everything."""
        evict = self.kv.evict
        return None if evict is None or evict.keeps_all else evict

    @property
    def read(self) -> Read | None:
        """What generated tokens read by; None if they read everything."""
        read = self.kv.read
        return None if read is None or read.reads_all else read

    @property
    def is_off(self) -> bool:
        """Neither shortens, nor evicts, nor names a format, nor reads a part: as if there were no plan."""
        return self.shortens is None and self.evict is None and self.format is None and self.read is None

    @property
    def evicts_at_prefill_end(self) -> bool:
        return self.evict is not None and self.evict.during != "decode"

    @property
    def evicts_in_decode(self) -> bool:
        return self.evict is not None and self.evict.during != "prefill"

    @property
    def interval(self) -> int:
        """Generated tokens between two evictions; 0 if none happen in decode."""
        return self.evict.interval if self.evict is not None and self.evicts_in_decode else 0

    @property
    def format(self) -> PageFormat | None:
        """Format of sealed pages; None is the engine's compute format."""
        return None if self.kv.format is None else PageFormat.parse(self.kv.format)

    @property
    def residual(self) -> int:
        """Newest tokens that stay in the compute format."""
        return self.kv.residual if self.kv.format is not None else 0

    def sealed_format(self, compute: PageFormat) -> PageFormat:
        """Format of sealed pages on an engine that computes in `compute`; PlanNotSupported if it has more bits."""
        if self.format is None:
            return compute
        if self.format.bits > compute.bits:
            raise PlanNotSupported(
                "compression.kv.format", f"'{self.kv.format}' is larger than '{compute.label}', the engine's own format"
            )
        return self.format

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
            plan = cls.model_validate(_without_future(data, at))
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


class Maximum(Part):
    """The most a request may hold on this server, as the operator writes it."""

    budget: Budget | None = Field(None, description="largest eviction budget: a fraction or a count")
    format: FormatName | None = Field(None, description="largest page format")

    def check(self, plan: Plan, at: str = "compression") -> None:
        """RequestError, naming the field and the limit, for a plan that may hold more.

        A limit that is a fraction cannot be compared with a count of tokens, nor the other way round: such a plan is
        refused. A plan that names no format holds f32.
        """
        if self.budget is not None:
            unit = "fraction of the tokens" if isinstance(self.budget, float) else "number of tokens"
            evict = plan.kv.evict
            if evict is not None and isinstance(eviction_policy(evict.policy), SetsBudgets):
                path = f"{at}.kv.evict.policy"
                raise RequestError(path, f"{path} '{evict.policy}' keeps all of some heads, which this server forbids")
            if evict is None or type(evict.budget) is not type(self.budget) or evict.budget > self.budget:
                path = f"{at}.kv.evict.budget"
                raise RequestError(path, f"{path} must be given, as a {unit} of at most {self.budget}, on this server")
        if self.format is not None:
            held = plan.format if plan.format is not None else PageFormat.F32
            if held.bits > PageFormat.parse(self.format).bits:
                path = f"{at}.kv.format"
                raise RequestError(path, f"{path} must be given, as '{self.format}' or smaller, on this server")


def evict_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `kv.evict` for each policy, by name."""
    return {name: evict_model(name).model_json_schema() for name in EVICTION}


def plan_schema() -> dict[str, Any]:
    """JSON schema of the whole plan, with its own `$defs`."""
    return Plan.model_json_schema()


def _without_future(data: dict[str, Any], at: str) -> dict[str, Any]:
    """The data without the parts of the design that this version does not serve; they may only be null."""
    names = ("vision",)
    for name in names:
        if data.get(name) is not None:
            raise PlanNotSupported(f"{at}.{name}", f"{at}.{name} is not supported by this server; leave it out")
    return {key: value for key, value in data.items() if key not in names}


def _fields(path: tuple[str, ...], policy: str | None) -> list[str]:
    """Names that are allowed in the object at `path`."""
    if path == ():
        return list(Plan.model_fields)
    if path == ("kv",):
        return list(KV.model_fields)
    if path == ("kv", "evict", "merge"):
        return list(merge_model(policy or next(iter(MERGE))).model_fields)
    if path == ("prompt",):
        return list(prompt_model(policy or next(iter(PROMPT))).model_fields)
    if path == ("kv", "read"):
        return list(read_model(policy or next(iter(READ))).model_fields)
    return list(evict_model(policy or next(iter(EVICTION))).model_fields)
