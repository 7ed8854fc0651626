"""Double Sparsity: find tokens by a few heavy channels, read these tokens whole (Yang et al., 2024, arXiv:2408.07092).

    score(token) = sum over the KV group's query heads of softmax( q·k over the lane's heaviest channels )

Which channels are heavy is measured once for each model, offline: the mean of |q_c · k_c| over a text
(`winnow calibrate --method double_sparsity`). The first two layers read everything, as in the paper.

Pages hold keys channel by channel, so that the heavy channels of a lane are read where they lie: the paper's label
cache, a copy of them beside the keys, is not needed, and no bytes are kept for this method.

Where we depart: the query heads of a group read one lane, share its channels and vote; with one head the order of
tokens is the paper's. The token itself is always read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.budget import Budget
from winnow.engine.compression.read_policy import LaneShape, Profile, ReadParams, layer_modes

if TYPE_CHECKING:
    from winnow.kernels.reading import ReadRule


class DoubleSparsity:
    """Find tokens by the heaviest channels of their keys, which a profile of the model names, and read them."""

    shares_choices = False
    keeps_choices = False

    class Params(ReadParams):
        tokens: Budget = Field(0.0625, description=ReadParams.model_fields["tokens"].description)
        channels: float = Field(0.25, gt=0, le=1, description="fraction of the channels that tokens are found by")

    def rule(self, params: Params, shape: LaneShape, profile: Profile) -> ReadRule:
        import torch

        from winnow.kernels.reading import ReadMode, ReadRule

        count = max(1, round(params.channels * shape.head_dim))
        # In their own order: as they lie in the page.
        heaviest = profile["channels"][..., :count].to(torch.int32).sort(-1).values
        return ReadRule(
            modes=layer_modes(shape, params.dense_layers, ReadMode.CHOSEN),
            tokens=params.count,
            share=params.share,
            sinks=params.sinks,
            recent=params.recent,
            channels=heaviest.contiguous(),
        )
