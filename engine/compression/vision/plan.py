"""The plan's part `vision`: {"policy": "div_prune", "keep": 64, "positions": "original"}."""

from __future__ import annotations

import json
from functools import cache, cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.budget import Budget, is_everything
from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.policy import MergesLayers, PolicyParams, StagedPolicy
from winnow.engine.compression.registry import eviction_policy, mix_method, read_policy
from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.policy import (
    Choice,
    Kind,
    LayerPolicy,
    LayerView,
    RatedPolicy,
    TokenPolicy,
    View,
    stages_of,
    whole,
)
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import PlanNotSupported

if TYPE_CHECKING:
    from torch import Tensor


class Vision(PolicyParams):
    """The knobs that all vision policies have. An instance is of `vision_model(policy)` and is itself the `params` of
    the policy's methods."""

    policy: str
    keep: Budget = Field(
        description="what stays of each image: a fraction (0.25) of its patch tokens, or a count (64); what the model "
        "reads of it, or where the policy acts only within the model, what the last layers read"
    )
    positions: Literal["original", "contiguous"] = Field(
        "original", description="the tokens that stay keep their positions in the whole prompt, or are counted anew"
    )

    @property
    def keeps_all(self) -> bool:
        """Whether no image is pruned, whatever its size."""
        return is_everything(self.keep)

    def tokens(self, patches: int) -> int:
        """How many patch tokens stay of so many."""
        if isinstance(self.keep, float):
            return max(1, round(self.keep * patches))
        return min(self.keep, patches)

    @property
    def stages(self) -> tuple[str, ...]:
        """Keys of `policy.STAGES`"""
        return stages_of(vision_policy(self.policy))

    @property
    def shrinks_prompts(self) -> bool:
        """Whether it leaves fewer tokens for the language model's first layer to read."""
        return not {"encoder", "pre_llm"}.isdisjoint(self.stages)

    @property
    def reads_text(self) -> bool:
        """Whether what stays depends on the text that an image came with."""
        return vision_policy(self.policy).reads_text

    @property
    def kinds(self) -> frozenset[Kind]:
        """What the policy prunes."""
        return vision_policy(self.policy).kinds

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, equal for plans that leave the same of an image, at whatever positions."""
        canonical = json.dumps(self.model_dump(exclude={"positions"}), sort_keys=True, separators=(",", ":"))
        return sha256(canonical.encode()).hexdigest()[:32]

    def view(self, image: Features, text: Tensor, seed: int) -> View:
        """What the language model is to be shown of an image: all of it, if the policy acts at other stages alone.

        Args
            text [t, hidden] float32: embeddings of the text that it came with; empty unless `reads_text`
            seed 64 bits that stand for the image
        Raises
            RequestError: the policy cannot prune an image of this layout
        """
        policy, patches = vision_policy(self.policy), len(image.patches)
        keep = self.tokens(patches)
        if keep >= patches or not isinstance(policy, TokenPolicy):
            return whole(image)
        return policy.view(image, keep, text, seed, self)

    @property
    def truncates(self) -> bool:
        """`LayerPolicy.truncates`; False for policies that do nothing within the language model."""
        policy = vision_policy(self.policy)
        return isinstance(policy, LayerPolicy) and policy.truncates

    def choices(self, depth: int) -> dict[int, int]:
        """By how many layers are below it, ascending, which of the policy's choices come in a model of this depth; none
        if it does nothing within the language model. PlanNotSupported if the model is not that deep."""
        policy = vision_policy(self.policy)
        if not isinstance(policy, LayerPolicy):
            return {}
        choices = {below: choice for choice, below in enumerate(policy.layers(self, depth))}
        if not 1 <= min(choices) <= max(choices) < depth:
            path = "compression.vision.layers"
            why = f"'{self.policy}' drops tokens before one of the model's layers 1 to {depth - 1}"
            raise PlanNotSupported(path, f"{path}: {why}, not before {max(choices)}")
        return choices

    @property
    def asks_raters(self) -> bool:
        """Whether the policy goes by what tokens of text attend to within the language model."""
        return isinstance(vision_policy(self.policy), RatedPolicy)

    def raters(self, image: Tensor, text: Tensor) -> Tensor:
        """`RatedPolicy.raters`"""
        policy = vision_policy(self.policy)
        assert isinstance(policy, RatedPolicy)
        return policy.raters(image, text, self)

    def choose(self, view: LayerView) -> Choice:
        """`LayerPolicy.choose`"""
        policy = vision_policy(self.policy)
        assert isinstance(policy, LayerPolicy)
        return policy.choose(view, self)

    @model_validator(mode="after")
    def _positions_are_used(self) -> Self:
        if self.stages == ("llm_layer",) and self.positions != "original":
            why = "has no effect: '{policy}' drops tokens between layers, where those that stay keep their positions"
            raise PydanticCustomError("unused", why, {"at": "positions", "policy": self.policy})
        return self


@cache
def vision_model(name: str) -> type[Vision]:
    """The model of `vision` for one policy: common knobs and its own, which therefore may not share a name."""
    return method_model(Vision, name, vision_policy(name))


if TYPE_CHECKING:
    AnyVision = Vision
else:
    AnyVision = any_method(vision_model, VISION)


def check_vision(vision: Vision, kv: Any) -> None:
    """PydanticCustomError where other parts of a plan, its `kv`, do not go with what happens between layers."""
    evict, mix, why = kv.evict, kv.mix, None
    if "llm_layer" not in vision.stages:
        return
    if kv.scope is not None:
        why = "reads a prompt as a whole, and with `kv.scope` a document is compressed before the rest is read"
    elif evict is not None and isinstance(eviction_policy(evict.policy), StagedPolicy):
        why = f"drops tokens between layers, and so does '{evict.policy}' of `kv.evict`"
    elif evict is not None and evict.is_compact:
        why = "leaves lanes of different lengths, and compact positions of `kv.evict` need them equal"
    elif mix is not None and isinstance(mix_method(mix.policy), MergesLayers):
        why = f"leaves less to some layers than to others, and '{mix.policy}' merges tokens of two layers"
    elif kv.read is not None and read_policy(kv.read.policy).shares_choices:
        why = f"leaves less to some layers than to others, and '{kv.read.policy}' reads the same tokens in several"
    if why is not None:
        raise PydanticCustomError("combination", "{why}", {"at": "vision", "why": f"'{vision.policy}' {why}"})


def vision_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `vision` for each policy, by name."""
    return schemas(vision_model, VISION)
