"""What a read policy is: it makes the rule by which a sequence's generated tokens choose what they read.

Nothing is evicted: the lanes keep every token, and decode attention reads some. Prompts are read densely. Policies
import torch where they make a rule only, since the server reads their knobs and must not load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from winnow.engine.compression.budget import MAX_TOKENS, Budget
from winnow.engine.compression.policy import PolicyParams

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.kernels.reading import ReadMode, ReadRule


Profile = Mapping[str, "Tensor"]
"""Tensors by name, as the method's calibrator makes them"""


@dataclass(frozen=True)
class LaneShape:
    """The lanes of a model."""

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int


class ReadParams(PolicyParams):
    """The knobs that all read policies have, each with defaults of its own.

    Papers without `sinks` and `recent` were tried on larger models. Small ones lose more without: on real text after
    2048 tokens quest is 0.25 nats from the uncompressed model with 256 tokens, 0.06 with 192 and these beside them.
    """

    tokens: Budget = Field(
        512, description="tokens that each lane reads by their score: a count, or a fraction (0.06) of those it holds"
    )
    sinks: int = Field(4, ge=0, le=MAX_TOKENS, description="first tokens that are always read, beside `tokens`")
    recent: int = Field(64, ge=1, le=MAX_TOKENS, description="newest tokens that are always read, beside `tokens`")
    dense_layers: int = Field(2, ge=0, le=1024, description="first layers, which read everything")

    @property
    def count(self) -> int:
        """`ReadRule.tokens`"""
        return self.tokens if isinstance(self.tokens, int) else 1

    @property
    def share(self) -> float:
        """`ReadRule.share`"""
        return self.tokens if isinstance(self.tokens, float) else 0.0


class ReadPolicy(Protocol):
    """One named method. Stateless; the registry makes one instance for the process."""

    Params: ClassVar[type[ReadParams]]
    """The method's knobs: the request's `read` object"""

    shares_choices: ClassVar[bool]
    """Several lanes read what one of them chose: they must hold the same tokens, so that nothing may be evicted"""

    keeps_choices: ClassVar[bool]
    """A row may take over what an earlier one chose: no token may be read on trial"""

    def rule(self, params: Any, shape: LaneShape, profile: Profile) -> ReadRule:
        """How rows choose, for lanes of this shape.

        `profile`: what calibration found out about the model for this method; empty where it needs none.
        """


def layer_modes(shape: LaneShape, dense_layers: int, mode: ReadMode) -> Tensor:
    """[layers] uint8: the first layers read all, the others do as `mode` says."""
    import torch

    modes = torch.full((shape.layers,), int(mode), dtype=torch.uint8)
    modes[:dense_layers] = 0
    return modes


def all_channels(shape: LaneShape) -> Tensor:
    """[layers, kv_heads, head_dim] int32: candidates are judged by whole keys."""
    import torch

    channels = torch.arange(shape.head_dim, dtype=torch.int32)
    return channels.expand(shape.layers, shape.kv_heads, shape.head_dim).contiguous()
