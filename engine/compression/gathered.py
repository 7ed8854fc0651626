"""What policies are shown where several processes share the heads: all of them (see engine/ranks.py)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from winnow.engine.compression.policy import LaneView, QueryMoments
from winnow.engine.ranks import Ranks


def gathered(view: LaneView, ranks: Ranks) -> LaneView:
    """The lanes of all heads of the same layers, padded to the longest."""
    if ranks.size == 1:
        return view
    tokens = ranks.most(view.positions.shape[-1])

    def whole(side: Tensor | None, padding: float = 0.0) -> Tensor | None:
        if side is None:
            return None
        missing = tokens - side.shape[2]
        room = (0, missing) if side.dim() == 3 else (0, 0, 0, missing)
        return ranks.gather(pad(side, room, value=padding), 1)

    positions = whole(view.positions, -1)
    assert positions is not None
    queries = view.queries
    return replace(
        view,
        positions=positions,
        kept=ranks.gather(view.kept, 1),
        keys=whole(view.keys),
        values=whole(view.values),
        mass=whole(view.mass),
        newest_mass=whole(view.newest_mass),
        queries=queries and QueryMoments(ranks.gather(queries.mean, 1), ranks.gather(queries.covariance, 1)),
    )
