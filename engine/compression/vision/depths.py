"""Where in a language model policies drop tokens, and how many: papers' numbers, at other depths and budgets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from winnow.engine.compression.vision.policy import LayerView

PAPER_DEPTH = 32
"""Layers of LLaVA-1.5-7B's language model, whose layers papers name"""

MOST = 1024


@dataclass(frozen=True)
class Layers:
    """Annotates a list that names as many layers, ascending, from 1 on."""

    least: int = 1
    most: int = MOST

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        layer = {"type": "integer", "minimum": 1, "maximum": MOST}
        return {"type": "array", "items": layer, "minItems": self.least, "maxItems": self.most}

    def _checked(self, value: Any) -> list[int]:
        if isinstance(value, list) and self.least <= len(value) <= self.most:
            are_layers = all(isinstance(one, int) and not isinstance(one, bool) and 1 <= one <= MOST for one in value)
            if are_layers and all(one < other for one, other in pairwise(value)):
                return value
        count = f"{self.least}" if self.least == self.most else f"{self.least} or more"
        raise PydanticCustomError("layers", f"must be a list of {count} ascending layers from 1 to {MOST}")


def at_depth(paper: Iterable[int], depth: int, own: list[int] | None) -> list[int]:
    """The caller's `own` layers, or where in a model of `depth` those are that the paper names: all inside, so that in
    a shallow model several may come together."""
    if own is not None:
        return own
    return [min(max(1, round(layer * depth / PAPER_DEPTH)), max(1, depth - 1)) for layer in paper]


def exponents(paper: Iterable[float], patches: float) -> list[float]:
    """x_i, so that a share of keep ** x_i stays after choice i: of the shares that the paper keeps of so many patches,
    x_i = log share_i / log share_last. The last of them is `keep`, whatever it is."""
    shares = [log(tokens / patches) for tokens in paper]
    return [share / shares[-1] for share in shares]


def left_after(view: LayerView, exponent: float) -> int:
    """Patch tokens of which a choice is to leave a share of keep ** exponent: 1 in the end; where each of n choices
    leaves the same share of what it finds, (i + 1) / n after choice i."""
    return max(1, round(view.patches * (view.keep / view.patches) ** exponent))
