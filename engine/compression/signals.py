"""What an eviction policy must see of a sequence before it can score its tokens."""

from __future__ import annotations

from enum import StrEnum


class Signal(StrEnum):
    """A costly input of a policy; the engine gathers only what the plan's policy names.

    Positions and kept lengths are always there, so a policy that needs nothing else names no signal.
    """

    KEYS = "keys"
    """The keys as attention sees them: after RoPE, dequantized"""
    VALUES = "values"
    """The values, dequantized"""
    ATTENTION = "attention"
    """Softmax probability that each token received from the queries that vote"""
    QUERIES = "queries"
    """Mean and covariance of the queries that vote, before RoPE"""
