"""The plan's part `vision`: {"policy": "div_prune", "keep": 64, "positions": "original"}."""

from __future__ import annotations

import json
from functools import cache, cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.engine.compression.budget import Budget, is_everything
from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.policy import Kind, TokenPolicy, View, stages_of, whole
from winnow.engine.compression.vision.registry import VISION, vision_policy

if TYPE_CHECKING:
    from torch import Tensor


class Vision(PolicyParams):
    """The knobs that all vision policies have. An instance is of `vision_model(policy)` and is itself the `params` of
    the policy's methods."""

    policy: str
    keep: Budget = Field(description="what stays of each image: a fraction (0.25) of its patch tokens, or a count (64)")
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


@cache
def vision_model(name: str) -> type[Vision]:
    """The model of `vision` for one policy: common knobs and its own, which therefore may not share a name."""
    return method_model(Vision, name, vision_policy(name))


if TYPE_CHECKING:
    AnyVision = Vision
else:
    AnyVision = any_method(vision_model, VISION)


def vision_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `vision` for each policy, by name."""
    return schemas(vision_model, VISION)
