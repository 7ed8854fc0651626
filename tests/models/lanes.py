"""Running a decoder without the engine: every sequence has a slot, and its lanes have sequential pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from winnow.engine.models.config import ModelConfig
from winnow.engine.models.decoder import Decoder
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageLayout


class Lanes:
    """Pages for `slots` sequences of up to `capacity` tokens."""

    def __init__(self, config: ModelConfig, slots: int = 1, capacity: int = 64, page_tokens: int = 16):
        layout = PageLayout(config.head_dim, page_tokens=page_tokens)
        lanes = (slots, config.layers, config.kv_heads)
        width = layout.pages(capacity)
        pages = slots * config.layers * config.kv_heads * width
        self.kv = PagedKV.allocate(layout, pages, *lanes, width)
        self.kv.table.copy_(torch.arange(pages, dtype=torch.int32).view(*lanes, width))
        self.lengths = [0] * slots

    def step(self, decoder: Decoder, chunks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """One step with new tokens of some sequences: slot -> their logits [tokens, vocab]."""
        sizes = [len(tokens) for tokens in chunks.values()]
        starts = [self.lengths[slot] for slot in chunks]
        for slot, tokens in chunks.items():
            self.lengths[slot] += len(tokens)
            self.kv.kept[slot] += len(tokens)
        batch = LaneBatch(
            slots=torch.tensor(list(chunks), dtype=torch.int32),
            cu_rows=torch.tensor([0, *sizes]).cumsum(0).int(),
            positions=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]).int(),
            first_vote=torch.tensor(sizes, dtype=torch.int32),
        )
        flat = torch.tensor([token for tokens in chunks.values() for token in tokens], dtype=torch.int32)
        logits = decoder.forward(flat, batch, self.kv, torch.arange(len(flat)))
        return dict(zip(chunks, logits.split(sizes), strict=True))


def prefill(decoder: Decoder, prompt: Sequence[int], chunks: Sequence[int] = ()) -> Tensor:
    """Logits [tokens, vocab] of a prompt, in one step or cut into chunks of these sizes and then single tokens."""
    lanes = Lanes(decoder.config, capacity=len(prompt))
    sizes = [*chunks, *[1] * (len(prompt) - sum(chunks))] if chunks else [len(prompt)]
    parts = torch.tensor(prompt).split(sizes)
    return torch.cat([lanes.step(decoder, {0: part.tolist()})[0] for part in parts])


def greedy(decoder: Decoder, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest continuation of a prompt, one token a step."""
    lanes = Lanes(decoder.config, capacity=len(prompt) + tokens)
    new: Sequence[int] = prompt
    out: list[int] = []
    while len(out) < tokens:
        new = [int(lanes.step(decoder, {0: new})[0][-1].argmax())]
        out += new
    return out
