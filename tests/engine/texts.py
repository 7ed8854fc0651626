"""Real text for prompts: what torch, whose version is pinned, says of itself."""

from __future__ import annotations

import inspect
from functools import cache

import torch

from winnow.engine.models.tokenizer import load_tokenizer


@cache
def _tokens() -> list[int]:
    parts = [torch.nn.MultiheadAttention, torch.nn.CTCLoss, torch.optim.Adam, torch.einsum, torch.Tensor.scatter_]
    text = "\n\n".join(inspect.getdoc(part) or "" for part in parts)
    return load_tokenizer("default").encode(text, add_special_tokens=False)


def tokens_of_text(length: int, start: int = 0) -> list[int]:
    """`length` tokens of the default model, from place `start` of the text."""
    tokens = _tokens()[start : start + length]
    assert len(tokens) == length, f"the text ends after {len(_tokens())} tokens"
    return tokens
