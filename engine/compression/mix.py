"""`kv.mix` of a plan: {"policy": "mikv", "format": "int8", "rest": "int2"}.

Nothing is evicted: the tokens that a policy would drop stay, at fewer bits. Important ones are held in `format`, the
others in `rest`, and attention merges the parts. "mikv" lets `kv.evict` say who is important; the other methods have a
choice of their own, which the engine carries out as if it were an eviction. With "mini_cache" the others lie in pages
that lanes of two layers share.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.policy import MergesLayers, PolicyParams, StagedPolicy
from winnow.engine.compression.registry import MIX, eviction_policy, mix_method
from winnow.engine.errors import PlanNotSupported
from winnow.kernels.layer_merge import LayerMerge
from winnow.kernels.layout import PageFormat

LOW = sorted((fmt for fmt in PageFormat if fmt.is_quantized and not fmt.spans_layers), key=lambda fmt: -fmt.mean_bits)
"""Formats of unimportant tokens"""

if TYPE_CHECKING:
    HighFormat = str
    LowFormat = str
else:
    HighFormat = Literal[
        tuple(fmt.label for fmt in PageFormat if fmt.mean_bits > LOW[-1].mean_bits and not fmt.spans_layers)
    ]
    LowFormat = Literal[tuple(fmt.label for fmt in LOW)]


class MixMethod(Protocol):
    """One named way to mix formats. Stateless; the registry makes one instance for the process."""

    format: ClassVar[str | None]
    """Of important tokens, unless the caller names another; None is the engine's compute format"""

    rest: ClassVar[str | None]
    """Of the other tokens, where the method has a format of its own for them; None lets the caller choose"""

    demotes: ClassVar[bool]
    """Whether a token that was important may lose its bits later on; otherwise it is judged once"""

    Params: ClassVar[type[PolicyParams]]
    """The method's own knobs; the request's `mix` object holds them beside the common ones"""

    def choice(self, params: Any) -> dict[str, Any] | None:
        """Knobs of the choice of important tokens, as those of an eviction by the policy of the same name; None where
        `kv.evict` chooses."""


class Mix(PolicyParams):
    """An instance is of `mix_model(policy)`: it has the method's own knobs too."""

    policy: str
    format: HighFormat | None = Field(None, description="page format of important tokens; the engine's own if null")
    rest: str = Field("int2", description="page format of the other tokens")

    @model_validator(mode="after")
    def _rest_is_smaller(self) -> Self:
        if self.format is not None and (
            PageFormat.parse(self.rest).mean_bits >= PageFormat.parse(self.format).mean_bits
        ):
            raise PydanticCustomError("unused", "has no fewer bits than `format`", {"at": "rest"})
        return self

    @property
    def demotes(self) -> bool:
        return mix_method(self.policy).demotes

    def layer_merge(self, layers: int) -> LayerMerge | None:
        """`MergesLayers.layer_merge`; None for other methods. PlanNotSupported where the model has no such layers."""
        method = mix_method(self.policy)
        if not isinstance(method, MergesLayers):
            return None
        merge = method.layer_merge(self, layers)
        if not merge.lower_layers(layers):
            path = "compression.kv.mix.start"
            raise PlanNotSupported(path, f"{path}: no two of the model's {layers} layers are at this depth or above")
        return merge

    @property
    def choice(self) -> dict[str, Any] | None:
        """`MixMethod.choice` of this method."""
        return mix_method(self.policy).choice(self)


@cache
def mix_model(name: str) -> type[Mix]:
    """The model of `mix` for one method."""
    method = mix_method(name)
    common = Mix.model_fields
    fmt = (HighFormat | None, Field(method.format, description=common["format"].description))
    formats = LowFormat if method.rest is None else Literal[method.rest]
    rest = (formats, Field(method.rest or common["rest"].default, description=common["rest"].description))
    return method_model(Mix, name, method, format=fmt, rest=rest)


if TYPE_CHECKING:
    AnyMix = Mix
else:
    AnyMix = any_method(mix_model, MIX)


def check_mix(mix: Mix, fmt: str | None, evict: Any | None, read: Any | None) -> None:
    """PydanticCustomError where other parts of a plan's `kv` do not go with a mix; `evict` is an `Evict`."""
    choice, at, why = mix.choice, "mix", None
    if fmt is not None:
        at, why = "format", "the format of important tokens is `mix.format`; leave this out"
    elif choice is None and evict is None:
        why = f"'{mix.policy}' holds at fewer bits what `kv.evict` would drop, and there is none"
    elif choice is not None and evict is not None:
        why = f"'{mix.policy}' chooses tokens itself; 'mikv' mixes formats by what `kv.evict` would drop"
    elif read is not None:
        why = f"`kv.read` reads pages of one format, and lanes of '{mix.policy}' hold two"
    elif evict is not None:
        if evict.merge is not None:
            why = "`kv.evict.merge` merges tokens that are dropped, and with `kv.mix` none are"
        elif evict.is_compact:
            why = "compact positions close the gaps of dropped tokens, and with `kv.mix` none are"
        elif isinstance(eviction_policy(evict.policy), StagedPolicy):
            why = f"'{evict.policy}' spares higher layers what it drops, so there is nothing to hold at fewer bits"
    if why is not None:
        raise PydanticCustomError("combination", "{why}", {"at": at, "why": why})


def mix_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `kv.mix` for each method, by name."""
    return schemas(mix_model, MIX)
