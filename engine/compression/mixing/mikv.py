"""MiKV: what an eviction would drop is kept at a few bits (Yang et al., 2024, arXiv:2402.18096).

    important tokens: those that `kv.evict` keeps, at high precision       the others: at low precision

Any eviction policy chooses, with its budget, heads, layers and schedule. A token that it wants no longer moves down;
one that was stored at few bits does not come back up, since its bits are lost.

Where we depart: keys are quantized per channel here, not per token, so the paper's channel balancer
b = sqrt(max|q| / max|k|), which it multiplies keys and divides queries by, would change no code: a channel's scale and
zero absorb any factor of their channel.
"""

from __future__ import annotations

from winnow.engine.compression.policy import PolicyParams


class MiKV:
    """Store what `kv.evict` would drop in `rest`, and what it keeps in `format`."""

    format = None
    rest = None
    demotes = True

    class Params(PolicyParams):
        pass

    def choice(self, params: Params) -> None:
        return None
