"""A budget, as a plan writes it: a fraction of the tokens or a count of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_TOKENS = 10_000_000
"""Largest count in a plan; longer contexts do not exist."""


def _check_budget(value: Any) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise PydanticCustomError("budget", f"must be a fraction in (0, 1] or a count of tokens from 1 to {MAX_TOKENS}")


Budget = Annotated[
    int | float,
    PlainValidator(_check_budget),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
            ]
        }
    ),
]
"""A float in (0, 1] is a fraction of the tokens there are, an int a number of tokens: 1 is one token, 1.0 is all."""


def is_everything(budget: int | float) -> bool:
    return isinstance(budget, float) and budget == 1.0


def tokens_of(budget: int | float, total: int) -> int:
    """Tokens that a budget allows of `total`. A fraction is rounded down, as in kvpress, but to no less than one."""
    return max(1, int(total * budget) if isinstance(budget, float) else min(budget, total))
