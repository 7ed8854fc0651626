"""How the attention of the queries that vote is counted into a lane's mass.

    row at position p    τ = temperature + heating·max(0, p - warm_from)
                         P = softmax over the tokens seen of (scale·q·K + noise) / τ
    "sum"                mass[j] = decay·mass[j] + Σ P[j]  over the query heads of the lane's group
    "max"                mass[j] = max(mass[j], P[j]...)   over the same

A sum that has faded below 2^-100 is zero: what is smaller still is slow to compute with and orders nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FAINT = 2.0**-100


@dataclass(frozen=True, slots=True)
class Vote:
    """One sequence's rule; the default sums up plain attention."""

    reduce: Literal["sum", "max"] = "sum"
    decay: float = 1.0
    """In (0, 1]: what the mass of earlier rows is multiplied by, row by row"""
    temperature: float = 1.0
    heating: float = 0.0
    """Added to the temperature for each position beyond `warm_from`"""
    warm_from: int = 0
    is_noisy: bool = False
    """Adds noise to the logits: `PagedKV.noise`, a number for each token of a lane"""

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or self.temperature <= 0 or self.heating < 0:
            raise ValueError(f"{self} is no rule: decay in (0, 1], temperature above 0, heating from 0 on")
        if self.reduce == "max" and self.decay != 1:
            raise ValueError("a maximum does not fade")

    @property
    def is_attention(self) -> bool:
        """P is what attention itself uses."""
        return self.temperature == 1 and self.heating == 0 and not self.is_noisy
