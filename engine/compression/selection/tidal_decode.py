"""TidalDecode: choose tokens in two layers, read the same ones in the others (Yang et al., 2024, arXiv:2410.05076).

    layers before `dense_layers`               read everything
    layer `dense_layers`, and the corrector    read everything, and choose
    the other layers                           read what was chosen last, each lane what its own head chose

    score(token) = sum over the KV group's query heads of softmax(q·k)

Where we depart: the paper gives every query head tokens of its own; here the query heads of a group read one lane and
vote, with one head the choice is the paper's. The corrector, layer 9 or 13 of 32 there, is placed by depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.budget import Budget
from winnow.engine.compression.read_policy import LaneShape, Profile, ReadParams, all_channels, layer_modes

if TYPE_CHECKING:
    from winnow.kernels.reading import ReadRule


class TidalDecode:
    """Choose tokens by full attention in two layers, and read the same ones in the others."""

    shares_choices = True
    keeps_choices = False

    class Params(ReadParams):
        tokens: Budget = Field(256, description=ReadParams.model_fields["tokens"].description)
        dense_layers: int = Field(2, ge=0, le=1024, description="first layers, which only read everything")
        corrector: float = Field(
            0.4, gt=0, lt=1, description="depth of the layer that chooses again, as a fraction of the layers"
        )

    def rule(self, params: Params, shape: LaneShape, profile: Profile) -> ReadRule:
        from winnow.kernels.reading import ReadMode, ReadRule

        modes = layer_modes(shape, params.dense_layers, ReadMode.CHOSEN_BEFORE)
        corrector = max(params.dense_layers, int(params.corrector * shape.layers))
        for layer in (params.dense_layers, corrector):
            modes[layer : layer + 1] = ReadMode.ALL_AND_CHOOSE
        return ReadRule(
            modes=modes,
            tokens=params.count,
            share=params.share,
            sinks=params.sinks,
            recent=params.recent,
            channels=all_channels(shape),
        )
