"""Compensation token: what a head gives up becomes one token (RazorAttention, Tang et al., 2024, arXiv:2407.15891).

    k_c = Σ n_e k_e / N,  v_c = Σ n_e v_e / N,  N = Σ n_e        over the tokens e given up; e stands for n_e tokens

and the compensation token weighs N tokens in attention: log N is added to its score.

Where we depart: the paper adds the token to the cache. Here it takes the place, and the position, of the oldest kept
token behind the sinks, which it takes in as well, so that a lane keeps what its budget says. At a later eviction it is
merged on with its weight.
"""

from __future__ import annotations

from winnow.engine.compression.merge import MergeView, Survivors, rows
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.signals import Signal


class Compensation:
    """Average all evicted tokens of a head into one, which weighs as many as it stands for."""

    signals: frozenset[Signal] = frozenset()

    class Params(PolicyParams):
        pass

    def merge(self, view: MergeView, params: Params) -> Survivors:
        lost, lost_count = view.given_up
        keys, values = rows(view.keys, view.keep), rows(view.values, view.keep)
        log_weights = rows(view.log_weights, view.keep)
        weights = log_weights.exp()
        lane = view.count.new_ones(keys.shape[1]).cumsum(0) - 1
        carrier = (view.count - 1).clamp_max(view.sinks).unsqueeze(-1)
        is_carrier = (lane == carrier) & (lost_count > 0).unsqueeze(-1)
        is_lost = lost >= 0
        to = carrier.expand_as(lost).masked_fill(~is_lost, -1).int()
        lost_weights = rows(view.log_weights, lost).exp()
        merged = []
        for kept, given in ((keys, view.keys), (values, view.values)):
            sums, totals = view.ops.sum_rows(rows(given, lost), lost_weights, to, keys.shape[1])
            mean = (weights.unsqueeze(-1) * kept + sums) / (weights + totals).unsqueeze(-1)
            merged.append(mean.where(is_carrier.unsqueeze(-1), kept))
        return Survivors(merged[0], merged[1], (weights + totals).log().where(is_carrier, log_weights))
