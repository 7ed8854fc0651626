"""Quest: read the pages whose keys could matter to the query (Tang et al., 2024, arXiv:2406.10774).

    bound(page) = sum over channels of max(q · least key, q · greatest key)  >=  q·k  for every key of the page
    score(page) = sum over the KV group's query heads of softmax over the pages of bound

The pages of the highest scores are read whole, until they hold `tokens` tokens, and the page being written always is.
The first two layers read everything, as in the paper.

What is kept for it: the least and greatest key of every page in a float format, in bf16 rounded outward (4 bytes a
channel: 1/32 of a page of 16 f32 tokens). Pages in int8, int4 and int2 carry them in their scales already.

Where we depart: the paper's lanes have one query head. Here the query heads of a group read one lane, and each votes by
its softmax, so that none outweighs the others by the size of its logits; with one head the order of pages is the
paper's. Pages of the first and newest tokens are read too (`sinks`, `recent`). The paper's code rounds the budget down
to pages and reads three at least; here the last page may exceed the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.read_policy import LaneShape, Profile, ReadParams, layer_modes

if TYPE_CHECKING:
    from winnow.kernels.reading import ReadRule


class Quest:
    """Read the pages that a bound on their keys says may matter to the query."""

    shares_choices = False
    keeps_choices = False

    class Params(ReadParams):
        pass

    def rule(self, params: Params, shape: LaneShape, profile: Profile) -> ReadRule:
        from winnow.kernels.reading import ReadMode, ReadRule

        return ReadRule(
            modes=layer_modes(shape, params.dense_layers, ReadMode.CHOSEN),
            tokens=params.count,
            share=params.share,
            sinks=params.sinks,
            recent=params.recent,
        )
