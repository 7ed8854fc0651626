"""KV merging: a token that is given up is averaged into the kept token whose key is most like its own.

    to_e = argmax over kept t of cos(k_e, k_t)
    w_e  = cos(k_e, k_to) · |v_e| / (|v_e| + |v_to|)        if the cosine is at least `threshold`, which is not negative
    v_t  = (v_t + Σ w_e v_e) / (1 + Σ w_e)        over the tokens e that go to t; keys stay, and so does RoPE

The rule is that of kvpress' merging press, after ToMe (Bolya et al., 2023, arXiv:2210.09461) and D2O (Wan et al.,
2024, arXiv:2406.13035). With `proportional`, as in ToMe, a token that took others in weighs 1 + Σ w_e tokens in
attention from then on, and in later merges.

Where we depart: kvpress' `merge_fraction` takes a quantile of similarities in which tokens below the threshold count as
-inf; here the most similar `fraction` of the tokens that are given up are candidates, ties falling to the older one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.merge import MergeView, Survivors, rows
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-6


class KVMerging:
    """Average the values of evicted tokens into the kept tokens of the most similar keys."""

    signals: frozenset[Signal] = frozenset()

    class Params(PolicyParams):
        threshold: float = Field(0.0, ge=0, le=1, description="least cosine of two keys that are merged")
        fraction: float = Field(1.0, gt=0, le=1, description="most similar part of the evicted tokens that is merged")
        proportional: bool = Field(False, description="a merged token weighs as many in attention as it stands for")

    def merge(self, view: MergeView, params: Params) -> Survivors:
        lost, lost_count = view.given_up
        keys, values = rows(view.keys, view.keep), rows(view.values, view.keep)
        to, cosine = view.ops.nearest_rows(rows(view.keys, lost), lost_count, keys, view.count)
        merges = (to >= 0) & (cosine >= params.threshold) & _among_first(cosine, lost_count, params.fraction)
        norms, lost_values = values.norm(dim=-1), rows(view.values, lost)
        share = lost_values.norm(dim=-1)
        weights = cosine * share / (share + rows(norms, to.long()) + EPSILON)
        stood_for = rows(view.log_weights, view.keep).exp()
        weights = weights * rows(view.log_weights, lost).exp()
        sums, totals = view.ops.sum_rows(lost_values, weights, to.masked_fill(~merges, -1), keys.shape[1])
        mean = (stood_for.unsqueeze(-1) * values + sums) / (stood_for + totals).unsqueeze(-1)
        takes_in = totals > 0
        values = mean.where(takes_in.unsqueeze(-1), values)
        if not params.proportional:
            return Survivors(keys, values)
        return Survivors(keys, values, (stood_for + totals).log().where(takes_in, rows(view.log_weights, view.keep)))


def _among_first(cosine: Tensor, count: Tensor, fraction: float) -> Tensor:
    """[H, n] bool: whether a token is among the most similar `fraction`, rounded up, of its lane's `count`."""
    if fraction == 1.0:
        return cosine > -2
    rank = cosine.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < (count.double() * fraction).ceil().unsqueeze(-1)
