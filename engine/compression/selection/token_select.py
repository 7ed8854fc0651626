"""TokenSelect: all heads of a layer vote for the tokens to read (Wu et al., 2024, arXiv:2411.02886).

    score(token) = max over `pool` neighbours of  sum over the layer's query heads of softmax(q·k)

over the tokens between `sinks` and `recent`, which are read anyway. As long as a token's queries point where those of
the last choice did (cosine of all heads' queries at least `similarity`), that choice is read again, so that keys are
scored now and then only.

Where we depart: every layer may choose, prompts are read densely (the paper selects there too), and the softmax is that
of attention, with its scale, which the reference leaves out. The reference reads the prompt's last choice in a chunk;
here the first generated token chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.budget import MAX_TOKENS, Budget
from winnow.engine.compression.read_policy import LaneShape, Profile, ReadParams, all_channels, layer_modes

if TYPE_CHECKING:
    from winnow.kernels.reading import ReadRule


class TokenSelect:
    """Read the tokens that all heads of a layer together vote for, and keep the choice while the queries stay alike."""

    shares_choices = True
    keeps_choices = True

    class Params(ReadParams):
        tokens: Budget = Field(2048, description=ReadParams.model_fields["tokens"].description)
        sinks: int = Field(128, ge=0, le=MAX_TOKENS, description=ReadParams.model_fields["sinks"].description)
        recent: int = Field(512, ge=1, le=MAX_TOKENS, description=ReadParams.model_fields["recent"].description)
        dense_layers: int = Field(0, ge=0, le=1024, description="first layers, which read everything")
        pool: int = Field(1, ge=1, le=63, description="neighbours whose highest vote a token gets, itself too; odd")
        similarity: float = Field(
            0.9,
            ge=-1,
            le=1,
            description="least cosine of the queries to those of the last choice to read it again",
        )

        @field_validator("pool")
        @classmethod
        def _is_odd(cls, pool: int) -> int:
            if pool % 2 == 0:
                raise PydanticCustomError("odd", "must be odd")
            return pool

    def rule(self, params: Params, shape: LaneShape, profile: Profile) -> ReadRule:
        from winnow.kernels.reading import ReadMode, ReadRule

        return ReadRule(
            modes=layer_modes(shape, params.dense_layers, ReadMode.CHOSEN),
            tokens=params.count,
            share=params.share,
            sinks=params.sinks,
            recent=params.recent,
            channels=all_channels(shape),
            votes_by_layer=True,
            pool=params.pool,
            similarity=params.similarity,
        )
