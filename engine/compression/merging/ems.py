"""EMS' merging: the best of what is given up joins the nearest kept centre (Li et al., 2024, arXiv:2412.08521).

    centres     the kept tokens that are not protected
    candidates  of the tokens given up, the (`candidates` - 1) · |centres| of the highest scores; the rest is evicted
    a candidate goes to the centre c of the highest cosine of keys, or, below `threshold`, to the zero class, which
    drops it; a class becomes one token, with the scores s as weights:
        v_c = Σ s v / Σ s        k_c = (Σ s |k| / Σ s) · u / |u|,  u = Σ s k / |k|        over c and its candidates

so that merged keys point where their class points and are as long as its keys are on average.

Where we depart: the paper has no public code; a class whose scores are all zero, which it leaves open, stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.merge import MergeView, Survivors, rows
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8


class EMS:
    """Merge the best of the evicted tokens into the nearest kept ones, weighted by attention."""

    signals = frozenset({Signal.ATTENTION})

    class Params(PolicyParams):
        candidates: float = Field(4.0, ge=1, le=64, description="tokens kept or merged, as a multiple of those kept")
        threshold: float = Field(0.6, ge=0, le=1, description="least cosine of two keys that are merged")

    def merge(self, view: MergeView, params: Params) -> Survivors:
        lost, lost_count = view.given_up
        keys, values = rows(view.keys, view.keep), rows(view.values, view.keep)
        lost_keys, lost_values = rows(view.keys, lost), rows(view.values, lost)
        newest = view.count.clamp_max(view.recent)
        first = (view.count - newest).clamp_max(view.sinks)
        centres = view.count - newest - first
        lane = view.count.new_ones(keys.shape[1]).cumsum(0) - 1
        centre_keys = rows(keys, (first.unsqueeze(-1) + lane).clamp_max(keys.shape[1] - 1))
        nearest, cosine = view.ops.nearest_rows(lost_keys, lost_count, centre_keys, centres)

        scores = rows(view.scores, lost).masked_fill(lost < 0, -EPSILON)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        is_candidate = rank < (centres.double() * (params.candidates - 1)).floor().unsqueeze(-1)
        merges = (nearest >= 0) & (cosine >= params.threshold) & is_candidate
        to = (nearest + first.unsqueeze(-1)).masked_fill(~merges, -1).int()

        weights, kept_weights = scores.clamp_min(0), rows(view.scores, view.keep).clamp_min(0)
        lost_norms, norms = lost_keys.norm(dim=-1), keys.norm(dim=-1)
        pointing, totals = view.ops.sum_rows(_unit(lost_keys, lost_norms), weights, to, keys.shape[1])
        _, lengths = view.ops.sum_rows(lost_values, weights * lost_norms, to, keys.shape[1])
        added, _ = view.ops.sum_rows(lost_values, weights, to, keys.shape[1])
        takes_in = (totals > 0).unsqueeze(-1)
        total = (kept_weights + totals).unsqueeze(-1)
        own = kept_weights.unsqueeze(-1)
        direction = own * _unit(keys, norms) + pointing
        length = (own * norms.unsqueeze(-1) + lengths.unsqueeze(-1)) / total
        merged_keys = _unit(direction, direction.norm(dim=-1)) * length
        merged_values = (own * values + added) / total
        return Survivors(merged_keys.where(takes_in, keys), merged_values.where(takes_in, values))


def _unit(x: Tensor, norms: Tensor) -> Tensor:
    return x / norms.clamp_min(EPSILON).unsqueeze(-1)
