"""`kv.evict` of a plan: the knobs that all eviction policies have, and each policy's own beside them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.budget import MAX_TOKENS, Budget, is_everything, tokens_of
from winnow.engine.compression.knobs import any_method, method_model
from winnow.engine.compression.merge_plan import AnyMerge, merge_model
from winnow.engine.compression.policy import (
    HearsNewest,
    LooksAhead,
    PolicyParams,
    Reciting,
    SetsBudgets,
    StagedPolicy,
    Voting,
)
from winnow.engine.compression.registry import EVICTION, OWN_MERGE, eviction_policy, merge_method
from winnow.engine.compression.signals import Signal
from winnow.engine.errors import PlanNotSupported
from winnow.kernels.vote import Vote


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

    @property
    def recital_chunk(self) -> int:
        """Tokens of the prompt that the model repeats at a time before its eviction; 0: it repeats nothing."""
        policy = _reciting(self.policy)
        return 0 if policy is None else policy.recital_chunk(self)

    @property
    def looks_ahead(self) -> int:
        """Tokens that a draft model says behind the prompt, at most, before its eviction; 0: none is asked."""
        policy = _looking_ahead(self.policy)
        return 0 if policy is None else policy.lookahead(self)

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

    def newest_voters(self, seen: int) -> int:
        """`HearsNewest.newest_voters` of the plan's policy; 0 if it hears all alike."""
        policy = _hearing_newest(self.policy)
        return 0 if policy is None else policy.newest_voters(self, seen)

    @property
    def signals(self) -> frozenset[Signal]:
        return eviction_policy(self.policy).signals

    @property
    def first_voter(self) -> int:
        """First position whose query may vote. A model's first tokens have queries like no others: they would distort
        the moments."""
        return self.sinks if Signal.QUERIES in self.signals else 0

    def vote(self, prompt_tokens: int) -> Vote:
        """How the policy wants votes counted."""
        policy = _voting(self.policy)
        return Vote() if policy is None else policy.vote(self, prompt_tokens)

    def recent_tokens(self, budget_tokens: int) -> int:
        """Newest tokens to protect: the caller's number, or the policy's for this budget."""
        if self.recent is not None:
            return self.recent
        return eviction_policy(self.policy).default_recent(self, budget_tokens)


# What steps ask of every sequence; whether a policy is of a protocol takes long to find out.


@cache
def _reciting(name: str) -> Reciting | None:
    policy = eviction_policy(name)
    return policy if isinstance(policy, Reciting) else None


@cache
def _looking_ahead(name: str) -> LooksAhead | None:
    policy = eviction_policy(name)
    return policy if isinstance(policy, LooksAhead) else None


@cache
def _hearing_newest(name: str) -> HearsNewest | None:
    policy = eviction_policy(name)
    return policy if isinstance(policy, HearsNewest) else None


@cache
def _voting(name: str) -> Voting | None:
    policy = eviction_policy(name)
    return policy if isinstance(policy, Voting) else None


@cache
def evict_model(name: str) -> type[Evict]:
    """The model of `evict` for one policy: common knobs and its own, which therefore may not share a name."""
    fields: dict[str, Any] = {}
    if name in OWN_MERGE:
        method = OWN_MERGE[name]
        text = f"how evicted tokens are merged into kept ones: as the paper does ('{method}') if unset, dropped if null"
        fields["merge"] = (AnyMerge | None, Field(merge_model(method)(policy=method), description=text))
    return method_model(Evict, name, eviction_policy(name), **fields)


if TYPE_CHECKING:
    AnyEvict = Evict
else:
    AnyEvict = any_method(evict_model, EVICTION)
